"""What a loss is a mean over: all examples, those that count, or their weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from samfn.batches import length_of, pair_of
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


class Mean(NamedTuple):
    """A mean over targets that are not ignored, as the kernel of `nll_loss` takes it."""

    targets: Tensor
    weighted: bool
    ignored: int


KERNELS = torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default


def mean_of(operation: Any, args: Sequence[Any]) -> Mean | None:
    """Return the mean that an operation takes, if it is one of a loss of classes."""
    if operation not in KERNELS:
        return None
    _, targets, weight, reduction, ignored = args
    return Mean(targets, weight is not None, ignored) if reduction == 1 else None


def seen(means: Sequence[Mean], targets: Any) -> Weighing:
    """Return what a loss is a mean over that was seen to take some means.

    Args:
        means: of its forward pass.
        targets: that the criterion was given.
    """
    if not means:
        return Weighing()
    ignored = {mean.ignored for mean in means}
    weighted = any(mean.weighted for mean in means)
    same = all(_is_same(mean.targets, targets) for mean in means)
    if same and len(ignored) == 1 and not weighted:
        return of_classes(lambda: {"ignore_index": next(iter(ignored))})
    if weighted or ignored != {IGNORED}:
        return Weighing(partial(_refused, "the weights or classes of its targets"))
    return Weighing(_rows_of_whole)


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
        for leaf in pytree.tree_leaves(batch)
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
    return Weighing() if getattr(criterion, "__module__", None) in LOSSES else None


def of_classes(options: Callable[[], dict[str, Any]]) -> Weighing:
    """Return what `cross_entropy` or `nll_loss` with some options is a mean over.

    sum of weight[target] over the targets that are not ignored
    """

    def kept(targets: Tensor) -> Tensor:
        ignored: int = options().get("ignore_index", IGNORED)
        return targets.long() != ignored  # Of bytes, -100 would be 156.

    def counts(batch: Batch) -> Tensor | None:
        _, targets = pair_of(batch)
        if targets.is_floating_point():  # Of probabilities of classes, none is ignored.
            return None
        return kept(targets).reshape(len(targets), -1).any(1)

    def weigh(batch: Batch) -> int | Tensor:
        said = options()
        reduction = said.get("reduction", "mean")
        if reduction == "sum":
            raise ValueError("expected a mean of the examples' losses, got their sum")
        _, targets = pair_of(batch)
        if reduction != "mean" or targets.is_floating_point():
            return length_of(batch)
        count = kept(targets)
        if (weights := said.get("weight")) is None:
            number: Tensor = count.sum()
            return number
        classes = torch.where(count, targets, 0).long()  # Bytes would be a mask.
        return torch.where(count, weights[classes], 0).sum()

    return Weighing(weigh, counts)
