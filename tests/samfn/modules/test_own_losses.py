"""Batches of keyword arguments, and models that compute their own loss, as in a loop."""

import copy
from collections import UserDict

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from bench.zoo import habits
from samfn.support.batches import first_rows
from samfn.training import loop
from tests.reference import NextToken, overwriting_sam_step, tokens

RHO, LR = 0.1, 0.2
SINGLE = {"rtol": 1e-5, "atol": 1e-7}
WHOLE = {"transformers, dropout", "encoding of a tokenizer", "training_step", "statistics"}


class Trained(nn.Module):
    """A module as of Lightning, with statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = habits.drawn(), nn.BatchNorm1d(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        assert batch_idx == 0
        return {"loss": F.cross_entropy(self.last(self.inner(x)), y), "log": "a"}

    def forward(self):
        raise AssertionError


class Normed(nn.Module):
    """Returns its loss alone."""

    def __init__(self):
        super().__init__()
        self.layers = habits.averaging()

    def forward(self, x, *, y, reduction):
        return F.cross_entropy(self.layers(x), y, reduction=reduction)


class Detecting(nn.Linear):
    """Gives several losses, or what they are computed from."""

    def __init__(self):
        super().__init__(6, 7)

    def forward(self, x, boxes=None, labels=None):
        found = super().forward(x)
        if boxes is None:
            return {"boxes": found[:, :4], "scores": found[:, 4:]}
        return {
            "loss_box": F.mse_loss(found[:, :4], boxes),
            "loss_class": F.cross_entropy(found[:, 4:], labels),
        }


class Named(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)

    def forward(self, *, left, scale, right):
        return super().forward(left * scale + right)


class Opening(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)

    def forward(self, record):
        return super().forward(record["x"])


def gpt2(**dropout):
    """Return a language model with a tied head."""
    config = transformers.GPT2Config(
        vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0,
        eos_token_id=0, loss_type="ForCausalLM", **dropout,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def losses_of(outputs, targets):
    boxes = F.l1_loss(outputs["boxes"], targets["boxes"])
    return boxes + F.cross_entropy(outputs["scores"], targets["labels"])


def mixed(outputs, targets):
    one, other, share = targets
    cross_entropy = F.cross_entropy
    return share * cross_entropy(outputs, one) + (1 - share) * cross_entropy(outputs, other)


torch.manual_seed(0)
X, Y = habits.vectors(), habits.classes()
SOFT = torch.rand(8, 3, dtype=torch.float64).softmax(1)
BOXES = {"boxes": torch.rand(8, 4, dtype=torch.float64), "labels": Y}
DENSE = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4, 5, 5))
DENSE[1][0, :4], DENSE[1][2] = 255, 255
NAMED = {"left": X, "scale": 2.0, "right": X.flip(0)}
dense = nn.CrossEntropyLoss(ignore_index=255)
summed = lambda losses, _: sum(losses.values())  # noqa: E731

# Model, batch, what samfn.supervised is told beside it, and the loss of a plain loop.
CASES = {
    "transformers, dropout": (gpt2, tokens(), {}, lambda m: m(**tokens()).loss),
    "encoding of a tokenizer": (
        gpt2,
        transformers.BatchEncoding(tokens()),
        {},
        lambda m: m(**tokens()).loss,
    ),
    "tied weights": (NextToken, tokens(), {}, lambda m: m(**tokens())["loss"]),
    "training_step": (
        Trained,
        (X, Y),
        {"call": lambda module, batch: module.training_step(batch, 0)},
        lambda m: m.training_step((X, Y), 0)["loss"],
    ),
    "statistics": (
        Normed,
        {"x": X, "y": Y, "reduction": "mean"},
        {},
        lambda m: m(X, y=Y, reduction="mean"),
    ),
    "several losses": (
        Detecting,
        ({"x": X, **BOXES}, None),
        {"criterion": summed},
        lambda m: summed(m(X, **BOXES), None),
    ),
    "targets by name": (
        Detecting,
        (X, BOXES),
        {"criterion": losses_of},
        lambda m: losses_of(m(X), BOXES),
    ),
    "soft labels": (
        Named,
        (NAMED, SOFT),
        {"criterion": F.cross_entropy},
        lambda m: F.cross_entropy(m(**NAMED), SOFT),
    ),
    "mixed labels": (
        Named,
        (UserDict(NAMED), (Y, Y.flip(0), 0.3)),
        {"criterion": mixed},
        lambda m: mixed(m(**NAMED), (Y, Y.flip(0), 0.3)),
    ),
    "dense outputs": (
        lambda: nn.Conv2d(2, 3, 3, padding=1),
        DENSE,
        {"criterion": dense},
        lambda m: dense(m(DENSE[0]), DENSE[1]),
    ),
    "one argument that is a dict": (
        Opening,
        (({"x": X},), Y),
        {"criterion": F.cross_entropy},
        lambda m: F.cross_entropy(m({"x": X}), Y),
    ),
}


def problem(name):
    make, batch, told, loss_of = CASES[name]
    torch.manual_seed(0)
    return make().double(), batch, told, loss_of


def stepped(model, batch, told, method=None, state=None):
    method, optimizer = method or samfn.sam(), samfn.sgd(momentum=0.9)
    state = state or samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    given = {"loss_fn": samfn.supervised(model, **told), "optimizer": optimizer}
    return samfn.sam_update(state, batch, **given, method=method, rho=RHO, lr=LR)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_plain_loop(name):
    model, batch, told, loss_of = problem(name)
    before, other, state = samfn.split(model), copy.deepcopy(model), None
    optimizer = torch.optim.SGD(other.parameters(), LR, momentum=0.9)
    for step in range(2):
        torch.manual_seed(step)
        expected = overwriting_sam_step(other, optimizer, loss_of, RHO)
        torch.manual_seed(step)
        state, metrics = stepped(model, batch, told, state=state)
        assert metrics.loss.item() == pytest.approx(expected, rel=1e-6)
    params, buffers = samfn.split(other)
    single = (
        loss_of(copy.deepcopy(model)).dtype is torch.float32
    )  # as transformers computes it
    assert_close(dict(state.params), params, **(SINGLE if single else {}))
    assert_close(dict(state.buffers), buffers)
    assert_close(samfn.split(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WHOLE])
def test_parts_come_to_the_whole_batch(name):
    model, batch, told, _ = problem(name)
    whole, _ = stepped(model, batch, told)
    for size in (1, 3):
        method = samfn.accumulated(samfn.sam(), size)
        parts, _ = stepped(model, batch, told, method)
        assert_close(dict(parts.params), dict(whole.params), rtol=1e-6, atol=1e-9)


def test_each_part_has_its_perturbation_and_weighs_what_it_counts():
    model, batch = NextToken(), tokens()
    weights = [*model.parameters()]
    total, count = torch.zeros_like(weights[0]), 0
    for start in (0, 2, 4):
        part = {
            k: v if k == "use_cache" else v[start : start + 2] for k, v in batch.items()
        }
        number = (part["labels"][:, 1:] != -100).sum()
        (slope,) = torch.autograd.grad(model(**part)["loss"], weights)
        there = copy.deepcopy(model)
        with torch.no_grad():
            there.embed.weight += RHO * slope / slope.norm()
        total += number * torch.autograd.grad(there(**part)["loss"], there.embed.weight)[0]
        count += number
    method = samfn.per_micro_batch(samfn.sam(), 2)
    state, _ = stepped(model, batch, {}, method)
    assert_close(state.params["embed.weight"], weights[0].detach() - LR * total / count)


class Scores(nn.Linear):
    """Returns what it was made for."""

    def __init__(self, returns):
        super().__init__(6, 3)
        self._returns = returns

    def forward(self, x):
        return self._returns(super().forward(x))


@pytest.mark.parametrize(
    ("returns", "came"),
    [
        (lambda out: out, r"a tensor of shape \(8, 3\)"),
        (lambda out: out[:, 0], r"a tensor of shape \(8,\)"),
        (lambda out: {"box": out.sum(), "hit": out.mean()}, "a dict of box, hit: .*sum"),
        (lambda out: None, "NoneType"),
        (lambda out: (out.sum(), out), "tuple"),
        (
            lambda out: transformers.modeling_outputs.CausalLMOutput(logits=out),
            "a CausalLMOutput of logits: give the batch the labels",
        ),
    ],
)
def test_a_loss_that_a_model_does_not_return_is_asked_for(returns, came):
    with pytest.raises(TypeError, match=f"must return its loss.* got {came}"):
        stepped(Scores(returns).double(), {"x": X}, {})


def test_losses_of_each_example_may_be_the_models_own():
    model = Scores(lambda out: {"loss": out.square().sum(1)}).double()
    seen = samfn.evaluate(samfn.supervised(model), *samfn.split(model), {"x": X})
    assert_close(seen.loss, model(X)["loss"].mean().detach())
    stepped(model, {"x": X}, {}, samfn.esam())
    stepped(model, transformers.BatchEncoding({"x": X}), {}, samfn.esam())


def test_an_evaluation_of_keyword_arguments_says_how_to_measure():
    model, batch = NextToken(), tokens()
    given, batches = samfn.split(model), [first_rows(batch, 0.5), batch]
    loss_fn = samfn.supervised(model.eval())
    with pytest.raises(ValueError, match=r"accuracy expects .* got a dict and a"):
        loop.evaluate(*given, batches, loss_fn=loss_fn, measures={"right": loop.accuracy})

    def right(outputs, batch):
        return (outputs["logits"].argmax(-1) == batch["labels"]).double().mean(1)

    found = loop.evaluate(*given, batches, loss_fn=loss_fn, measures={"right": right})
    both = {k: torch.cat([b[k] for b in batches]) for k in ("input_ids", "labels")}
    assert found["loss"] == pytest.approx(model(**both)["loss"].item())


def test_statistics_are_taken_anew_by_keyword_arguments():
    class Wide(nn.BatchNorm1d):
        def forward(self, *, x, factor):
            return super().forward(x * factor)

    model = Wide(6).double()
    for batch in (UserDict(x=X, factor=2), (UserDict(x=X, factor=2), Y)):
        found = samfn.reestimated(model, *samfn.split(model), [batch])
        assert_close(found["running_mean"], 2 * X.mean(0))
