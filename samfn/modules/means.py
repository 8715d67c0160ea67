"""The examples, targets or weights that a loss is a mean over, as its passes show."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from samfn.loss import Aux
from samfn.modules import additive, weighing
from samfn.modules.weighing import Reductions, Weighing
from samfn.support.batches import length_of, rows_of
from samfn.support.collectives import has_ranks
from samfn.tree import Batch

PASSES = 4  # two steps of SAM, or four batches of an evaluation

UNSEEN = (
    "no pass has shown yet what this criterion's loss is a mean over, as none does inside"
    " of torch.compile: call samfn.evaluate before, or say weigh=lambda batch: ... to"
    " samfn.supervised"
)


class Means:
    """What a loss is a mean over, in each mode of its model.

    The criterion is looked at where a mean is taken, and not before: it may be anything.

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
        self._samples: dict[bool, list[additive.Sample]] = {False: [], True: []}
        self._forms: dict[bool, Any] = {}  # Outputs of passes that were not real.
        # How many passes leave a sample: in the first, a mask may leave out nothing.
        self._wanted = dict.fromkeys((False, True), PASSES if asks else 0)

    @property
    def wants(self) -> bool:
        """Whether a pass in this mode still leaves a sample."""
        return self._wanted[self._model.training] > 0

    @property
    def are_known(self) -> bool:
        """Whether a pass in this mode has shown what it is."""
        return self._model.training in self._seen

    def weigh(self, batch: Batch) -> int | Tensor:
        """Return what the loss of a batch is a mean over; a pass has shown it.

        Raises:
            ValueError: it cannot be counted, or is no mean of what parts of batches have.
        """
        known = self._known()
        if not torch.compiler.is_compiling():
            self.look(batch)
            known = self._known()
        return known.weigh(batch)

    def counts(self, batch: Batch) -> Tensor | None:
        """Return which examples were seen to count; None is all."""
        return self._known().counts(batch)

    def note(self, taken: Reductions, loss: Tensor, aux: Aux, batch: Batch) -> None:
        """Know what the first pass in this mode has shown by its operations."""
        found = weighing.seen(taken, loss, aux.losses, batch)
        self._seen[self._model.training] = found

    def keep(self, loss: Tensor, aux: Aux, batch: Batch) -> None:
        """Keep some rows of one of the first passes, in case that a mean is taken."""
        mode = self._model.training
        if aux.losses is not None:
            self._wanted[mode] = 0  # Their mean is the loss.
        elif is_fake(loss):
            # Without their graph.
            self._forms[mode] = pytree.tree_map_only(Tensor, Tensor.detach, aux.outputs)
        else:
            self._wanted[mode] -= 1
            self._forms.pop(mode, None)
            if found := additive.sample(aux.outputs, batch):
                self._samples[mode].append(found)

    def look(self, batch: Batch) -> None:
        """Look at what passes have left, whether the loss is a mean over examples.

        On several ranks nothing is looked at: a criterion may exchange something.
        """
        mode = self._model.training
        samples, self._samples[mode] = self._samples[mode], []
        forms = self._forms.pop(mode, None)
        if not (samples or forms is not None) or has_ranks() or is_capturing():
            return
        for outputs, of in samples:
            self._look(outputs, of)
        if forms is not None:
            self._look_at_drawn(forms, batch)

    def _look(self, outputs: Any, batch: Batch) -> bool | None:
        weigh = self._known().weigh
        given = self._loss_at, outputs, batch, weigh, self._criterion
        if (found := additive.is_mean(*given)) is False:
            self._seen[self._model.training] = weighing.OF_PARTS
        return found

    def _look_at_drawn(self, forms: Any, batch: Batch) -> None:
        """Look at outputs that are drawn, on the CPU."""
        try:
            few = pytree.tree_map_only(
                Tensor, Tensor.cpu, rows_of(batch, slice(additive.ROWS))
            )
            length_of(few)
        except ValueError:
            return
        for chances in (False, True):  # Not every criterion takes any number.
            drawn = additive.drawn(forms, length_of(few), chances=chances)
            found = additive.sample(drawn, few)
            if found is None or self._look(*found) is not None:
                return

    def _known(self) -> Weighing:
        if not self.are_known:
            raise RuntimeError(UNSEEN)
        return self._seen[self._model.training]


def is_capturing() -> bool:
    """Return whether a CUDA graph is recorded, in which nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
