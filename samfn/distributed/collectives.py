"""What ranks exchange in a step: sums and means, of many tensors in one message.

The collectives are PyTorch's functional ones: they return new tensors, and graphs hold
them.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.tree import Params

_OPERATIONS = torch.ops._c10d_functional


def changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not the very same as before, as frozen weights are."""
    return {key: value for key, value in new.items() if value is not old.get(key)}


def mean(
    values: Mapping[str, Any], rows: int | Tensor, group: str, params: Params
) -> tuple[dict[str, Any], Tensor]:
    """Average nested mappings of tensors over all examples of a group, in one message.

    Whole numbers, as BatchNorm's count of batches, are alike on all ranks, and stay.

    Args:
        values: what the rank found.
        rows: from how many examples, or what else they are means over.
        group: name of the process group.
        params: whose layout in memory counts, as it is the same on all ranks.

    Returns:
        The means, and the number of examples, shape (). Those of "grads" and "beside" are
        parts of one long vector; all that may outlive the step has memory of its own.
    """
    leaves = [(name, leaf) for name, leaf in _leaves(values) if leaf.is_floating_point()]
    dtype = _wide(leaf for _, leaf in leaves)
    layouts = [Layout.of(leaf, params.get(name)) for name, leaf in leaves]
    parts = [
        layout.flat(leaf).to(dtype)
        for layout, (_, leaf) in zip(layouts, leaves, strict=True)
    ]
    count = torch.ones(1, dtype=dtype, device=parts[0].device)
    flat, examples = _mean_of(_weighted([*parts, count], rows), group)
    pieces = torch.split(flat, [part.numel() for part in parts])
    found = iter(
        layout.whole(piece).to(leaf.dtype)
        for layout, piece, (_, leaf) in zip(layouts, pieces, leaves, strict=True)
    )
    means = _replaced(values, found)
    for key in means.keys() - {"grads", "beside"}:
        means[key] = pytree.tree_map(torch.clone, means[key])
    return means, examples.clone()


# Long vectors take longer to allocate than to fill: eager code works in place, where a
# graph plans its memory itself, and fuses what makes a part with its weight.


def _weighted(parts: list[Tensor], rows: int | Tensor) -> Tensor:
    """Return the parts as one tensor, times the number of examples they are from."""
    if isinstance(rows, Tensor):  # The mean over nothing is NaN, and counts as 0.
        parts = [torch.where(rows > 0, part, 0) for part in parts]
    if torch.compiler.is_compiling():
        return torch.cat([rows * part for part in parts])
    return torch.cat(parts).mul_(rows)


def _mean_of(vector: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Return the mean of vectors that end in their weight, and the sum of the weights."""
    if torch.compiler.is_compiling():
        total = all_reduce(vector, group)
        return total[:-1] / total[-1], total[-1]
    total = _done(_OPERATIONS.all_reduce_(vector, "sum", group))
    return total[:-1].div_(total[-1]), total[-1]


class Layout(NamedTuple):
    """How a tensor lies in memory, so that a vector of it needs no transposition."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """Its dimensions, from the one with the largest stride on."""

    @classmethod
    def of(cls, tensor: Tensor, like: Tensor | None = None) -> "Layout":
        """Return the layout of `like`, if that has the tensor's shape."""
        if like is None or like.shape != tensor.shape:
            return cls(tuple(tensor.shape), tuple(range(tensor.ndim)))
        strides = like.stride()
        order = sorted(range(like.ndim), key=lambda place: (-strides[place], place))
        return cls(tuple(like.shape), tuple(order))

    def flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a vector."""
        return tensor.permute(self.order).reshape(-1)

    def whole(self, vector: Tensor) -> Tensor:
        """Return a vector as a tensor."""
        laid = vector.view([self.shape[place] for place in self.order])
        return laid.permute([self.order.index(place) for place in range(len(self.order))])


def _leaves(node: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the tensors of nested mappings, each with its own key."""
    if isinstance(node, Mapping):
        return [leaf for key, child in node.items() for leaf in _leaves(child, key)]
    return [] if node is None else [(name, node)]


def _replaced(node: Any, found: Iterator[Tensor]) -> Any:
    """Rebuild nested mappings with others in place of their floating-point tensors."""
    if isinstance(node, Mapping):
        return {key: _replaced(child, found) for key, child in node.items()}
    return node if node is None or not node.is_floating_point() else next(found)


def _wide(leaves: Iterable[Tensor]) -> torch.dtype:
    """Return the widest dtype, at least float32: half precision loses what it adds up."""
    return reduce(torch.promote_types, {leaf.dtype for leaf in leaves}, torch.float32)


def all_reduce(values: Tensor, group: str) -> Tensor:
    """Return the sum over the ranks of a process group, which is given by its name."""
    return _done(_OPERATIONS.all_reduce(values, "sum", group))


def _done(begun: Tensor) -> Tensor:
    """Wait for a collective; a compiled graph does so where it needs the values."""
    done: Tensor = _OPERATIONS.wait_tensor(begun)
    return done
