"""More than one device: the package that knows torch.distributed.

torchrun starts one process for each device, a rank. All of them take the same steps on
batches of their own, and hold the same state, bit for bit, or parts of it. Which of them
share a perturbation is a property of the method, which `placed` gives it::

    placement      perturbation of                communication in a step of SAM
    "replica"      each rank, from its batch      one all-reduce
    "group:n"      n ranks, from their batches    two all-reduces of n ranks, one of all
    "global"       all ranks, from all batches    two all-reduces

Whether ranks hold the whole state is a property of the state: `shard` makes it one of
DTensors, which a step takes with no placement. All ranks share a perturbation then. Each
pass gathers a parameter where it is used, and reduces and scatters its gradient; see
`samfn.evaluate`.
"""

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
    together,
)
from samfn.distributed.placements import placed, sharing
from samfn.distributed.shards import gather, mesh_of, shard

__all__ = [
    "FIRST",
    "Agreement",
    "RanksDifferError",
    "concatenated",
    "from_first",
    "gather",
    "is_lost",
    "launched",
    "mean",
    "mesh_of",
    "placed",
    "rank",
    "ranks",
    "require_alike",
    "shard",
    "share",
    "sharing",
    "size",
    "synchronised",
    "together",
    "total",
]
