"""Each method is what its paper says, and its neighbour where it should be."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import samfn
from samfn import tree
from samfn.gradient import evaluate, evaluator
from samfn.loss import Aux
from samfn.methods.base import Point
from samfn.perturb import filter_noise
from tests import oracle
from tests.reference import Counted, descent_of

STEPS, RHO, LR = 8, 0.3, 0.2


def distance(outputs, batch):
    return (outputs - batch[1]).square().sum(1)


def criterion_of(outputs_of, criterion=distance):
    """Return a loss that tells its outputs and its criterion apart."""

    def function(params, buffers, batch):
        outputs = outputs_of(params, batch)
        losses = criterion(outputs, batch)
        return losses.mean(), Aux(outputs, buffers, losses)

    return samfn.Loss(function, criterion=criterion)


def units(params, batch):
    return (batch[0] @ params["weight"] + params["bias"]).tanh()


# The loss of `tests/oracle.py`, and that of each row.
layer = criterion_of(units)


def problem(dtype=torch.float64, rows=10):
    """Return parameters and batches, different ones for every step."""
    source = np.random.default_rng(0)
    w = source.normal(size=oracle.SPLIT + oracle.UNITS)
    data = [
        (
            source.normal(size=(rows, oracle.INPUTS)),
            source.normal(size=(rows, oracle.UNITS)),
        )
        for _ in range(STEPS)
    ]
    batches = [tuple(torch.tensor(part, dtype=dtype) for part in pair) for pair in data]
    return w, data, as_params(w, dtype), batches


def as_params(w, dtype=torch.float64):
    weight = w[: oracle.SPLIT].reshape(oracle.INPUTS, oracle.UNITS)
    return {
        "weight": torch.tensor(weight, dtype=dtype),
        "bias": torch.tensor(w[oracle.SPLIT :], dtype=dtype),
    }


def train(method, optimizer=None, rho=RHO, loss_fn=layer, **how):
    """Return the state and the metrics after each step."""
    optimizer = optimizer or samfn.sgd(0.0)
    _, _, params, batches = problem(**how)
    state = samfn.init(params, {}, optimizer=optimizer, method=method)
    trace = []
    for batch in batches:
        common = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
        state, metrics = samfn.sam_update(state, batch, **common, rho=rho, lr=LR)
        trace.append((state, metrics))
    return trace


def other(params, buffers, batch):
    """Return another loss of the batch, as that of its rows that are to be forgotten."""
    return layer(params, buffers, oracle.part(*batch))[0]


ORACLES = {
    "sam": (samfn.sam(), oracle.sam),
    "asam": (samfn.asam(), oracle.asam),
    "asam everywhere": (
        samfn.asam(0.0, adapts=samfn.everything),
        oracle.asam_everywhere,
    ),
    "fisher_sam": (samfn.fisher_sam(0.3), oracle.fisher_sam),
    "gsam": (samfn.gsam(), oracle.gsam),
    "wsam": (samfn.wsam(0.8), oracle.wsam),
    "ssam": (samfn.ssam(), oracle.ssam),
    "awp": (samfn.awp(), oracle.awp),
    "s2_sam": (samfn.s2_sam(), oracle.s2_sam),
    "rwp": (samfn.rwp(0.3), oracle.rwp),
    "rwp alone": (samfn.rwp(1.0), partial(oracle.rwp, lam=1.0)),
    "usam": (samfn.usam(), oracle.usam),
    "unified_sam": (samfn.unified_sam(), oracle.unified_sam),
    "unified_sam 0.3": (
        samfn.unified_sam(0.3),
        partial(oracle.unified_sam, lam=0.3),
    ),
    "le_sam": (samfn.le_sam(0.35), oracle.le_sam),
    "light_sam": (samfn.light_sam(), oracle.light_sam),
    "sagm": (samfn.sagm(0.1), oracle.sagm),
    "friendly_sam": (samfn.friendly_sam(0.7, 0.6), oracle.friendly_sam),
    "vasso": (samfn.vasso(0.3), oracle.vasso),
    "momentum_sam": (samfn.momentum_sam(), oracle.momentum_sam),
    "looksam": (samfn.looksam(3), oracle.looksam),
    "multi_step_sam": (samfn.multi_step_sam(3), oracle.multi_step_sam),
    "esam": (samfn.esam(1.0, 0.4), oracle.esam),
    "ae_sam": (samfn.ae_sam(STEPS), oracle.ae_sam),
    "functional_sam": (samfn.functional_sam(), oracle.functional_sam),
    "preconditioned": (samfn.sam(samfn.preconditioned(0.7)), oracle.preconditioned),
    "functional and preconditioned": (
        samfn.functional_sam(samfn.preconditioned(0.7)),
        oracle.functional_preconditioned,
    ),
    "accumulated functional_sam": (
        samfn.accumulated(samfn.functional_sam(), 4),
        oracle.functional_sam,
    ),
    "spectral_sam": (samfn.spectral_sam(), oracle.spectral_sam),
    "ascent_on": (samfn.ascent_on(samfn.sam(), other), oracle.ascent_on),
    "on_loss": (samfn.on_loss(samfn.sam(), other), oracle.on_loss),
    "on_parameters": (samfn.on_parameters(samfn.sam(), ["weight"]), oracle.on_weights),
    "every": (samfn.every(samfn.sam(), 3), oracle.every_third),
    "sub_batch_ascent": (samfn.sub_batch_ascent(samfn.sam()), oracle.quarter_ascent),
    "per_micro_batch": (samfn.per_micro_batch(samfn.sam(), 4), oracle.of_fours),
    "accumulated": (samfn.accumulated(samfn.gsam(), 4), oracle.gsam),
    "same_randomness": (samfn.same_randomness(samfn.sam()), oracle.sam),
    "loss_scaled": (samfn.loss_scaled(samfn.sam()), oracle.sam),
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_training_is_that_of_the_papers_equations_in_numpy(name):
    method, step_of = ORACLES[name]
    w, data, _, _ = problem()
    torch.manual_seed(0)
    trace = train(method)
    torch.manual_seed(0)
    memory = {"normal": lambda *shape: torch.randn(shape, dtype=torch.float64).numpy()}
    for step, ((state, _), (x, y)) in enumerate(zip(trace, data, strict=True)):
        found = step_of(w, x, y, RHO, memory, step)
        grads, beside = found if isinstance(found, tuple) else (found, 0.0)
        w = w - LR * grads - LR * beside
        assert_close(state.params, as_params(w), rtol=1e-6, atol=1e-7)
    for branches in ("sharp", "capped"):  # Both were taken.
        assert {True, False} == set(memory.get(branches, (True, False)))


def test_every_method_has_an_oracle():
    makers = {
        name
        for name in samfn.methods.__all__
        if inspect.isfunction(maker := getattr(samfn.methods, name))
        and name not in ("two_pass", "watched")  # It changes nothing of a step.
        and inspect.signature(maker).return_annotation is samfn.Method
    }
    assert makers <= ORACLES.keys()


@pytest.mark.parametrize("name", ORACLES)
def test_each_differs_from_sam_and_from_the_base_optimizer(name):
    if name in ("sam", "same_randomness", "loss_scaled"):
        pytest.skip("these are SAM, and the oracle above is not the base optimizer")
    last = train(ORACLES[name][0])[-1][0].params
    for other, rho in ((samfn.sam(), RHO), (samfn.sam(), 0.0)):
        assert not torch.allclose(
            last["weight"], train(other, rho=rho)[-1][0].params["weight"], rtol=1e-4
        )


@pytest.mark.parametrize("name", sorted(ORACLES.keys() - {"on_loss"}))  # Of two losses.
@pytest.mark.parametrize("optimizer", [samfn.sgd(), samfn.adamw()])
def test_rho_zero_is_the_base_optimizer(name, optimizer):
    loss_fn = Counted(layer)
    if name == "per_micro_batch" or name.startswith("accumulated"):
        close, passes = {"rtol": 1e-12, "atol": 1e-14}, 3  # Sums of parts round.
    else:
        close, passes = {"rtol": 0, "atol": 0}, 1
    state = train(ORACLES[name][0], optimizer, 0.0, loss_fn)[-1][0]
    expected = train(samfn.sam(), optimizer, 0.0)[-1][0]
    assert loss_fn.count == passes * STEPS
    assert_close(state.params, expected.params, **close)
    assert_close(state.opt_state, expected.opt_state, **close)


IDENTITIES = {
    "gsam without alpha": samfn.gsam(0.0),
    "friendly without sigma": samfn.friendly_sam(0.0),
    "vasso with all of the new gradient": samfn.vasso(1.0),
    "looksam at every step": samfn.looksam(1),
    "one ascent step": samfn.multi_step_sam(1),
    "fisher without information": samfn.fisher_sam(0.0),
    "unified, all normalised": samfn.unified_sam(1.0),
    "asam without a weight that adapts": samfn.asam(adapts=lambda name, w: False),
    "esam of all weights and examples": samfn.esam(1.0, 1.0),
    "micro-batch of the whole batch": samfn.per_micro_batch(samfn.sam(), 10),
    "accumulated": samfn.accumulated(samfn.sam(), 3),
    "every 1": samfn.every(samfn.sam(), 1),
    "ascent on all": samfn.sub_batch_ascent(samfn.sam(), 1.0),
    "on all parameters": samfn.on_parameters(samfn.sam(), "*"),
    "gate that is always open": samfn.ae_sam(STEPS, -1e9, -1e9),
    "scaled": samfn.loss_scaled(samfn.sam()),
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("optimizer", [samfn.sgd(0.0), samfn.sgd(0.9), samfn.adamw()])
def test_it_is_sam(name, optimizer):
    state, metrics = train(IDENTITIES[name], optimizer)[-1]
    expected, seen = train(samfn.sam(), optimizer)[-1]
    assert_close(state.params, expected.params, rtol=1e-9, atol=1e-12)
    assert_close(metrics.loss, seen.loss, rtol=1e-9, atol=0)
    assert_close(metrics.perturbation_norm, seen.perturbation_norm, rtol=1e-9, atol=0)


def test_wsam_of_one_half_is_sam_with_sgd_and_not_with_momentum():
    for momentum, same in ((0.0, True), (0.9, False)):
        optimizer = samfn.sgd(momentum)
        found = train(samfn.wsam(0.5), optimizer)[-1][0].params["weight"]
        expected = train(samfn.sam(), optimizer)[-1][0].params["weight"]
        assert torch.allclose(found, expected, rtol=1e-9) == same


def test_wsam_clips_both_gradients_before_it_subtracts_them():
    def steep(params, buffers, batch):
        return 50 * params["w"].square().sum()

    clipped = samfn.wsam(0.9, max_norm=0.1)
    seen = descent_of(clipped, steep, {"w": torch.tensor([1.0])})
    assert_close(seen.grads["w"], torch.tensor([0.1]))  # Of 100 and 110, both 0.1.
    assert_close(seen.beside["w"], torch.tensor([0.0]))
    with pytest.raises(ValueError, match="moves past the optimizer would escape its clip"):
        train(samfn.wsam(), samfn.clipped(samfn.sgd(), 0.1))
    apart = samfn.grouped(samfn.sgd(), (["bias"], samfn.clipped(samfn.sgd(), 0.1)))
    with pytest.raises(ValueError, match="wsam"):
        train(samfn.wsam(), apart)
    own = samfn.methods.two_pass(combine=lambda clean, worst: (dict(clean), dict(worst)))
    with pytest.raises(ValueError, match="would escape its clip"):
        train(own, samfn.clipped(samfn.sgd(), 0.1))


DECAY = 0.1


def decaying(step_of):
    """Return the weights after a training by hand, by equations with a momentum."""
    w, data, _, _ = problem()
    v = np.zeros_like(w)
    for x, y in data:
        v = 0.9 * v + step_of(w, v, x, y)
        w = w - LR * v
    return as_params(w)


def test_momentum_sam_with_decay_in_the_loss_has_it_in_its_momentum_as_the_official_code():
    def step_of(w, v, x, y):
        ahead = w - RHO * oracle.unit(v) if v.any() else w
        return oracle.slope(ahead, x, y) + DECAY * ahead

    loss_fn = samfn.l2_regularized(layer, DECAY)
    last = train(samfn.momentum_sam(0.9), samfn.sgd(0.9), loss_fn=loss_fn)[-1][0].params
    assert_close(last, decaying(step_of), rtol=1e-9, atol=1e-12)
    apart = train(samfn.momentum_sam(0.9), samfn.sgd(0.9, weight_decay=DECAY))
    assert not torch.allclose(last["weight"], apart[-1][0].params["weight"], rtol=1e-3)


def test_a_regulariser_is_descended_and_not_climbed():
    def step_of(w, v, x, y):
        worst = w + RHO * oracle.unit(oracle.slope(w, x, y))
        return oracle.slope(worst, x, y) + DECAY * worst

    loss_fn, method = (
        samfn.l2_regularized(layer, DECAY),
        samfn.ascent_on(samfn.sam(), layer),
    )
    last = train(method, samfn.sgd(0.9), loss_fn=loss_fn)[-1][0].params
    assert_close(last, decaying(step_of), rtol=1e-9, atol=1e-12)
    climbed = train(samfn.sam(), samfn.sgd(0.9), loss_fn=loss_fn)[-1][0].params
    assert not torch.allclose(last["weight"], climbed["weight"], rtol=1e-3)


def weighted(weights):
    """Return the mean of the losses of rows, each times its weight, as in Focal-SAM."""

    def loss_fn(params, buffers, batch):
        _, aux = layer(params, buffers, batch)
        return (weights * aux.losses).mean(), Aux("seen", buffers)

    return loss_fn


def test_two_parts_of_a_loss_are_descended_together_and_one_of_them_perturbed():
    shares = torch.linspace(0, 0.5, 10, dtype=torch.float64)
    method = samfn.on_loss(samfn.sam(), weighted(shares))
    for rho in (0.0, RHO):
        trace = train(method, rho=rho, loss_fn=weighted(1 - shares))
        whole, seen = train(samfn.sam(), rho=0.0)[0]
        assert_close(trace[0][1].loss, seen.loss)
        assert_close(trace[0][1].grad_norm, seen.grad_norm)
        assert trace[0][1].outputs == "seen"
        same = torch.allclose(trace[0][0].params["weight"], whole.params["weight"])
        assert same == (rho == 0)


def test_what_is_told_of_an_ascent_on_another_loss_is_of_the_steps_own():
    method, (w, data, _, _) = samfn.ascent_on(samfn.sam(), other), problem()
    _, metrics = train(method, loss_fn=weighted(1.0))[0]
    part = oracle.slope(w, *oracle.part(*data[0]))
    ahead = oracle.loss(w + RHO * oracle.unit(part), *data[0]).mean()
    assert_close(metrics.loss.item(), ahead)
    assert_close(metrics.perturbed_loss.item(), ahead)
    assert metrics.outputs == "seen"
    assert_close(metrics.grad_norm.item(), np.sqrt(part @ part))


def test_an_ascent_on_another_loss_needs_a_method_that_only_climbs_by_it():
    compares = samfn.gsam(), samfn.wsam(), samfn.looksam(2), samfn.ae_sam(9), samfn.rwp()
    for method in compares:
        with pytest.raises(ValueError, match="also descends with the gradient"):
            train(samfn.ascent_on(method, other))
    for method in (samfn.momentum_sam(), samfn.rwp(1.0)):
        with pytest.raises(ValueError, match="has no pass that looks up the slope"):
            train(samfn.ascent_on(method, other))
    with pytest.raises(ValueError, match="and on the step's own loss"):
        train(samfn.ascent_on(samfn.esam(), other))


@pytest.mark.parametrize("plan", ["whole", "gradient", "loss"])
def test_compiled_passes_are_each_of_its_own_loss(plan):
    climbing = samfn.ascent_on(samfn.unified_sam(), weighted(0.3))
    method, optimizer = samfn.on_loss(climbing, other), samfn.sgd()
    given = {"loss_fn": layer, "optimizer": optimizer, "method": method}
    step = samfn.compile_update(**given, plan=plan, backend="eager")
    _, _, params, batches = problem()
    state = expected = samfn.init(params, {}, optimizer=optimizer, method=method)
    for batch in batches[:3]:
        expected, seen = samfn.sam_update(expected, batch, **given, rho=RHO, lr=LR)
        state, metrics = step(state, batch, rho=RHO, lr=LR)
    assert step.plan == plan
    assert_close(state, expected)
    assert_close(metrics, seen)


def test_momentum_sam_perturbs_along_the_momentum_of_sgd():
    for state, _ in train(samfn.momentum_sam(0.7), samfn.sgd(0.7)):
        own = state.opt_state["momentum_buffer_list"]
        assert_close(dict(state.method_state["momentum"]), dict(own))


@pytest.mark.parametrize("name", ["sam", "asam everywhere"])
def test_asam_and_only_asam_is_unchanged_by_rescaling_a_weight(name):
    # x -> a, y -> b in L(ab): scaling a up and b down leaves the function as it is.
    def product(params, buffers, batch):
        return (params["a"] * params["b"] - batch).square().sum()

    def sharpness(scale):
        params = {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
        params = {"a": params["a"] * scale, "b": params["b"] / scale}
        method = ORACLES[name][0]
        return descent_of(method, product, params, torch.tensor(1.0)).perturbed_loss

    assert torch.isclose(sharpness(1.0), sharpness(8.0)) == (name != "sam")


# Gradients of a whole batch in STEPS steps, forward passes, and rows differentiated.
PASSES = {
    "sam": (16, 0),
    "asam": (16, 0),
    "fisher_sam": (16, 0),
    "gsam": (16, 0),
    "wsam": (16, 0),
    "friendly_sam": (16, 0),
    "vasso": (16, 0),
    "momentum_sam": (8, 0),
    "functional_sam": (16, 0),
    "preconditioned": (16, 0),
    **dict.fromkeys(["usam", "unified_sam", "le_sam", "light_sam", "sagm"], (16, 0)),
    **dict.fromkeys(["ssam", "awp", "rwp"], (16, 0)),
    **dict.fromkeys(["momentum_sam", "s2_sam", "rwp alone"], (8, 0)),
    "looksam": (8 + 3, 0),
    "multi_step_sam": (32, 0),
    "esam": (16, 8),
    "every": (8 + 3, 0),
}


class Tally:
    """Counts gradients and forward passes."""

    def __init__(self):
        self.gradients, self.forwards = 0, 0

    def __call__(self, params, buffers, batch, *, wrt=None, **how):
        if wrt is not None and not wrt:
            self.forwards += 1
        else:
            self.gradients += 1
        return evaluate(layer, params, buffers, batch, wrt=wrt, **how)


def tally(method, steps):
    _, _, params, batches = problem()
    seen, memory = Tally(), method.init(params, params)
    for step in range(steps):
        kind = method.kind(step) if method.kind else None
        batch = batches[step % STEPS]
        point = Point(params, {}, batch, RHO, tuple(params), kind=kind)
        _, memory = method.descent(seen, point, memory)
    return seen


@pytest.mark.parametrize("name", PASSES)
def test_gradients_are_as_many_as_promised(name):
    seen = tally(ORACLES[name][0], STEPS)
    assert (seen.gradients, seen.forwards) == PASSES[name]


@pytest.mark.parametrize("method", [samfn.looksam(5), samfn.every(samfn.sam(), 5)])
def test_twenty_steps_with_every_fifth_perturbed_are_24_gradients(method):
    assert tally(method, 20).gradients == 24


LENGTHS = {
    "sam": lambda w, g, e: e,
    "light_sam": lambda w, g, e: e,  # In its first step.
    "gsam": lambda w, g, e: e,
    "wsam": lambda w, g, e: e,
    "vasso": lambda w, g, e: e,
    "friendly_sam": lambda w, g, e: e,
    "looksam": lambda w, g, e: e,
    "on_parameters": lambda w, g, e: e,
    "sub_batch_ascent": lambda w, g, e: e,
    "asam everywhere": lambda w, g, e: e / w.abs(),
    "fisher_sam": lambda w, g, e: e * (1 + 0.3 * g.square()).sqrt(),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_perturbation_is_rho_long_in_its_own_metric(name):
    _, _, params, batches = problem()
    seen = []

    def watched(params, buffers, batch):
        seen.append({name: w.detach() for name, w in params.items()})
        return layer(params, buffers, batch)

    descent_of(ORACLES[name][0], watched, params, batches[0], rho=0.07)
    grads = evaluate(layer, params, {}, batches[0]).grads
    step = {n: seen[1][n] - w for n, w in params.items()}
    inner = {n: LENGTHS[name](w, grads[n], step[n]) for n, w in params.items()}
    assert_close(tree.norm(inner).item(), 0.07, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ORACLES)
def test_a_zero_gradient_perturbs_nothing_and_gives_no_nan(name):
    if "rwp" in name or name in ("ascent_on", "on_loss"):
        pytest.skip("it is perturbed at random, or by another gradient")
    flat = criterion_of(units, lambda outputs, batch: 0 * distance(outputs, batch))
    trace = train(ORACLES[name][0], loss_fn=flat)
    for _, metrics in trace:
        assert metrics.finite
        assert metrics.perturbation_norm == 0
    assert_close(dict(trace[-1][0].params), problem()[2], rtol=0, atol=0)


def test_noise_is_as_wide_as_its_filter_is_long():
    weight = torch.stack([torch.full((30, 1000), size) for size in (1.0, 0.0, 3.0)])
    torch.manual_seed(0)
    for w, lengths in ((weight, weight.norm(dim=(1, 2))), (weight[2, 0], [9000**0.5])):
        noise = filter_noise(w).reshape(len(lengths), -1)
        found = noise.std(1), noise.mean(1)
        expected = torch.as_tensor(lengths), torch.zeros(len(lengths))
        assert_close(found[0], expected[0], rtol=0.05, atol=0)
        assert (found[1].abs() < 0.1 * expected[0] + 1e-9).all()


def test_looksam_survives_when_its_first_look_is_skipped():
    method, optimizer = samfn.looksam(3), samfn.sgd(0.0)
    _, _, params, batches = problem()
    state = samfn.init(params, {}, optimizer=optimizer, method=method)
    spoilt = batches[0][0] * float("nan"), batches[0][1]
    common = {"loss_fn": layer, "optimizer": optimizer, "method": method, "lr": LR}
    state, metrics = samfn.sam_update(state, spoilt, **common)
    assert not metrics.finite
    state, metrics = samfn.sam_update(state, batches[1], **common)
    assert metrics.finite
    expected = evaluate(layer, params, {}, batches[1]).grads
    assert_close(metrics.descent_norm, tree.norm(expected))


def test_esam_draws_the_share_beta_and_makes_up_for_it():
    params = {"w": torch.ones(40_000, dtype=torch.float64)}
    seen = []

    def loss_fn(params, buffers, batch):
        seen.append(params["w"].detach())
        losses = params["w"].sum() * batch
        return losses.mean(), Aux(None, buffers, losses)

    descent_of(samfn.esam(0.25, 1.0), loss_fn, params, torch.ones(2).double(), rho=1.0)
    step = seen[1] - seen[0]
    moved = step != 0
    assert moved.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert_close(step[moved], torch.full_like(step[moved], 4 / 200))  # rho / beta / ||1||


def test_esam_of_tensors_is_the_length_of_the_official_code_and_leaves_whole_tensors():
    params = {str(n): torch.full((3,), 1.0 + n, dtype=torch.float64) for n in range(40)}
    method, seen = samfn.esam(0.25, 1.0, draws="tensors"), []

    def loss_fn(params, buffers, batch):
        seen.append({name: w.detach() for name, w in params.items()})
        return sum(w.square().sum() for w in params.values()) * batch.mean()

    torch.manual_seed(0)
    descent = descent_of(method, loss_fn, params, torch.ones(2).double(), rho=0.1)
    step = {name: seen[1][name] - w for name, w in params.items()}
    moved = {name: e for name, e in step.items() if e.any()}
    assert 2 < len(moved) < 20
    # All of it along the gradient of what is not frozen, 2 w, and rho / beta long.
    scales = [e / params[name] for name, e in moved.items()]
    assert_close(torch.cat(scales), scales[0][0].expand(3 * len(moved)))
    assert_close(tree.norm(step).item(), 0.1 / 0.25, rtol=1e-12, atol=0)
    assert descent.grads.keys() == params.keys()  # All descend.


def test_esam_descends_with_the_examples_whose_loss_grew_most():
    chosen = []

    def loss_fn(params, buffers, batch):
        chosen.append(batch)
        losses = params["w"] * batch  # The loss grows by the batch's value.
        return losses.mean(), Aux(None, buffers, losses)

    batch = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5])
    descent_of(samfn.esam(1.0, 0.5), loss_fn, {"w": torch.tensor(1.0)}, batch)
    assert sorted(chosen[-1].tolist()) == pytest.approx([0.5, 0.7, 0.9])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samfn.looksam(0), "k must be a whole number of at least 1, got 0"),
        (lambda: samfn.looksam(2.5), "k must be a whole number .* got 2.5"),
        (lambda: samfn.multi_step_sam(0), "ascents must be a whole number"),
        (lambda: samfn.ae_sam(0), "steps must be a whole number"),
        (lambda: samfn.wsam(1.0), "gamma must be at least 0 and below 1, got 1.0"),
        (lambda: samfn.rwp(0.0), "lam must be above 0 and at most 1, got 0.0"),
        (lambda: samfn.unified_sam(1.5), "lam must be between 0 and 1, or None, got 1.5"),
        (lambda: samfn.le_sam(0.0), "rho_max must be positive, got 0.0"),
        (lambda: samfn.sagm(-0.1), "alpha must be finite and at least 0, got -0.1"),
        (lambda: samfn.friendly_sam(decay=1.0), "decay must be at least 0 and below 1"),
        (lambda: samfn.vasso(0.0), "theta must be above 0 and at most 1, got 0.0"),
        (lambda: samfn.momentum_sam(-0.1), "momentum must be at least 0 and below 1"),
        (lambda: samfn.ae_sam(5, decay=1.5), "decay must be at least 0 and below 1"),
        (lambda: samfn.esam(beta=0.0), "beta must be above 0 and at most 1, got 0.0"),
        (lambda: samfn.esam(draws="weights"), "draws must be .entries. or .tensors."),
        (lambda: samfn.esam(gamma=1.5), "gamma must be above 0 and at most 1, got 1.5"),
    ],
)
def test_arguments_out_of_range_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_functional_sam_says_what_it_needs():
    _, _, params, batches = problem()
    method = samfn.functional_sam()
    for known in (lambda p, b, x: layer(p, b, x)[0], lambda p, b, x: layer(p, b, x)):
        with pytest.raises(ValueError, match="not known to be a criterion of outputs"):
            descent_of(method, known, params, batches[0])
    with pytest.raises(ValueError, match="leave its ascent whole"):
        descent_of(samfn.sub_batch_ascent(method, 0.5), layer, params, batches[0])
    # Two rows of outputs for each example: their parts do not go with those of the batch.
    both = criterion_of(
        lambda params, batch: units(params, batch).repeat(2, 1),
        lambda outputs, batch: distance(outputs, (None, batch[1].repeat(2, 1))),
    )
    with pytest.raises(ValueError, match="one row for each example, got 20 rows"):
        descent_of(samfn.accumulated(method, 4), both, params, batches[0])


def test_esam_says_what_it_needs():
    _, _, params, batches = problem()
    with pytest.raises(ValueError, match="needs the loss of each example"):
        descent_of(samfn.esam(), lambda p, b, x: layer(p, b, x)[0], params, batches[0])
    method = samfn.sub_batch_ascent(samfn.esam(), 0.5)
    with pytest.raises(ValueError, match="leave its ascent whole"):
        descent_of(method, layer, params, batches[0])


TRACED = {name: method for name, (method, _) in ORACLES.items()} | {
    "esam, entries": samfn.esam(0.5, 0.4),
    "esam, tensors": samfn.esam(0.5, 0.4, draws="tensors"),
}


@pytest.mark.parametrize("name", TRACED)
def test_it_traces_as_one_graph_for_each_kind_of_step(name):
    method = TRACED[name]
    if not method.traces:
        pytest.skip("it does not, and says so")
    torch.compiler.reset()  # Dynamo counts graphs by the code they are of.
    _, _, params, batches = problem()
    memory = method.init(params, params)
    for step in range(3):
        kind = method.kind(step) if method.kind else None

        def descent(params, batch, rho, memory, kind=kind):
            point = Point(params, {}, batch, rho, tuple(params), kind=kind)
            seen, memory = method.descent(evaluator(layer), point, memory)
            return seen.grads, seen.beside, seen.perturbed_loss, memory

        traced = torch.compile(descent, fullgraph=True, backend="eager")
        arguments = params, batches[step], torch.tensor(RHO), memory
        torch.manual_seed(0)
        found = traced(*arguments)
        torch.manual_seed(0)
        expected = descent(*arguments)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        memory = expected[-1]
