import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from samfn import tree
from tests.reference import flat
from tests.strategies import params_and_grads


@given(params_and_grads())
def test_norm_is_that_of_the_vector_of_all_entries(trees):
    assert_close(tree.norm(trees[1]), torch.linalg.vector_norm(flat(trees[1])))


@given(params_and_grads())
def test_arithmetic_is_that_of_the_vectors(trees):
    u, v = trees
    assert_close(flat(tree.add_scaled(u, 0.3, v)), flat(u) + 0.3 * flat(v))
    assert_close(flat(tree.subtract(u, v)), flat(u) - flat(v))
    assert_close(flat(tree.multiply(u, v)), flat(u) * flat(v))


def test_names_and_not_positions_are_matched():
    u = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    v = {"b": torch.tensor([20.0]), "a": torch.tensor([10.0])}
    assert_close(tree.add(u, v), {"a": torch.tensor([11.0]), "b": torch.tensor([22.0])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norm_is_float32_or_wider(dtype):
    # 300 ** 2 is more than float16 holds.
    result = tree.norm({"a": torch.full((100,), 300.0, dtype=dtype)})
    assert result.dtype is torch.float32
    assert_close(result, torch.tensor(3000.0), rtol=5e-3, atol=0)


def test_norm_of_many_bfloat16_ones_is_not_rounded_away():
    ones = {"a": torch.ones(1_000_000, dtype=torch.bfloat16)}
    assert_close(tree.norm(ones), torch.tensor(1000.0))


def test_norm_of_mixed_dtypes_takes_the_widest():
    mixed = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0], dtype=torch.float64)}
    assert tree.norm(mixed).dtype is torch.float64
    assert tree.norm(mixed) == 5


def test_norm_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one tensor, got an empty mapping"):
        tree.norm({})


def test_selecting_ignores_what_is_dropped():
    old, new = {"a": torch.tensor([1.0])}, {"a": torch.tensor([float("nan")])}
    assert_close(tree.select(torch.tensor(False), new, old), old, rtol=0, atol=0)


def test_zeros_keep_layout():
    image = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    zero = tree.zeros_like({"a": image})["a"]
    assert zero.is_contiguous(memory_format=torch.channels_last)
    assert not zero.any()


def test_what_is_added_in_half_precision_is_rounded_once():
    one = {"a": torch.ones(1, dtype=torch.float16)}
    found = tree.add_scaled(one, torch.tensor(2.0**-11 + 2.0**-23), one)["a"]
    assert found.dtype is torch.float16
    assert found == 1 + 2.0**-10  # The product alone would be rounded to half of that.
