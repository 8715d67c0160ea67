"""Averages of weights: over time, and over checkpoints."""

from collections.abc import Iterable

import torch
from torch import Tensor

from samfn import tree
from samfn.support import checks
from samfn.tree import Params


def moving_average(average: Params, new: Params, decay: float) -> dict[str, Tensor]:
    """Move an exponential average towards new values.

    a <- decay a + (1 - decay) v; what is no floating point, such as a counter, is v

    Args:
        average: a; names, shapes and dtypes of `new`. It is not changed.
        new: v. What is no floating point is returned itself, and not a copy.
        decay: share of the old average, at least 0 and below 1. 0.999 forgets half in 693
            calls.

    Raises:
        ValueError: names, shapes or dtypes differ, or `decay` is out of range.
    """
    checks.require_below_one("decay", decay)
    checks.require_same_layout(new, average, names="the average and the new values")
    moves = [name for name, value in new.items() if value.is_floating_point()]
    moved = {name: average[name].clone() for name in moves}
    # In place, or tensors with a dimension of size 1 would get other strides.
    own, there = ([tree.local(leaves[n]) for n in moves] for leaves in (moved, new))
    torch._foreach_lerp_(own, there, 1 - decay)
    return {name: moved.get(name, value) for name, value in new.items()}


def mean_of(trees: Iterable[Params]) -> dict[str, Tensor]:
    """Return the mean of several mappings, summed in float64.

    What is no floating point, such as a counter, comes from the last one.

    Raises:
        ValueError: there are none, or names, shapes or dtypes differ.
    """
    total: dict[str, Tensor] = {}
    last: Params = {}
    count = 0
    for leaves in trees:
        if last:
            checks.require_same_layout(last, leaves, names="what is averaged")
        for name, value in leaves.items():
            if value.is_floating_point():
                total[name] = total[name] + value if count else value.double()
        last, count = leaves, count + 1
    if not count:
        raise ValueError("expected something to average, got nothing")
    return {
        name: (total[name] / count).to(value.dtype) if name in total else value.clone()
        for name, value in last.items()
    }
