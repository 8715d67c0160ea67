import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samfn
from bench.measure import Live
from tests.reference import small_network


def problem(model=None):
    model = model or small_network()
    optimizer = samfn.sgd(momentum=0.9)
    loss_fn = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    batch = torch.randn(6, 2, 4, 4).double(), torch.randint(3, (6,))
    return state, batch, {"loss_fn": loss_fn, "optimizer": optimizer}


def gradient(loss_fn, params, buffers, batch):
    leaves = {name: w.clone().requires_grad_() for name, w in params.items()}
    loss, _ = loss_fn(leaves, buffers, batch)
    return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))


def both_gradients(state, batch, how, rho):
    """Return the clean gradient, the perturbed parameters, and the gradient there."""
    clean = gradient(how["loss_fn"], state.params, state.buffers, batch)
    there = samfn.perturb(state.params, clean, rho)
    return clean, there, gradient(how["loss_fn"], there, state.buffers, batch)


def test_layers_are_measured_one_by_one():
    state, batch, how = problem()
    new, metrics = samfn.sam_update(
        state, batch, rho=0.1, lr=0.1, method=samfn.watched(samfn.sam()), **how
    )
    clean, there, worst = both_gradients(state, batch, how, 0.1)
    for place, (name, w) in enumerate(state.params.items()):
        expected = {
            "gradient": clean[name].norm(),
            "perturbation": (there[name] - w).norm(),
            "update": (new.params[name] - w).norm(),
            "weight": w.norm(),
            "cosine": F.cosine_similarity(
                clean[name].flatten(), worst[name].flatten(), dim=0, eps=1e-30
            ),
        }
        for what, value in expected.items():
            found = getattr(metrics.layers, what)[place]
            torch.testing.assert_close(found, value, msg=f"{name} {what}")


def test_all_layers_together_are_the_global_norms():
    state, batch, how = problem()
    _, metrics = samfn.sam_update(
        state, batch, rho=0.1, lr=0.1, method=samfn.watched(samfn.sam()), **how
    )
    together = torch.linalg.vector_norm
    torch.testing.assert_close(together(metrics.layers.gradient), metrics.grad_norm)
    torch.testing.assert_close(
        together(metrics.layers.perturbation), metrics.perturbation_norm
    )


def test_watching_changes_nothing():
    state, batch, how = problem()
    for method in (samfn.sam(), samfn.gsam(), samfn.looksam(), samfn.momentum_sam()):
        start = samfn.init(
            state.params, state.buffers, optimizer=how["optimizer"], method=method
        )
        how |= {"method": method, "rho": 0.1, "lr": 0.1}
        one, seen = samfn.sam_update(start, batch, **how)
        how |= {"method": samfn.watched(method)}
        other, watched = samfn.sam_update(start, batch, **how)
        assert seen.layers is None
        assert watched.layers.gradient.shape == (len(state.params),)
        for name, w in one.params.items():
            assert torch.equal(w, other.params[name])


@pytest.mark.parametrize("size", [2, 4, 5])
def test_micro_batches_at_one_point_are_watched_as_the_whole_batch(size):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    state, (inputs, _), how = problem(model)
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    # A micro-batch of two in which nothing counts, and one of four in which half does.
    batch = inputs, torch.tensor([1, 2, 0, 0, 1, 0])
    how |= {"loss_fn": samfn.supervised(model, criterion), "rho": 0.1, "lr": 0.1}
    whole, parts = (
        samfn.sam_update(state, batch, method=samfn.watched(method), **how)[1].layers
        for method in (samfn.sam(), samfn.accumulated(samfn.sam(), size))
    )
    torch.testing.assert_close(parts, whole)


def test_watching_keeps_the_gradients_of_no_micro_batch():
    model, optimizer = nn.Linear(200, 100), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    batch = torch.randn(24, 200), torch.randn(24, 100)
    how = {"loss_fn": samfn.supervised(model, F.mse_loss), "optimizer": optimizer, "lr": 1}
    peaks = []
    for size in (12, 1):
        method = samfn.watched(samfn.accumulated(samfn.sam(), size))
        with Live() as live:
            samfn.sam_update(state, batch, method=method, **how)
        peaks.append(live.peak)
    assert peaks[1] < 1.3 * peaks[0]


def test_without_a_perturbation_both_gradients_are_one():
    state, batch, how = problem()
    _, metrics = samfn.sam_update(
        state, batch, rho=0, lr=0.1, method=samfn.watched(samfn.sam()), **how
    )
    assert metrics.layers.perturbation.tolist() == [0] * len(state.params)
    # A bias before BatchNorm has a gradient of rounding errors, and an angle with itself.
    torch.testing.assert_close(
        metrics.layers.cosine, torch.ones(len(state.params)).double()
    )


def test_a_layer_that_the_loss_does_not_use_has_cosine_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    state, batch, how = problem(model)
    _, metrics = samfn.sam_update(
        state, batch, rho=0.1, lr=0.1, method=samfn.watched(samfn.sam()), **how
    )
    place = [*state.params].index("unused")
    found = [float(values[place]) for values in metrics.layers[:-1]]
    assert found == pytest.approx([0, 0, 0, 2**0.5, 0])


def test_what_is_not_perturbed_has_no_perturbation():
    state, batch, how = problem()
    method = samfn.on_parameters(samfn.sam(), ["0.weight"])
    _, metrics = samfn.sam_update(
        state, batch, rho=0.1, lr=0.1, method=samfn.watched(method), **how
    )
    place = [*state.params].index("0.weight")
    moved = metrics.layers.perturbation.nonzero().flatten().tolist()
    assert moved == [place]


@pytest.mark.parametrize("plan", ["whole", "gradient"])
def test_a_compiled_step_measures_the_same(plan):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    state, batch, how = problem(nn.Sequential(*layers).double())
    how |= {"method": samfn.watched(samfn.sam())}
    _, eager = samfn.sam_update(state, batch, rho=0.1, lr=0.1, **how)
    step = samfn.compile_update(plan=plan, backend="aot_eager", **how)
    _, metrics = step(state, batch, rho=0.1, lr=0.1)
    # A bias before BatchNorm has a gradient of rounding errors, of any angle.
    known = eager.layers.gradient > 1e-9
    assert known.sum() == len(known) - 1
    for name, values in eager.layers._asdict().items():
        found = getattr(metrics.layers, name)
        if values.ndim:
            found, values = found[known], values[known]
        torch.testing.assert_close(found, values, atol=1e-6, rtol=1e-6, msg=name)


def test_the_cosine_of_all_layers_is_that_of_one_vector():
    state, batch, how = problem()
    _, metrics = samfn.sam_update(
        state, batch, rho=0.5, lr=0.1, method=samfn.watched(samfn.sam()), **how
    )
    clean, _, worst = both_gradients(state, batch, how, 0.5)
    flat = [torch.cat([g.flatten() for g in found.values()]) for found in (clean, worst)]
    expected = F.cosine_similarity(*flat, dim=0)
    torch.testing.assert_close(metrics.layers.overall_cosine, expected)
    assert not torch.isclose(expected, metrics.layers.cosine.mean())


def test_nothing_goes_around_what_watches():
    watched = samfn.watched(samfn.sam())
    for around in (
        lambda: samfn.every(watched, 2),
        lambda: samfn.accumulated(watched, 2),
        lambda: samfn.watched(watched),
    ):
        with pytest.raises(ValueError, match="goes inside of watched"):
            around()


def test_steps_in_between_are_watched_too():
    state, batch, how = problem()
    method = samfn.watched(samfn.every(samfn.sam(), 2))
    for perturbed in (True, False):
        state, metrics = samfn.sam_update(
            state, batch, rho=0.1, lr=0.1, method=method, **how
        )
        assert bool(metrics.layers.perturbation.any()) == perturbed


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("which", ["*", "0.*"])
@pytest.mark.parametrize("parts", ["none", "inside", "around"])
def test_of_two_losses_the_gradient_is_that_of_their_sum(parts, which, rho):
    def penalty(params, buffers, batch):
        return params["0.weight"].square().sum() + 3 * params["0.bias"].sum()

    state, batch, how = problem(nn.Sequential(nn.Conv2d(2, 3, 4), nn.Flatten()).double())
    method = samfn.on_parameters(samfn.sam(), which)
    method = samfn.accumulated(method, 4) if parts == "inside" else method
    method = samfn.on_loss(method, penalty)
    method = samfn.accumulated(method, 4) if parts == "around" else method
    how["method"] = samfn.watched(method)
    _, metrics = samfn.sam_update(state, batch, rho=rho, lr=0.1, **how)
    found = torch.linalg.vector_norm(metrics.layers.gradient)
    torch.testing.assert_close(found, metrics.grad_norm)
