import pytest
import torch

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
