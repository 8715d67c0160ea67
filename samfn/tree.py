"""Arithmetic on mappings from name to tensor, read as one long vector.

Every function is pure: it reads mappings and returns new dicts. The `_foreach_`
operations of PyTorch handle all tensors in one call, without a Python loop.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]  # also gradients: same names, same shapes
Batch = Any  # whatever the loss function takes


def norm(tree: Params) -> Tensor:
    """Return the Euclidean norm of all tensors together.

    ||v|| = sqrt(sum over all entries of v_i ** 2)

    Returns:
        Shape (), float32 or wider: squares of float16 overflow at 256, and bfloat16
        has too few bits to add up millions of them.

    Raises:
        ValueError: `tree` is empty.
    """
    if not tree:
        raise ValueError("norm needs at least one tensor, got an empty mapping")
    leaves = list(tree.values())
    if torch.compiler.is_compiling() and not any_sharded(leaves):
        # To stack n numbers would take n kernels of a GPU; to add them up takes one.
        return _sum([part.square() for part in _norms(leaves)]).sqrt()
    length: Tensor = torch.linalg.vector_norm(norms(tree))
    return length


def norm_of_any(tree: Params, wholes: Params | None = None) -> Tensor:
    """Return `norm` of tensors of which some may be complex, or on other devices.

    Args:
        tree: tensors.
        wholes: of which `tree` is this rank's part, where they are DTensors; None if it is
            all.

    Returns:
        On the device of the first.
    """

    def kind(name: str) -> tuple[torch.device, bool]:
        return tree[name].device, tree[name].is_complex()

    device = next(iter(tree.values())).device
    lengths = [norms(part, wholes).to(device) for _, part in parts(tree, kind)]
    length: Tensor = torch.linalg.vector_norm(torch.cat(lengths))
    return length


def norms(tree: Params, wholes: Params | None = None) -> Tensor:
    """Return the Euclidean norm of each tensor, shape (tensors,), float32 or wider.

    Those of `wholes`, where these are given and `tree` is this rank's part of them.
    """
    leaves = list(tree.values())
    owners = leaves if wholes is None else [wholes[name] for name in tree]
    if any_sharded(owners):
        here, dtype = [local(leaf) for leaf in leaves], _common_dtype(leaves)
        if dtype.is_complex:
            here, dtype = [part.abs() for part in here], dtype.to_real()
        squares = [part.to(dtype).square().sum() for part in here]
        return _completed(squares, owners).sqrt()
    return torch.stack(_norms(leaves))


def dot(left: Params, right: Params) -> Tensor:
    """Return the inner product of u and v, which have the same names.

    u . v = sum over all entries of u_i v_i

    Returns:
        Shape (), float32 or wider, as `norm`.
    """
    return dots(left, right).sum()


def dots(left: Params, right: Params) -> Tensor:
    """Return the inner product of each pair of tensors, shape (tensors,), as `dot`."""
    leaves, others = _aligned(left, right)
    parts = [
        (local(leaf).to(wide) * local(other).to(wide)).sum()
        for leaf, other in zip(leaves, others, strict=True)
        for wide in [torch.promote_types(leaf.dtype, torch.float32)]
    ]
    return _completed(parts, leaves)


def only(tree: Params, names: Collection[str]) -> dict[str, Tensor]:
    """Return the part of a mapping that has these names, in their order."""
    return {name: tree[name] for name in names}


def parts(
    tree: Params, key: Callable[[str], Any]
) -> Iterable[tuple[Any, dict[str, Tensor]]]:
    """Return parts of a mapping whose names have a key in common, with the key."""
    found: dict[Any, dict[str, Tensor]] = {}
    for name, leaf in tree.items():
        found.setdefault(key(name), {})[name] = leaf
    return found.items()


def named(node: Any, place: str = "") -> dict[str, Tensor]:
    """Name every tensor of nested mappings by the path that leads to it, as "a/b".

    Raises:
        TypeError: something in it is neither a tensor nor a mapping.
        ValueError: two paths are the same, as those of 1 and "1".
    """
    if isinstance(node, Tensor):
        return {place: node}
    if not isinstance(node, Mapping):
        raise TypeError(
            f"expected a tensor or a mapping as {place}, got {type(node).__name__}"
        )
    flat: dict[str, Tensor] = {}
    for key, child in node.items():
        found = named(child, f"{place}/{key}" if place else str(key))
        if twice := flat.keys() & found.keys():
            raise ValueError(f"two tensors would be called {min(twice)}")
        flat |= found
    return flat


def scale(tree: Params, factor: float | Tensor) -> dict[str, Tensor]:
    """Return factor * v."""
    return _like(tree, torch._foreach_mul(list(tree.values()), factor))


def add(left: Params, right: Params) -> dict[str, Tensor]:
    """Return u + v, which have the same names."""
    return _like(left, torch._foreach_add(*_aligned(left, right)))


def subtract(left: Params, right: Params) -> dict[str, Tensor]:
    """Return u - v, which have the same names."""
    return _like(left, torch._foreach_sub(*_aligned(left, right)))


def multiply(left: Params, right: Params) -> dict[str, Tensor]:
    """Return u * v entry by entry; u and v have the same names."""
    return _like(left, torch._foreach_mul(*_aligned(left, right)))


def add_scaled(
    tree: Params, factor: float | Tensor, direction: Params
) -> dict[str, Tensor]:
    """Return u + factor * v, with the names and dtypes of u, rounded to these once.

    In half precision a factor as rho / ||g|| is infinite where ||g|| is below 1e-6.
    """
    return typed_as(tree, add(tree, scale(wide(direction), factor)))


def wide(tree: Params) -> dict[str, Tensor]:
    """Return the tensors in float32 or wider, those that are so as they are.

    Squares of gradients vanish in half precision.
    """
    return {
        name: leaf.float() if leaf.dtype.itemsize < 4 else leaf
        for name, leaf in tree.items()
    }


def typed_as(like: Params, tree: Params) -> dict[str, Tensor]:
    """Return the tensors of `tree` in the dtypes of `like`."""
    return {
        name: leaf if leaf.dtype == like[name].dtype else leaf.to(like[name].dtype)
        for name, leaf in tree.items()
    }


def clip(tree: Params, max_norm: float) -> dict[str, Tensor]:
    """Return v min(1, max_norm / ||v||)."""
    return scale(tree, (max_norm / norm(tree)).clamp(max=1.0))


def zeros_like(tree: Params) -> dict[str, Tensor]:
    """Return zeros with the names, shapes, dtypes and layouts of `tree`."""
    return {name: torch.zeros_like(leaf) for name, leaf in tree.items()}


def unmixed(tree: Params) -> AbstractContextManager[Any]:
    """Return a context in which operations have the dtypes of these tensors.

    A caller's autocast would take its own, in backward passes and products, too.
    """
    device = next(iter(tree.values())).device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()  # Entering autocast costs as much as a small layer.
    return torch.autocast(device, enabled=False)


def wide_default() -> torch.dtype:
    """Return PyTorch's default dtype, but float32 where that is narrower.

    As torch.optim counts steps: bfloat16 would stop at 256.
    """
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def clone(tree: Params) -> dict[str, Tensor]:
    """Return a copy of numbers, not booleans, that shares no memory with `tree`."""
    leaves = list(tree.values())
    if not torch.compiler.is_compiling() and all(map(_is_here, leaves)):
        return _like(tree, [leaf.clone() for leaf in leaves])
    # Exact; _foreach_clone is newer than torch 2.11.
    return _like(tree, torch._foreach_mul(leaves, 1))


def select(condition: Tensor, new: Any, old: Any) -> Any:
    """Return `new` where the 0-d boolean `condition` holds, else `old`.

    Both are tensors, or mappings nested alike. Selecting never computes with the side
    that is dropped, so a NaN there is harmless.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        return new if condition else old  # Reading it is free there.
    if isinstance(old, Mapping):
        return {key: select(condition, new[key], old[key]) for key in old}
    if new is old:  # As frozen weights, and sparse buffers, which torch.where refuses.
        return old
    return torch.where(condition, new, old)


def is_sharded(leaf: Tensor | None) -> bool:
    """Return whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(leaf, "device_mesh")  # By name: importing DTensor takes a second.


def any_sharded(leaves: Iterable[Tensor | None]) -> bool:
    """Return whether one of the tensors is a DTensor."""
    return any(map(is_sharded, leaves))


def local(leaf: Any) -> Tensor:
    """Return this rank's part of a DTensor, in its memory, and another tensor as it is."""
    found: Tensor = leaf.to_local() if is_sharded(leaf) else leaf
    return found


def _norms(leaves: list[Tensor]) -> list[Tensor]:
    dtype = _common_dtype(leaves)
    if torch.compiler.is_compiling() and leaves[0].device.type == "cpu":
        # Sums fuse with what makes the leaves; _foreach_norm would be a call from Python
        # for every leaf, a quarter of the step of a small network.
        return [leaf.to(dtype).square().sum().sqrt() for leaf in leaves]
    return list(torch._foreach_norm(leaves, 2, dtype=dtype))


def _common_dtype(leaves: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {leaf.dtype for leaf in leaves}, torch.float32)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, added in pairs so that rounding does not grow."""
    half = len(parts) // 2
    return _sum(parts[:half]) + _sum(parts[half:]) if half else parts[0]


def _completed(sums: list[Tensor], leaves: list[Any]) -> Tensor:
    """Add up over the processes sums over the parts of leaves; one message for a mesh."""
    total = torch.stack(sums)
    for mesh in dict.fromkeys(leaf.device_mesh for leaf in leaves if is_sharded(leaf)):
        for place in range(mesh.ndim):
            own = [
                is_sharded(leaf) and leaf.device_mesh == mesh and _is_cut(leaf, place)
                for leaf in leaves
            ]
            if any(own):
                # Parts that are offloaded to the CPU meet where the mesh is.
                total = total.to(mesh.device_type)
                total = _all_reduced(total, own, mesh.get_group(place).group_name)
    return total


def _is_cut(leaf: Any, place: int) -> bool:
    """Return whether the processes along a dimension of the mesh hold parts of a leaf."""
    placement = leaf.placements[place]
    if placement.is_partial():
        raise ValueError(
            f"expected a DTensor that is whole or cut, got terms of a sum ({placement}):"
            " redistribute it before"
        )
    return not placement.is_replicate()  # A strided shard is no `is_shard()`.


def _all_reduced(values: Tensor, chosen: list[bool], group: str) -> Tensor:
    """Return values with the sum over a group in place of those that are chosen."""
    functional = torch.ops._c10d_functional
    summed: Tensor = functional.wait_tensor(functional.all_reduce(values, "sum", group))
    if all(chosen):
        return summed
    pairs = zip(chosen, summed.unbind(), values.unbind(), strict=True)
    return torch.stack([new if one else old for one, new, old in pairs])


def _aligned(left: Params, right: Params) -> tuple[list[Tensor], list[Tensor]]:
    # By name, not by position: two dicts of the same names may differ in order.
    return list(left.values()), [right[name] for name in left]


def _is_here(leaf: Tensor) -> bool:
    """Return whether it is a plain tensor of the CPU, where each operation is one call."""
    return leaf.device.type == "cpu" and not is_sharded(leaf)


def _like(tree: Params, leaves: Any) -> dict[str, Tensor]:
    return dict(zip(tree, leaves, strict=True))
