"""Weights in place: this rank's parts of them where they are DTensors, else all of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from samfn import tree
from samfn.gradient import dense
from samfn.perturb import rate
from samfn.support.collectives import all_reduce
from samfn.tree import Params


def whole(part: Tensor, like: Any) -> Tensor:
    """Return the tensor that has this part here, as `like` has its own."""
    if not tree.is_sharded(like):
        return part
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    found: Tensor = type(like).from_local(part, like.device_mesh, like.placements, **layout)
    return found


def align(parameters: Iterable[Any]) -> None:
    """Cut gradients as their parameters are; backward may leave terms of a sum."""
    for p in parameters:
        grad = p.grad if tree.is_sharded(p) else None
        if grad is not None and grad.placements != p.placements:
            p.grad = grad.redistribute(p.device_mesh, p.placements)


def way_to_gradients(parameters: Iterable[Tensor]) -> str:
    """Return what to do where there are no gradients."""
    way = "call backward before"
    if tree.any_sharded(parameters):
        way += "; of fully_shard, with set_requires_gradient_sync(True)"
    return way


def moves_nothing(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a step would be of gradients of 0, at a learning rate of 0.

    By such a step torch.distributed.checkpoint makes the memory of an optimizer.
    """
    groups = list(groups)
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return all(group.get("lr", 0) == 0 for group in groups) and not any(
        tree.local(grad).any() for grad in grads
    )


def write(values: Mapping[Tensor, Tensor]) -> None:
    """Write parts into the memory of the tensors that they are of."""
    if values:
        torch._foreach_copy_(list(map(tree.local, values)), list(values.values()))
        torch.clear_autocast_cache()  # Within one autocast, it holds casts of the old ones.


def take_over(before: Mapping[Tensor, Tensor], elsewhere: dict[Tensor, Tensor]) -> None:
    """Let what was written be the parts `before`, and let `elsewhere` move as far."""
    for p, old in before.items():
        new, there = tree.local(p.detach()), elsewhere[p]
        elsewhere[p] = torch.where(new == old, there, there + (new - old))
        old.copy_(new)


Groups = Mapping[str, Mapping[str, Any]]


def uphill(wholes: Params, groups: Groups) -> tuple[dict[str, Tensor], Tensor]:
    """Return T^2 g, and ||T g||, where T is |w| in groups that are adaptive, else 1."""
    # The way up has an entry for every weight, also where the gradient is sparse.
    grads = tree.wide({name: dense(tree.local(p.grad)) for name, p in wholes.items()})
    adaptive = [name for name, group in groups.items() if group["adaptive"]]
    metric = {name: tree.local(wholes[name]).abs() for name in adaptive}
    scaled = {**grads, **_multiplied(metric, grads)}
    length = tree.norm_of_any(scaled, wholes)
    return scaled | _multiplied(metric, scaled), length


def move(params: Params, way: Params, length: Tensor, groups: Groups) -> None:
    """Add rho / length times the way to parameters, each with the rho of its group."""

    def kind(name: str) -> tuple[Any, torch.device]:
        return groups[name]["rho"], way[name].device

    for (rho, device), part in tree.parts(way, kind):
        step = tree.scale(part, rate(length.to(device), rho))
        torch._foreach_add_([params[name] for name in part], list(step.values()))


def _multiplied(metric: Params, up: Params) -> dict[str, Tensor]:
    return tree.multiply(metric, up) if metric else {}


def require_agreement(found: Tensor, parameters: Iterable[Any]) -> None:
    """Raise where not all ranks that hold parts of the parameters found the same.

    Raises:
        RuntimeError: a GradScaler found a gradient that is not finite on some alone.
    """
    for mesh in {p.device_mesh: None for p in parameters if tree.is_sharded(p)}:
        votes = torch.stack([found.bool(), torch.ones_like(found).bool()]).to(torch.int32)
        for place in range(mesh.ndim):
            votes = all_reduce(votes, mesh.get_group(place).group_name)
        if 0 < (some := int(votes[0])) < (count := int(votes[1])):
            raise RuntimeError(
                f"GradScaler found a gradient of inf or NaN on {some} of {count} ranks:"
                " it asks the ranks that hold parts of the first parameter of a device, so"
                " let the first be one that is cut along all dimensions of the mesh, or let"
                " torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler unscale_ the"
                " gradients, which asks all"
            )
