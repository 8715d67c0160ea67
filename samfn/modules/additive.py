"""Whether a loss is the mean of those of a batch's parts, as its criterion shows.

A criterion takes outputs and targets, and needs no model: it is given some rows of them,
and parts of these. One that sums, divides by a count of the batch, or holds examples
against each other gives another mean of the parts than of the whole. That it does not
depend on the order of the rows is asked first: else they are no examples.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.support.batches import keyed, length_of, rows_of
from samfn.support.nested import as_it_was, tensors_kept
from samfn.tree import Batch

FEWEST, ROWS = 4, 16  # of both parts together
ENTRIES = 2**20  # of all these rows: a look takes next to no time beside a pass
APART = 1e-3  # relative; in half precision, where a number is rounded by more, 8 eps

LossAt = Callable[[Any, Batch], Tensor]
Weigh = Callable[[Batch], "int | Tensor"]
Sample = tuple[Any, Batch]
"""Some rows of outputs, and of the batch that they are of."""


def sample(outputs: Any, batch: Batch) -> Sample | None:
    """Return copies of some rows; None where it has no rows, or they are too large."""
    try:
        length = length_of(batch)
    except ValueError:
        return None
    leaves = pytree.tree_leaves(outputs)
    if not leaves or any(
        not isinstance(leaf, Tensor) or leaf.shape[:1] != (length,) for leaf in leaves
    ):
        return None
    held = [x for x in pytree.tree_leaves(keyed(batch)) if isinstance(x, Tensor)]
    each = sum(leaf[0].numel() for leaf in (*leaves, *held))
    count = min(length, ROWS, ENTRIES // max(1, each))
    if count < FEWEST:
        return None
    rows = slice(count)
    return _copied(_rows(outputs, rows)), _copied(rows_of(batch, rows))


def is_mean(
    loss_at: LossAt, outputs: Any, batch: Batch, weigh: Weigh, criterion: Any
) -> bool | None:
    """Return whether a loss is the mean of those of a batch's parts.

    w L(batch) = sum of w_i L(part i), with the weights w of the batch and of its parts

    Args:
        loss_at: (outputs, batch) -> loss, shape ().
        outputs: as `sample` gives them.
        batch: likewise.
        weigh: batch -> w.
        criterion: what `loss_at` calls, whose state is put back.

    Returns:
        None where it cannot be seen: the criterion takes no such rows, their order counts,
        it is random, or its loss is not finite.
    """
    count = length_of(batch)
    order = torch.arange(count - 1, -1, -1)
    dtypes = {x.dtype for x in pytree.tree_leaves(outputs) if x.is_floating_point()}

    def at(places: Sequence[int], of: Sample) -> Tensor:
        """Return the w_i L(part i) of the parts between some rows, in float64."""
        terms = []
        for rows in map(slice, places, places[1:]):
            part = rows_of(of[1], rows)
            if weight := torch.as_tensor(weigh(part), dtype=torch.float64).item():
                loss = loss_at(_copied(_rows(of[0], rows)), _copied(part))
                dtypes.add(loss.dtype)
                terms.append(weight * loss.double().cpu())
        return torch.stack(terms) if terms else torch.full((1,), torch.nan)

    turned = _rows(outputs, order), rows_of(batch, order)
    cuts = [(0, cut, count) for cut in {count // 2, max(2, count // 4)}]
    try:
        with torch.no_grad(), _undisturbed(criterion, outputs):
            whole, other = (at((0, count), of) for of in ((outputs, batch), turned))
            parted = [at(places, (outputs, batch)) for places in cuts]
    except Exception:
        return None
    apart = max(APART, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
    if not (whole.isfinite().all() and _agree(whole, other, apart)):
        return None
    return all(_agree(whole, parts, apart) for parts in parted)


def drawn(outputs: Any, rows: int, *, chances: bool) -> Any:
    """Return other outputs of as many rows, on the CPU: normal, or between 0 and 1.

    Leaves that are no floating-point tensors stay as they are.
    """
    source = torch.Generator().manual_seed(0)

    def of(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point()):
            return leaf
        given: Any = {"dtype": leaf.dtype, "generator": source}
        return (torch.rand if chances else torch.randn)(rows, *leaf.shape[1:], **given)

    return pytree.tree_map(of, outputs)


@contextmanager
def _undisturbed(criterion: Any, outputs: Any) -> Iterator[None]:
    """Put back what calls of a criterion change; let it neither compile nor warn."""
    leaves = pytree.tree_leaves(outputs)
    gpus = {x.device.index for x in leaves if x.device.type == "cuda"}
    small = (x for x in tensors_kept(criterion) if x.numel() <= ENTRIES)
    kept = [x for x in small if not x.requires_grad]
    before = [(tensor, tensor._version, tensor.clone()) for tensor in kept]
    numbers, numpy = random.getstate(), sys.modules.get("numpy")
    others = numpy.random.get_state() if numpy else None
    stance = torch.compiler.set_stance("force_eager")
    quiet = warnings.catch_warnings(action="ignore")
    try:
        with as_it_was(criterion), torch.random.fork_rng(gpus), stance, quiet:
            yield
    finally:
        random.setstate(numbers)
        if numpy:
            numpy.random.set_state(others)
        for tensor, version, old in before:
            if tensor._version != version:
                tensor.copy_(old)


def _rows(outputs: Any, rows: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf[rows], outputs)


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), tree)


def _agree(one: Tensor, other: Tensor, apart: float) -> bool:
    """Return whether two sums are the same but for rounding; NaN is nothing's."""
    size = one.abs().sum() + other.abs().sum()
    return bool((one.sum() - other.sum()).abs() <= apart * size)
