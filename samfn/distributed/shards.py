"""States of which every rank holds a part: dicts of DTensors.

Arithmetic on DTensors is PyTorch's, and the norms of `samfn.tree` are those of the whole
vectors. Only a pass needs whole tensors, each where it is used: see `samfn.evaluate`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.distributed.group import everyone, size
from samfn.support.collectives import require_all_ranks


def mesh_of(kind: str, parts: int | None = None) -> Any:
    """Return all ranks as copies times parts, a `DeviceMesh` for `shard`.

    Args:
        kind: of device, as "cuda".
        parts: how many ranks hold a state together; None is all of them, and one copy.

    Raises:
        RuntimeError: no process group was begun.
        ValueError: the number of parts does not divide the ranks.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # takes a second

    group, parts = everyone(), size() if parts is None else parts
    if parts < 1 or size() % parts:
        raise ValueError(f"{parts} parts do not divide the number of ranks, {size()}")
    if parts == size():
        return DeviceMesh.from_group(group, kind)
    return init_device_mesh(kind, (size() // parts, parts))


def shard(values: Any, mesh: Any = None) -> Any:
    """Return what this rank keeps of parameters, or of a state: DTensors.

    Each parameter is cut along its first dimension, as `fully_shard` does it; a scalar
    stays whole on every rank. Of a state, the memory of optimizer and method is cut as the
    parameters are; buffers and counters stay. Frozen weights, which are among the buffers,
    may be cut by another call, as parameters by name.

    Steps and measures take the result as they take plain tensors, each rank with a batch of
    its own. Losses and gradients are means over the examples of all ranks, and so are the
    statistics of BatchNorm; a perturbation is one for all: m is the global batch.

    Args:
        values: parameters by name, or a `TrainState`; the same on all ranks.
        mesh: a `DeviceMesh` of all ranks. Along the last of its dimensions parameters are
            cut, along one before it they are whole, as by `fully_shard`: (2, 4) makes two
            copies of four parts. None is all ranks in one dimension, as of `mesh_of`.

    Raises:
        RuntimeError: no process group was begun.
        ValueError: the mesh has more than two dimensions, or not all ranks; parameters are
            DTensors already.
    """
    # Takes a second.
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    params = getattr(values, "params", values)
    if mesh is None:
        mesh = mesh_of(next(iter(params.values())).device.type)
    if mesh.ndim > 2:
        raise ValueError(f"expected a mesh of one dimension or two, got {mesh.ndim}")
    require_all_ranks(mesh)
    if tree.any_sharded(params.values()):
        raise ValueError("expected plain tensors, got DTensors, which are placed already")
    shapes = {name: leaf.shape for name, leaf in params.items()}

    def part(leaf: Tensor) -> Tensor:
        last = Shard(0) if leaf.ndim else Replicate()
        placements = [*[Replicate()] * (mesh.ndim - 1), last]
        return distribute_tensor(leaf.detach(), mesh, placements, src_data_rank=None)

    def parts(node: Any) -> Any:
        if isinstance(node, tuple) and hasattr(node, "_fields"):  # A state.
            return type(node)(*map(parts, node))
        if not isinstance(node, Mapping):
            return node
        if all(
            isinstance(leaf, Tensor) and leaf.shape == shapes.get(name)
            for name, leaf in node.items()
        ):
            return {name: part(leaf) for name, leaf in node.items()}
        return {key: parts(child) for key, child in node.items()}

    return parts(values)


def gather(values: Any, device: torch.device | str | None = None) -> Any:
    """Return the whole of what ranks keep parts of; all have to call it.

    Args:
        values: nested mappings and tuples of tensors, as a state.
        device: that each tensor goes to as soon as it is whole; None leaves it where it
            is. For a checkpoint "cpu" on the first rank, and "meta", which holds nothing,
            on the others.
    """

    def whole(leaf: Any) -> Tensor:
        full: Tensor = leaf.full_tensor() if tree.is_sharded(leaf) else leaf
        return full if device is None else full.to(device)

    return pytree.tree_map_only(Tensor, whole, values)
