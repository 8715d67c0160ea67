"""A loss as a value: what is added to it, and what is asked of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from samfn.gradient import evaluate
from tests.reference import small_network

PARAMS = {"w": torch.tensor([1.0, 2.0]), "unused": torch.tensor([5.0])}


def test_l2_adds_half_the_decay_times_the_squared_weights():
    regularized = samfn.l2_regularized(lambda p, b, x: (p["w"] * x).sum(), 0.1)
    seen = evaluate(regularized, PARAMS, {}, torch.ones(2))
    assert_close(seen.loss, torch.tensor(3.0 + 0.05 * (1 + 4 + 25)))
    expected = {"w": torch.tensor([1.1, 1.2]), "unused": torch.tensor([0.5])}
    assert_close(seen.grads, expected)


def test_l2_does_not_round_wide_parameters():
    w = torch.tensor([0.1], dtype=torch.float64)
    regularized = samfn.l2_regularized(lambda p, b, x: 0 * p["w"].sum(), 1.0)
    assert torch.equal(evaluate(regularized, {"w": w}, {}, None).grads["w"], w)


def test_l2_keeps_the_checks_of_the_loss():
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = samfn.l2_regularized(samfn.supervised(model, torch.nn.MSELoss()), 0.1)
    state = samfn.init({**params, "x": torch.ones(1)}, buffers, optimizer=samfn.sgd())
    with pytest.raises(ValueError, match="x unexpected"):
        samfn.sam_update(state, None, loss_fn=loss_fn, optimizer=samfn.sgd(), lr=0.1)


def test_l2_spares_what_it_is_told_to():
    params = {"w": torch.tensor([3.0]), "b": torch.tensor([5.0])}

    def loss_fn(params, buffers, batch):
        return params["w"].sum() + params["b"].sum()

    spared = {"b": 1.0, "w": 1.0 + 0.1 * 3.0}
    for names in (["b"], ["b", "w"]):
        regularized = samfn.l2_regularized(loss_fn, 0.1, without=names)
        seen = evaluate(regularized, params, {}, None)
        expected = spared if names == ["b"] else {"b": 1.0, "w": 1.0}
        found = {name: grad.item() for name, grad in seen.grads.items()}
        assert found == pytest.approx(expected)
    state = samfn.init(params, {}, optimizer=samfn.sgd())
    unknown = samfn.l2_regularized(loss_fn, 0.1, without=["x"])
    with pytest.raises(ValueError, match="without: x is none of the parameters"):
        samfn.sam_update(state, None, loss_fn=unknown, optimizer=samfn.sgd(), lr=0.1)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda p, b, x: p["w"], ValueError, r"scalar loss, got shape \(2,\)"),
        (lambda p, b, x: torch.tensor(1), ValueError, "floating-point .* torch.int64"),
        (lambda p, b, x: None, TypeError, "got NoneType"),
        (lambda p, b, x: (p["w"].sum(), 3), TypeError, "got tuple"),
        (
            lambda p, b, x: (p["w"].sum(), samfn.Aux(None, {})),
            ValueError,
            "buffers and new buffers must have the same names: b missing",
        ),
        (
            lambda p, b, x: (p["w"].sum(), samfn.Aux(None, {"b": torch.ones(3)})),
            ValueError,
            r"same shapes: b: \(1,\) against \(3,\)",
        ),
    ],
)
def test_bad_losses_say_what_came(loss_fn, error, message):
    with pytest.raises(error, match=message):
        evaluate(loss_fn, PARAMS, {"b": torch.ones(1)}, None)


def test_negative_decay_is_an_error():
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        samfn.l2_regularized(lambda p, b, x: p["w"].sum(), -1)


def test_the_slope_of_a_criterion_is_taken_at_other_outputs_and_penalties_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    batch = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    params, buffers = samfn.split(model)
    there = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(there, batch[1]), there)
    leaves = {name: w.clone().requires_grad_() for name, w in params.items()}
    outputs = torch.func.functional_call(model, leaves, (batch[0],))
    found = torch.autograd.grad(outputs, [*leaves.values()], slope)
    expected = {
        name: grad + 0.1 * params[name] for name, grad in zip(leaves, found, strict=True)
    }
    for criterion in (F.cross_entropy, nn.CrossEntropyLoss(reduction="none")):
        plain = samfn.supervised(model, criterion)
        loss_fn = samfn.l2_regularized(plain, 0.1)
        given = params, buffers, batch
        for scale in (None, torch.tensor(64.0)):
            how = {"slope_at": there.detach(), "scale": scale}
            bent = samfn.evaluate(loss_fn, *given, **how)
            assert_close(bent.grads, expected, rtol=1e-12, atol=1e-14)
        known = samfn.evaluate(loss_fn, *given)
        assert_close(bent.loss, known.loss, rtol=1e-15, atol=0)
        same = samfn.evaluate(loss_fn, *given, slope_at=known.outputs)
        assert_close(same.grads, known.grads, rtol=1e-14, atol=1e-16)
        # The forward pass may be another function, as a compiled one.
        pure = samfn.Loss(loss_fn.function, criterion=loss_fn.criterion)
        bent = samfn.evaluate(pure, *given, slope_at=there.detach())
        assert_close(bent.grads, expected, rtol=1e-12, atol=1e-14)


def test_a_loss_that_is_not_a_criterion_of_outputs_alone_has_no_slope_elsewhere():
    model = nn.Linear(5, 3)
    batch = torch.randn(8, 5), torch.randint(3, (8,))

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = model.weight

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs * self.weight.norm(), targets)

    losses = [
        samfn.supervised(model, Penalised()),
        samfn.supervised(model, call=lambda model, batch: model(batch[0]).sum()),
        lambda params, buffers, batch: params["weight"].sum(),
    ]
    for loss_fn in losses:
        with pytest.raises(ValueError, match="not known to be a criterion of outputs"):
            samfn.evaluate(loss_fn, *samfn.split(model), batch, slope_at=torch.zeros(8, 3))
