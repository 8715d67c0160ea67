"""Nothing that a checkpoint holds could be left out: each part makes its difference.

A loop of one's own, with dropout, BatchNorm, a loss scale, a method that remembers, a
skipped step, an average of the weights and random numbers from PyTorch's generator, is
stopped and goes on from a file. With the whole file it ends where it would have, to the
bit; with any one part replaced by what a fresh start has, it does not.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import samfn

STEPS, STOP = 9, 5
METHOD = samfn.loss_scaled(samfn.every(samfn.friendly_sam(), 3), interval=4)
OPTIMIZER = samfn.clipped(
    samfn.grouped(
        samfn.adamw(amsgrad=True), (["0.bias", "4.bias"], samfn.sgd(0.5, nesterov=True))
    ),
    1.0,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def start(model):
    state = samfn.init(*samfn.split(model), optimizer=OPTIMIZER, method=METHOD)
    return state, dict(state.params), 0


def go_on(model, state, average, start, until):
    """Train, on data that are a function of the position, with noise that is not."""
    loss_fn = samfn.supervised(model, F.cross_entropy)
    common = {"loss_fn": loss_fn, "optimizer": OPTIMIZER, "method": METHOD}
    for position in range(start, until):
        source = torch.Generator().manual_seed(position)
        inputs = torch.randn(16, 4, generator=source) + 0.1 * torch.randn(16, 4)
        targets = torch.randint(3, (16,), generator=source)
        if position in (STOP - 2, STOP - 1):  # They are skipped, and halve the scale.
            inputs = inputs * float("nan")
        lr = 0.05 * 0.9 ** int(state.step)
        state, _ = samfn.sam_update(state, (inputs, targets), **common, rho=0.1, lr=lr)
        average = samfn.tree.add_scaled(
            {name: 0.9 * w for name, w in average.items()}, 0.1, state.params
        )
    return state, average, until


def end(model, *where):
    torch.manual_seed(7) if where[2] == 0 else None
    return named(*go_on(model, *where, STEPS)[:2])


def saved(path):
    """Stop in the middle, and leave a file."""
    model = network()
    torch.manual_seed(7)
    state, average, position = go_on(model, *start(model), STOP)
    samfn.save(path, state, average=average, position=position, random=samfn.random_state())
    torch.manual_seed(123)


def resumed(path):
    model = network()
    state, metadata = samfn.restore(path, like=start(model)[0])
    samfn.set_random_state(metadata["random"])
    return model, state, metadata["average"], metadata["position"]


def named(state, average):
    """Return all tensors, in the order of their names."""
    tree = {**state._asdict(), "average": average}
    flat, _ = pytree.tree_flatten_with_path(tree)
    return [leaf for _, leaf in sorted(flat, key=lambda pair: str(pair[0]))]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_loop_goes_on_bit_for_bit(tmp_path):
    saved(tmp_path / "file")
    assert equal(end(*resumed(tmp_path / "file")), end(network(), *start(network())))


PARTS = [*samfn.TrainState._fields, "average", "position", "random"]


@pytest.mark.parametrize("part", PARTS)
def test_with_one_part_left_out_it_ends_elsewhere(tmp_path, part):
    saved(tmp_path / "file")
    model, state, average, position = resumed(tmp_path / "file")
    fresh, fresh_average, _ = start(network())
    if part == "average":
        average = fresh_average
    elif part == "position":
        position = 0
    elif part == "random":
        torch.manual_seed(123)
    else:
        state = state._replace(**{part: getattr(fresh, part)})
    found = named(*go_on(model, state, average, position, STEPS)[:2])
    assert not equal(found, end(network(), *start(network()))), part


def test_each_part_of_the_methods_memory_counts(tmp_path):
    saved(tmp_path / "file")
    expected = end(network(), *start(network()))
    keys = [*resumed(tmp_path / "file")[1].method_state]
    assert len(keys) >= 3
    for key in keys:
        model, state, average, position = resumed(tmp_path / "file")
        fresh = start(network())[0].method_state[key]
        memory = {**state.method_state, key: fresh}
        state = state._replace(method_state=memory)
        found = named(*go_on(model, state, average, position, STEPS)[:2])
        assert not equal(found, expected), key


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_it_may_stop_after_any_step(tmp_path, stop):
    path, model = tmp_path / "file", network()
    torch.manual_seed(7)
    state, average, position = go_on(model, *start(model), stop)
    random = samfn.random_state()
    samfn.save(path, state, average=average, position=position, random=random)
    found = end(*resumed(path))
    assert equal(found, end(network(), *start(network())))
