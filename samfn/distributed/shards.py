"""States of which every rank holds a part: dicts of DTensors.

Arithmetic on DTensors is PyTorch's, and the norms of `samfn.tree` are those of the whole
vectors. Only a pass needs whole tensors: it gathers them, and scatters the gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.distributed.collectives import changed, mean
from samfn.distributed.group import everyone, size
from samfn.loss import Evaluate, Pass
from samfn.tree import Batch, Params


def shard(values: Any, mesh: Any = None) -> Any:
    """Return what this rank keeps of parameters, or of a state: DTensors.

    Each parameter is cut along its first dimension, as `fully_shard` does it; a scalar
    stays whole on every rank. Of a state, the memory of optimizer and method is cut as the
    parameters are; buffers and counters stay.

    Args:
        values: parameters by name, or a `TrainState`; the same on all ranks.
        mesh: a `DeviceMesh` of all ranks in one dimension; None makes it.

    Raises:
        RuntimeError: no process group was begun.
        ValueError: the mesh has several dimensions, or not all ranks.
    """
    from torch.distributed.device_mesh import DeviceMesh  # takes a second
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    params = getattr(values, "params", values)
    if mesh is None:
        mesh = DeviceMesh.from_group(everyone(), next(iter(params.values())).device.type)
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of one dimension, got {mesh.ndim}")
    require_all_ranks(mesh, size())
    shapes = {name: leaf.shape for name, leaf in params.items()}

    def part(leaf: Tensor) -> Tensor:
        placements = [Shard(0) if leaf.ndim else Replicate()]
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


def require_all_ranks(mesh: Any, count: int) -> None:
    """Raise unless a tensor's mesh has all ranks, over whose batches gradients are means.

    Raises:
        ValueError: it has others, or there is none.
    """
    if mesh is None or mesh.size() != count:
        came = "a tensor without a mesh" if mesh is None else f"one of {mesh.size()}"
        raise ValueError(f"expected a mesh of all {count} ranks, got {came}")


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


def on_parts(
    evaluate: Evaluate, group: str, weigh: Callable[[Batch], int | Tensor]
) -> Evaluate:
    """Return the function that takes and gives parts, and evaluates on all batches."""

    def evaluate_parts(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
        seen = evaluate(gather(dict(params)), buffers, batch, **how)
        rows = weigh(batch)  # After a pass, which may have told.
        shared = {"loss": seen.loss, "buffers": changed(seen.buffers, buffers)}
        found, examples = mean(shared, rows, group, {})
        grads = {
            name: _scattered(grad, rows, examples, params[name])
            for name, grad in seen.grads.items()
        }
        buffers = {**seen.buffers, **found["buffers"]}
        return seen._replace(loss=found["loss"], buffers=buffers, grads=grads)

    return evaluate_parts


def _scattered(grad: Tensor, rows: int | Tensor, examples: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of the mean gradient."""
    from torch.distributed.tensor import DTensor, Partial

    if isinstance(rows, Tensor):  # The mean over nothing is NaN, and counts as 0.
        grad = torch.where(rows > 0, grad, 0)
    # Half precision loses what it adds up.
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32)) * (rows / examples)
    parts: Any = like
    mesh = parts.device_mesh
    summed = DTensor.from_local(wide.contiguous(), mesh, [Partial()], run_check=False)
    return summed.redistribute(mesh, parts.placements).to(grad.dtype)
