"""Batches: nested tensors with one row for each example, and what holds many of them."""

from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import checks
from samfn.tree import Batch


def length_of(batch: Batch) -> int:
    """Return how many rows every tensor of a batch has.

    Raises:
        ValueError: they have different lengths, or there are none.
    """
    leaves = pytree.tree_leaves(batch)
    lengths = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
    if len(lengths) != 1 or not (length := next(iter(lengths))) or not length[0]:
        found = [tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in leaves]
        raise ValueError(
            "a batch that is cut or counted must be tensors of one length, got shapes"
            f" {', '.join(map(str, found))}"
        )
    return int(length[0])


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch.

    Raises:
        ValueError: it is no pair, or has no examples.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        if isinstance(batch, Mapping):
            came = f"a mapping of {checks.some([*map(str, batch)])}"
        elif isinstance(batch, tuple | list):
            came = f"{len(batch)} of them"
        else:
            came = type(batch).__name__
        raise ValueError(
            f"expected a batch of two, (inputs, targets), got {came}: several inputs are a"
            " tuple, ((a, b), targets); for batches of another form write a loss function"
            " (params, buffers, batch) -> loss"
        )
    inputs, targets = batch
    if isinstance(targets, Tensor) and targets.numel() == 0:
        raise ValueError(
            "expected a batch of at least one example, got targets of shape"
            f" {tuple(targets.shape)}"
        )
    return inputs, targets


def first_rows(batch: Batch, share: float) -> Batch:
    """Return the first rows of every tensor of a batch, that share of them, rounded up."""
    size = max(1, ceil(share * length_of(batch)))
    return pytree.tree_map(lambda leaf: leaf[:size], batch)


def cut(batch: Batch, size: int) -> list[tuple[Batch, float]]:
    """Cut every tensor of a batch along its first dimension; give each part's share.

    Args:
        batch: of any length.
        size: rows of a part; the last one may have fewer.
    """
    length = length_of(batch)
    leaves, structure = pytree.tree_flatten(batch)
    parts = zip(*[leaf.split(size) for leaf in leaves], strict=True)
    return [
        (pytree.tree_unflatten(list(part), structure), len(part[0]) / length)
        for part in parts
    ]


def together(batches: Any) -> Iterable[Batch]:
    """Return an iterable of batches as it is, and one batch as a list.

    Args:
        batches: a list, a data loader or another iterable of batches; or one batch, a
            tuple, a mapping or a tensor.
    """
    one = isinstance(batches, tuple | Mapping | Tensor)
    several: Iterable[Batch] = [batches] if one else batches
    return several


def repeatable(batches: Any) -> Iterable[Batch]:
    """Return what can be gone through again and again.

    Args:
        batches: as for `together`.

    Raises:
        TypeError: it can be gone through only once, as a generator, or not at all.
    """
    batches = together(batches)
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be a batch, or an iterable of batches that can be gone through"
            f" again, as a list or a data loader; got {type(batches).__name__}"
        )
    return batches
