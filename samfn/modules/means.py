"""What the loss of a model and a criterion is a mean over, as its passes show."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from samfn.loss import Aux
from samfn.modules import additive, weighing
from samfn.modules.weighing import Reductions, Weighing
from samfn.support.batches import length_of, rows_of
from samfn.support.nested import as_it_was
from samfn.tree import Batch

UNSEEN = (
    "no pass has shown yet what this criterion's loss is a mean over, as none does inside"
    " of torch.compile: call samfn.evaluate before, or say weigh=lambda batch: ... to"
    " samfn.supervised"
)


class Means:
    """What a loss is a mean over, in each mode of its model.

    Args:
        model: whose mode it is.
        criterion: (outputs, targets) -> loss; None where the model has its own.
        loss_at: (outputs, batch) -> the criterion's loss.
        asks: whether the criterion's loss is looked at.
    """

    def __init__(
        self, model: nn.Module, criterion: Any, loss_at: additive.LossAt, *, asks: bool
    ) -> None:
        self._model, self._criterion, self._loss_at = model, criterion, loss_at
        self._seen: dict[bool, Weighing] = {}
        self._forms: dict[bool, Any] = {}  # Outputs of passes that were not real.
        # How many passes are still looked at, whether they give a mean.
        self._looks = dict.fromkeys((False, True), additive.PASSES if asks else 0)

    @property
    def look(self) -> bool:
        """Whether passes in this mode are still looked at."""
        return self._looks[self._model.training] > 0

    @property
    def are_known(self) -> bool:
        """Whether a pass in this mode has shown what it is."""
        return self._model.training in self._seen

    def weigh(self, batch: Batch) -> int | Tensor:
        """Return what the loss of a batch is a mean over; a pass has shown it.

        Raises:
            ValueError: it cannot be counted, or is no mean of what parts of batches have.
        """
        if self._forms and not torch.compiler.is_compiling():
            self._look_at_others(batch)
        return self._known().weigh(batch)

    def counts(self, batch: Batch) -> Tensor | None:
        """Return which examples were seen to count; None is all."""
        return self._known().counts(batch)

    def note(self, taken: Reductions, loss: Tensor, aux: Aux, batch: Batch) -> None:
        """Know what the first pass in this mode has shown by its operations."""
        found = weighing.seen(taken, loss, aux.losses, batch)
        self._seen[self._model.training] = found

    def look_at(self, loss: Tensor, aux: Aux, batch: Batch) -> None:
        """Look at one of the first passes, whether its loss is a mean over examples."""
        mode = self._model.training
        if aux.losses is not None:
            self._looks[mode] = 0  # Their mean is the loss.
        elif is_fake(loss):
            self._forms[mode] = aux.outputs
        else:
            self._looks[mode] -= 1
            self._look(aux.outputs, batch)

    def _look(self, outputs: Any, batch: Batch) -> bool | None:
        """Look whether the loss is a mean over examples; if not, refuse to weigh it."""
        with as_it_was(self._criterion):
            found = additive.is_mean(self._loss_at, outputs, batch, self._known().weigh)
        if found is False:
            self._seen[self._model.training] = weighing.OF_PARTS
        return found

    def _look_at_others(self, batch: Batch) -> None:
        """Look whether it is one at outputs that are drawn, on the CPU."""
        if (forms := self._forms.pop(self._model.training, None)) is None:
            return
        few = rows_of(batch, slice(additive.ROWS))
        few = pytree.tree_map_only(Tensor, Tensor.cpu, few)
        for chances in (False, True):  # Not every criterion takes any number.
            outputs = additive.drawn(forms, length_of(few), chances=chances)
            if self._look(outputs, few) is not None:
                return

    def _known(self) -> Weighing:
        if not self.are_known:
            raise RuntimeError(UNSEEN)
        return self._seen[self._model.training]
