"""Modules with every habit: a step is that of a plain loop, or refused with its reason."""

import pytest
import torch
from timm.models.densenet import DenseNet

from bench.zoo import __main__ as command
from bench.zoo import check as checks
from bench.zoo import networks
from bench.zoo.check import Fingerprint, Problem, check, functional, plain_loop
from bench.zoo.habits import CASES

NAMES = {case.name: case for case in CASES}


class Cast(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


# PyTorch's own refusals, and hooks, which have no second derivative to speak of.
FLAT = {
    "checkpoint, reentrant": "use_reentrant=True",
    "checkpoint of dropout, reentrant": None,  # Nothing is recomputed in evaluation mode.
    "checkpoint, selective": "selective gradient checkpointing",
    "hooks backward": "has a hook that may change gradients",
    "hook on a parameter": "has a hook that may change gradients",
}


@pytest.mark.parametrize("case", CASES, ids=NAMES.keys())
def test_a_step_is_that_of_a_plain_loop_or_refused_with_its_reason(case):
    row = check(case, compiled=False)
    if case.refused is None:
        assert row["eager"] == "exact, eager"
        assert row["drop-in"] == "exact, drop-in"
    else:
        assert row["eager"].startswith("refused: ")
        assert case.refused in row["eager"]
    assert "WRONG" not in row["drop-in"]
    if case.refused is None and case.name not in FLAT:
        assert row["Hessian"] == "exact"
    elif reason := FLAT.get(case.name):
        assert row["Hessian"].startswith("refused: ")
        assert reason in row["Hessian"]
    assert "WRONG" not in row["Hessian"]


COMPILED = {
    "checkpoint": "exact, loss",
    "a module twice": "exact, whole",
    "assigned buffer": "exact, whole",
    "targets in place": "exact, whole",
    "layer drop": "exact, eager (samfn goes on uncompiled: ",
    "hook on a parameter": "exact, eager (samfn goes on uncompiled: ",
    "weight in place": "refused: ImpureError: the forward pass writes to weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_it_is_compiled_as_far_as_it_can_be_and_else_goes_on_with_the_same_numbers(
    name, monkeypatch
):
    case = NAMES[name]
    torch._dynamo.reset()
    if name != "assigned buffer":  # One of them by PyTorch's own compiler.
        monkeypatch.setattr(checks, "BACKEND", "aot_eager")
    row = check(case, only="compiled")
    assert row["compiled"].startswith(COMPILED[name])


CHECKPOINTED = "GPT2, checkpointing", "Bert, checkpointing, reentrant", "Llama"


def test_networks_of_transformers_with_checkpointing_are_trained_as_by_a_plain_loop():
    for case in networks.of_transformers():
        if case.name.endswith(CHECKPOINTED):
            assert check(case, only="eager")["eager"] == "exact, eager", case.name


def small_densenet():
    """Return a network whose checkpoints hold BatchNorm, of a few thousand parameters."""
    model = DenseNet(growth_rate=4, block_config=(2, 2), bn_size=2, num_classes=10)
    model.set_grad_checkpointing(True)
    return model


def test_a_densenet_of_timm_with_checkpointing_is_trained_as_by_a_plain_loop():
    (case,) = (c for c in networks.of_timm() if "densenet121, checkpointing" in c.name)
    row = check(case._replace(make=small_densenet), only="eager")
    assert row["eager"] == "exact, eager"


def test_the_check_sees_what_is_wrong(monkeypatch):
    case = NAMES["checkpoint"]
    wrong = checks.functional

    def careless(case, problem, *, compiled):
        torch.nn.init.zeros_(problem.model.last.bias)
        return wrong(case, problem, compiled=compiled)

    monkeypatch.setattr(checks, "functional", careless)
    assert check(case, only="eager")["eager"] == "WRONG: changed ['last.bias']"
    monkeypatch.setattr(checks, "functional", wrong)
    monkeypatch.setattr(checks, "RHO", 0.2)
    expected = plain_loop(case, unused=True)
    monkeypatch.setattr(checks, "RHO", 0.1)
    found, _ = functional(case, Problem(case), compiled=False)
    start = Problem(case).model.state_dict()
    params = {name: start[name] for name in found.params}
    assert checks.apart(found, expected, params) > 1e-3


@pytest.mark.parametrize("large", [1_000_000, 0])
def test_a_fingerprint_is_of_objects_and_bits(monkeypatch, large):
    monkeypatch.setattr(checks, "LARGE", large)
    problem = Problem(NAMES["no checkpoint"])
    before = Fingerprint(problem)
    assert before.changes() == []
    first = problem.model.first
    first._parameters["weight"] = torch.nn.Parameter(first.weight.detach().clone())
    assert before.changes() == ["first.weight"]
    problem.batch[0][0, 0] += 1
    assert sorted(before.changes()) == ["batch 0", "first.weight"]
    with torch.no_grad():
        problem.model.last.bias[0] += 1
    assert sorted(before.changes()) == ["batch 0", "first.weight", "last.bias"]


def test_the_table_has_a_row_for_each_network_and_each_reason_once(tmp_path, capsys):
    lines = tmp_path / "rows.jsonl"
    options = command.Options(
        only=["habits"], name="inputs", compiled=False, output=lines, report=tmp_path
    )
    command.main(options)
    command.main(options)  # What was tried is not tried again.
    assert len(lines.read_text().splitlines()) == 2
    (report,) = tmp_path.glob("zoo_*.md")
    assert (
        "| inputs in place | exact, eager | – | exact, drop-in | exact |"
        in report.read_text()
    )
    told = {"network": "x", "eager": "refused: why", "drop-in": "refused: why"}
    assert command.table([told]).endswith(
        "| x | refused [1] | – | refused [1] | – |\n\n1. why"
    )


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (torch.nn.Tanh(), False),
        (torch.nn.Hardsigmoid(), True),  # Its backward kernel has 1/6 in float32.
        (torch.nn.Sequential(Cast(torch.float32), Cast(torch.float64)), True),
    ],
)
def test_what_computes_in_float32_is_seen_forward_and_backward(layer, found):
    def make():
        return torch.nn.Sequential(NAMES["no checkpoint"].make(), layer)

    assert checks._computes_in_float32(NAMES["no checkpoint"]._replace(make=make)) is found


@pytest.mark.parametrize(("rho", "found"), [(1.0, "exact, eager"), (1 + 1e-12, "WRONG")])
def test_what_rounding_makes_is_no_fault_and_what_more_makes_is(monkeypatch, rho, found):
    case = NAMES["convolutions"]
    monkeypatch.setitem(checks.TOLERANCE, torch.float64, 1e-30)
    right = checks.functional

    def longer(case, problem, *, compiled):
        monkeypatch.setattr(checks, "RHO", 0.1 * rho)
        try:
            return right(case, problem, compiled=compiled)
        finally:
            monkeypatch.setattr(checks, "RHO", 0.1)

    monkeypatch.setattr(checks, "functional", longer)
    assert found in check(case, compiled=False, only="eager")["eager"]


def test_operations_are_rounded_otherwise_in_their_last_place_and_views_are_left_alone():
    x = torch.full((1000,), 3.0, dtype=torch.float64)
    with checks._Rounded(0):
        products, view = x * x, x.view(10, 100)
        x.mul_(2)
    steps = (products - 9) / (8 * torch.finfo(torch.float64).eps)
    assert set(steps.tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(view, torch.full((10, 100), 6.0, dtype=torch.float64))


def test_a_loop_that_is_rounded_otherwise_trains_the_same_network():
    def make():  # Some networks count their channels with tensors.
        products = torch.full((1000,), 3.0, dtype=torch.float64).square()
        assert products.eq(9).all()
        return NAMES["convolutions"].make()

    case = NAMES["convolutions"]._replace(make=make)
    expected = plain_loop(case, unused=True)
    start = Problem(case).model.state_dict()
    params = {name: start[name] for name in expected.params}
    assert 0 < checks._rounding(case, expected, params, "compiled") < 1e-9
