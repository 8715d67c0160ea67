"""More than one device: the one package that knows torch.distributed.

torchrun starts one process for each device, a rank. All of them take the same steps on
batches of their own, and hold the same state, bit for bit. What of it they share is a
placement, which `sam_update` and `compile_update` take:

    placement      perturbation of                communication in a step of SAM
    "replica"      each rank, from its batch      one all-reduce
    "group:n"      n ranks, from their batches    two all-reduces of n ranks, one of all
    "global"       all ranks, from all batches    two all-reduces
    "sharded"      as "global"; each rank keeps   two all-gathers, two reduce-scatters
                   a part of every tensor

Nothing of this happens inside of the function that is differentiated. What a pass has to
share travels in one message; "sharded" adds small sums, as for norms.
"""

import torch.distributed as dist

from samfn.distributed.batch_norm import synchronised, total
from samfn.distributed.group import (
    FIRST,
    Agreement,
    RanksDifferError,
    concatenated,
    from_first,
    is_lost,
    launched,
    mean,
    rank,
    ranks,
    require_alike,
    share,
    size,
)
from samfn.distributed.replicas import Placement, replicated
from samfn.distributed.shards import sharded
from samfn.tree import Params

__all__ = [
    "FIRST",
    "Agreement",
    "Placement",
    "RanksDifferError",
    "concatenated",
    "from_first",
    "is_lost",
    "launched",
    "mean",
    "placement",
    "rank",
    "ranks",
    "require_alike",
    "share",
    "size",
    "synchronised",
    "total",
]


def placement(name: str = "replica", *, like: Params | None = None) -> Placement:
    """Return a placement of the perturbation.

    Gradients and losses are means over all examples, so that ranks may have batches of
    different lengths. BatchNorm normalises by each rank's batch; its statistics, and what
    the method remembers, are averaged in every step with the gradients.

    "replica" on n ranks is `per_micro_batch(method, m, statistics="averaged")` on one
    device; "global" is `accumulated(method, m, statistics="averaged")`, which is the step
    on the whole batch where there is no BatchNorm.

    Args:
        name: "replica", as in the paper; "group:n"; "global"; or "sharded".
        like: the whole parameters, for "sharded" alone.

    Raises:
        RuntimeError: no process group was begun.
        ValueError: there is no such placement, or n does not divide the ranks.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 4.1 and its official code:
        `sync_perturbations` and `inner_group_size`.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group: start with torchrun, and enter samfn.distributed.ranks()"
        )
    assert dist.group.WORLD is not None
    count, everyone = size(), dist.group.WORLD.group_name
    if name == "sharded":
        if like is None:
            raise ValueError("a sharded placement needs like=, the whole parameters")
        return sharded(like, rank(), count, everyone)
    if name in ("replica", "global"):
        sharing = count if name == "global" else 1
        return replicated(name, count, sharing, everyone, everyone)
    kind, _, number = name.partition(":")
    if kind != "group" or not number.isdecimal() or not int(number):
        raise ValueError(
            f'placement must be "replica", "group:n", "global" or "sharded", got {name!r}'
        )
    if count % int(number):
        raise ValueError(
            f"placement {name!r}: {number} does not divide the number of ranks, {count}"
        )
    group, _ = dist.new_subgroups(int(number))
    return replicated(name, count, int(number), group.group_name, everyone)
