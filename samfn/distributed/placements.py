"""Which ranks share a perturbation: functions from a method to one on several devices."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from samfn import tree
from samfn.distributed.group import everyone, size
from samfn.gradient import Evaluate, Pass
from samfn.methods.base import Descended, Descent, Method, MethodState, Point
from samfn.support.collectives import changed, mean, over_ranks
from samfn.tree import Batch, Params


def sharing(placement: str) -> int:
    """Return how many ranks share a perturbation.

    Args:
        placement: as for `placed`.

    Raises:
        RuntimeError: no process group was begun.
        ValueError: there is no such placement, or n does not divide the ranks.
    """
    everyone()
    if placement in ("replica", "global"):
        return size() if placement == "global" else 1
    kind, _, number = placement.partition(":")
    if kind != "group" or not number.isdecimal() or not int(number):
        raise ValueError(
            f'placement must be "replica", "group:n" or "global", got {placement!r}'
        )
    if size() % int(number):
        raise ValueError(
            f"placement {placement!r}: {number} does not divide the number of ranks,"
            f" {size()}"
        )
    return int(number)


def placed(method: Method, placement: str = "replica") -> Method:
    """Return the method on several devices: all ranks take its steps, on their batches.

    "replica" finds a perturbation on each rank, "group:n" one for n ranks, "global" one
    for all. A state whose parameters are DTensors, as `shard` makes them, has one for all
    without any placement.

    Gradients and losses are means over all examples, so that ranks may have batches of
    different lengths; so are all metrics, but the outputs. BatchNorm normalises by each
    rank's batch; its statistics, and what the method remembers, are averaged in every
    step with the gradients.

    "replica" on n ranks is `per_micro_batch(method, m, statistics="averaged")` on one
    device; "global" is `accumulated(method, m, statistics="averaged")`, which is the step
    on the whole batch where there is no BatchNorm.

    Args:
        method: any method; combinators go inside.
        placement: "replica", as in the paper; "group:n"; or "global".

    Raises:
        RuntimeError: no process group was begun.
        ValueError: there is no such placement, or n does not divide the ranks; in a step,
            the state is sharded and the placement not "global", or not over all ranks.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 4.1 and its official code:
        `sync_perturbations` and `inner_group_size`.
    """
    if method.outermost == placed.__name__:
        raise ValueError("the method is placed already")
    group, world, count = everyone(), everyone(), sharing(placement)
    if placement.startswith("group:"):
        group, _ = dist.new_subgroups(count)
    inner, outer, alone = group.group_name, world.group_name, count < size()

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        shared = point
        if tree.any_sharded(point.params.values()):
            if alone:
                raise ValueError(
                    "a sharded state has one perturbation for all ranks, and needs no"
                    f" placement: leave it out, got {placement!r}"
                )
        elif count > 1:
            evaluate = _on_all(evaluate, inner, point.weigh)
            together = over_ranks(point.weigh, inner, point.params)
            shared = point._replace(weigh=together)
        seen, new = method.descent(evaluate, shared, memory)
        if not alone:
            return seen, new
        return _mean_descent(seen, new, point, memory, outer)

    return method._replace(descent=descent, outermost=placed.__name__)


def _on_all(
    evaluate: Evaluate, group: str, weigh: Callable[[Batch], int | Tensor]
) -> Evaluate:
    """Return the function that evaluates on the batches of all ranks of a group."""

    def on_all(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
        seen = evaluate(params, buffers, batch, **how)
        shared = {
            "grads": seen.grads,
            "loss": seen.loss,
            "buffers": changed(seen.buffers, buffers),
        }
        found, _ = mean(shared, weigh(batch), group, params)
        buffers = {**seen.buffers, **found["buffers"]}
        return seen._replace(loss=found["loss"], grads=found["grads"], buffers=buffers)

    return on_all


def _mean_descent(
    seen: Descent,
    memory: MethodState,
    point: Point,
    before: MethodState,
    group: str,
) -> Descended:
    """Average what the ranks descend with, and what they saw and remember."""
    shared = {
        "grads": seen.grads,
        "beside": seen.beside,
        "loss": seen.clean.loss,
        "perturbed": seen.perturbed_loss,
        "length": seen.perturbation_norm,
        "grad_norm": tree.norm(seen.clean.grads),
        "buffers": changed(seen.clean.buffers, point.buffers),
        "memory": changed(memory, before),
    }
    rows = point.weigh(point.batch)
    found, _ = mean(shared, rows, group, point.params)
    buffers = {**seen.clean.buffers, **found["buffers"]}
    return Descent(
        grads=found["grads"],
        clean=seen.clean._replace(loss=found["loss"], buffers=buffers),
        perturbed_loss=found["perturbed"],
        perturbation_norm=found["length"],
        beside=found["beside"],
        grad_norm=found["grad_norm"],
        watched=None if seen.watched is None else _mean_layers(seen.watched, rows, group),
    ), {**memory, **found["memory"]}


def _mean_layers(
    watched: Callable[[Params], Any], rows: int | Tensor, group: str
) -> Callable[[Params], Any]:
    def on_all(new_params: Params) -> Any:
        own = watched(new_params)
        found, _ = mean(own._asdict(), rows, group, {})
        return type(own)(**found)

    return on_all
