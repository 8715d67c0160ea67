"""What a loss is a mean over: all examples, those that count, or their weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from samfn.modules.labels import Labels, Trail
from samfn.modules.memory import address
from samfn.modules.shares import Shares
from samfn.support.batches import keyed, length_of, pair_of
from samfn.tree import Batch

# PyTorch's losses that are means over examples, or over entries of which each has as many.
OF_EXAMPLES = {
    "l1_loss": "L1Loss",
    "mse_loss": "MSELoss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "kl_div": "KLDivLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "gaussian_nll_loss": "GaussianNLLLoss",
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "margin_ranking_loss": "MarginRankingLoss",
    "cosine_embedding_loss": "CosineEmbeddingLoss",
    "soft_margin_loss": "SoftMarginLoss",
    "multi_margin_loss": "MultiMarginLoss",
    "multilabel_margin_loss": "MultiLabelMarginLoss",
    "multilabel_soft_margin_loss": "MultiLabelSoftMarginLoss",
    "triplet_margin_loss": "TripletMarginLoss",
    "triplet_margin_with_distance_loss": "TripletMarginWithDistanceLoss",
    "ctc_loss": "CTCLoss",
}
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
    ignores: bool
    """Whether some of its targets are ignored."""


class Reduction(NamedTuple):
    """A sum or a mean over entries."""

    result: Tensor
    summed: bool
    entries: int
    picked: bool
    """Whether the entries are those that a mask has picked."""


ATEN = torch.ops.aten
KERNELS = ATEN.nll_loss_forward.default, ATEN.nll_loss2d_forward.default
SUMS = ATEN.sum.default, ATEN.sum.dim_IntList, ATEN.nansum.default
MEANS = ATEN.mean.default, ATEN.mean.dim
WHOLE = torch.int64, torch.int32
BY_NUMBERS = ATEN.index.Tensor, ATEN.index_select.default


class Reductions:
    """The sums and means that a forward pass was seen to take.

    Args:
        batch: that it is given.
    """

    def __init__(self, batch: Batch) -> None:
        self.of_classes: list[OfClasses] = []
        """The losses of classes among them."""
        self.numbers: set[float] = set()
        """Those that whole numbers were made with."""
        self._all: list[Reduction] = []
        # They are kept, and so their memory; and whether a mask of examples picked them.
        self._picked: dict[int | None, tuple[Tensor, bool]] = {}
        self._places: dict[int | None, Tensor] = {}  # That a mask is true at.
        self._trail, self._shares = Trail(batch), Shares(batch)

    def note(self, operation: Any, args: Sequence[Any], result: Any) -> None:
        """Look at an operation, and what it gave."""
        given = operation._schema.arguments
        named = {a.name: a.default_value for a in given if a.has_default_value()}
        named |= {a.name: b for a, b in zip(given, args, strict=False)}
        if operation in KERNELS and named["reduction"]:
            self._note_classes(named)
        self._note_picked(operation, args, named, result)
        self._note_numbers(operation, args, result)
        self._trail.note(operation, named, result)
        reduction = named.get("reduction")
        summed = operation in SUMS or (bool(args) and reduction == 2)
        if summed or operation in MEANS or (bool(args) and reduction == 1):
            value = result[0] if isinstance(result, tuple) else result
            picked = self.is_picked(named.get("target", args[0])) or (
                self.is_picked(args[0], of_examples=True)
            )
            self._all.append(Reduction(value, summed, args[0].numel(), picked))
            self._shares.reduce(args[0], value, by_mask=picked and not summed)
            if summed and self.is_picked(args[0], of_examples=True):
                self._shares.pick(args[0])
        elif isinstance(result, Tensor):
            self._shares.note(operation, args, result)

    def _note_classes(self, named: Mapping[str, Any]) -> None:
        target, ignored = named["target"], named["ignore_index"]
        labels = self._trail.labels(target, ignored)
        weighted, summed = named["weight"] is not None, named["reduction"] == 2
        known = not (target.is_meta or is_fake(target))
        ignores = known and bool((target.long() == ignored).any())
        picked = self.is_picked(target)
        found = OfClasses(labels, picked, weighted, ignored, summed, ignores)
        self.of_classes.append(found)

    def _note_picked(
        self, operation: Any, args: Sequence[Any], named: Mapping[str, Any], result: Any
    ) -> None:
        """Look for what a mask picks, and what is made of that, entry by entry or row."""
        if operation is ATEN.nonzero.default:
            self._places[address(result)] = result
        by: list[Tensor] = []
        if operation is ATEN.masked_select.default:
            by = [args[1]]
        elif operation in BY_NUMBERS:
            given = named["indices"] if "indices" in named else [named["index"]]
            by = [index for index in given if index is not None]
        if any(map(self._is_of_mask, by)):
            self._picked[address(result)] = result, [index.ndim for index in by] == [1]
        elif of := self._of_picked(operation, args, result):
            self._picked[address(result)] = result, self.is_picked(of[0], of_examples=True)

    def _is_of_mask(self, index: Tensor) -> bool:
        return index.dtype is torch.bool or (
            (own := address(index)) is not None and own in self._places
        )

    def _of_picked(self, operation: Any, args: Sequence[Any], result: Any) -> list[Tensor]:
        """Return what was picked, and that the result is made of, if of that alone."""
        if not isinstance(result, Tensor) or not result.ndim:
            return []
        tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
        rows = [x for x in tensors if len(x) == len(result) and self.is_picked(x)]
        others = [x for x in tensors if x.shape == result.shape and not self.is_picked(x)]
        return [] if others or operation._schema.is_mutable else rows

    def is_part(self, loss: Tensor) -> bool:
        """Return whether a loss is made of a mean over what a mask picks, or counts.

        Beside losses of classes, quotients are theirs, as where labels are smoothed.
        """
        return self._shares.are_by_mask(loss) or (
            self._shares.are_by_count(loss) and not self.of_classes
        )

    def _note_numbers(self, operation: Any, args: Sequence[Any], result: Any) -> None:
        if not isinstance(result, Tensor) or result.dtype not in WHOLE:
            return
        if operation is ATEN.lift_fresh.default and not result.ndim and not is_fake(result):
            self.numbers.add(result.item())
        elif operation is not ATEN.constant_pad_nd.default:  # Labels end with it.
            self.numbers.update(x for x in args if type(x) in (int, float))

    def is_picked(self, given: Any, *, of_examples: bool = False) -> bool:
        """Return whether it is what a mask has picked, of examples, or made of that."""
        own = address(given) if isinstance(given, Tensor) else None
        known = own is not None and own in self._picked
        return known and (self._picked[own][1] or not of_examples)

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
    part = taken.is_part(loss)
    added = last and last.summed and _is_of_rows(last.entries, batch)
    if added and losses is None and not part:
        return Weighing(_refused_sum)
    if part or (last and last.picked) or any(one.picked for one in found):
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
    if any(not one.labels and one.ignores for one in found) or (
        taken.numbers & {IGNORED, -IGNORED} and not all(one.labels for one in found)
    ):  # They were made to be ignored, as where a mask of the batch is 0.
        return Weighing(partial(_refused, "the targets, which the model makes"))
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


def _refused_parts(batch: Batch) -> int:
    raise ValueError(
        "expected a mean of the examples' losses, got a loss of which parts of a batch have"
        " another mean: as a sum, a quotient of sums, means over different counts, or of"
        " examples held against each other. Let it be a mean, as its sum / len(targets), or"
        " say what it is one over: samfn.supervised(model, criterion, weigh=lambda batch:"
        " len(batch[0]))"
    )


OF_PARTS = Weighing(_refused_parts)
"""What is known of a loss that is no mean of those of a batch's parts."""


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
        if isinstance(leaf, Tensor) and leaf.dtype is not torch.bool
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
    if any(criterion is f for f in (nn.functional.cross_entropy, nn.functional.nll_loss)):
        return of_classes(lambda: given)
    functions = [getattr(nn.functional, name) for name in OF_EXAMPLES]
    modules = [getattr(nn, name) for name in OF_EXAMPLES.values()]
    if type(criterion) not in modules and not any(criterion is f for f in functions):
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
