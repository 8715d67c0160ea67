"""The mean loss over many batches as a function of the parameters alone."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from samfn import tree
from samfn.gradient import evaluate
from samfn.loss import LossFn, as_loss
from samfn.measure.curvature import hessian_product
from samfn.support import checks
from samfn.support.batches import cut, length_of, repeatable
from samfn.support.collectives import over_parts
from samfn.tree import Batch, Params

# What a pass costs, in gradient evaluations: a forward pass is a third of one, and a
# product with the Hessian in theory three; 3.5 for a Wide ResNet on a CPU.
LOSS, GRADIENT, PRODUCT = 1 / 3, 1.0, 3.0


class Objective:
    """The mean loss over all examples of some batches, with gradient and curvature.

    L(w) = sum over batches b of n_b L_b(w) / sum of n_b, n_b the examples in b, or what
    else L_b is a mean over

    Every call goes through all batches, in their order, and what the loss function does to
    its buffers is dropped. With `supervised(model, criterion)`, call `model.eval()` first,
    or the statistics of each batch are part of its loss, as in training.

    At DTensors, all ranks go through as many batches, each its own, and the mean is over
    the examples of all.

    Args:
        loss_fn: (params, buffers, batch) -> the mean loss of a batch, as for `sam_update`.
        buffers: what it reads beside the parameters.
        batches: a list or a data loader of batches, or one batch.

    Raises:
        TypeError: `batches` can be gone through only once.
    """

    def __init__(self, loss_fn: LossFn, buffers: Params, batches: Any) -> None:
        checks.require_tensors("buffers", buffers)
        self._loss_fn, self._buffers = loss_fn, buffers
        self._batches = repeatable(batches)

    @property
    def number(self) -> int:
        """How many batches there are; 0 where that is not known."""
        return len(self._batches) if isinstance(self._batches, Sized) else 0

    def examples(self, params: Params) -> int:
        """Return how many examples all batches have; of DTensors, those of all ranks."""
        return int(sum(map(over_parts(length_of, params), self._batches)))

    def each(self) -> Iterator["Objective"]:
        """Yield the loss on each of the batches alone."""
        for batch in self._batches:
            yield Objective(self._loss_fn, self._buffers, [batch])

    def groups(self, size: int) -> Iterator["Objective"]:
        """Yield the loss on each part of each batch, of `size` examples or what is left."""
        for batch in self._batches:
            for part, _ in cut(batch, size):
                yield Objective(self._loss_fn, self._buffers, [part])

    def loss(self, params: Params) -> Tensor:
        """Return L(w), float64, shape ()."""

        def of_batch(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return evaluate(self._loss_fn, params, self._buffers, batch, wrt=()).loss, {}

        return self._mean(of_batch, params)[0]

    def gradient(self, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L(w), float64, shape (), and its gradient, as `params`."""

        def of_batch(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            seen = evaluate(self._loss_fn, params, self._buffers, batch)
            return seen.loss, seen.grads

        return self._mean(of_batch, params)

    def product(self, params: Params, direction: Params) -> dict[str, Tensor]:
        """Return H v, H the matrix of second derivatives at w; as `params`.

        Raises:
            NotTwiceDifferentiableError: PyTorch cannot differentiate the loss twice.
        """

        def of_batch(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            given = self._loss_fn, params, self._buffers, batch
            return torch.zeros(()), hessian_product(*given, direction)

        return self._mean(of_batch, params)[1]

    def _mean(
        self,
        of_batch: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]],
        params: Params,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weigh = over_parts(as_loss(self._loss_fn).weigh, params)
        total, count = torch.zeros((), dtype=torch.float64), 0.0
        sums: dict[str, Tensor] = {}
        batches = 0
        for batch in self._batches:
            batches += 1
            value, leaves = of_batch(batch)
            # A number, as everything here waits for the values of each batch anyway.
            length = float(weigh(batch))
            if not length:  # The mean over nothing is NaN.
                continue
            total = total.to(value.device) + length * value.double()
            scaled = tree.scale(leaves, length) if leaves else {}
            sums = tree.add(sums, scaled) if sums else scaled
            count += length
        if not batches:
            raise ValueError("expected at least one batch, got none")
        if not count:
            raise ValueError("expected an example that counts in the loss, got none")
        return total / count, tree.scale(sums, 1 / count) if sums else {}
