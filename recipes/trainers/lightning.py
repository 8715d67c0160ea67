"""SAM in the automatic optimization of Lightning, where it accumulates gradients."""

from contextlib import nullcontext
from typing import Any

from recipes.trainers import sam_of


class SAMModule:
    """Lets Lightning accumulate gradients of samfn.SAM: a mixin, named before a module.

    Each micro-batch of each process has a perturbation of its own (m-sharpness), from a
    first pass that is not averaged over processes. `accumulate_grad_batches`, clipping,
    schedulers, precision (also fp16) and checkpoints are the Trainer's own, and see the
    second gradient. `training_step` is called twice, with other dropout.
    """

    def optimizer_step(self: Any, epoch: int, index: int, sam: Any, closure: Any) -> None:
        """Take the first pass of the last micro-batch; the second is Lightning's."""
        with getattr(self.trainer.strategy, "block_backward_sync", nullcontext)():
            closure()
        with (own := sam_of(sam)).restore_on_error():
            own.first_step(zero_grad=True)
            super().optimizer_step(epoch, index, sam, closure)  # type: ignore[misc]

    def on_train_batch_end(self: Any, outputs: Any, *seen: Any) -> None:
        """Run an accumulated micro-batch again, `seen` with its index: the second pass."""
        loop, sam = self.trainer.fit_loop.epoch_loop, sam_of(self.trainer.optimizers[0])
        if loop._should_accumulate():
            with sam.restore_on_error():
                sam.first_step(zero_grad=True)
                loop.automatic_optimization.run(sam, seen[1], loop._build_kwargs({}, *seen))
            sam.keep_step(zero_grad=True)
        super().on_train_batch_end(outputs, *seen)  # type: ignore[misc]
