"""What a model makes of each example: one pass over batches, without gradients.

The answers come in the order of the batches, and stay on their device: a GPU never waits
for a batch to be done. What a loss function does to its buffers is dropped. With
`supervised(model, criterion)`, call `model.eval()` first, or an example's answer depends
on those beside it in its batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samfn.gradient import Pass, evaluate
from samfn.loss import LossFn, as_loss
from samfn.support.batches import length_of, pair_of, together
from samfn.training import sampling
from samfn.tree import Batch, Params


def losses(params: Params, buffers: Params, batches: Any, *, loss_fn: LossFn) -> Tensor:
    """Return the loss of each example.

    At perturbed weights, minus those at w, it is the sharpness of each example, as a
    score for `samfn.training.sampling.hardest`:

        sharpness = losses(perturbed, ...) - losses(params, ...)

    Args:
        params: where; `samfn.perturb(params, grads, rho)` for the perturbed weights.
        buffers: what the loss function reads beside them.
        batches: a list, a data loader or another iterable of batches; or one batch, a
            tuple, a mapping or a tensor.
        loss_fn: (params, buffers, batch) -> loss, Aux, with `Aux.losses`.

    Returns:
        Shape (examples,).

    Raises:
        ValueError: the loss function does not give the loss of each example; there are
            no batches, or one whose tensors differ in length.
    """

    def of_batch(seen: Pass, batch: Batch) -> Tensor:
        return _require_losses(seen.losses, length_of(batch))

    return _gathered(params, buffers, batches, loss_fn, of_batch)


def easy(
    params: Params,
    buffers: Params,
    batches: Any,
    *,
    loss_fn: LossFn,
    confidence: float = 0.5,
) -> Tensor:
    """Return which examples are predicted right, and with confidence.

    It is what `samfn.training.sampling.update` counts. For batches that are no
    `(inputs, targets)`, ask `samfn.training.sampling.is_easy` about each.

    Args:
        params: as for `losses`.
        buffers: as for `losses`.
        batches: as for `losses`, of `(inputs, targets)`.
        loss_fn: (params, buffers, batch) -> loss, Aux, where `Aux.outputs` are logits.
        confidence: as for `samfn.training.sampling.is_easy`.

    Returns:
        Shape (examples,), bool. An example that the criterion leaves out, as by
        `ignore_index`, has nothing left to be learnt, and is easy.

    Raises:
        TypeError: outputs that are no logits.
        ValueError: outputs and targets do not fit; there are no batches.
    """

    def of_batch(seen: Pass, batch: Batch) -> Tensor:
        _, targets = pair_of(batch)
        found = sampling.is_easy(seen.outputs, targets, confidence)
        counts = as_loss(loss_fn).counts(batch)
        return found if counts is None else found | ~counts

    return _gathered(params, buffers, batches, loss_fn, of_batch)


def _gathered(
    params: Params,
    buffers: Params,
    batches: Any,
    loss_fn: LossFn,
    of_batch: Callable[[Pass, Batch], Tensor],
) -> Tensor:
    answers = [
        of_batch(evaluate(loss_fn, params, buffers, batch, wrt=()), batch)
        for batch in together(batches)
    ]
    if not answers:
        raise ValueError(
            "expected at least one batch, got none: a generator can be gone through only"
            " once, a list or a data loader again"
        )
    return torch.cat(answers)


def _require_losses(losses: Tensor | None, examples: int) -> Tensor:
    if losses is None:
        raise ValueError(
            "expected the loss of each example, the loss function gives their mean alone:"
            ' let the criterion of samfn.supervised have reduction="none", or return'
            " Aux(outputs, buffers, losses)"
        )
    if losses.shape != (examples,):
        raise ValueError(
            f"expected {examples} losses, one for each example, got shape"
            f" {tuple(losses.shape)}"
        )
    return losses
