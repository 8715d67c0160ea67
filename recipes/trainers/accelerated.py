"""SAM in a loop that is written with accelerate."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from recipes.trainers import sam_of


def two_passes(
    accelerator: Any, model: nn.Module, optimizer: Any, loss_of: Callable[[], Tensor]
) -> Tensor:
    """Take the passes of SAM on a micro-batch, in the place of `accelerator.backward`.

    Each micro-batch of each process has a perturbation of its own (m-sharpness), from a
    first pass that is not averaged over processes; under FSDP2 all processes share one.
    Under `accelerator.accumulate` the gradients of all but the last are kept; clipping and
    `optimizer.step()` come after, as ever. Call it in every iteration, and neither `step`
    nor `zero_grad` in between.

    Args:
        accelerator: of `model` and `optimizer`, which it has prepared.
        model: that `loss_of` calls.
        optimizer: samfn.SAM, prepared.
        loss_of: computes the loss of the micro-batch; it is called twice.

    Returns:
        The loss of the first pass.

    Raises:
        TypeError: the optimizer is another, or is not prepared.
    """
    sam = sam_of(optimizer, prepared=True)
    with sam.restore_on_error():
        with nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model):
            loss = loss_of()
            accelerator.backward(loss)
        sam.first_step(zero_grad=True)
        accelerator.backward(loss_of())
    if not accelerator.sync_gradients:
        sam.keep_step(zero_grad=True)
    return loss.detach()
