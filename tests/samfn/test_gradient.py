"""One pass: a loss, its gradient, and what becomes of what it is given."""

import contextlib

import pytest
import torch
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
