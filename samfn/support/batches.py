"""Batches: nested tensors with one row for each example, and what holds many of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.support import checks
from samfn.tree import Batch

VALUES = str, bytes, int, float, complex, type(None)
"""What a batch may hold beside tensors, and has no rows: it is alike in all its parts."""


def keyed(batch: Any) -> Any:
    """Return a batch with dicts where it has keyword arguments in other mappings.

    Trees of PyTorch do not look into those, as into what tokenizers of transformers give.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
        if not isinstance(inputs, Tensor) and isinstance(inputs, Mapping):
            return dict(inputs), targets
    return batch


def length_of(batch: Batch) -> int:
    """Return how many rows every tensor of a batch has.

    Raises:
        ValueError: they have different lengths, or there are none; it holds something
            that is neither a tensor nor a value, or a list of mappings, as of examples
            with several boxes.
    """
    leaves = pytree.tree_leaves(keyed(batch), is_leaf=_is_of_mappings)
    leaves = [leaf for leaf in leaves if not isinstance(leaf, VALUES)]
    lengths = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
    if len(lengths) != 1 or not (length := next(iter(lengths))) or not length[0]:
        found = [tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in leaves]
        raise ValueError(
            "a batch that is cut or counted must be tensors of one length, got shapes"
            f" {', '.join(map(str, found)) or 'of none'}"
        )
    return int(length[0])


def _is_of_mappings(node: Any) -> bool:
    return bool(
        isinstance(node, list)
        and node
        and all(isinstance(value, Mapping) for value in node)
    )


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch; a mapping is inputs alone.

    Raises:
        ValueError: it is neither a pair nor a mapping, or has no examples.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(targets, Tensor) and targets.numel() == 0:
            raise ValueError(
                "expected a batch of at least one example, got targets of shape"
                f" {tuple(targets.shape)}"
            )
        return inputs, targets
    if isinstance(batch, Mapping):
        return batch, None
    several = isinstance(batch, tuple | list)
    raise ValueError(
        "expected a batch of two, (inputs, targets), got"
        f" {f'{len(batch)} of them' if several else type(batch).__name__}: several inputs"
        " are a tuple or a mapping, ((a, b), targets), and a batch without targets is a"
        " mapping; for batches of another form write a loss function"
        " (params, buffers, batch) -> loss"
    )


def rows_of(batch: Batch, rows: Any) -> Batch:
    """Return some rows of every tensor of a batch, and beside them what has no rows.

    Args:
        batch: of one length.
        rows: as an index of a tensor.

    Raises:
        ValueError: it has a list of values, of which one may belong to each example.
    """

    def of(leaf: Any) -> Any:
        if _is_column(leaf):
            raise ValueError(
                "a batch that is cut must have tensors for its examples, got a"
                f" {type(leaf).__name__} of {checks.some([repr(x) for x in leaf])}: leave"
                " it out, or write a loss function that makes a tensor of it"
            )
        return leaf[rows] if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(of, keyed(batch), is_leaf=_is_column)


def _is_column(node: Any) -> bool:
    return bool(
        isinstance(node, tuple | list)
        and node
        and all(isinstance(value, VALUES) for value in node)
    )


def first_rows(batch: Batch, share: float) -> Batch:
    """Return the first rows of every tensor of a batch, that share of them, rounded up."""
    return rows_of(batch, slice(max(1, checks.rounded_up(share, length_of(batch)))))


def cut(batch: Batch, size: int) -> list[tuple[Batch, float]]:
    """Cut every tensor of a batch along its first dimension; give each part's share.

    Args:
        batch: of any length.
        size: rows of a part; the last one may have fewer.
    """
    length = length_of(batch)
    return [
        (rows_of(batch, slice(start, start + size)), min(size, length - start) / length)
        for start in range(0, length, size)
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
