"""Placements where every rank holds the whole state."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.batches import length_of
from samfn.distributed.collectives import all_reduce, changed, mean
from samfn.loss import Evaluate, Pass
from samfn.methods.base import Descended, Descent, Method, MethodState, Point
from samfn.tree import Batch, Params


class Placement(NamedTuple):
    """Which ranks share a perturbation, and who keeps what; `placement` makes them."""

    name: str
    ranks: int
    sharing: int
    """How many ranks share a perturbation."""
    spread: Callable[[Method], Method]
    """Of the method on one rank, make the one on all of them."""
    shard: Callable[[Any], Any]
    """Of a whole state or tree of it, make what this rank keeps."""
    gather: Callable[..., Any]
    """Of what the ranks keep, make the whole, on every rank; all have to call it. A second
    argument is the device that each tensor goes to as soon as it is whole: for a checkpoint
    "cpu" on the first rank, and "meta", which holds nothing, on the others."""
    whole: Callable[[Params], Params]
    """Of what a rank keeps, tell the whole tensors' shapes and dtypes."""
    mean: Callable[[Any, Batch], Any]
    """(small tensors, batch of this rank) -> their mean over all examples."""
    sharded: str | None = None
    """Name of the group of ranks that each keep a part of every tensor."""

    def m(self, examples: int) -> float:
        """Return how many of a step's examples a perturbation is found on, on average."""
        return examples * self.sharing / self.ranks

    @contextlib.contextmanager
    def norms(self) -> Iterator[None]:
        """Let `tree.norm` and `tree.dot` be those of the whole vectors."""
        if self.sharded is None:
            yield
        else:
            with tree.summed(partial(all_reduce, group=self.sharded)):
                yield


def replicated(name: str, ranks: int, sharing: int, inner: str, everyone: str) -> Placement:
    """Return a placement.

    Args:
        name: of it.
        ranks: how many there are.
        sharing: how many of them share a perturbation.
        inner: name of the group of these.
        everyone: name of the group of all ranks.
    """

    def spread(method: Method) -> Method:
        def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
            if sharing > 1:
                evaluate = _on_all(evaluate, inner, point.weigh)
            seen, new = method.descent(evaluate, point, memory)
            if sharing == ranks:
                return seen, new
            return _mean_descent(seen, new, point, memory, everyone)

        return method._replace(descent=descent)

    average = alike if sharing == ranks else partial(_mean_fields, everyone)
    return Placement(name, ranks, sharing, spread, _same, put, _same, average)


def _same(values: Any) -> Any:
    return values


def put(values: Any, device: torch.device | str | None = None) -> Any:
    """Return a tree with its tensors on a device; None leaves them where they are."""
    if device is None:
        return values
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), values)


def alike(values: Any, batch: Batch) -> Any:
    """Return what is the same on all ranks."""
    return values


def _mean_fields(group: str, values: Any, batch: Batch) -> Any:
    found, _ = mean(values._asdict(), length_of(batch), group, {})
    return type(values)(**found)


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
    found, _ = mean(shared, point.weigh(point.batch), group, point.params)
    buffers = {**seen.clean.buffers, **found["buffers"]}
    return Descent(
        grads=found["grads"],
        clean=seen.clean._replace(loss=found["loss"], buffers=buffers),
        perturbed_loss=found["perturbed"],
        perturbation_norm=found["length"],
        beside=found["beside"],
        grad_norm=found["grad_norm"],
    ), {**memory, **found["memory"]}
