"""SAM in the automatic optimization of Lightning, where it accumulates gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any


class SAMModule:
    """Lets Lightning accumulate gradients of samfn.SAM: a mixin, named before a module.

    Each micro-batch of each process has a perturbation of its own (m-sharpness), from a
    first pass that is not averaged over processes. `accumulate_grad_batches`, clipping,
    schedulers, precision (also fp16) and checkpoints are the Trainer's own, and see the
    second gradient. `training_step` is called twice, with other dropout.
    """

    trainer: Any
    optimizers: Callable[[], Any]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Take the first pass of the last micro-batch; the second is Lightning's."""
        with _unsynchronised(self.trainer.strategy, optimizer):
            optimizer_closure()
        optimizer.first_step(zero_grad=True)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)  # type: ignore[misc]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the second pass of a micro-batch that Lightning has accumulated."""
        if self.trainer.fit_loop._should_accumulate():
            sam, strategy = self.optimizers(), self.trainer.strategy
            sam.first_step(zero_grad=True)
            with _unsynchronised(strategy, sam):
                loss = _loss_in(strategy.training_step(batch, batch_idx))
                strategy.backward(loss / self.trainer.accumulate_grad_batches, sam)
            sam.keep_step(zero_grad=True)
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]


@contextmanager
def _unsynchronised(strategy: Any, optimizer: Any) -> Iterator[None]:
    """Average no gradients over processes; put the weights back where a pass fails."""
    try:
        with getattr(strategy, "block_backward_sync", nullcontext)():
            yield
    except BaseException:
        optimizer.restore()
        raise


def _loss_in(outputs: Any) -> Any:
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs
