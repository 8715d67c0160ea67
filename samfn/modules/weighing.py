"""What a loss is a mean over: all examples, those that count, or their weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from samfn.batches import keyed, length_of, pair_of
from samfn.modules.labels import Labels, Trail
from samfn.modules.memory import address
from samfn.tree import Batch

LOSSES = "torch.nn.functional", "torch.nn.modules.loss"
IGNORED = -100  # by the losses of PyTorch, unless they are told another

SAY = (
    "the loss is a mean over some of {}, and not over the examples, which cannot be counted"
    " from the batch: say how many count, as samfn.supervised(model, criterion,"
    " weigh=lambda batch: (batch[1] != -100).sum())"
)


class Weighing(NamedTuple):
    """What is known of it."""

    weigh: Callable[[Batch], int | Tensor] = length_of
    """batch -> what its loss is a mean over, shape ()."""
    counts: Callable[[Batch], Tensor | None] = lambda batch: None
    """batch -> which examples have a target that counts, shape (examples,); None is all."""


class OfClasses(NamedTuple):
    """A loss of classes, as the kernel of `nll_loss` takes it."""

    labels: Labels | None
    """Its targets, if it is known where they come from."""
    picked: bool
    """Whether they are those that a mask has picked."""
    weighted: bool
    ignored: int
    summed: bool


class Reduction(NamedTuple):
    """A sum or a mean over entries."""

    result: Tensor
    summed: bool
    entries: int
    picked: bool
    """Whether the entries are those that a mask has picked."""


ATEN = torch.ops.aten
KERNELS = ATEN.nll_loss_forward.default, ATEN.nll_loss2d_forward.default
SUMS = ATEN.sum.default, ATEN.sum.dim_IntList
MEANS = ATEN.mean.default, ATEN.mean.dim


class Reductions:
    """The sums and means that a forward pass was seen to take.

    Args:
        batch: that it is given.
    """

    def __init__(self, batch: Batch) -> None:
        self.of_classes: list[OfClasses] = []
        """The losses of classes among them."""
        self._all: list[Reduction] = []
        self._picked: list[Tensor] = []
        self._trail = Trail(batch)

    def note(self, operation: Any, args: Sequence[Any], result: Any) -> None:
        """Look at an operation, and what it gave."""
        named = {a.name: b for a, b in zip(operation._schema.arguments, args, strict=False)}
        if operation in KERNELS and named["reduction"]:
            self._note_classes(named)
        if operation is ATEN.masked_select.default or (
            operation is ATEN.index.Tensor
            and any(i is not None and i.dtype is torch.bool for i in named["indices"])
        ):
            self._picked.append(result)
        self._trail.note(operation, named, result)
        reduction = named.get("reduction")
        summed = operation in SUMS or (bool(args) and reduction == 2)
        if summed or operation in MEANS or (bool(args) and reduction == 1):
            value = result[0] if isinstance(result, tuple) else result
            picked = any(map(self.is_picked, args))
            self._all.append(Reduction(value, summed, args[0].numel(), picked))

    def _note_classes(self, named: Mapping[str, Any]) -> None:
        target, ignored = named["target"], named["ignore_index"]
        labels = self._trail.labels(target, ignored)
        weighted, summed = named["weight"] is not None, named["reduction"] == 2
        found = OfClasses(labels, self.is_picked(target), weighted, ignored, summed)
        self.of_classes.append(found)

    def is_picked(self, given: Any) -> bool:
        """Return whether it is what a mask has picked."""
        own = address(given) if isinstance(given, Tensor) else None
        return own is not None and any(address(one) == own for one in self._picked)

    def that_gave(self, loss: Tensor) -> Reduction | None:
        """Return the reduction whose result is the loss, if one is."""
        found = [one for one in self._all if _is_same(one.result, loss)]
        return found[-1] if found else None


def seen(taken: Reductions, loss: Tensor, losses: Tensor | None, batch: Batch) -> Weighing:
    """Return what a loss is a mean over that was seen to take some means.

    Args:
        taken: in its forward pass.
        loss: that it gave.
        losses: of each example, if it gave these.
        batch: that it was given.
    """
    last, found = taken.that_gave(loss), taken.of_classes
    if last and last.summed and losses is None and _is_of_rows(last.entries, batch):
        return Weighing(_refused_sum)
    if (last and last.picked) or any(one.picked for one in found):
        return Weighing(partial(_refused, "the examples, those that a mask picks"))
    if not found:
        return Weighing()
    summed = any(one.summed for one in found)
    # As transformers' num_items_in_batch, by which it divides.
    numbers = [x for x in pytree.tree_leaves(keyed(batch)) if type(x) in (int, float)]
    if summed and numbers:
        return Weighing(partial(_refused, "what a number in the batch says"))
    weighted = any(one.weighted for one in found)
    ignored, labels = {one.ignored for one in found}, found[0].labels
    alike = len(ignored) == 1 and all(one.labels == labels for one in found)
    if labels and alike and not (weighted or summed):
        return of_classes(lambda: {"ignore_index": next(iter(ignored))}, labels.of)
    if weighted or ignored != {IGNORED}:
        return Weighing(partial(_refused, "the weights or classes of its targets"))
    return Weighing(_rows_of_whole)


def _is_of_rows(entries: int, batch: Batch) -> bool:
    """Return whether so many entries can be some of each example."""
    leaves = pytree.tree_leaves(keyed(batch))
    rows = [len(x) for x in leaves if isinstance(x, Tensor) and x.ndim][-1:]
    return not any(rows) or (entries > 0 and entries % rows[0] == 0)


def _refused_sum(batch: Batch) -> int:
    raise ValueError("expected a mean of the examples' losses, got their sum")


def _is_same(one: Tensor, other: Any) -> bool:
    """Return whether two tensors are the same numbers in the same memory, as yet."""
    return (
        isinstance(other, Tensor)
        and address(one) == address(other)
        and one.numel() == other.numel()
        and not other._version
    )


def _refused(what: str, batch: Batch) -> int:
    raise ValueError(SAY.format(what))


def _rows_of_whole(batch: Batch) -> int | Tensor:
    """Return the number of examples, of which no part may be ignored."""
    whole = [
        (leaf != IGNORED).all()
        for leaf in pytree.tree_leaves(keyed(batch))
        if isinstance(leaf, Tensor) and leaf.dtype is torch.int64  # as ignored targets are
    ]
    length = length_of(batch)
    if not whole:
        return length
    if torch.compiler.is_compiling():  # A graph cannot raise: the step is not finite.
        return torch.where(torch.stack(whole).all(), float(length), torch.nan)
    return length if bool(torch.stack(whole).all()) else _refused("its targets", batch)


def of_criterion(criterion: Any) -> Weighing | None:
    """Return what a criterion is a mean over, if it is one of PyTorch's own."""
    given: dict[str, Any] = {}
    while isinstance(criterion, partial) and not criterion.args:
        given, criterion = {**criterion.keywords, **given}, criterion.func
    if type(criterion) in (nn.CrossEntropyLoss, nn.NLLLoss):
        known = "ignore_index", "reduction", "weight"  # They may be set anew.
        return of_classes(lambda: {key: getattr(criterion, key) for key in known})
    if criterion in (nn.functional.cross_entropy, nn.functional.nll_loss):
        return of_classes(lambda: given)
    if getattr(criterion, "__module__", None) not in LOSSES:
        return None

    def weigh(batch: Batch) -> int:
        said = {**getattr(criterion, "__dict__", {}), **given}
        return (_refused_sum if said.get("reduction") == "sum" else length_of)(batch)

    return Weighing(weigh)


def of_classes(
    options: Callable[[], dict[str, Any]],
    labels: Callable[[Batch], Tensor] = lambda batch: pair_of(batch)[1],
) -> Weighing:
    """Return what `cross_entropy` or `nll_loss` with some options is a mean over.

    sum of weight[target] over the targets that are not ignored

    Args:
        options: -> those that are not PyTorch's.
        labels: batch -> its targets.
    """

    def kept(targets: Tensor) -> Tensor:
        ignored: int = options().get("ignore_index", IGNORED)
        return targets.long() != ignored  # Of bytes, -100 would be 156.

    def counts(batch: Batch) -> Tensor | None:
        targets = labels(batch)
        if targets.is_floating_point():  # Of probabilities of classes, none is ignored.
            return None
        return kept(targets).reshape(len(targets), -1).any(1)

    def weigh(batch: Batch) -> int | Tensor:
        said = options()
        reduction = said.get("reduction", "mean")
        if reduction == "sum":
            return _refused_sum(batch)
        targets = labels(batch)
        if reduction != "mean" or targets.is_floating_point():
            return length_of(batch)
        count = kept(targets)
        if (weights := said.get("weight")) is None:
            number: Tensor = count.sum()
            return number
        classes = torch.where(count, targets, 0).long()  # Bytes would be a mask.
        return torch.where(count, weights[classes], 0).sum()

    return Weighing(weigh, counts)
