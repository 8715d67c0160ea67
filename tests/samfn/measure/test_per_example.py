from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import samfn
from samfn.measure import per_example
from samfn.training import sampling
from tests.reference import batches, small_network

EACH = partial(F.cross_entropy, reduction="none")


def setting(criterion=EACH):
    """Return a network in evaluation mode, its loss function and its tensors."""
    model = small_network().eval()
    return model, samfn.supervised(model, criterion), *samfn.split(model)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_losses_are_those_of_one_example_at_a_time(size):
    model, loss_fn, params, buffers = setting()
    inputs, labels = map(torch.cat, zip(*batches(3), strict=True))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=size)
    found = per_example.losses(params, buffers, loader, loss_fn=loss_fn)
    expected = [
        F.cross_entropy(model(x[None]), y[None]).item()
        for x, y in zip(inputs, labels, strict=True)
    ]
    assert_close(found.tolist(), expected)
    assert not found.requires_grad


def test_easy_is_what_sampling_counts():
    model, loss_fn, params, buffers = setting(F.cross_entropy)  # The mean will do.
    several = batches(3)
    for confidence in (0.2, 0.4, 0.9):
        found = per_example.easy(
            params, buffers, several, loss_fn=loss_fn, confidence=confidence
        )
        expected = [sampling.is_easy(model(x), y, confidence) for x, y in several]
        assert torch.equal(found, torch.cat(expected))
    counts = sampling.update(sampling.init(24), found)
    assert counts.sum() == found.sum()


def test_one_batch_is_taken_for_one_batch():
    # Two examples: the inputs alone could be taken for a pair.
    _, loss_fn, params, buffers = setting()
    batch = tuple(part[:2] for part in batches(1)[0])
    whole = per_example.losses(params, buffers, batch, loss_fn=loss_fn)
    assert_close(whole, per_example.losses(params, buffers, [batch], loss_fn=loss_fn))
    assert len(per_example.easy(params, buffers, batch, loss_fn=loss_fn)) == 2


def test_nothing_is_changed_not_even_statistics():
    model, loss_fn, params, buffers = setting()
    model.train()
    before = {name: leaf.clone() for name, leaf in {**params, **buffers}.items()}
    first = per_example.losses(params, buffers, batches(2), loss_fn=loss_fn)
    again = per_example.losses(params, buffers, batches(2), loss_fn=loss_fn)
    assert torch.equal(first, again)
    assert_close({**params, **buffers}, before, rtol=0, atol=0)


def test_no_gradient_is_computed():
    enabled = []

    def loss_fn(params, buffers, batch):
        enabled.append(torch.is_grad_enabled())
        return params["w"], samfn.Aux(None, buffers, batch * params["w"])

    per_example.losses({"w": torch.ones(())}, {}, [torch.ones(2)] * 3, loss_fn=loss_fn)
    assert enabled == [False] * 3


def test_the_increase_of_the_loss_scores_who_lies_in_a_sharp_place():
    def loss_fn(params, buffers, batch):
        losses = batch * params["w"] ** 2
        return losses.mean(), samfn.Aux(None, buffers, losses)

    curvature = torch.tensor([1.0, 9.0, 0.0, 4.0, 7.0])
    params, rho = {"w": torch.zeros(())}, 0.1
    moved = samfn.perturb(params, {"w": torch.ones(())}, rho)
    at = [per_example.losses(p, {}, curvature, loss_fn=loss_fn) for p in (moved, params)]
    sharpness = at[0] - at[1]
    assert_close(sharpness, rho**2 * curvature)
    assert sampling.hardest(sharpness, 0.4).tolist() == [1, 4]


class Read(TorchDispatchMode):
    """Counts what makes the program wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITS:
            self.waits.append(func)
        return func(*args, **(kwargs or {}))


def test_no_batch_is_waited_for():
    _, loss_fn, params, buffers = setting()
    for ask in (per_example.losses, per_example.easy):
        with Read() as reading:
            found = ask(params, buffers, batches(3), loss_fn=loss_fn)
        assert reading.waits == []
        with Read() as reading:
            found[0].item()
        assert len(reading.waits) == 1


def no_losses(params, buffers, batch):
    return params["w"].sum(), samfn.Aux(batch, buffers)


def too_few_losses(params, buffers, batch):
    return params["w"].sum(), samfn.Aux(batch, buffers, torch.ones(1))


@pytest.mark.parametrize(
    ("ask", "loss_fn", "several", "error", "message"),
    [
        ("losses", no_losses, [torch.ones(3)], ValueError, 'reduction="none"'),
        ("losses", too_few_losses, [torch.ones(3)], ValueError, r"3 losses, .*\(1,\)"),
        ("losses", no_losses, [], ValueError, "at least one batch, got none: a generator"),
        ("easy", no_losses, iter([]), ValueError, "at least one batch, got none"),
        (
            "easy",
            lambda params, buffers, batch: params["w"].sum(),
            [(torch.ones(3), torch.ones(3))],
            TypeError,
            "outputs must be logits of floating point, got NoneType",
        ),
    ],
)
def test_wrong_input_is_refused(ask, loss_fn, several, error, message):
    with pytest.raises(error, match=message):
        getattr(per_example, ask)({"w": torch.ones(2)}, {}, several, loss_fn=loss_fn)
