"""What each layer does in a step: norms of gradient, perturbation and update."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samfn import tree
from samfn.loss import Evaluate, Pass
from samfn.methods.base import Descended, Method, MethodState, Point, combinator
from samfn.tree import Batch, Params


class Layers(NamedTuple):
    """What each parameter did in a step, shapes (parameters,), in the state's order.

    With micro-batches, the first pass is that of the first one, and the last of the last.
    """

    gradient: Tensor
    """||g||, of the clean pass."""
    perturbation: Tensor
    """||e||, how far the last pass was from the parameters."""
    update: Tensor
    """||w' - w||, what the optimizer added to the weights."""
    weight: Tensor
    """||w|| before the step."""
    cosine: Tensor
    """Of the angle between the gradients of the first and the last pass, -1 to 1."""
    overall_cosine: Tensor
    """The same of all parameters as one vector, shape ()."""


@combinator
def watched(method: Method) -> Method:
    """Measure each parameter in every step, as `Metrics.layers`.

    Put it around other combinators, and inside of `samfn.distributed.placed`, by which
    the norms are those of what the ranks share.

    Args:
        method: any method; the steps stay what they are.
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        passes: list[tuple[Params, Pass]] = []

        def noted(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
            passes.append((params, evaluate(params, buffers, batch, **how)))
            return passes[-1][1]

        seen, memory = method.descent(noted, point, memory)
        return seen._replace(watched=partial(layers, point.params, passes)), memory

    return method._replace(descent=descent, outermost="watched")


def layers(params: Params, passes: list[tuple[Params, Pass]], new_params: Params) -> Layers:
    """Measure a step, on the device.

    Args:
        params: before the step.
        passes: (parameters, Pass) of each evaluation, in their order. A parameter that a
            pass was not derived by has gradient 0 there.
        new_params: after the step.
    """
    first, last = (_whole(params, seen.grads) for _, seen in (passes[0], passes[-1]))
    shift = tree.subtract(tree.only(passes[-1][0], params.keys()), params)
    lengths = tree.norms(first), tree.norms(last)
    product = tree.dots(first, last)
    return Layers(
        gradient=lengths[0],
        perturbation=tree.norms(shift),
        update=tree.norms(tree.subtract(new_params, params)),
        weight=tree.norms(params),
        cosine=_cosine(product, *lengths),
        overall_cosine=_cosine(product.sum(), *map(torch.linalg.vector_norm, lengths)),
    )


def _cosine(product: Tensor, *lengths: Tensor) -> Tensor:
    both = lengths[0] * lengths[1]
    return torch.where(both > 0, product / both, 0.0)


def _whole(params: Params, grads: Params) -> dict[str, Tensor]:
    return {
        name: grads[name] if name in grads else torch.zeros_like(w)
        for name, w in params.items()
    }
