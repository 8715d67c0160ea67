"""What each layer does in a step: norms of gradient, perturbation and update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samfn import tree
from samfn.gradient import Evaluate, Pass
from samfn.loss import LossFn
from samfn.methods.base import Descended, Method, MethodState, Point, combinator
from samfn.methods.combinators import add_weighted
from samfn.tree import Batch, Params


class Layers(NamedTuple):
    """What each parameter did in a step, shapes (parameters,), in the state's order.

    Of micro-batches at one point, as those of `accumulated`, it is their mean. With
    `per_micro_batch`, which has a point for each, the first pass is that of the first one,
    and the last of the last. Of both losses of `on_loss` at one point it is the sum.
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
        ends: list[_Noted] = []  # The first and the last pass; those between are let go.

        def noted(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
            seen = evaluate(params, buffers, batch, **how)
            new = _Of(how.get("other"), seen.grads, partial(point.weigh, batch))
            if ends and (parts := ends[-1].with_further(params, new)):
                ends[-1] = _Noted(params, parts)
            else:
                ends[1:] = [_Noted(params, [new])]
            return seen

        seen, memory = method.descent(noted, point, memory)
        return seen._replace(watched=partial(layers, point.params, ends)), memory

    return method._replace(descent=descent, outermost="watched")


class _Of(NamedTuple):
    """A gradient of one loss."""

    loss: LossFn | None
    """None is the step's own."""
    grads: dict[str, Tensor]
    weigh: Callable[[], int | Tensor]
    """What the loss was a mean over."""


class _Noted(NamedTuple):
    """The gradients at a point, of each loss that was evaluated there."""

    params: Params
    parts: list[_Of]

    def with_further(self, params: Params, new: _Of) -> list[_Of] | None:
        """Return the gradients with another one, or None where that is of another pass."""
        # By tensors, as PyTorch 2.11 compiles no comparison of two dicts by what they are.
        if not all(w is self.params[name] for name, w in params.items()):
            return None
        known = [part for part in self.parts if part.loss is new.loss]
        if known and known[0].grads.keys() != new.grads.keys():
            return None
        others = [part for part in self.parts if part.loss is not new.loss]
        return [*others, _mean(known[0], new) if known else new]


def _mean(one: _Of, other: _Of) -> _Of:
    """Return what two micro-batches have been at one point."""
    weights = one.weigh(), other.weigh()
    total, grads = weights[0] + weights[1], None
    for part, weight in zip((one.grads, other.grads), weights, strict=True):
        grads = add_weighted(grads, part, weight / total)
    return _Of(one.loss, grads or {}, lambda: total)


def layers(params: Params, ends: list[_Noted], new_params: Params) -> Layers:
    """Measure a step, on the device.

    Args:
        params: before the step.
        ends: of its passes, the first and the last. A parameter that a pass was not derived
            by has gradient 0 there.
        new_params: after the step.
    """
    first, last = (_whole(params, end.parts) for end in (ends[0], ends[-1]))
    shift = tree.subtract(tree.only(ends[-1].params, params.keys()), params)
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


def _whole(params: Params, parts: list[_Of]) -> dict[str, Tensor]:
    """Return the sum of gradients; of what none was derived by, 0."""
    total = {}
    for name, w in params.items():
        found = [part.grads[name] for part in parts if name in part.grads]
        total[name] = sum(found[1:], found[0]) if found else torch.zeros_like(w)
    return total
