import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import samfn
from samfn.gradient import GradientError, evaluate
from samfn.loss import Loss
from samfn.measure import hessian_product
from samfn.training import loop
from tests.reference import batches, small_network

PARAMS = {"w": torch.tensor([1.0, 2.0]), "unused": torch.tensor([5.0])}


def test_gradient_is_that_of_autograd():
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, torch.nn.functional.cross_entropy)
    batch = batches(1)[0]
    seen = evaluate(loss_fn, params, buffers, batch)
    loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    assert_close(seen.loss, loss.detach())
    assert_close(seen.grads, {n: p.grad for n, p in model.named_parameters()})


def test_a_bare_loss_keeps_the_buffers_and_an_unused_parameter_has_gradient_zero():
    buffers = {"b": torch.tensor(3.0)}
    seen = evaluate(lambda p, b, x: (p["w"] * x).sum(), PARAMS, buffers, torch.ones(2))
    assert_close(seen.buffers, buffers)
    assert seen.outputs is None
    assert_close(seen.grads, {"w": torch.ones(2), "unused": torch.zeros(1)})


def test_outputs_may_be_any_tree():
    def loss_fn(params, buffers, batch):
        outputs = {"hidden": [params["w"] * 2, None], "name": "x"}
        return params["w"].sum(), samfn.Aux(outputs, buffers)

    seen = evaluate(loss_fn, PARAMS, {}, None)
    assert_close(seen.outputs["hidden"][0], torch.tensor([2.0, 4.0]))
    assert seen.outputs["hidden"][1] is None
    assert seen.outputs["name"] == "x"


def test_nothing_that_is_returned_carries_a_graph():
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, torch.nn.functional.cross_entropy)
    seen = evaluate(loss_fn, params, buffers, batches(1)[0])
    tensors = [seen.loss, seen.outputs, *seen.buffers.values(), *seen.grads.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


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


def test_a_pure_function_has_the_same_gradient_without_torch_func_bit_for_bit():
    model = small_network(torch.float32)
    params, buffers = samfn.split(model)
    pure = samfn.supervised(model, torch.nn.functional.cross_entropy)
    assert pure.differentiating
    assert samfn.l2_regularized(pure, 0.1).differentiating
    batch = batches(1, torch.float32)[0]
    for loss_fn in (pure, samfn.l2_regularized(pure, 0.1)):
        seen = evaluate(loss_fn, params, buffers, batch)
        careful = evaluate(lambda *args, f=loss_fn: f(*args), params, buffers, batch)
        assert_close(seen, careful, rtol=0, atol=0)


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize(
    "constant", [torch.tensor(2.0), torch.tensor(2.0).requires_grad_()]
)
def test_a_loss_that_depends_on_no_parameter_is_an_error(pure, constant):
    def loss_fn(params, buffers, batch):
        return 1 * constant, samfn.Aux(batch, {"b": params["w"] * 3})

    def opened(*given):
        return contextlib.nullcontext(loss_fn(*given))

    loss = Loss(loss_fn, differentiating=opened if pure else None)
    with pytest.raises(GradientError, match=r"depends on none of the parameters \(w, u"):
        evaluate(loss, PARAMS, {"b": torch.ones(2)}, torch.ones(2))
    seen = evaluate(loss, PARAMS, {"b": torch.ones(2)}, torch.ones(2), wrt=["unused"])
    assert_close(seen.grads, {"unused": torch.zeros(1)})
    assert not seen.buffers["b"].requires_grad
    assert not any(w.requires_grad for w in PARAMS.values())


def test_a_function_that_changes_what_it_was_not_given_is_refused():
    model = small_network()
    params, buffers = samfn.split(model)

    def careless(params, buffers, batch):  # BatchNorm's statistics are the module's own.
        outputs = torch.func.functional_call(model, dict(params), batch[0])
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    with pytest.raises(RuntimeError, match="writes to a tensor that it was given"):
        evaluate(careless, params, buffers, batches(1)[0])
    assert model[1].num_batches_tracked <= 1


def test_gradients_are_taken_where_autograd_is_off():
    model = small_network()
    params, buffers = samfn.split(model)
    loss_fn = samfn.supervised(model, torch.nn.functional.cross_entropy)
    expected = evaluate(loss_fn, params, buffers, batches(1)[0])
    with torch.no_grad():
        seen = evaluate(loss_fn, params, buffers, batches(1)[0])
    assert_close(seen, expected, rtol=0, atol=0)


def assigning(params, buffers, batch):
    """Return a loss that puts what it computes into what it was given."""
    buffers["count"] = buffers["count"] + 1
    batch["x"] = batch["x"] - 1
    params["w"] = params["w"] * batch["more"].pop()
    return (params["w"] * batch["x"]).square().sum(), samfn.Aux(None, buffers)


def test_what_a_function_puts_into_a_mapping_the_next_pass_does_not_find():
    buffers = {"count": torch.tensor(0.0)}
    batch = {"x": torch.tensor([3.0, 4.0]), "more": [torch.tensor(2.0)]}
    optimizer = samfn.sgd()
    state = samfn.init({"w": torch.tensor([1.0, 2.0])}, buffers, optimizer=optimizer)
    new, metrics = samfn.sam_update(
        state, batch, loss_fn=assigning, optimizer=optimizer, rho=1e-4, lr=0.1
    )
    assert metrics.loss == (2 * 2) ** 2 + (4 * 3) ** 2
    assert_close(metrics.perturbed_loss, metrics.loss, rtol=1e-3, atol=0)
    assert new.buffers["count"] == 1
    assert state.buffers["count"] == 0
    assert batch["x"].tolist() == [3, 4]
    assert len(batch["more"]) == 1
    hessian_product(assigning, state.params, state.buffers, batch, state.params)
    assert batch["x"].tolist() == [3, 4]


WRITING = {
    "params": lambda p, b, x: (p["w"].mul_(2) * x).sum(),
    "buffers": lambda p, b, x: (p["w"] * b["count"].add_(1)).sum(),
    "batch": lambda p, b, x: (p["w"] * x.sub_(1)).sum(),
}


@pytest.mark.parametrize("name", WRITING)
def test_an_evaluation_whose_function_writes_to_what_it_was_given_is_an_error(name):
    given = {"w": torch.ones(2)}, {"count": torch.zeros(())}, torch.ones(2)
    with pytest.raises(RuntimeError, match="writes to a tensor that it was given"):
        evaluate(WRITING[name], *given, wrt=())
    given = {"w": torch.ones(2)}, {"count": torch.zeros(())}
    with pytest.raises(RuntimeError, match="writes to a tensor that it was given"):
        loop.evaluate(*given, [torch.ones(2)], loss_fn=WRITING[name])


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
