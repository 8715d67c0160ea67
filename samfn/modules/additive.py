"""Whether a loss is the mean of those of a batch's parts, as its criterion shows.

A criterion takes outputs and targets, and needs no model: it is given some rows of them,
and parts of these. One that sums, divides by a count of the batch, or holds examples
against each other gives another mean of the parts than of the whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.support.batches import length_of, rows_of
from samfn.tree import Batch

ROWS = 16  # enough to see it, and little to compute beside a pass
PASSES = 4  # that are looked at: in the first, a mask may leave out nothing

LossAt = Callable[[Any, Batch], Tensor]
Weigh = Callable[[Batch], "int | Tensor"]


def is_mean(loss_at: LossAt, outputs: Any, batch: Batch, weigh: Weigh) -> bool | None:
    """Return whether a loss is the mean of those of a batch's parts.

    w L(batch) = sum of w_i L(part i), with the weights w of the batch and of its parts

    Args:
        loss_at: (outputs, batch) -> loss, shape ().
        outputs: of a pass.
        batch: that they are of.
        weigh: batch -> w.

    Returns:
        None where it cannot be seen: outputs are not tensors of a row for each example, or
        the criterion takes no parts, is random, or its loss not finite.
    """
    try:
        count = min(_rows(outputs, batch), ROWS)
    except ValueError:
        return None

    def at(places: Sequence[int], cast: Callable[[Any], Any]) -> Tensor:
        """Return the w_i L(part i) of the parts between some rows, in float64."""
        terms = []
        for rows in map(slice, places, places[1:]):
            part = rows_of(batch, rows)
            if weight := torch.as_tensor(weigh(part), dtype=torch.float64).item():
                # Copies, which it may write to.
                given = pytree.tree_map(lambda leaf, r=rows: cast(leaf[r].clone()), outputs)
                loss = loss_at(given, pytree.tree_map(cast, part))
                terms.append(weight * loss)
        return torch.stack(terms).cpu() if terms else torch.empty(0)

    middle = {1, count // 2, count - 1}
    cuts = [(0, count), (0, count), *((0, cut, count) for cut in middle)]
    for cast in (_widened, _as_it_is):  # Not every criterion takes float64.
        try:
            with torch.no_grad(), torch.random.fork_rng(_devices(outputs)):
                whole, again, *parted = [at(places, cast) for places in cuts]
        except Exception:
            continue
        told = [parts for parts in parted if parts.isfinite().all()]
        if not (told and len(whole) and _agree(whole, again)):
            return None
        return all(_agree(whole, parts) for parts in told)
    return None


def drawn(outputs: Any, rows: int, *, chances: bool) -> Any:
    """Return other outputs of as many rows, on the CPU: normal, or between 0 and 1.

    What holds no floating-point numbers stays as it is.
    """
    source = torch.Generator().manual_seed(0)

    def of(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point()):
            return leaf
        given: Any = {"dtype": leaf.dtype, "generator": source}
        return (torch.rand if chances else torch.randn)(rows, *leaf.shape[1:], **given)

    return pytree.tree_map(of, outputs)


def _rows(outputs: Any, batch: Batch) -> int:
    """Return how many examples a batch has, of which each output has a row."""
    length = length_of(batch)
    leaves = pytree.tree_leaves(outputs)
    whole = all(isinstance(x, Tensor) and x.shape[:1] == (length,) for x in leaves)
    if not (leaves and whole and length > 1):
        raise ValueError("expected several rows")
    return length


def _devices(outputs: Any) -> list[int]:
    """Return the GPUs whose random numbers a criterion may draw."""
    devices = {leaf.device for leaf in pytree.tree_leaves(outputs)}
    return [device.index for device in devices if device.type == "cuda"]


def _widened(leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if floating else leaf


def _as_it_is(leaf: Any) -> Any:
    return leaf


def _agree(one: Tensor, other: Tensor) -> bool:
    """Return whether two sums are the same but for rounding in their dtype."""
    size = one.abs().sum() + other.abs().sum()
    apart = (one.sum() - other.sum()).abs()
    return bool(apart <= torch.finfo(one.dtype).eps ** 0.5 * size)
