"""What ranks exchange in a step: means of many tensors, and the parts of one tensor.

The collectives are PyTorch's functional ones: they return new tensors, and graphs hold
them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.tree import Batch, Params, is_sharded

_OPERATIONS = torch.ops._c10d_functional


def changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not the very same as before, as frozen weights are."""
    return {key: value for key, value in new.items() if value is not old.get(key)}


def kept(new: Params, seen: Params, given: Params) -> dict[str, Tensor]:
    """Return new tensors, and what was given for those that are as they were seen."""
    return {n: given[n] if leaf is seen.get(n) else leaf for n, leaf in new.items()}


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


def over_ranks(
    weigh: Callable[[Batch], int | Tensor], group: str, params: Params
) -> Callable[[Batch], int | Tensor]:
    """Return what weighs the batches of all ranks of a group together."""

    def of_all(batch: Batch) -> Tensor:
        device, dtype = next(iter(params.values())).device, _wide(params.values())
        rows = weigh(batch)
        own = rows if isinstance(rows, Tensor) else torch.tensor(rows)
        return all_reduce(own.to(device, dtype), group)

    return of_all


def over_parts(
    weigh: Callable[[Batch], int | Tensor], params: Params
) -> Callable[[Batch], int | Tensor]:
    """Return what weighs a batch: that of all ranks, where they have parts of `params`."""
    if not is_sharded(next(iter(params.values()))):
        return weigh
    return over_ranks(weigh, all_ranks(params), params)


def sum_over_parts(values: Tensor, params: Params) -> Tensor:
    """Return what ranks have counted: summed where they have parts of `params`."""
    sharded = is_sharded(next(iter(params.values())))
    return all_reduce(values, all_ranks(params)) if sharded else values


def placed_as(full: Tensor, like: Tensor) -> Tensor:
    """Return a plain tensor, where `like` is a DTensor the first rank's, placed as it."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    parts: Any = like
    return distribute_tensor(full, parts.device_mesh, parts.placements)


def cut_as(full: Tensor, like: Tensor) -> Tensor:
    """Return a plain tensor alike on all ranks, placed as `like`; nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    parts: Any = like
    mesh = parts.device_mesh
    copies = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: Tensor = copies.redistribute(mesh, parts.placements)
    return found


def placed_alike(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as a plain one or a DTensor, whichever `like` is.

    A DTensor that is placed in another way is put together first, by all ranks.
    """
    if _placement(value) == _placement(like):
        return value
    return cut_as(whole(value), like)


def _placement(leaf: Any) -> Any:
    return (leaf.device_mesh, leaf.placements) if is_sharded(leaf) else None


def whole(leaf: Tensor) -> Tensor:
    """Return a tensor as a plain one; of a DTensor, the ranks' parts together.

    Its gradient is the sum of the ranks' gradients, of which each rank keeps its part: that
    of a sum of losses, one on each rank.
    """
    apply: Any = _Whole.apply
    return apply(leaf) if is_sharded(leaf) else leaf


def wholes(leaves: Params) -> dict[str, Tensor]:
    """Return tensors as plain ones, as `whole` does."""
    return {name: whole(leaf) for name, leaf in leaves.items()}


def summed(full: Tensor, like: Tensor) -> Tensor:
    """Return the sum over the ranks of tensors, placed as the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Partial  # takes a second

    parts: Any = like
    mesh = parts.device_mesh
    # Half precision loses what it adds up.
    wide = full.to(torch.promote_types(full.dtype, torch.float32)).contiguous()
    terms = DTensor.from_local(wide, mesh, [Partial()] * mesh.ndim, run_check=False)
    return terms.redistribute(mesh, parts.placements).to(full.dtype)


def total(sums: list[Any]) -> Tensor:
    """Return the sum of DTensors, shape (), as a plain one that is the same on all ranks.

    Its gradient is the sum of the ranks' gradients, as for `whole`.
    """
    from torch.distributed.tensor import Partial

    found = sum(sums[1:], sums[0])
    added: Tensor = found.full_tensor(grad_placements=[Partial()] * found.device_mesh.ndim)
    return added


class _Whole(torch.autograd.Function):
    """A DTensor made whole; adjoint to `_Summed`, so that it has all derivatives."""

    @staticmethod
    def forward(ctx: Any, leaf: Any) -> Tensor:
        ctx.like = leaf.detach()
        found: Tensor = leaf.full_tensor()
        return found.view_as(found)  # It may be the part itself, which has no history.

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Summed.apply(grad, ctx.like)


class _Summed(torch.autograd.Function):
    """Tensors of the ranks summed up, and cut; adjoint to `_Whole`."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, like: Tensor) -> Tensor:
        return summed(full, like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return whole(grad), None


def has_ranks() -> bool:
    """Return whether this process is one of several that belong together."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_ranks(params: Params) -> str:
    """Return the name of the group of the ranks, all of which have parts of `params`.

    Raises:
        ValueError: they are not over all ranks.
    """
    for leaf in params.values():
        require_all_ranks(getattr(leaf, "device_mesh", None))
    group: Any = dist.group.WORLD
    return str(group.group_name)


def require_all_ranks(mesh: Any) -> None:
    """Raise unless a mesh has all ranks, over whose batches gradients are means.

    Raises:
        ValueError: it has others, or there is none.
    """
    count = dist.get_world_size()
    if mesh is None or mesh.size() != count:
        came = "a tensor without a mesh" if mesh is None else f"one of {mesh.size()}"
        raise ValueError(f"expected a mesh of all {count} ranks, got {came}")
