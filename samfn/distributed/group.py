"""The processes that torchrun started: who is there, and what they tell each other."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.support.checks import some
from samfn.tree import Batch

TIMEOUT = 300.0  # seconds; compiling may take one rank longer than another
FIRST = 0  # the rank that prints and writes
GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, odd, as a signed number


class RanksDifferError(RuntimeError):
    """What should be the same on all ranks is not."""


@contextlib.contextmanager
def ranks(
    *, timeout: float = TIMEOUT, kind: Literal["cuda", "cpu"] | None = None
) -> Iterator[torch.device | None]:
    """Join the other processes that torchrun started, until the end.

    A collective that a rank waits for longer than the timeout, as for one that was killed
    or stopped, raises; torchrun ends all ranks then, and begins anew up to --max-restarts
    times.

    Args:
        timeout: in seconds, from a fast rank to the slowest.
        kind: of device; None takes GPUs where there are any.

    Yields:
        The device of this rank; None where torchrun started nothing, and this does nothing.

    Raises:
        ValueError: there are fewer GPUs on this machine than ranks, the environment says
            how many ranks there are but not where, or as `rank`.
    """
    if not launched():
        if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            # All of them would do the whole work, each for itself.
            raise ValueError(
                "RANK and WORLD_SIZE are set, expected MASTER_ADDR beside them"
            )
        yield None
        return
    rank()
    port = os.environ.get("MASTER_PORT", "")
    if not (port.isdecimal() and len(port) < 6 and int(port) < 2**16):
        raise ValueError(f"expected a MASTER_PORT of 0 to 65535, got {port!r}")
    device = torch.device("cpu")
    backend = "gloo"
    if kind == "cuda" or (kind is None and torch.cuda.is_available()):
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"rank {local} of this machine has no GPU: {found} found")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=timeout)
    store, own, count = next(rendezvous("env://", timeout=patience))
    # torchrun may keep the store when it begins anew, with the addresses of before in it.
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=store, rank=own, world_size=count, timeout=patience
    )
    try:
        # A rank that is done at once would close connections that others still make.
        dist.all_reduce(torch.zeros(()))
        yield device
    finally:
        dist.destroy_process_group()


def is_lost(error: Exception) -> bool:
    """Return whether an error says that another rank ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)  # It has no type.
    )


def launched() -> bool:
    """Return whether torchrun, or what sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def everyone() -> Any:
    """Return the process group of all ranks.

    Raises:
        RuntimeError: no process group was begun.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group: start with torchrun, and enter samfn.distributed.ranks()"
        )
    return dist.group.WORLD


def rank() -> int:
    """Return which of the ranks this is, or is to become; 0 where there is one alone.

    Raises:
        ValueError: the environment numbers it otherwise than torchrun does.
    """
    if dist.is_initialized():
        return dist.get_rank()
    if not launched():
        return FIRST
    own, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
    numbers = own.isdecimal() and count.isdecimal() and len(own + count) < 16
    if not (numbers and int(own) < int(count)):
        # Nobody would wait for it, and it for others until they are given up.
        raise ValueError(f"expected a RANK of 0 to below WORLD_SIZE, got {own} of {count}")
    return int(own)


def size() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Batch) -> Batch:
    """Return the rows of a batch that are this rank's, of one that all ranks have whole."""
    own, parts = rank(), size()
    return pytree.tree_map(lambda leaf: leaf.tensor_split(parts)[own], batch)


def mean(values: Mapping[str, float], weight: float) -> dict[str, float]:
    """Return the means of what the ranks found, each with its weight; the same on all."""
    if size() == 1:
        return dict(values)
    found = torch.tensor([*values.values(), 1.0], dtype=torch.float64) * weight
    dist.all_reduce(found)
    *sums, total = found.tolist()
    return {name: value / total for name, value in zip(values, sums, strict=True)}


def concatenated(part: Tensor) -> Tensor:
    """Return the parts of all ranks, in their order, along the first dimension."""
    if size() == 1:
        return part
    lengths = [
        torch.zeros((), dtype=torch.int64, device=part.device) for _ in range(size())
    ]
    dist.all_gather(lengths, torch.tensor(len(part), device=part.device))
    counts = [int(length) for length in lengths]
    padded = part.new_zeros(max(counts), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([some[:count] for some, count in zip(parts, counts, strict=True)])


class Agreement:
    """What ranks ask for between steps, so that all do it after the same one.

    Args:
        count: how many numbers are asked for; the largest that a rank asks counts.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pending: tuple[dist.Work, Tensor] | None = None

    def later(self, *asked: int) -> list[int]:
        """Ask, and return what was asked for in the call before; does not wait."""
        if size() == 1:
            return list(asked)
        before = self._take()
        self._begin(asked)
        return before

    def now(self, *asked: int) -> list[int]:
        """Ask, and return what was asked for since the last call; waits for all ranks."""
        before = self.later(*asked)
        return [*map(max, before, self._take())] if size() > 1 else before

    def _begin(self, asked: tuple[int, ...]) -> None:
        values = torch.tensor(asked)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)
        assert work is not None  # It is asynchronous, and this rank is in the group.
        self._pending = work, values

    def _take(self) -> list[int]:
        if self._pending is None:
            return [0] * self._count
        work, values = self._pending
        work.wait()
        self._pending = None
        return [int(value) for value in values]


def from_first(value: Any) -> Any:
    """Return what the first rank has: numbers, texts, and what holds them."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=FIRST)
    return box[0]


def together(function: Callable[[], Any]) -> Any:
    """Call a function on every rank; raise on all of them what the first raised, if any.

    So no rank waits for one that gave up.
    """
    result, failures = None, [None] * size()
    failure: Any = None
    try:
        result = function()
    except Exception as error:
        failure = error
    if size() == 1:
        failures = [failure]
    else:
        dist.all_gather_object(failures, failure)
    for failed in failures:
        if failed is not None:
            raise failed
    return result


def require_alike(values: Any) -> None:
    """Raise unless nested mappings of tensors are the same on all ranks, bit for bit.

    It waits for all ranks and for a GPU; compares 64 bits of each tensor. DTensors are left
    out, of which ranks hold parts.

    Raises:
        RanksDifferError: on all ranks; names the first tensors that differ.
    """
    if size() == 1:
        return
    if isinstance(values, tuple) and hasattr(values, "_asdict"):
        found = values._asdict().items()
        values = {name: value for name, value in found if value is not None}
    named = {n: leaf for n, leaf in tree.named(values).items() if not tree.is_sharded(leaf)}
    if not named:
        return
    own = torch.stack([_digest(leaf) for leaf in named.values()])
    digests = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(digests, own)
    differs = torch.stack(digests).ne(digests[0]).any(0).tolist()
    if names := [name for name, differ in zip(named, differs, strict=True) if differ]:
        raise RanksDifferError(
            f"expected the same state on all {size()} ranks, but {some(names)} differ"
        )


def _digest(leaf: Tensor) -> Tensor:
    """Return 64 bits that depend on every bit of a tensor, and where it is."""
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = leaf.reshape(-1).view(whole[leaf.element_size()]).to(torch.int64)
    # Odd factors lose no change of a single entry; products and sums wrap around.
    factors = torch.arange(1, 2 * len(bits), 2, device=bits.device) * GOLDEN
    return (bits * factors).sum()
