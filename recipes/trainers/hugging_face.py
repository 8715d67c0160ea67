"""SAM in the Trainer of transformers, and in those that are made of it."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from recipes.trainers import sam_of


class SAMTrainer:
    """Lets a Trainer take the two passes of samfn.SAM: a mixin, to be named before it.

    Each micro-batch of each process has a perturbation of its own (m-sharpness), from a
    first pass that is not averaged over processes; under FSDP2 all processes share one.
    `gradient_accumulation_steps`, clipping, schedulers, precision and checkpoints are the
    Trainer's own, and see the second gradient. Dropout differs between the passes. The
    logged loss is that of the first.
    """

    def training_step(
        self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Take both passes of a micro-batch; return the loss of the first."""
        one_pass, sam = super().training_step, sam_of(self.optimizer)  # type: ignore[misc]
        alone = nullcontext if self.accelerator.is_fsdp2 else self.accelerator.no_sync
        with sam.restore_on_error():
            with alone(model):
                loss: Tensor = one_pass(model, inputs, num_items_in_batch)
            sam.first_step(zero_grad=True)
            one_pass(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            sam.keep_step(zero_grad=True)
        return loss
