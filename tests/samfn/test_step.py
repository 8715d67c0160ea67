from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import samfn
from samfn.methods import two_pass
from tests.reference import batches, overwriting_sam_step, small_network

SGD = samfn.sgd(0.9, weight_decay=5e-3)


def task(dtype=torch.float64, optimizer=SGD):
    model = small_network(dtype)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    return model, samfn.supervised(model, F.cross_entropy), state


def run(state, loss_fn, count=1, optimizer=SGD, **options):
    metrics = None
    for batch in batches(count):
        state, metrics = samfn.sam_update(
            state, batch, loss_fn=loss_fn, optimizer=optimizer, **{"lr": 0.1} | options
        )
    return state, metrics


def test_200_steps_equal_a_sam_that_overwrites_weights():
    _, loss_fn, state = task()
    twin = small_network()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    for step, batch in enumerate(batches(200)):
        optimizer.param_groups[0]["lr"] = lr = 0.05 * (1 - step / 250)
        expected = overwriting_sam_step(
            twin, optimizer, lambda m, b=batch: F.cross_entropy(m(b[0]), b[1]), 0.05
        )
        state, metrics = samfn.sam_update(
            state, batch, loss_fn=loss_fn, optimizer=SGD, rho=0.05, lr=lr
        )
        assert metrics.loss.item() == pytest.approx(expected, rel=1e-10)
    close = {"rtol": 0, "atol": 1e-10}
    assert_close(state.params, dict(twin.named_parameters()), **close)
    assert_close(state.buffers, dict(twin.named_buffers()), **close)
    momentum = {
        name: optimizer.state[p]["momentum_buffer"] for name, p in twin.named_parameters()
    }
    assert_close(state.opt_state["momentum_buffer_list"], momentum, **close)
    assert state.step == 200


@pytest.mark.parametrize("rho", [0, 0.0])
@pytest.mark.parametrize("method", [samfn.sam(), samfn.asam()])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(rho, method):
    _, loss_fn, state = task()
    twin = small_network()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    for images, labels in batches(5):
        optimizer.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        optimizer.step()
    state, metrics = run(state, loss_fn, 5, rho=rho, method=method)
    for name, parameter in twin.named_parameters():
        assert torch.equal(state.params[name], parameter)
    for name, buffer in twin.named_buffers():
        assert torch.equal(state.buffers[name], buffer)
    assert metrics.perturbation_norm == 0


def test_rho_zero_as_a_tensor_takes_the_same_step():
    _, loss_fn, state = task()
    number, _ = run(state, loss_fn, 3, rho=0.0)
    tensor, _ = run(state, loss_fn, 3, rho=torch.tensor(0.0))
    assert_close(tensor, number, rtol=0, atol=0)


def test_statistics_are_those_of_the_clean_pass_and_counted_once():
    model, loss_fn, state = task()
    state, _ = run(state, loss_fn, rho=0.5)
    model(batches(1)[0][0])
    assert_close(dict(state.buffers), dict(model.named_buffers()), rtol=0, atol=0)
    assert state.buffers["1.num_batches_tracked"] == 1


def test_metrics_are_of_the_clean_pass():
    model, loss_fn, state = task()
    images, labels = batches(1)[0]
    outputs = model(images)
    loss = F.cross_entropy(outputs, labels)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    _, metrics = run(state, loss_fn, rho=0.3)
    assert_close(metrics.loss, loss.detach())
    assert_close(metrics.outputs, outputs.detach())
    assert_close(metrics.grad_norm, gradient.norm())
    assert metrics.perturbation_norm.item() == pytest.approx(0.3)
    assert metrics.perturbed_loss > metrics.loss
    assert metrics.descent_norm != metrics.grad_norm
    assert metrics.finite


@given(st.floats(1e-3, 1.0), st.integers(0, 3))
def test_arguments_stay_and_results_are_new(rho, seed):
    _, loss_fn, state = task()
    torch.manual_seed(seed)
    batch = (torch.randn(4, 2, 4, 4).double(), torch.randint(3, (4,)))
    copy = pytree.tree_map(torch.clone, (state, batch))
    new, _ = samfn.sam_update(state, batch, loss_fn=loss_fn, optimizer=SGD, rho=rho, lr=0.1)
    assert_close((state, batch), copy, rtol=0, atol=0)
    old_places = {t.data_ptr() for t in pytree.tree_leaves(state)}
    new_places = {t.data_ptr() for t in pytree.tree_leaves(new)}
    assert not old_places & new_places


def test_no_graph_grows_from_step_to_step():
    _, loss_fn, state = task()
    state, metrics = run(state, loss_fn, 3)
    leaves = [x for x in pytree.tree_leaves((state, metrics)) if x is not None]
    assert all(leaf.grad_fn is None and not leaf.requires_grad for leaf in leaves)


def test_order_of_names_does_not_matter():
    _, loss_fn, state = task()
    reordered = state._replace(params=OrderedDict(reversed(state.params.items())))
    expected, _ = run(state, loss_fn)
    result, _ = run(reordered, loss_fn)
    assert_close(dict(result.params), dict(expected.params))


def test_an_unused_parameter_moves_by_weight_decay_alone():
    params = {"used": torch.ones(2), "unused": torch.ones(2)}
    optimizer = samfn.sgd(0.0, weight_decay=0.5)
    state = samfn.init(params, {}, optimizer=optimizer)
    state, _ = samfn.sam_update(
        state,
        None,
        loss_fn=lambda p, b, x: p["used"].sum(),
        optimizer=optimizer,
        lr=0.1,
    )
    assert_close(state.params["unused"], torch.full((2,), 0.95))


def test_frozen_parameters_do_not_move():
    model = small_network()
    model[0].weight.requires_grad_(False)
    state = samfn.init(*samfn.split(model), optimizer=SGD)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    new, _ = run(state, loss_fn, 2)
    assert torch.equal(new.buffers["0.weight"], model[0].weight)
    assert not torch.equal(new.params["3.weight"], state.params["3.weight"])


def test_a_loss_function_needs_no_module():
    params = {"w": torch.tensor([1.0, 2.0])}
    state = samfn.init(params, {}, optimizer=samfn.sgd())
    for _ in range(200):
        state, _ = samfn.sam_update(
            state,
            torch.tensor([3.0, -1.0]),
            loss_fn=lambda p, b, target: (p["w"] - target).square().sum(),
            optimizer=samfn.sgd(),
            rho=0.01,
            lr=0.01,
        )
    assert_close(state.params["w"], torch.tensor([3.0, -1.0]), rtol=0, atol=0.02)


def poison(place):
    """Return a loss whose value or gradient is not finite, in one of the passes."""
    passes = []

    def loss_fn(params, buffers, batch):
        passes.append(None)
        w = params["w"]
        loss = (w * w).sum()
        if len(passes) == (1 if "clean" in place else 2):
            if "loss" in place:
                loss = loss * float("nan")
            else:  # sqrt has an infinite slope, and no value, at 0
                loss = loss + (w[0] - w[0].detach()).sqrt()
        return loss, samfn.Aux(None, {"seen": buffers["seen"] + 1})

    return loss_fn


@pytest.mark.parametrize(
    "place", ["clean loss", "clean gradient", "perturbed loss", "perturbed gradient"]
)
@pytest.mark.parametrize("optimizer", [samfn.sgd(), samfn.adamw()])
def test_a_step_that_is_not_finite_changes_no_tensor_and_is_counted(place, optimizer):
    params, buffers = {"w": torch.tensor([3.0, 4.0])}, {"seen": torch.tensor(0)}
    state = samfn.init(params, buffers, optimizer=optimizer)
    state, metrics = samfn.sam_update(
        state,
        None,
        loss_fn=poison("perturbed loss"),  # which a step with rho 0 does not have
        optimizer=optimizer,
        lr=0.1,
        rho=0.0,
    )
    assert metrics.finite
    assert state.buffers["seen"] == 1
    new, metrics = samfn.sam_update(
        state, None, loss_fn=poison(place), optimizer=optimizer, lr=0.1
    )
    assert not metrics.finite
    assert new.step == state.step + 1 == 2
    assert (new.skipped, new.skipped_in_a_row) == (1, 1)
    for before, after in zip(
        pytree.tree_leaves(state[:4]), pytree.tree_leaves(new[:4]), strict=True
    ):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("params", "buffers", "error", "message"),
    [
        ({}, {}, ValueError, "at least one tensor, got none"),
        ([torch.ones(1)], {}, TypeError, "params must map names .* got list"),
        (
            {"w": 1.0},
            {},
            TypeError,
            r"params\['w'\] must be a tensor, got <class 'float",
        ),
        ({"w": torch.ones(1)}, {"b": 1}, TypeError, r"buffers\['b'\] must be a tensor"),
        ({"w": torch.ones(1, dtype=torch.int64)}, {}, ValueError, "w is torch.int64"),
        (
            {"w": torch.ones(1, requires_grad=True)},
            {},
            ValueError,
            "must not require grad, w does: detach",
        ),
        ({"w": torch.ones(1)}, {"w": torch.ones(1)}, ValueError, r"both hold \['w'\]"),
        (
            {"w": torch.ones(1), "v": torch.ones(1, device="meta")},
            {},
            ValueError,
            "on one device, v is on meta, others on cpu",
        ),
        (
            {"w": torch.ones(1)},
            {"b": torch.ones(1, device="meta")},
            ValueError,
            "on one device, b is on meta, others on cpu",
        ),
    ],
)
def test_states_that_cannot_be_trained_are_errors(params, buffers, error, message):
    with pytest.raises(error, match=message):
        samfn.init(params, buffers, optimizer=samfn.sgd())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be finite and at least 0, got -1.0"),
        ({"rho": torch.ones(2)}, ValueError, r"rho .* 0-d tensor, got shape \(2,\)"),
        ({"lr": "fast"}, TypeError, "lr must be a number or a 0-d tensor, got str"),
        ({"lr": float("inf")}, ValueError, "lr must be finite .* got inf"),
        ({"optimizer": samfn.adam()}, ValueError, "made by another optimizer"),
    ],
)
def test_bad_arguments_of_a_step_are_errors(options, error, message):
    _, loss_fn, state = task()
    with pytest.raises(error, match=message):
        run(state, loss_fn, **options)


def test_another_optimizer_is_refused_before_anything_is_computed():
    state = samfn.init({"w": torch.ones(2)}, {}, optimizer=samfn.sgd())
    seen = []

    def loss_fn(params, buffers, batch):
        seen.append(batch)
        return params["w"].sum()

    options = {"loss_fn": loss_fn, "optimizer": samfn.adam(), "lr": 0.1}
    with pytest.raises(ValueError, match="made by another optimizer"):
        samfn.sam_update(state, "batch", **options)
    assert not seen
    samfn.sam_update(state, "batch", **options | {"optimizer": samfn.sgd()})
    assert seen == ["batch", "batch"]


def test_state_that_requires_grad_is_an_error():
    _, loss_fn, state = task()
    params = {name: w.requires_grad_() for name, w in state.params.items()}
    with pytest.raises(ValueError, match=r"must not require grad, 0.weight does"):
        run(state._replace(params=params), loss_fn)


def test_two_runs_are_equal_bit_for_bit():
    results = []
    for _ in range(2):
        _, loss_fn, state = task()
        results.append(run(state, loss_fn, 10)[0])
    assert_close(*results, rtol=0, atol=0)


def test_sharpness_aware_steps_lower_the_loss():
    _, loss_fn, state = task()
    first = run(state, loss_fn)[1].loss
    batch = batches(1)[0]
    for _ in range(50):
        state, metrics = samfn.sam_update(
            state, batch, loss_fn=loss_fn, optimizer=SGD, rho=0.05, lr=0.1
        )
    assert metrics.loss < 0.1 * first


@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_of_one_length_may_be_a_tree(size):
    params = {"w": torch.ones(3)}
    optimizer = samfn.sgd()
    state = samfn.init(params, {}, optimizer=optimizer)
    batch = {"x": torch.randn(4, 3), "more": [torch.randn(4)]}

    def loss_fn(params, buffers, batch):
        return ((batch["x"] @ params["w"] - batch["more"][0]) ** 2).mean()

    method = samfn.accumulated(samfn.sam(), size)
    options = {"loss_fn": loss_fn, "optimizer": optimizer, "lr": 0.1}
    whole, _ = samfn.sam_update(state, batch, **options)
    parts, _ = samfn.sam_update(state, batch, method=method, **options)
    assert_close(parts.params, whole.params)


def test_models_of_any_kind_can_be_trained():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
    state = samfn.init(*samfn.split(model), optimizer=samfn.adamw())
    inputs, targets = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    state, metrics = samfn.sam_update(
        state,
        (inputs, targets),
        loss_fn=samfn.supervised(model, F.mse_loss),
        optimizer=samfn.adamw(),
        lr=1e-3,
    )
    assert metrics.finite
    assert metrics.perturbation_norm.item() == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize("name", ["rho", "lr"])
def test_a_dial_that_requires_grad_leaves_no_graph_behind(name):
    def loss_fn(params, buffers, batch):
        return params["w"].pow(4).sum()

    dials = {"rho": torch.tensor(0.1), "lr": torch.tensor(0.1)}
    dials[name].requires_grad_()
    optimizer = samfn.muon()
    state = samfn.init({"w": torch.ones(2, 2)}, {}, optimizer=optimizer)
    for _ in range(2):
        state, metrics = samfn.sam_update(
            state, None, loss_fn=loss_fn, optimizer=optimizer, **dials
        )
    assert not metrics.perturbation_norm.requires_grad


@pytest.mark.parametrize("bad", [False, True])
def test_the_norm_of_the_descent_is_that_of_all_it_descends_with(bad):
    # The first tensor descends with the clean gradient, the second with the perturbed one.
    def loss_fn(params, buffers, batch):
        return params["a"].square().sum() + params["b"].pow(4).sum()

    def combine(clean, worst):
        second = worst["b"] * (float("nan") if bad else 1.0)
        return {"a": clean["a"], "b": second}, None

    method, optimizer = two_pass(combine=combine), samfn.sgd()
    start = {"a": torch.ones(2), "b": torch.ones(2)}
    state = samfn.init(start, {}, optimizer=optimizer, method=method)
    common = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    after, metrics = samfn.sam_update(state, None, **common, rho=0.5, lr=0.1)
    assert bool(metrics.finite) is not bad
    if bad:
        assert_close(after.params, start, rtol=0, atol=0)
    else:
        moved = [(start[name] - after.params[name]) / 0.1 for name in start]
        assert_close(metrics.descent_norm, torch.cat(moved).norm())
        assert metrics.descent_norm > metrics.grad_norm
    plain, seen = samfn.sam_update(state, None, **common, rho=0, lr=0.1)
    assert seen.descent_norm is seen.grad_norm
    assert plain.step == 1


@pytest.mark.parametrize("dial", ["rho", "lr"])
def test_a_dial_that_cannot_be_read_and_is_not_finite_changes_no_tensor(dial):
    state = samfn.init({"w": torch.ones(3)}, {}, optimizer=SGD)

    def flat(params, buffers, batch):
        return (params["w"] * 0).sum()

    @torch.compile(backend="eager", fullgraph=True)
    def step(rho, lr):
        return samfn.sam_update(state, 0, loss_fn=flat, optimizer=SGD, rho=rho, lr=lr)

    dials = {"rho": torch.tensor(0.1), "lr": torch.tensor(0.1)}
    assert step(**dials)[1].finite
    new, metrics = step(**dials | {dial: torch.tensor(float("nan"))})
    assert not metrics.finite
    assert new.skipped == 1
    assert_close(new[:4], state[:4], rtol=0, atol=0)


@pytest.mark.parametrize("slope", [1e18, 1e20])
def test_a_gradient_is_finite_if_its_norm_is(slope):
    state = samfn.init({"w": torch.zeros(4)}, {}, optimizer=SGD)

    def steep(params, buffers, batch):
        return slope * params["w"].sum()

    given = {"loss_fn": steep, "optimizer": SGD, "lr": 1e-20}
    new, metrics = samfn.sam_update(state, None, **given)
    assert metrics.finite == (slope < 1e19)
    assert torch.equal(new.params["w"], state.params["w"]) == (slope > 1e19)
