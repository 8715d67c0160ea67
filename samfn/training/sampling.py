"""Which examples an epoch trains on: easy ones are skipped, hard ones are preferred.

Pure functions of tensors. What a run keeps is one small integer for each example; what
an epoch trains on, and in which order, depends on these, on the seed and on the number
of the epoch alone, so that a run that stopped goes on exactly. For that, `update` comes
between two epochs, and `kept` and `order` have a generator each, made of seed and epoch::

    kept = sampling.kept(counts, generator(seed, "kept", epoch))
    indices = sampling.order(kept, examples, generator(seed, "order", epoch))
    ...  # the epoch, and after every few of them a scan:
    counts = sampling.update(counts, easy)

Whether an example is easy, and its loss, come from one pass over all of them, as
`samfn.measure.per_example` takes it. An epoch without the easy ones minimises another mean
than that over all examples, and wrong labels are never easy: they gain weight.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from samfn import tree
from samfn.support import checks


def init(examples: int, device: torch.device | str | None = None) -> Tensor:
    """Return the counts that a run starts with: 0 for every example, so all are kept.

    Returns:
        Shape (examples,), int8: a tensor like any other in a checkpoint.
    """
    checks.require_count("examples", examples)
    return torch.zeros(examples, dtype=torch.int8, device=device)


def is_easy(outputs: Tensor, labels: Tensor, confidence: float = 0.5) -> Tensor:
    """Tell which examples are predicted right, and with confidence.

    argmax_k z_k = y  and  max_k softmax(z)_k >= confidence

    Args:
        outputs: z, logits, shape (examples, classes), of two classes or more.
        labels: y. Class indices, shape (examples,); or probabilities or scores of
            classes, shape (examples, classes), whose highest one is the label.
        confidence: above 0 and at most 1. The default is that of ml-cvnets.

    Returns:
        Shape (examples,), bool. With a logit of NaN or plus infinity it is False.

    Raises:
        TypeError: logits that are not floating point, or class indices that are.
        ValueError: other shapes, or `confidence` outside of its range.
    """
    checks.require_share("confidence", confidence)
    _require_logits(outputs, labels)
    # The 8 bits of bfloat16 cannot tell 0.5005 from 0.5.
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    right = wide.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
    return right & (wide.softmax(1).amax(1) >= confidence)


def update(
    counts: Tensor, easy: Tensor, indices: Tensor | None = None, *, limit: int = 5
) -> Tensor:
    """Count one scan: up by one where an example was easy, down by one where it was not.

    c <- min(c + 1, limit) if easy, else max(c - 1, 0)

    So an example that is always easy is dropped after `limit` scans, and is back after
    the first in which it is not. One that a scan left out keeps its count.

    Args:
        counts: c, shape (examples,), as `init` makes them; unchanged.
        easy: shape (scanned,), bool, as `is_easy` gives it.
        indices: whose they are, shape (scanned,), integers. None is every example, in
            order. One that comes twice counts once, and is easy if it was so each time;
            replicas can thus gather what they scanned, with what filled up their shards.
        limit: count at which an example is dropped. The default is that of ml-cvnets.

    Returns:
        The new counts, dtype and device of `counts`.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: lengths differ, an index is not of an example, or the dtype of
            `counts` cannot hold `limit`. With indices it waits for a GPU.

    Source:
        github.com/apple/ml-cvnets, engine/training_engine.py, find_easy_samples. There
        an example counts once for each replica that scanned it, one that was left out
        counts as hard, and when nobody is easy any more, who was dropped stays dropped.
    """
    _require_counts(counts, limit)
    if easy.dtype != torch.bool:
        raise TypeError(f"easy must be of bool, got {easy.dtype}")
    if indices is None:
        _require_length("easy", easy, len(counts), "the counts")
        hard = ~easy
    else:
        _require_length("easy", easy, len(indices), "the indices")
        _require_indices(indices, len(counts))
        # Each write says True, so that their order does not matter.
        seen = counts.new_zeros((len(counts), 2), dtype=torch.bool)
        seen[indices.long(), easy.long()] = True
        hard, easy = seen.unbind(1)
    # Clipped before and not after: 127 + 1 is -128 in int8.
    up, down = counts.clamp(0, limit - 1) + 1, counts.clamp(1, limit) - 1
    return torch.where(hard, down, torch.where(easy, up, counts))


def kept(
    counts: Tensor, generator: Generator, *, limit: int = 5, replay: float = 0.25
) -> Tensor:
    """Return which examples an epoch trains on: the hard ones, and some of the easy.

    Those whose count is below `limit`, and of the others the share `replay`, drawn at
    random: with a new generator in every epoch each has its turn, and is not forgotten.
    If that leaves nobody, nobody is dropped: an epoch is never empty.

    Args:
        counts: shape (examples,), from `update`.
        generator: made of seed and epoch, and read for this alone.
        limit: as for `update`.
        replay: share of the dropped examples that stays, rounded; at least 0, which is
            ml-cvnets, and below 1. An epoch has at least that share of all examples.
            With 0, a network forgets what it no longer sees, most of all at a learning
            rate that stays high. The default is a choice.

    Returns:
        Indices, int64, ascending.

    Raises:
        TypeError: `counts` are no integers.
        ValueError: `replay` or `limit` is outside of its range.

    Source:
        Qin et al., 2023, arXiv:2303.04947, who drop at random what has a low loss; they
        also scale the losses of the rest of it up, which this does not.
    """
    _require_counts(counts, limit)
    checks.require_below_one("replay", replay)
    stay = counts < limit
    dropped = _where(~stay)
    drawn = _permutation(len(dropped), generator)[: round(replay * len(dropped))]
    stay[dropped[drawn.to(dropped.device)]] = True
    return _where(stay if stay.any() else ~stay)


def hardest(scores: Tensor, share: float) -> Tensor:
    """Return the examples with the highest scores.

    Args:
        scores: shape (examples,): losses, or how much they grow from w to w + e, which
            is the sharpness of each example, or any other; see `samfn.measure.per_example`.
        share: of the examples, rounded, and at least one; above 0 and at most 1.

    Returns:
        Indices, int64, the highest score first, equal ones by index. A score that is
        NaN counts as the highest.

    Raises:
        TypeError: scores that are not floating point.
        ValueError: they have another shape, or `share` is outside of its range.

    Source:
        Shrivastava et al., 2016, arXiv:1604.03540, which selects regions of an image by
        their loss.
    """
    checks.require_share("share", share)
    _require_scores(scores)
    ranked = scores.argsort(descending=True, stable=True)
    return ranked[: _number(share, len(scores))]


def draw(
    scores: Tensor, share: float, generator: Generator, *, floor: float = 0.1
) -> Tensor:
    """Draw examples without replacement, with chances in proportion to their scores.

    P(next is i) = w_i / sum of w over those left,  w = max(s, 0) + floor * mean

    `hardest` leaves most examples out for good, and takes wrong labels first; this gives
    every one a chance in each epoch.

    Args:
        scores: s, as for `hardest`. One that is not finite counts as the highest that is.
        share: as for `hardest`.
        generator: of the draw.
        floor: weight that a score of 0 has, as a share of the mean of max(s, 0); above 0
            and at most 1. The default is a choice, and from no source.

    Returns:
        Indices, int64, in the order in which they were drawn.

    Raises:
        TypeError, ValueError: as for `hardest`.

    Source:
        Efraimidis and Spirakis, 2006, Weighted random sampling with a reservoir: the
        largest of u^(1 / w), u uniform; here of w / e, e = -log u, which ranks alike.
    """
    checks.require_share("floor", floor)
    _require_scores(scores)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    finite = wide.isfinite()
    weights = torch.where(finite, wide, 0.0).clamp(min=0.0)
    weights = torch.where(finite, weights, weights.amax())
    largest = weights.amax()  # The sum of large ones would overflow.
    weights = weights / torch.where(largest > 0, largest, 1.0)
    mean = weights.mean()
    weights = weights + floor * torch.where(mean > 0, mean, 1.0)
    dtype = tree.wide_default()
    waiting = torch.empty(len(scores), dtype=dtype, device=generator.device)
    waiting.exponential_(generator=generator)
    return hardest(weights / waiting.to(weights.device), share)


def order(indices: Tensor, examples: int, generator: Generator) -> Tensor:
    """Return the indices in the order in which an epoch goes through them.

    It is the permutation of all examples, without those that are not kept: to drop one
    moves no other, and with nothing dropped this is `torch.randperm(examples)`.

    Args:
        indices: shape (kept,), each once, in any order: only the set matters.
        examples: how many there are in all.
        generator: made of seed and epoch, and read for this alone. On a CPU the order is
            the same for every device of `indices`.

    Raises:
        TypeError: `indices` are no integers.
        ValueError: an index is not of an example, or comes twice. It waits for a GPU.
    """
    checks.require_count("examples", examples)
    _require_indices(indices, examples)
    member = torch.zeros(examples, dtype=torch.bool, device=indices.device)
    member[indices.long()] = True
    everyone = _permutation(examples, generator).to(indices.device)
    ordered = everyone[member[everyone]]
    if len(ordered) != len(indices):
        twice = len(indices) - len(ordered)
        raise ValueError(f"indices must come once each, {twice} came again")
    return ordered


class Report(NamedTuple):
    """What skipping examples spared a run, epoch by epoch; numbers, and no tensors."""

    examples: int
    """Of the whole training set."""
    steps: int
    """Of an epoch that skips none."""
    trained: tuple[int, ...] = ()
    """Examples that each epoch so far trained on."""
    taken: tuple[int, ...] = ()
    """Steps that each epoch so far took."""

    def after(self, trained: int, taken: int) -> "Report":
        """Return the report with one epoch more.

        Args:
            trained: examples that it trained on.
            taken: steps that it took.
        """
        checks.require_count("trained", trained, 0)
        checks.require_count("taken", taken, 0)
        if trained > self.examples:
            raise ValueError(f"an epoch has {self.examples} examples, not {trained}")
        return self._replace(trained=(*self.trained, trained), taken=(*self.taken, taken))

    @property
    def skipped(self) -> tuple[int, ...]:
        """Examples that each epoch so far skipped; their sum is that of the run."""
        return tuple(self.examples - trained for trained in self.trained)

    @property
    def skipped_share(self) -> float:
        """Share of all examples of all epochs so far that was skipped, 0 to 1."""
        return sum(self.skipped) / max(1, self.examples * len(self.trained))

    @property
    def steps_saved(self) -> int:
        """Steps that were not taken; what the scans cost is not taken off."""
        return self.steps * len(self.taken) - sum(self.taken)


def _number(share: float, examples: int) -> int:
    return max(1, round(share * examples))


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _permutation(length: int, generator: Generator) -> Tensor:
    return torch.randperm(length, generator=generator, device=generator.device)


def _is_integer(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _require_counts(counts: Tensor, limit: int) -> None:
    checks.require_count("limit", limit)
    if not _is_integer(counts):
        raise TypeError(f"counts must be integers, got {counts.dtype}")
    if counts.ndim != 1 or not len(counts):
        raise ValueError(
            f"counts must have the shape (examples,), got {tuple(counts.shape)}"
        )
    if limit > torch.iinfo(counts.dtype).max:
        raise ValueError(f"limit must fit into {counts.dtype}, got {limit}")


def _require_indices(indices: Tensor, examples: int) -> None:
    if not _is_integer(indices):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(
            f"indices must have one dimension, got shape {tuple(indices.shape)}"
        )
    if len(indices):
        lowest, highest = torch.stack(indices.aminmax()).tolist()
        if lowest < 0 or highest >= examples:
            raise ValueError(
                f"indices of {examples} examples are 0 to {examples - 1}, got {lowest} to"
                f" {highest}"
            )


def _require_length(name: str, tensor: Tensor, length: int, of: str) -> None:
    if tensor.shape != (length,):
        raise ValueError(
            f"{name} must have the shape ({length},) of {of}, got {tuple(tensor.shape)}"
        )


def _require_scores(scores: Tensor) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"scores must have the shape (examples,), got {tuple(scores.shape)}"
        )


def _require_logits(outputs: Tensor, labels: Tensor) -> None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        found = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"outputs must be logits of floating point, got {found}")
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        # One logit would always be right, with probability 1.
        raise ValueError(
            "outputs must have the shape (examples, classes), of two classes or more, got"
            f" {tuple(outputs.shape)}"
        )
    if labels.shape not in (outputs.shape[:1], outputs.shape):
        raise ValueError(
            f"labels must have the shape {tuple(outputs.shape[:1])} or"
            f" {tuple(outputs.shape)}, got {tuple(labels.shape)}"
        )
    if labels.ndim == 1 and not _is_integer(labels):
        raise TypeError(f"class indices must be integers, got {labels.dtype}")
