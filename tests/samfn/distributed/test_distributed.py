"""Several ranks take the step of one process, and say which; they never drift apart."""

import functools
import itertools
import math
import os
import signal
import time
from collections import Counter
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import samfn
from recipes.settings.method_expression import MAKERS
from samfn import distributed, tree
from samfn.compiled import operations
from tests.ranks import Sent, on_ranks
from tests.reference import NextToken, methods_by_default, tokens

ROWS, STEPS = 16, 3


def other(params, buffers, batch):
    """Return another loss of the batch, of the last layer of `network` alone."""
    features = batch[0].flatten(1)[:, : 4 * 36]
    return F.linear(features, params["4.weight"], params["4.bias"]).cos().mean()


# On several ranks, these choose among each rank's own examples.
ALONE = {
    "esam": samfn.esam(beta=1),
    "sub_batch_ascent": samfn.sub_batch_ascent(samfn.sam(), 0.5),
    "accumulated": samfn.accumulated(samfn.sam(), 2, statistics="averaged"),
    "per_micro_batch": samfn.per_micro_batch(samfn.sam(), 2, statistics="averaged"),
}
DRAWING = {
    "esam": samfn.esam(0.5, 1.0),
    "esam, tensors": samfn.esam(0.5, 1.0, draws="tensors"),
    "rwp": samfn.rwp(),
}
METHODS = {
    **{
        name: method
        for name, method in methods_by_default().items()
        if name not in {**ALONE, **DRAWING}
    },
    "preconditioned": samfn.functional_sam(samfn.preconditioned()),
    "looksam": samfn.looksam(2),
    "ae_sam": samfn.ae_sam(2 * STEPS),
    "every": samfn.every(samfn.sam(), 2),
    "on_parameters": samfn.on_parameters(samfn.sam(), "*.weight"),
    "loss_scaled": samfn.loss_scaled(samfn.sam()),
    "same_randomness": samfn.same_randomness(samfn.sam()),
    "ascent_on": samfn.ascent_on(samfn.sam(), other),
    "on_loss": samfn.on_loss(samfn.sam(), other),
}
PLACEMENTS = {2: ["replica", "global"], 4: ["replica", "group:2", "global"]}
SHARDED = [
    *("sam", "asam", "gsam", "looksam", "friendly_sam", "fisher_sam", "wsam"),
    *("on_parameters", "loss_scaled"),
]


criterion = nn.CrossEntropyLoss(reduction="none")


def network(batch_norm):
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(3, 4, 3, bias=not batch_norm),
        nn.BatchNorm2d(4) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def batch_of(step, rows=ROWS):
    source = torch.Generator().manual_seed(step)
    images = torch.randn(rows, 3, 8, 8, generator=source)
    return images, torch.randint(0, 5, (rows,), generator=source)


def own(batch):
    rank, size = distributed.rank(), distributed.size()
    return tuple(part.tensor_split(size)[rank] for part in batch)


def placed(method, placement, params):
    """Return the method and the parameters on all ranks."""
    if placement == "sharded":
        return method, distributed.shard(params)
    return distributed.placed(method, placement), params


def optimizer_of(name):
    """Return one that clips, but for wsam, which it would not bound."""
    plain = samfn.sgd(0.9, weight_decay=1e-3)
    return plain if name == "wsam" else samfn.clipped(plain, 2.0)


def train(method, *, batch_norm=True, placement=None, rows=ROWS, steps=STEPS, **how):
    """Train a small network; return what came of it, the same on every rank."""
    model = how.pop("model", None) or network(batch_norm)
    params, buffers = samfn.split(model)
    optimizer = how.pop("optimizer", optimizer_of("others"))
    given = {
        "loss_fn": samfn.supervised(
            model, how.pop("criterion", criterion), dtype=how.pop("dtype", None)
        ),
        "optimizer": optimizer,
        "method": method,
    }
    if placement:
        given["method"], params = placed(method, placement, params)
    state = samfn.init(params, buffers, optimizer=optimizer, method=method)
    update = functools.partial(samfn.sam_update, **given)
    if backend := how.pop("backend", None):
        update = samfn.compile_update(**given, plan="whole", backend=backend)
    seen = []
    for step in range(steps):
        batch = batch_of(step, rows)
        state, metrics = update(state, own(batch) if placement else batch, rho=0.05, lr=0.1)
        seen.append(metrics._replace(outputs=None, layers=None))
        if placement:
            distributed.require_alike(metrics._replace(outputs=None, layers=None))
        if placement and placement != "sharded":
            distributed.require_alike(state)
    if placement:
        state = distributed.gather(state)
        distributed.require_alike(state)
    return state, seen, getattr(update, "plan", None)


def difference(found, expected):
    """Return the largest relative difference of a tensor."""
    return max(
        float((found[name].double() - leaf.double()).norm() / leaf.double().norm())
        for name, leaf in expected.items()
    )


def train_all(placement):
    """On a rank: train with every method."""
    found = {}
    for name, method in METHODS.items():
        for batch_norm in (True, False):
            how = {"batch_norm": batch_norm, "optimizer": optimizer_of(name)}
            found[name, batch_norm] = train(method, placement=placement, **how)[:2]
    return found


@functools.cache
def trained(count, placement):
    return on_ranks(count, train_all, placement)


def on_one(method, m, placement, ranks):
    """Return the method that is on one process what it is on all ranks."""
    _, _, group = placement.partition(":")
    sharing = {"replica": 1, "global": ranks}.get(placement) or int(group)
    together = samfn.accumulated(method, m, statistics="averaged")
    inner = method if sharing == 1 else together
    return samfn.per_micro_batch(inner, sharing * m, statistics="averaged")


CASES = [(count, placement) for count, names in PLACEMENTS.items() for placement in names]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("count", "placement"), CASES)
def test_ranks_take_the_step_of_one_process(count, placement, name, batch_norm):
    (state, seen), *_ = [found[name, batch_norm] for found in trained(count, placement)]
    method = on_one(METHODS[name], ROWS // count, placement, count)
    how = {"batch_norm": batch_norm, "optimizer": optimizer_of(name)}
    expected, metrics, _ = train(method, **how)
    assert difference(state.params, expected.params) < 1e-6
    floating = {n: b for n, b in expected.buffers.items() if b.is_floating_point()}
    if batch_norm:
        assert difference(state.buffers, floating) < 1e-6
    for found, wanted in zip(seen, metrics, strict=True):
        for field in ("loss", "perturbed_loss", "perturbation_norm", "descent_norm"):
            left, right = (float(getattr(one, field)) for one in (found, wanted))
            assert math.isclose(left, right, rel_tol=2e-6, abs_tol=1e-7), field


IGNORING = nn.CrossEntropyLoss(ignore_index=0)  # a fifth, and not as many on each rank
REMEMBERING = {
    "sam": samfn.sam(),
    "vasso": samfn.vasso(),
    "looksam": samfn.looksam(2),
    "momentum_sam": samfn.momentum_sam(),
}


def train_ignoring(placement=None):
    """Train with targets that are ignored, on a rank or as all ranks do."""
    found = {}
    for name, method in REMEMBERING.items():
        here = method if placement else on_one(method, ROWS // 2, "replica", 2)
        found[name] = train(here, placement=placement, criterion=IGNORING)[0]
    return found


def test_replicas_weigh_by_what_counts_as_parts_of_one_process_do():
    found, _ = on_ranks(2, train_ignoring, "replica")
    for name, expected in train_ignoring().items():
        assert difference(found[name].params, expected.params) < 1e-6, name
        floating = {n: b for n, b in expected.buffers.items() if b.is_floating_point()}
        assert difference(found[name].buffers, floating) < 1e-6, name


def train_by_draws(placement=None, count=1):
    """Train with every method that draws; `network` seeds all ranks alike."""
    found = {}
    for name, method in DRAWING.items():
        here = method if placement else on_one(method, ROWS // count, "global", count)
        found[name] = train(here, placement=placement, batch_norm=False)[0].params
    return found


def test_every_method_is_tried_on_ranks():
    assert MAKERS.keys() <= {*METHODS, *ALONE, *DRAWING}


def test_what_is_drawn_is_shared_by_ranks_of_one_seed():
    plain = train(samfn.sam(), batch_norm=False)[0].params
    found = on_ranks(2, train_by_draws, "global")[0]
    for name, params in train_by_draws(count=2).items():
        assert difference(found[name], params) < 1e-6, name
        assert difference(params, plain) > 1e-4, name


def train_alone():
    return {
        name: train(method, placement="replica")[0].params for name, method in ALONE.items()
    }


def test_what_chooses_examples_does_so_on_each_replica():
    found = on_ranks(2, train_alone)[0]
    for name, method in ALONE.items():
        expected, *_ = train(on_one(method, ROWS // 2, "replica", 2))
        assert difference(found[name], expected.params) < 1e-6, name


def kept_memory(placement):
    """On a rank: bytes of the storages that a state and its metrics keep alive."""
    model = network(True)
    params, buffers = samfn.split(model)
    method, params = placed(samfn.vasso(), placement, params)
    optimizer = samfn.sgd()
    state = samfn.init(params, buffers, optimizer=optimizer, method=method)
    state, metrics = samfn.sam_update(
        state,
        own(batch_of(0)),
        loss_fn=samfn.supervised(model, criterion),
        optimizer=optimizer,
        method=method,
        lr=0.1,
    )
    longer = [
        leaf.untyped_storage().nbytes() - leaf.nbytes
        for leaf in pytree.tree_leaves((state, metrics._replace(outputs=None)))
        if leaf is not None
    ]
    return max(longer)


@pytest.mark.parametrize("placement", ["replica", "global", "sharded"])
def test_what_outlives_a_step_keeps_no_message_alive(placement):
    assert set(on_ranks(2, kept_memory, placement)) == {0}


def one_step(placement, rows=slice(None), ignored=None):
    """Take a watched step, on a rank or, without a placement, on some rows alone."""
    loss = criterion if ignored is None else nn.CrossEntropyLoss(ignore_index=ignored)
    model = network(False)
    params, buffers = samfn.split(model)
    method = samfn.watched(samfn.sam())
    if placement:
        method, params = placed(method, placement, params)
    images, labels = own(batch_of(0)) if placement else batch_of(0)
    optimizer = samfn.sgd()
    _, metrics = samfn.sam_update(
        samfn.init(params, buffers, optimizer=optimizer),
        (images[rows], labels[rows]),
        loss_fn=samfn.supervised(model, loss),
        optimizer=optimizer,
        lr=0.1,
        method=method,
    )
    return metrics


def test_norms_of_replicas_weigh_what_their_losses_are_means_over():
    ignored = int(batch_of(0)[1][0])
    found, _ = on_ranks(2, one_step, "replica", slice(None), ignored)
    halves = [slice(8), slice(8, 16)]
    counts = [int((batch_of(0)[1][half] != ignored).sum()) for half in halves]
    assert counts[0] != counts[1]
    alone = [one_step(None, half, ignored).layers.gradient for half in halves]
    mean = sum(n * norms for n, norms in zip(counts, alone, strict=True)) / sum(counts)
    assert torch.allclose(found.layers.gradient, mean)


def test_norms_of_replicas_are_means_over_them():
    left, right = on_ranks(2, one_step, "replica")
    first, second = (one_step(None, rows) for rows in (slice(8), slice(8, 16)))
    assert first.grad_norm != second.grad_norm
    for found in (left, right):
        assert torch.allclose(found.grad_norm, (first.grad_norm + second.grad_norm) / 2)
        for name in ("gradient", "perturbation", "cosine"):
            ours, *theirs = (getattr(one.layers, name) for one in (found, first, second))
            assert torch.allclose(ours, (theirs[0] + theirs[1]) / 2, atol=1e-6), name


@pytest.mark.parametrize("placement", ["global", "sharded"])
def test_norms_of_a_shared_perturbation_are_those_of_one_process(placement):
    expected = one_step(None)
    for found in on_ranks(2, one_step, placement):
        assert torch.allclose(found.grad_norm, expected.grad_norm)
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def train_in(dtype):
    return train(samfn.sam(), placement="replica", dtype=dtype)[0].params


def test_ranks_may_compute_in_bfloat16():
    found = on_ranks(2, train_in, torch.bfloat16)[0]
    method = on_one(samfn.sam(), ROWS // 2, "replica", 2)
    expected, *_ = train(method, dtype=torch.bfloat16)
    full, *_ = train(method)
    assert difference(found, expected.params) < 1e-6
    assert difference(found, full.params) > 1e-4


@pytest.mark.parametrize("name", ["sam", "asam", "gsam"])
def test_placements_differ_on_the_same_data(name):
    found = {
        placement: trained(4, placement)[0][name, False][0].params
        for placement in PLACEMENTS[4]
    }
    for one in found:
        for other in found:
            if one != other:
                assert difference(found[one], found[other]) > 1e-3


@pytest.mark.parametrize("name", ["sam", "gsam"])
def test_global_is_the_step_on_the_whole_batch_of_one_process(name):
    state, _ = trained(4, "global")[0][name, False]
    expected, *_ = train(METHODS[name], batch_norm=False)
    assert difference(state.params, expected.params) < 1e-6


def train_some(names, how):
    found = {}
    for name in names:
        found[name] = train(METHODS[name], optimizer=optimizer_of(name), **how)[0]
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_sharded_is_the_accumulated_step_of_one_process(count):
    found = on_ranks(
        count, train_some, SHARDED, {"batch_norm": True, "placement": "sharded"}
    )
    for name in SHARDED:
        method = on_one(METHODS[name], ROWS // count, "global", count)
        expected, *_ = train(method, batch_norm=True, optimizer=optimizer_of(name))
        assert difference(found[0][name].params, expected.params) < 1e-6, name


@pytest.mark.parametrize("placement", ["global", "sharded"])
def test_batches_of_different_lengths_count_by_their_examples(placement):
    how = {"batch_norm": False, "placement": placement, "rows": 10}
    found = on_ranks(4, train_some, ["sam"], how)[0]["sam"]
    expected, *_ = train(samfn.sam(), batch_norm=False, rows=10)
    assert difference(found.params, expected.params) < 1e-6


def compiled_and_not(placement, backend):
    found = {}
    for run_by in (None, backend):
        torch.manual_seed(1)  # A small network, for both ranks compile it.
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))
        how = {"model": model, "placement": placement, "backend": run_by}
        found[run_by] = train(samfn.sam(), **how)
    return found


@pytest.mark.parametrize(  # global: see BatchNorm.
    ("placement", "backend"), [("replica", "inductor"), ("sharded", "aot_eager")]
)
def test_collectives_are_in_the_one_compiled_graph(placement, backend):
    found = on_ranks(2, compiled_and_not, placement, backend, timeout=300)[0]
    (compiled, _, plan), (eager, *_) = found[backend], found[None]
    assert plan == "whole"
    assert difference(compiled.params, eager.params) < 1e-5


def counted_operations():
    """On a rank: the operations of a gradient, of a whole state and of a sharded one."""
    model = network(True)
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, criterion)
    whole = samfn.init(params, buffers, optimizer=samfn.sgd())
    parts = samfn.init(distributed.shard(params), buffers, optimizer=samfn.sgd())
    return [operations(loss_fn, state, batch_of(0)) for state in (whole, parts)]


def test_the_plan_of_a_sharded_step_is_chosen_by_its_whole_parameters():
    for whole, parts in on_ranks(2, counted_operations):
        assert whole == parts > 0


def poisoned(placement):
    """On a rank: one step, whose batch has a NaN on the last rank alone."""
    model = network(True)
    params, buffers = samfn.split(model)
    method, params = placed(samfn.sam(), placement, params)
    optimizer = samfn.sgd()
    loss_fn = samfn.supervised(model, nn.CrossEntropyLoss())
    given = {"loss_fn": loss_fn, "method": method}
    state = samfn.init(params, buffers, optimizer=optimizer)
    images, labels = own(batch_of(0))
    if distributed.rank() == distributed.size() - 1:
        images = images.index_fill(0, torch.tensor([0]), math.nan)
    batch = images, labels
    new, metrics = samfn.sam_update(state, batch, **given, optimizer=optimizer, lr=0.1)
    told = samfn.find_nonfinite(new, batch, **given)
    state, new = distributed.gather(state), distributed.gather(new)
    return state, new, bool(metrics.finite), told


@pytest.mark.parametrize("placement", ["replica", "global", "sharded"])
def test_a_rank_that_is_not_finite_makes_all_skip(placement):
    found = on_ranks(2, poisoned, placement)
    for old, new, finite, _ in found:
        assert not finite
        assert int(new.skipped) == 1
        for field in ("params", "buffers"):
            for name, leaf in getattr(old, field).items():
                assert torch.equal(leaf, getattr(new, field)[name]), name
    assert found[1][3] == "pass 1: the loss is nan"  # On the rank that has it.
    if placement == "sharded":
        assert found[0][3] == found[1][3]


def counted(placement):
    """On a rank: count the collectives of a step, and what it does on its own."""
    model = network(True)
    params, buffers = samfn.split(model)
    method, params = placed(samfn.sam(), placement, params)
    optimizer = samfn.sgd()
    loss_fn = samfn.supervised(model, nn.CrossEntropyLoss())
    state = samfn.init(params, buffers, optimizer=optimizer)
    with Sent() as sent:
        samfn.sam_update(
            state,
            own(batch_of(0)),
            loss_fn=loss_fn,
            optimizer=optimizer,
            lr=0.1,
            method=method,
        )
    return Counter(name for name, *_ in sent.found), len(params)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("replica", {"all_reduce": 1}),
        ("group:2", {"all_reduce": 3}),
        ("global", {"all_reduce": 2}),
    ],
)
def test_a_step_communicates_as_often_as_is_said(placement, expected):
    for found, _ in on_ranks(4, counted, placement):
        assert found == expected


def test_a_sharded_step_scatters_each_gradient_in_each_of_two_passes():
    for found, parameters in on_ranks(2, counted, "sharded"):
        # All but the two biases are gathered again for the backward pass.
        assert found["all_gather_into_tensor"] == 2 * (parameters + 3)
        assert found["reduce_scatter_tensor"] == 2 * parameters


def shared_by():
    return [distributed.sharing(name) for name in ("replica", "group:2", "global")]


def test_a_perturbation_is_shared_by_as_many_ranks_as_is_said():
    assert on_ranks(4, shared_by) == [[1, 2, 4]] * 4


def gathered_by_the_first(placement):
    """On a rank: gather a state for a checkpoint."""
    params, buffers = samfn.split(network(True))
    _, params = placed(samfn.sam(), placement, params)
    state = samfn.init(params, buffers, optimizer=samfn.adam())
    whole = distributed.gather(state, "meta" if distributed.rank() else "cpu")
    devices = {leaf.device.type for leaf in pytree.tree_leaves(whole)}
    return devices, {name: tuple(w.shape) for name, w in whole.params.items()}


@pytest.mark.parametrize("placement", ["replica", "sharded"])
def test_a_state_can_be_gathered_where_it_is_written_alone(placement):
    (first, shapes), (other, same) = on_ranks(2, gathered_by_the_first, placement)
    assert (first, other) == ({"cpu"}, {"meta"})
    expected = {n: tuple(w.shape) for n, w in samfn.split(network(True))[0].items()}
    assert shapes == same == expected


def resharded(state):
    """On a rank: shard a state, and put it together again."""
    part = distributed.shard(state)
    sizes = [
        sum(leaf.to_local().numel() for leaf in held.values())
        for held in (part.params, part.opt_state["exp_avgs"])
    ]
    return distributed.gather(part), *sizes


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_state_is_sharded_evenly_and_comes_back_bit_for_bit(count):
    model = network(True)
    params, buffers = samfn.split(model)
    state = samfn.init(params, buffers, optimizer=samfn.adam(), method=samfn.looksam())
    whole = sum(leaf.numel() for leaf in params.values())
    rows = sum(-(-len(leaf) // count) * leaf[0].numel() for leaf in params.values())
    found = on_ranks(count, resharded, state)
    assert sum(kept for _, kept, _ in found) == whole
    for back, kept, memory in found:
        assert kept == memory <= rows
        assert back.opt_state.keys() == state.opt_state.keys()
        for name, leaf in state.params.items():
            assert torch.equal(back.params[name], leaf)


def measured():
    """On a rank: the norm of a tensor that is cut in strides, and of terms of a sum."""
    mesh, own = init_device_mesh("cpu", (2,)), torch.full((2,), 1.0 + distributed.rank())
    cut = DTensor.from_local(own, mesh, [_StridedShard(0, split_factor=1)], run_check=False)
    terms = DTensor.from_local(own, mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="got terms of a sum"):
        samfn.norm({"w": terms})
    # Any mapping is sharded, not dicts alone.
    assert tree.is_sharded(distributed.shard(MappingProxyType({"w": own}))["w"])
    return float(samfn.norm({"w": cut})) ** 2


def test_a_norm_is_of_all_parts_also_of_those_in_strides():
    assert on_ranks(2, measured) == [pytest.approx(2 * 1 + 2 * 4)] * 2


def sharded_on_some():
    """On a rank of four: shard over two, or take a step with what is."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))["parts"]
    model = nn.Linear(4, 2)
    params, buffers = samfn.split(model)
    with pytest.raises(ValueError, match="a mesh of all 4 ranks, got one of 2"):
        distributed.shard(params, mesh)
    cut = {name: distribute_tensor(w, mesh, [Shard(0)]) for name, w in params.items()}
    optimizer = samfn.sgd()
    state = samfn.init(cut, buffers, optimizer=optimizer)
    given = {"loss_fn": samfn.supervised(model, criterion), "optimizer": optimizer}
    batch = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="a mesh of all 4 ranks, got one of 2"):
        samfn.sam_update(state, batch, **given, lr=0.1)


def test_a_state_that_is_cut_over_some_of_the_ranks_is_refused():
    on_ranks(4, sharded_on_some)


def synchronised():
    """On a rank: train with BatchNorm over all ranks."""
    model = distributed.synchronised(network(True))
    return [train(samfn.sam(), model=model, placement="global", **how) for how in WAYS]


WAYS = ({}, {"backend": "aot_eager"})


def test_batch_norm_over_all_ranks_makes_the_step_that_of_one_process():
    expected, *_ = train(samfn.sam(), model=network(True))
    for found, _, plan in on_ranks(2, synchronised)[0]:
        assert plan in (None, "whole")
        assert difference(found.params, expected.params) < 2e-6
        assert int(found.buffers["1.num_batches_tracked"]) == STEPS
        for name in ("1.running_mean", "1.running_var"):
            assert torch.allclose(found.buffers[name], expected.buffers[name], rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_of_one_part_is_batch_norm(momentum, track):
    given = {"momentum": momentum, "track_running_stats": track}
    layer = nn.BatchNorm2d(4, **given)
    other = distributed.synchronised(layer)
    for _ in range(2):
        inputs = 3 + torch.randn(8, 4, 5, 5)
        left, right = (inputs.clone().requires_grad_() for _ in range(2))
        outputs, found = layer(left), other(right)
        assert torch.allclose(outputs, found, atol=1e-6)
        outputs.square().mean().backward()
        found.square().mean().backward()
        assert torch.allclose(left.grad, right.grad, atol=1e-7)
    for (name, own), (_, theirs) in zip(
        layer.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.allclose(own, theirs, atol=1e-6), name
    assert torch.allclose(layer.eval()(inputs), other.eval()(inputs), atol=1e-6)
    with pytest.raises(ValueError, match="4D"):
        other(torch.ones(2, 4))


class Odd(nn.Module):
    """Has a tied weight, a frozen one, a small one, an unused one, and one of any dtype."""

    def __init__(self, dtype, shape):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.full(shape, 1.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.wide = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.frozen(self.embed(tokens)) * self.scale
        beside = hidden.to(self.wide.dtype) @ self.wide
        return self.head(
            hidden * (1 + beside.square().sum(1, keepdim=True)).to(hidden.dtype)
        )


def train_odd(placement, *of):
    torch.manual_seed(2)
    model = Odd(*of)
    params, buffers = samfn.split(model)
    given = {"optimizer": samfn.nadam(), "method": samfn.gsam()}
    if placement:
        given["method"], params = placed(given["method"], placement, params)
    state = samfn.init(params, buffers, **given)
    for step in range(STEPS):
        tokens = torch.arange(12).add(step) % 7
        batch = tokens, (3 * tokens) % 7
        state, _ = samfn.sam_update(
            state,
            own(batch) if placement else batch,
            loss_fn=samfn.supervised(model, criterion),
            lr=0.01,
            **given,
        )
    return distributed.gather(state)


@pytest.mark.parametrize("of", [(torch.float64, (1,)), (torch.float32, ())])
@pytest.mark.parametrize("placement", ["global", "sharded"])
def test_ranks_take_any_model_that_one_process_takes(placement, of):
    found, expected = on_ranks(3, train_odd, placement, *of)[0], train_odd(None, *of)
    assert found.params.keys() == expected.params.keys()
    assert "frozen.weight" in found.buffers
    for name, leaf in expected.params.items():
        assert found.params[name].dtype == leaf.dtype
        assert torch.allclose(found.params[name], leaf, rtol=1e-5, atol=1e-7), name


def go_on(path, placement, steps):
    """On a rank: train, from a checkpoint if there is one, and write the next."""
    model = network(False)
    params, buffers = samfn.split(model)
    given = {"optimizer": samfn.adam(), "method": samfn.gsam()}
    state = samfn.init(params, buffers, **given)
    if path.exists():
        state, _ = samfn.restore(path, like=state)
    given["method"], state = placed(given["method"], placement, state)
    for _ in range(steps):
        batch = own(batch_of(int(state.step)))
        state, _ = samfn.sam_update(
            state,
            batch,
            loss_fn=samfn.supervised(model, nn.CrossEntropyLoss()),
            lr=0.01,
            **given,
        )
    whole = distributed.gather(state)
    if distributed.rank() == distributed.FIRST:
        samfn.save(path, whole)
    return whole


def test_a_checkpoint_goes_on_with_other_ranks_and_another_placement(tmp_path):
    plan = [(2, "sharded"), (4, "global"), (3, "sharded"), (1, "replica")]
    for count, placement in plan:
        found = on_ranks(count, go_on, tmp_path / "split", placement, 2)[0]
    expected = on_ranks(1, go_on, tmp_path / "whole", "replica", 2 * len(plan))[0]
    assert int(found.step) == 2 * len(plan)
    assert (
        difference(found.params, expected.params) < 1e-5
    )  # Adam divides by small numbers.
    assert difference(found.opt_state["exp_avgs"], expected.opt_state["exp_avgs"]) < 1e-5


def agreed(rank_of_signal):
    agreement = distributed.Agreement(2)
    asks = [0, 0, 15, 0, 0] if distributed.rank() == rank_of_signal else [0] * 5
    return [agreement.later(1, ask)[1] for ask in asks], agreement.now(0, 0)


def test_what_one_rank_asks_for_all_do_after_the_same_step():
    for later, last in on_ranks(3, agreed, 1):
        assert later == [0, 0, 0, 15, 0]
        assert last == [1, 0]


def test_one_process_need_not_wait_for_an_answer():
    assert distributed.Agreement(2).later(1, 15) == [1, 15]
    assert distributed.Agreement(2).now(0, 2) == [0, 2]


def shared():
    return distributed.share({"images": torch.arange(10), "labels": torch.arange(10)})


def test_ranks_share_a_batch_without_rest():
    parts = on_ranks(4, shared)
    assert [len(part["images"]) for part in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), torch.arange(10))


def flipped():
    leaf = torch.arange(10.0)
    if distributed.rank() == 1:
        leaf[3] = leaf[3].nextafter(leaf[4])
    swapped = torch.tensor([1.0, 2.0])
    if distributed.rank() == 1:
        swapped = swapped.flip(0)
    messages = []
    for given in ({"a": leaf}, {"b": swapped, "a": torch.ones(1)}, {"a": torch.ones(2)}):
        try:
            distributed.require_alike({"params": given})
        except distributed.RanksDifferError as error:
            messages.append(str(error))
    return messages


def test_ranks_that_differ_are_found():
    for messages in on_ranks(2, flipped):
        assert len(messages) == 2
        assert "params/a differ" in messages[0]
        assert "params/b differ" in messages[1]


def exchanged():
    rank = distributed.rank()
    mean = distributed.mean({"loss": float(rank)}, weight=rank + 1)
    rows = distributed.concatenated(torch.full((rank, 2), rank))
    return mean, rows, distributed.from_first({"rank": rank})


def test_ranks_tell_each_other():
    for mean, rows, first in on_ranks(3, exchanged):
        assert mean == {"loss": pytest.approx((0 + 1 * 2 + 2 * 3) / 6)}
        assert rows.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert first == {"rank": 0}


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.mean({"a": 1.0}, 3) == {"a": 1.0}
    assert distributed.from_first("x") == "x"
    distributed.require_alike({"a": torch.ones(1)})
    with distributed.ranks() as device:
        assert device is None


def test_a_placement_needs_a_process_group():
    with pytest.raises(RuntimeError, match="torchrun"):
        distributed.placed(samfn.sam())


def wrapped():
    """On a rank: what samfn says to the wrappers of torch.distributed."""
    model, messages = network(False), []
    mesh = init_device_mesh("cpu", (1,))
    sharded = fully_shard(nn.Linear(3, 3), mesh=mesh)
    parallel = parallelize_module(nn.Linear(3, 3), mesh, ColwiseParallel())

    def step_after(change):
        late = nn.Linear(3, 3)
        given = {"loss_fn": samfn.supervised(late, criterion), "optimizer": samfn.sgd()}
        state = samfn.init(*samfn.split(late), optimizer=given["optimizer"])
        change(late)
        samfn.sam_update(state, batch_of(0), **given, lr=0.1)

    for attempt in (
        lambda: samfn.split(nn.parallel.DistributedDataParallel(model)),
        lambda: samfn.supervised(nn.Sequential(nn.DataParallel(model)), criterion),
        lambda: samfn.split(sharded),
        lambda: samfn.split(parallel),
        lambda: step_after(functools.partial(fully_shard, mesh=mesh)),
        lambda: step_after(lambda late: parallelize_module(late, mesh, ColwiseParallel())),
    ):
        try:
            attempt()
        except TypeError as error:
            messages.append(str(error))
    return messages


def test_wrappers_are_refused_with_the_right_way():
    messages = on_ranks(1, wrapped)[0]
    parts = ("FSDPModule, as of fully_shard", "one that parallelize_module has changed")
    names = ("DistributedDataParallel", "DataParallel at 0", *parts, *parts)
    for message, name in zip(messages, names, strict=True):
        assert name in message
        assert "samfn.distributed" in message
        assert ("samfn.SAM takes the module as it is" in message) == (name in parts)


def misplaced():
    """On a rank: what samfn says to methods and states that do not fit together."""
    everywhere, messages = distributed.placed(samfn.sam()), []
    model = network(False)
    params, buffers = samfn.split(model)
    given = {"optimizer": samfn.sgd(), "method": everywhere}
    state = samfn.init(distributed.shard(params), buffers, **given)
    given |= {"loss_fn": samfn.supervised(model, criterion), "lr": 0.1}
    for attempt in (
        lambda: distributed.placed(everywhere),
        lambda: samfn.every(everywhere, 2),
        lambda: samfn.watched(everywhere),
        lambda: samfn.sam_update(state, own(batch_of(0)), **given),
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_placement_goes_around_everything_and_a_sharded_state_is_global():
    for messages in on_ranks(2, misplaced):
        assert messages == [
            "the method is placed already",
            "every goes inside of placed",
            "watched goes inside of placed",
            "a sharded state has one perturbation for all ranks, and needs no placement:"
            " leave it out, got 'replica'",
        ]


def refused():
    messages = []
    for name in ("global:2", "group:0", "group:3", "group:x", "sharded", "replicas"):
        try:
            distributed.placed(samfn.sam(), name)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_placement_that_there_is_not_is_refused():
    messages = on_ranks(4, refused)[0]
    assert len(messages) == 6
    assert "3 does not divide the number of ranks, 4" in messages[2]
    assert "got 'sharded'" in messages[4]


def stopped():
    """On a rank: wait for one that was stopped, no longer than the timeout."""
    if distributed.rank() == 1:
        parent = os.getpid()
        if not os.fork():  # Goes on with it later, so that the test can end.
            time.sleep(8)
            os.kill(parent, signal.SIGCONT)
            os._exit(0)
        os.kill(parent, signal.SIGSTOP)
        return None
    begun = time.monotonic()
    try:
        distributed.mean({"a": 1.0}, 1)
    except RuntimeError:
        return time.monotonic() - begun
    return None


def test_a_rank_that_was_stopped_is_not_waited_for_forever():
    waited, _ = on_ranks(2, stopped, timeout=2.0)
    assert 1 < waited < 7


def train_with_ignored(placement, named):
    """Take a step on rows of which the ranks have different numbers that count."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss(ignore_index=7)
    batch = torch.randn(8, 4).double(), torch.tensor([0, 7, 1, 2, 7, 7, 7, 1])
    if named:
        model, criterion, (*batch, _) = NextToken(), None, tokens().values()
    batch = own(batch) if placement else batch
    if named:
        batch = dict(zip(tokens(), (*batch, False), strict=True))
    loss_fn = samfn.supervised(model, criterion)
    optimizer = samfn.sgd(0.9)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "rho": 0.1, "lr": 0.1}
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    if placement:
        given["method"], state = placed(samfn.sam(), placement, state)
    state, metrics = samfn.sam_update(state, batch, **given)
    return distributed.gather(dict(state.params)), metrics.loss


@pytest.mark.parametrize(
    ("placement", "named"), [("global", False), ("sharded", False), ("global", True)]
)
def test_ranks_count_by_what_their_losses_are_means_over(placement, named):
    params, loss = train_with_ignored(None, named)
    # On four ranks, one has nothing that counts.
    for found, seen in on_ranks(4, train_with_ignored, placement, named):
        torch.testing.assert_close(found, params)
        torch.testing.assert_close(seen, loss)


def talking():
    """On a rank: how often a criterion is called that waits for the other ranks."""
    calls, count = itertools.count(), 2 * (1 + distributed.rank())

    def criterion(outputs, targets):
        next(calls)
        total = torch.tensor(float(len(targets)))
        dist.all_reduce(total)
        return outputs.square().sum() / total

    model = nn.Linear(3, 2)
    loss_fn = samfn.supervised(model, criterion)
    method, optimizer = distributed.placed(samfn.sam()), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    batch = torch.randn(count, 3), torch.zeros(count)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    for _ in range(3):
        state, _ = samfn.sam_update(state, batch, **given, lr=0.1)
    return next(calls)


def test_a_criterion_that_waits_for_other_ranks_is_called_in_passes_alone():
    assert on_ranks(2, talking) == [6, 6]
