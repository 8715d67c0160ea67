"""Several steps in one call give what they give in as many."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import samfn
from samfn.compiled import step as step_module
from samfn.compiled.several import require_dials, with_zeros

OPTIMIZER = samfn.sgd(0.9, weight_decay=5e-4)
DIALS = {"rho": [0.0, 0.1, 0.2], "lr": torch.tensor([0.3, 0.2, 0.1])}


def task(method=None, **settings):
    """Return a state, a function that makes a step, and batches of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    common = {
        "loss_fn": samfn.supervised(model, F.cross_entropy),
        "optimizer": OPTIMIZER,
        "method": method or samfn.sam(),
    }
    state = samfn.init(*samfn.split(model), optimizer=OPTIMIZER, method=common["method"])
    batches = [(torch.randn(5, 4), torch.arange(5) % 3) for _ in range(6)]

    def make(**more):
        return samfn.compile_update(**common, **settings, **more)

    return state, make, batches


def stacked(trees):
    return pytree.tree_map(
        lambda *one: None if one[0] is None else torch.stack(one), *trees
    )


def one_by_one(step, state, batches, rho, lr):
    """Take single steps, and return the last state and the metrics of all."""
    seen = []
    for batch, *dials in zip(batches, rho, lr, strict=True):
        state, metrics = step(state, batch, rho=dials[0], lr=dials[1])
        seen.append(metrics)
    return state, stacked(seen)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["whole", "gradient", "loss"])
def test_steps_of_one_call_are_those_of_as_many_bit_for_bit(plan):
    state, make, batches = task(plan=plan, backend="aot_eager")
    several, single = make(steps=3), make()
    other = state
    for part in (batches[:3], batches[3:]):
        other, expected = one_by_one(single, other, part, **DIALS)
        counters.clear()
        state, metrics = several(state, stacked(part), **DIALS)
        assert_close((state, metrics), (other, expected), rtol=0, atol=0)
    assert several.plan == plan
    assert counters["stats"]["unique_graphs"] == 0  # Those of the call before.
    assert state.step == 6
    assert metrics.outputs.shape == (3, 5, 3)
    assert metrics.perturbation_norm.gt(0).tolist() == [False, True, True]


@pytest.mark.slow
def test_each_pattern_of_kinds_has_a_graph_and_follows_the_count_of_the_state():
    state, make, batches = task(samfn.looksam(3), plan="whole", backend="eager")
    several, single = make(steps=2), make()
    made = []
    other = state
    # Looks at 0, at 3, at none, at 6.
    for part in (batches[:2], batches[2:4], batches[4:], batches[:2]):
        counters.clear()
        state, metrics = several(state, stacked(part), rho=0.1, lr=0.1)
        made.append(counters["stats"]["unique_graphs"])
        other, expected = one_by_one(single, other, part, [0.1] * 2, [0.1] * 2)
        assert_close((state, metrics), (other, expected), rtol=1e-6, atol=1e-6)
    assert made == [1, 1, 1, 0]


@pytest.mark.filterwarnings("ignore:samfn goes on uncompiled")
def test_without_a_compiler_several_steps_are_taken_eagerly(monkeypatch):
    monkeypatch.setattr(step_module, "missing_compiler", lambda *given: "found none")
    state, make, batches = task()
    several, single = make(steps=3), make()
    found = several(state, stacked(batches[:3]), **DIALS)
    assert several.plan == "eager"
    expected = one_by_one(single, state, batches[:3], **DIALS)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:samfn goes on uncompiled")
def test_a_value_in_a_batch_belongs_to_all_its_steps(monkeypatch):
    class Powers(nn.Linear):
        def forward(self, x, power):
            return super().forward(x) ** power

    monkeypatch.setattr(step_module, "missing_compiler", lambda *given: "found none")
    given = {"optimizer": OPTIMIZER}
    model = Powers(4, 3)
    given["loss_fn"] = samfn.supervised(model, F.cross_entropy)
    state = samfn.init(*samfn.split(model), optimizer=OPTIMIZER)
    x, targets = torch.randn(2, 5, 4), torch.arange(10).view(2, 5) % 3
    batch = {"x": x, "power": 2}, targets
    _, metrics = samfn.compile_update(**given, steps=2)(state, batch, lr=0.1)
    assert_close(metrics.outputs[0], model(x[0], 2).detach())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(3, 5, 4), torch.ones(5)), r"\(3, \.\.\.\), got \(3, 5, 4\), \(5,\)"),
        (
            (torch.ones(2, 5, 4), torch.ones(2, 5)),
            r"\(3, \.\.\.\), got \(2, 5, 4\), \(2,",
        ),
        ((torch.ones(3, 5, 4), [torch.ones(3, 5), torch.ones(())]), r", \(3, 5\), \(\)"),
        (({1}, torch.ones(3, 5)), "got <class 'set'>"),
        ((), "got none"),
    ],
)
def test_batches_that_are_not_stacked_are_refused(batch, message):
    state, make, _ = task()
    with pytest.raises(ValueError, match=f"steps=3 takes as many batches.*{message}"):
        make(steps=3)(state, batch, lr=0.1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.1, 0.2], "lr must be one value, or one for each of 3 steps, got 2"),
        (torch.ones(4), "lr must be one value, or one for each of 3 steps, got 4"),
        (torch.ones(3, 1), r"lr must be a number or a 0-d tensor, got shape \(3, 1\)"),
        ([0.1, -0.2, 0.1], "lr must be finite and at least 0, got -0.2"),
    ],
)
def test_other_than_one_value_or_one_for_each_step_is_refused(value, message):
    state, make, batches = task()
    with pytest.raises(ValueError, match=message):
        make(steps=3)(state, stacked(batches[:3]), lr=value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({0.1, 0.2}, TypeError, "rho must be a number or a 0-d tensor, got set"),
        ({0.1: 0, 0.2: 1}, TypeError, "rho must be a number or a 0-d tensor, got dict"),
        (torch.tensor([0.1, -0.2]), ValueError, "rho must be finite .* got -0.2"),
        ([0.1, torch.tensor(float("nan"))], ValueError, "rho must be finite .* got nan"),
        (torch.tensor([True, False]), TypeError, "rho must be a number .* torch.bool"),
    ],
)
def test_values_for_each_step_have_an_order_and_are_dials(value, error, message):
    with pytest.raises(error, match=message):
        require_dials("rho", value, 2)


def test_a_single_step_takes_a_single_value():
    with pytest.raises(TypeError, match="rho must be a number or a 0-d tensor, got list"):
        require_dials("rho", [0.1], None)
    with pytest.raises(ValueError, match=r"rho must be a number or a 0-d tensor, got sh"):
        require_dials("rho", torch.ones(1), None)


@pytest.mark.parametrize("steps", [0, 1.0, True])
def test_steps_are_a_number_of_at_least_one(steps):
    _, make, _ = task()
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        make(steps=steps)


def test_numbers_that_are_zero_stay_numbers_and_tensors_do_not_get_lost():
    two = torch.tensor([0.0, 0.5])
    first, second = with_zeros((0.0, 0.5), two)
    assert first == 0
    assert not isinstance(first, torch.Tensor)
    assert second == 0.5
    assert with_zeros((0.5, 0.5), two) is two
    assert with_zeros((0.0, 0.0), two) == 0
    found = require_dials("rho", [0.25, torch.tensor(0.5, dtype=torch.float64)], 2)
    assert found.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("plan", ["whole", "gradient"])
def test_outputs_of_steps_that_see_other_parts_of_a_batch_are_a_list(plan):
    method = samfn.every(samfn.sub_batch_ascent(samfn.sam(), 0.4), 2)
    state, make, batches = task(method, backend="aot_eager", plan=plan)
    _, metrics = make(steps=3)(state, stacked(batches[:3]), rho=0.1, lr=0.1)
    assert [len(outputs) for outputs in metrics.outputs] == [2, 5, 2]
    assert metrics.loss.shape == (3,)


def test_a_number_beside_a_tensor_has_the_precision_of_the_tensor():
    dials = require_dials("rho", [0.1, torch.tensor(0.2, dtype=torch.float64)], 2)
    assert dials.tolist() == [0.1, 0.2]
