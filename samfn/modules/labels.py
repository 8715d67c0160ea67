"""Labels in a batch, followed through a forward pass to the targets of a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.modules.memory import address
from samfn.support.batches import keyed
from samfn.tree import Batch

ATEN = torch.ops.aten
COPIES = ATEN.clone.default, ATEN._to_copy.default


class Labels(NamedTuple):
    """Whole numbers in a batch, as a forward pass makes targets of them."""

    path: tuple[Any, ...]
    """Where they are in the batch."""
    shifted: bool = False
    """Whether rows have lost their first, as those of tokens to be predicted."""
    appended: int | None = None
    """The number that rows were made longer with, if they were."""

    def of(self, batch: Batch) -> Tensor:
        """Return those of a batch, without what its rows are made longer with."""
        own = keyed(batch)
        for key in self.path:
            own = own[key]
        labels: Tensor = own[..., 1:] if self.shifted else own
        return labels


class Seen(NamedTuple):
    """A tensor of labels; it is kept, so that no other one gets its memory."""

    labels: Labels
    tensor: Tensor
    by_rows: bool = True
    """Whether its last dimension is along the rows of the batch."""

    def has_rows_in(self, view: Tensor) -> bool:
        """Return whether a view of all its numbers still has them in rows."""
        own = self.tensor
        same = own.shape == view.shape and own.stride() == view.stride()
        return self.by_rows and same and own.ndim > 1


class Trail:
    """Which tensors of a forward pass have labels of its batch, and nothing else.

    It follows views of all of them, copies, rows that are made longer, and rows without
    their first, which is how language models predict the next token. Whatever else is made
    of labels is not known to be such.
    """

    def __init__(self, batch: Batch) -> None:
        self._seen: dict[tuple[int, int, int], Seen] = {}
        for path, leaf in pytree.tree_leaves_with_path(keyed(batch)):
            if isinstance(leaf, Tensor) and not leaf.is_floating_point():
                keys = [getattr(step, "key", getattr(step, "idx", None)) for step in path]
                if None not in keys:  # as of a named tuple
                    self._add(Seen(Labels(tuple(keys)), leaf))

    def labels(self, targets: Tensor, ignored: int) -> Labels | None:
        """Return what targets are of which some number is ignored, or None."""
        seen = self._find(targets)
        padded = seen and seen.labels.appended not in (None, ignored)
        return seen.labels if seen and not padded else None

    def note(self, operation: Any, named: Mapping[str, Any], result: Any) -> None:
        """Look at an operation, and what it gave."""
        if operation._schema.is_mutable:
            self._forget((*named.values(), result))
            return
        given = named.get("self")
        if isinstance(given, Tensor) and (seen := self._find(given)):
            labels = _followed(seen, operation, named)
            # Bytes would have other numbers in the place of those below 0.
            if labels and result.dtype in (given.dtype, torch.int64):
                self._add(Seen(labels, result, seen.has_rows_in(given)))

    def _find(self, given: Tensor) -> Seen | None:
        place = _place(given)
        return None if place is None else self._seen.get(place)

    def _add(self, seen: Seen) -> None:
        if (place := _place(seen.tensor)) is not None:
            self._seen[place] = seen

    def _forget(self, written: Any) -> None:
        memory = {address(x) for x in pytree.tree_leaves(written) if isinstance(x, Tensor)}
        seen = self._seen.items()
        self._seen = {place: one for place, one in seen if place[0] not in memory}


def _followed(seen: Seen, operation: Any, named: Mapping[str, Any]) -> Labels | None:
    """Return what labels an operation makes of some, if it makes any."""
    given, labels = named["self"], seen.labels
    if operation in COPIES:
        return labels
    if not seen.has_rows_in(given):
        return None
    if operation is ATEN.constant_pad_nd.default and labels.appended is None:
        before, after, *more = named["pad"]
        longer = before == 0 < after and not more
        return labels._replace(appended=int(named.get("value", 0))) if longer else None
    if operation is ATEN.slice.Tensor and not labels.shifted:
        how = {"dim": 0, "start": 0, "end": None, "step": 1, **named}
        to_end = how["end"] is None or how["end"] >= given.shape[-1]
        along = how["dim"] in (-1, given.ndim - 1)
        first = along and to_end and how["start"] == how["step"] == 1
        return labels._replace(shifted=True) if first else None
    return None


def _place(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return what tells the numbers of a tensor from those of others, if it has any."""
    if (memory := address(tensor)) is None:
        return None
    return memory, int(tensor.storage_offset()), tensor.numel()
