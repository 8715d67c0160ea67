"""Parts of a batch: tensors are cut, values are in each part, the rest is an error."""

from collections import UserDict

import pytest
import torch
from torch.utils import _pytree as pytree

from samfn.support.batches import cut, first_rows, length_of, rows_of

ROWS = torch.arange(10).reshape(5, 2)


def same(one, other):
    pairs, alike = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return pairs[1] == alike[1] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(pairs[0], alike[0], strict=True)
    )


VALUES = {"use_cache": False, "task": "ner", "past": None, "scale": 0.5}


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("pair", [False, True])
def test_parts_have_rows_of_tensors_and_all_values(kind, pair):
    own = kind({**VALUES, "x": ROWS, "deep": {"y": (ROWS, "a")}})
    batch = (own, ROWS) if pair else own
    assert length_of(batch) == 5
    parts = cut(batch, 2)
    assert [share for _, share in parts] == [0.4, 0.4, 0.2]
    for start, (part, _) in zip((0, 2, 4), parts, strict=True):
        rows = ROWS[start : start + 2]
        expected = {**VALUES, "x": rows, "deep": {"y": (rows, "a")}}
        assert same(part, (expected, rows) if pair else expected)
    assert same(first_rows(batch, 0.3), parts[0][0])
    assert same(rows_of(batch, torch.tensor([4])), parts[2][0])


@pytest.mark.parametrize(
    "other",
    [torch.tensor(3), torch.ones(1, 2), ROWS.numpy(), [{"x": ROWS}, {"x": ROWS}]],
)
def test_what_has_no_rows_or_others_is_an_error(other):
    with pytest.raises(ValueError, match="must be tensors of one length, got shapes"):
        length_of({"other": other, "x": ROWS})
    with pytest.raises(ValueError, match="must be tensors of one length, got shapes"):
        cut(({"x": ROWS, "other": other}, ROWS), 2)
    with pytest.raises(ValueError, match="got shapes of none"):
        length_of({"a": 1, "b": None})


@pytest.mark.parametrize("names", [["a", "b", "c", "d", "e"], (1, 2)])
def test_a_list_of_values_is_counted_beside_and_not_cut(names):
    batch = {"x": ROWS, "names": names}
    assert length_of(batch) == 5
    with pytest.raises(ValueError, match=r"cut must have tensors .* leave it out"):
        cut(batch, 2)
