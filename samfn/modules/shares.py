"""Numbers in a forward pass that are means over a part of a batch which the batch decides.

A mean over what a mask picks is one, and so is a sum over a count of the mask, or a mean
over the mean of the mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.modules.memory import address
from samfn.support.batches import keyed
from samfn.tree import Batch

REDUCED = "reduced"
"""A number that a sum or a mean gave."""
COUNT = "count"
"""One that a sum or a mean of the batch itself gave, as of a mask, or of whole numbers."""
INVERSE = "inverse"
"""One over such a count."""
BY_MASK = "by mask"
"""What is made of a mean over what a mask picks."""
BY_COUNT = "by count"
"""What is made of a sum over such a count, or of a sum of entries over it."""

ATEN = torch.ops.aten
QUOTIENTS = {ATEN.div.Tensor: COUNT, ATEN.mul.Tensor: INVERSE}
"""What a sum is divided by, or multiplied with, to be a mean over a count."""


class Shares:
    """What is known of the numbers of a forward pass.

    Args:
        batch: that it is given.
    """

    def __init__(self, batch: Batch) -> None:
        # Tensors are kept, so that no other one gets their memory.
        self._of_batch: dict[int, Tensor] = {}
        self._facts: dict[int, tuple[Tensor, set[str]]] = {}
        self._sizes: set[int] = set()  # Of what a mask of examples picked, and is summed.
        for leaf in pytree.tree_leaves(keyed(batch)):
            if isinstance(leaf, Tensor):
                self._put_of_batch(leaf)

    def reduce(self, given: Tensor, result: Tensor, *, by_mask: bool) -> None:
        """Look at a sum or a mean; `by_mask` is one over what a mask has picked."""
        facts = self._facts_of(given) & {BY_MASK, BY_COUNT} | {REDUCED}
        facts |= {COUNT} if self._is_of_batch(given) else set()
        self._put(result, facts | ({BY_MASK} if by_mask else set()))

    def pick(self, given: Tensor) -> None:
        """Know that a sum is over what a mask of examples has picked."""
        self._sizes |= {given.numel(), len(given)}

    def note(self, operation: Any, args: Sequence[Any], result: Tensor) -> None:
        """Look at another operation, and what it gave."""
        given = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        if operation in QUOTIENTS and self._is_mean(*args[:2], of=QUOTIENTS[operation]):
            self._put(result, {BY_COUNT})
            return
        # What has a number for each example, be it a single one, is a mean over them.
        facts = set[str]().union(*map(self._facts_of, given)) if not result.ndim else set()
        if operation is ATEN.reciprocal.default and COUNT in facts:
            facts |= {INVERSE}
        if facts:
            self._put(result, facts)
        elif given and all(map(self._is_of_batch, given)):
            self._put_of_batch(result)

    def are_by_mask(self, number: Tensor) -> bool:
        """Return whether a number is made of a mean over what a mask picks."""
        return BY_MASK in self._facts_of(number)

    def are_by_count(self, number: Tensor) -> bool:
        """Return whether a number is made of a sum over a count."""
        return BY_COUNT in self._facts_of(number)

    def _is_mean(self, one: Any, other: Any, *, of: str) -> bool:
        """Return whether entries, or a sum of them, are divided by a count of all."""
        if isinstance(other, Tensor):
            return not other.ndim and of in self._facts_of(other)
        return of == COUNT and REDUCED in self._facts_of(one) and other in self._sizes

    def _is_of_batch(self, given: Tensor) -> bool:
        """Return whether it is made of the batch alone, or is a mask or whole numbers."""
        return not given.is_floating_point() or address(given) in self._of_batch

    def _facts_of(self, given: Any) -> set[str]:
        own = address(given) if isinstance(given, Tensor) else None
        return set() if own is None else self._facts.get(own, (given, set()))[1]

    def _put(self, result: Tensor, facts: set[str]) -> None:
        if (own := address(result)) is not None:
            self._facts[own] = result, facts

    def _put_of_batch(self, result: Tensor) -> None:
        if (own := address(result)) is not None:
            self._of_batch[own] = result
