"""BatchNorm over the batches of all ranks."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samfn.distributed.group import everyone, size
from samfn.support.collectives import all_reduce


class _Total(torch.autograd.Function):
    """All-reduce whose backward pass is an all-reduce too."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        return all_reduce(values, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), ctx.group), None


def total(values: Tensor) -> Tensor:
    """Return the sum over the ranks of a tensor, for use inside of a loss function.

    Its derivative is that of the sum of all ranks' losses.
    """
    if size() == 1:
        return values
    apply: Any = _Total.apply
    summed: Tensor = apply(values, everyone().group_name)
    return summed


def synchronised(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose BatchNorm normalises by the batches of all ranks.

    With the placement "global" the step is then that of one process on the whole batch.
    With others, ranks see each other's perturbed activations: a perturbation depends on
    more examples than its m. The ranks' batches must be of one length. It costs an
    all-reduce for each layer and direction of a pass; evaluation is each rank's own.

    Args:
        model: the same module on all ranks; unchanged.
    """
    copied = copy.deepcopy(model)
    if isinstance(copied, _BatchNorm):
        return SyncBatchNorm(copied)
    for name, module in [*copied.named_modules()]:
        if isinstance(module, _BatchNorm):
            copied.set_submodule(name, SyncBatchNorm(module))
    return copied


class SyncBatchNorm(_BatchNorm):
    """BatchNorm by the mean and variance over the batches of all ranks, of one length."""

    def __init__(self, like: Any) -> None:
        super().__init__(1)
        vars(self).update(vars(like))
        self._like, self._ranks = type(like), size()

    def _check_input_dim(self, inputs: Tensor) -> None:
        self._like._check_input_dim(self, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised inputs, shape (examples, channels, ...)."""
        if not self.training:
            alone: Tensor = super().forward(inputs)
            return alone
        self._check_input_dim(inputs)
        others = [place for place in range(inputs.ndim) if place != 1]
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        count = self._ranks * (inputs.numel() // inputs.shape[1])
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        # Squares of the distance from a number nearby lose fewer digits.
        near = self.running_mean
        if near is None:
            near = wide.new_zeros(wide.shape[1])
        shifted = wide - near.view(shape)
        sums = total(torch.stack([shifted.sum(others), shifted.square().sum(others)]))
        mean, square = sums / count
        variance = square - mean.square()
        self._remember(near + mean.detach(), variance.detach() * (count / (count - 1)))
        scaled = (shifted - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        outputs: Tensor = scaled.to(inputs.dtype)
        return outputs

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        kept: Any = self
        if not kept.track_running_stats:
            return
        kept.num_batches_tracked.add_(1)
        share = 1 / kept.num_batches_tracked if kept.momentum is None else kept.momentum
        kept.running_mean.lerp_(mean, share)
        kept.running_var.lerp_(variance, share)
