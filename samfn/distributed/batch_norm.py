"""BatchNorm over the batches of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from samfn.distributed.messages import all_reduce
from samfn.distributed.processes import size
from samfn.stateless import normalised_over


class _Total(torch.autograd.Function):
    """The sum over the ranks; what each rank's loss owes to it comes back to all."""

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
    assert dist.group.WORLD is not None
    apply: Any = _Total.apply
    summed: Tensor = apply(values, dist.group.WORLD.group_name)
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
    return normalised_over(model, total, size())
