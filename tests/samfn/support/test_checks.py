import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import samfn
from samfn.support import checks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": torch.zeros(2), "c": torch.zeros(3)}, r"same names: b missing, c unexp"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, r"shapes: b: \(3,\) against \(1,\)"),
        ({}, r"same names: a, b missing, none unexpected"),
    ],
)
def test_layout_errors_name_what_differs(given, message):
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"w and g must have the .*{message}"):
        checks.require_same_layout(expected, given, names="w and g")


def test_long_lists_of_names_are_cut_off():
    expected = {str(i): torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match="0, 1, 2, 3, 4 and 4 more missing"):
        checks.require_same_layout(expected, {}, names="w and g")


def test_a_dial_is_read_where_that_takes_no_waiting_and_nowhere_else():
    wrong = torch.tensor([-1.0, float("nan")])
    for one in (*wrong, *wrong.double(), torch.nn.Parameter(wrong[0])):
        with pytest.raises(ValueError, match="rho must be finite and at least 0, got"):
            checks.require_dial("rho", one)
    assert torch.vmap(lambda one: checks.require_dial("rho", one))(wrong)[0] == -1
    fake = FakeTensorMode().from_tensor(torch.tensor(-1.0))
    assert checks.require_dial("rho", fake) is fake


def test_a_radius_that_a_step_has_computed_may_point_back():
    assert checks.require_radius("rho", torch.tensor(-1.0)) == -1
    params, grads = {"w": torch.zeros(1)}, {"w": torch.full((1,), 3.0)}
    assert samfn.perturb(params, grads, torch.tensor(-1.0))["w"] == -1
