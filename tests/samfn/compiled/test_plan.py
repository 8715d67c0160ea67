"""What is tried out leaves nothing behind."""

from collections import deque
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

import samfn
from samfn.compiled import operations
from samfn.support.nested import inside

KEPT = []
TOTAL = 0.0


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.losses, self.last, self.by_name = [], None, {"all": deque(maxlen=3)}

    def forward(self, outputs, targets):
        self.last = F.cross_entropy(outputs, targets)
        self.losses.append(self.last)
        self.by_name["all"].append(self.last)
        return self.last


class Plain(Keeping):
    """One that is no module to those who look for its attributes."""

    def method(self, outputs, targets):
        return self(outputs, targets)


def to_globals(outputs, targets):
    global TOTAL
    loss = F.cross_entropy(outputs, targets)
    KEPT.append(loss)
    TOTAL = TOTAL + loss.detach()
    return loss


def closed():
    kept, total = [], 0.0

    def criterion(outputs, targets):
        nonlocal total
        loss = F.cross_entropy(outputs, targets)
        kept.append(loss)
        total = total + loss.detach()
        return loss

    return criterion, lambda: [kept, total]


def with_default(outputs, targets, kept=[]):  # noqa: B006
    kept.append(F.cross_entropy(outputs, targets))
    return kept[-1]


def cases():
    module, plain = Keeping(), Plain()
    yield "module", module, lambda: [vars(module)]
    yield "method", plain.method, lambda: [vars(plain)]
    yield "globals", to_globals, lambda: [KEPT, TOTAL]
    yield "closure", *closed()
    yield "default", partial(with_default), lambda: with_default.__defaults__


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(
    ("criterion", "kept"), [pytest.param(*case[1:], id=case[0]) for case in cases()]
)
def test_a_dry_run_leaves_nothing_in_what_a_criterion_keeps(criterion, kept, decay):
    model = nn.Linear(4, 3)
    loss_fn = samfn.supervised(model, criterion)
    if decay:
        loss_fn = samfn.l2_regularized(loss_fn, 0.1)
    state = samfn.init(*samfn.split(model), optimizer=samfn.sgd())
    batch = torch.randn(2, 4), torch.tensor([0, 1])
    samfn.evaluate(loss_fn, state.params, state.buffers, batch)
    before = [*inside(kept())]
    assert operations(loss_fn, state, batch) > 0
    after = [*inside(kept())]
    assert before
    assert len(after) == len(before)
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert not any(isinstance(leaf, FakeTensor) for leaf in after)


def test_a_dry_run_of_a_function_leaves_nothing_in_it_either():
    kept = []

    def loss_fn(params, buffers, batch):
        kept.append((batch @ params["w"]).square().mean())
        return kept[-1]

    state = samfn.init({"w": torch.zeros(3, 2)}, {}, optimizer=samfn.sgd())
    assert operations(loss_fn, state, torch.randn(4, 3)) > 0
    assert kept == []
