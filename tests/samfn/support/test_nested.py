"""Outputs in objects of a user's own keep no graph alive, and come as they were made."""

import gc
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import samfn
from samfn.support.nested import inside, mapped, remembered


@dataclass
class Record:
    logits: Tensor
    more: dict = field(default_factory=dict)
    name: str = "x"


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor


class Plain:
    def __init__(self, logits):
        self.logits, self.more = logits, [logits * 2]


class Named(dict):
    """A dict that lets its keys be asked for as attributes."""

    @property
    def logits(self):
        return self["logits"]


class Boxes(list):
    @property
    def logits(self):
        return self[0]


class Registered(NamedTuple):
    logits: Any


MADE = {
    "dataclass": lambda y: Record(y, {"more": [y + 1]}),
    "frozen, with slots": Frozen,
    "plain": Plain,
    "dict": lambda y: Named(logits=y),
    "list": lambda y: Boxes([y]),
    "in another": lambda y: Registered(Record(y)),
    "distribution": lambda y: torch.distributions.Categorical(logits=y),
    "tuple": lambda y: Registered(y),
}


class Wrapped(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(4, 3), make

    def forward(self, x):
        return self.make(self.layer(x))


def logits_of(outputs):
    found = outputs.logits
    return found.logits if isinstance(found, Record) else found


def criterion(outputs, targets):
    return nn.functional.cross_entropy(logits_of(outputs), targets)


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_outputs_of_a_step_hold_no_graph_whatever_they_are_in(name, pure):
    torch.manual_seed(0)
    model, plain = Wrapped(MADE[name]), Wrapped(lambda y: y)
    plain.load_state_dict(model.state_dict())
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    loss_fn = known = samfn.supervised(model, criterion)
    if not pure:  # By torch.func.
        loss_fn = lambda *given: known(*given)  # noqa: E731
    optimizer = samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1}
    _, metrics = samfn.sam_update(state, batch, **given)
    tensors = [*inside(metrics.outputs)]
    assert tensors
    assert not any(leaf.requires_grad for leaf in tensors)
    assert type(metrics.outputs) is type(MADE[name](torch.zeros(1, 3)))
    expected = plain(batch[0]).detach()
    if name == "distribution":
        expected = expected.log_softmax(1)
    assert_close(logits_of(metrics.outputs), expected)


def test_a_step_of_outputs_that_are_kept_keeps_nothing_else():
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept = x * 1
            alive.append(weakref.ref(kept.untyped_storage()))
            ctx.save_for_backward(kept)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    model = Wrapped(lambda y: Record(Watched.apply(y)))
    seen = samfn.evaluate(
        samfn.supervised(model, criterion),
        *samfn.split(model),
        (torch.randn(5, 4), torch.randint(3, (5,))),
    )
    gc.collect()
    assert seen.outputs.logits.grad_fn is None
    assert alive
    assert alive[0]() is None


def test_what_holds_no_tensor_is_left_as_it_is():
    record, model = Record(3), nn.Linear(2, 2)
    given = [record, model, "x", None, {"a": 1}]
    found = mapped(torch.neg, given)
    assert found[0] is record
    assert found[1] is model
    assert [*inside(model)] == []
    ring = Plain(torch.ones(1))
    ring.itself = ring
    assert mapped(torch.neg, ring).logits == -1
    assert ring.logits == 1


class Making(OrderedDict):
    """Makes what it is asked for, as the activations of transformers."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


def test_what_a_mapping_makes_of_its_values_is_not_put_into_it():
    kept = Making(a=list)
    put_back = remembered([kept])
    assert not put_back()
    kept["b"] = dict
    assert put_back()
    assert [*kept.items()] == [("a", list)]
