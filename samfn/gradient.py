"""From a pure loss function to its gradient: the one module that differentiates.

A loss function takes `(params, buffers, batch)` and returns the loss, a 0-d tensor,
alone or together with an `Aux`. It reads no other state and changes nothing. It may have
two attributes: `pure`, whether that is known, and `check(params, buffers)`, which raises
where they are not its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from samfn import border
from samfn.tree import Batch, Params


class Aux(NamedTuple):
    """What a loss function returns beside the loss."""

    outputs: Any
    """Predictions of the model, or anything else worth reporting; None if nothing."""
    buffers: Params
    """The buffers after this pass, same names as before it."""


LossFn = Callable[[Params, Params, Batch], "Tensor | tuple[Tensor, Aux]"]


class Pass(NamedTuple):
    """One evaluation of a loss function and its gradient."""

    loss: Tensor
    """Shape ()."""
    outputs: Any
    """As the loss function returned them, detached."""
    buffers: Params
    """The buffers after the pass."""
    grads: dict[str, Tensor]
    """Gradient of the loss, names and shapes of the parameters."""


Evaluate = Callable[[Params, Params, Batch], Pass]


def evaluate(loss_fn: LossFn, params: Params, buffers: Params, batch: Batch) -> Pass:
    """Evaluate the loss, its gradient in `params`, and the new buffers.

    A parameter that the loss does not use has gradient zero.

    Raises:
        TypeError: `loss_fn` returned neither a loss nor a pair of loss and `Aux`.
        ValueError: the loss is no floating-point scalar, or the buffers changed in names,
            shapes or dtypes.
        RuntimeError: `loss_fn` changes a tensor that it was not given.
    """
    # torch.func refuses a function that changes what it captured, such as a module's own
    # buffers, and it compiles. Eagerly it wraps every operation, which takes as long as
    # the operations of a small network; a function that is known to be pure is spared it.
    if getattr(loss_fn, "pure", False) and not torch.compiler.is_compiling():
        return _by_autograd(loss_fn, params, buffers, batch)
    return _by_func(loss_fn, params, buffers, batch)


def _by_autograd(loss_fn: LossFn, params: Params, buffers: Params, batch: Batch) -> Pass:
    leaves = {name: w.detach().requires_grad_() for name, w in params.items()}
    with torch.enable_grad():
        loss, aux = _loss_and_aux(loss_fn(leaves, buffers, batch), buffers)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    else:
        grads = tuple(map(torch.zeros_like, params.values()))
    outputs, new_buffers = pytree.tree_map(_detached, (aux.outputs, dict(aux.buffers)))
    return Pass(loss.detach(), outputs, new_buffers, dict(zip(params, grads, strict=True)))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _by_func(loss_fn: LossFn, params: Params, buffers: Params, batch: Batch) -> Pass:
    around: list[Any] = []

    def objective(params: Params) -> tuple[Tensor, list[Tensor]]:
        loss, aux = _loss_and_aux(loss_fn(params, buffers, batch), buffers)
        leaves, structure = pytree.tree_flatten((aux.outputs, dict(aux.buffers)))
        # torch.func lets tensors through and nothing else; the rest goes around it.
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        around[:] = others, is_tensor, structure
        return loss, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    grads, (loss, tensors) = grad_and_value(objective, has_aux=True)(dict(params))
    others, is_tensor, structure = around
    through = iter(tensors)
    leaves = [
        next(through) if through_it else other
        for other, through_it in zip(others, is_tensor, strict=True)
    ]
    outputs, new_buffers = pytree.tree_unflatten(leaves, structure)
    return Pass(loss, outputs, new_buffers, grads)


def l2_regularized(loss_fn: LossFn, weight_decay: float) -> LossFn:
    """Return the loss function with weight decay inside the loss.

    loss(w) + weight_decay / 2 * ||w||^2

    The decay then bends the ascent direction too, as in the original SAM code; a
    `weight_decay` of the optimizer acts on the descent alone. Use one of them.

    Args:
        loss_fn: loss(w).
        weight_decay: in units of loss per squared weight; at least 0.

    Source:
        github.com/google-research/sam, sam_jax/training_utils/flax_training.py.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")

    def regularized(params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        loss, aux = _loss_and_aux(loss_fn(params, buffers, batch), buffers)
        return loss + weight_decay / 2 * _sum_of_squares(params), aux

    regularized.check = getattr(loss_fn, "check", None)  # type: ignore[attr-defined]
    regularized.pure = getattr(loss_fn, "pure", False)  # type: ignore[attr-defined]
    return regularized


def _sum_of_squares(params: Params) -> Tensor:
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in params.values()]
    return torch.stack([w.square().sum() for w in wide]).sum()


def _loss_and_aux(returned: Any, buffers: Params) -> tuple[Tensor, Aux]:
    match returned:
        case Tensor():
            loss, aux = returned, Aux(None, buffers)
        case (Tensor() as loss, Aux() as aux):
            pass
        case _:
            raise TypeError(
                "loss_fn must return a loss or (loss, Aux(outputs, buffers)),"
                f" got {type(returned).__name__}"
            )
    if loss.ndim != 0 or not loss.is_floating_point():
        raise ValueError(
            "loss_fn must return a floating-point scalar loss, got shape"
            f" {tuple(loss.shape)} and {loss.dtype}: reduce it, as with .mean()"
        )
    border.require_same_layout(buffers, aux.buffers, names="buffers and new buffers")
    return loss, aux
