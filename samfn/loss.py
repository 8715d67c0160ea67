"""A loss as a value: a function, and what is known of it.

A loss function takes `(params, buffers, batch)` and returns the loss, a 0-d tensor,
alone or together with an `Aux`. It reads no other state and changes nothing. Any function
will do; a `Loss` is one of which more is known.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.support import checks
from samfn.support.batches import length_of
from samfn.support.collectives import total
from samfn.tree import Batch, Params


class Aux(NamedTuple):
    """What a loss function returns beside the loss."""

    outputs: Any
    """Predictions of the model, or anything else worth reporting; None if nothing."""
    buffers: Params
    """The buffers after this pass, same names as before it."""
    losses: Tensor | None = None
    """The loss of each example, shape (examples,); their mean is the loss."""


LossFn = Callable[[Params, Params, Batch], "Tensor | tuple[Tensor, Aux]"]


@dataclass(frozen=True)
class Loss:
    """A loss function, and what is known of it; it is called as the function itself."""

    function: LossFn
    """(params, buffers, batch) -> loss or (loss, Aux)."""
    check: Callable[[Params, Params], None] = lambda params, buffers: None
    """(params, buffers): raises where they are not the function's own."""
    differentiating: Callable[..., AbstractContextManager[Any]] | None = None
    """(params, buffers, batch, twice=False) -> a context that gives what `function`
    returns, and in which a backward pass may read again what the forward pass has read; or
    two of them, with `twice`. Both take DTensors then, and make them whole for themselves.
    None where it is not known whether the function is pure."""
    weigh: Callable[[Batch], "int | Tensor"] = length_of
    """batch -> what its loss is a mean over, shape (): the number of examples, or of those
    that count, or the sum of their weights. It may have to see a pass before it knows."""
    counts: Callable[[Batch], "Tensor | None"] = lambda batch: None
    """batch -> which examples have a target that counts, shape (examples,); None is all."""
    standing: Callable[[], object] = lambda: None
    """-> the same object as long as what the function reads beside its arguments, as the
    layers and hooks of a model, is the same but for values: a graph of it holds then."""
    criterion: Callable[[Any, Batch], Tensor] | None = None
    """(outputs, batch) -> the loss, or that of each example, as `function` takes it from
    `Aux.outputs`. None where it does not tell the two apart."""
    look: Callable[[Batch], None] = lambda batch: None
    """batch -> looks whether the loss is a mean, before a graph takes one; eagerly, `weigh`
    does."""

    def __call__(
        self, params: Params, buffers: Params, batch: Batch
    ) -> "Tensor | tuple[Tensor, Aux]":
        """Evaluate the function."""
        return self.function(params, buffers, batch)


def as_loss(loss_fn: LossFn) -> Loss:
    """Return a function with what is known of it: of one that is no `Loss`, nothing."""
    return loss_fn if isinstance(loss_fn, Loss) else Loss(partial(_called_apart, loss_fn))


def _called_apart(
    function: LossFn, params: Params, buffers: Params, batch: Batch
) -> "Tensor | tuple[Tensor, Aux]":
    """Call a function with mappings and lists of its own, which it may put others into."""
    own = pytree.tree_map(lambda leaf: leaf, batch)
    return function(dict(params), dict(buffers), own)


NO_CRITERION = (
    "this loss is not known to be a criterion of outputs, which functional_sam tells apart:"
    " expected samfn.supervised(model, criterion), with a criterion that has no parameters,"
    " or samfn.Loss(function, criterion=lambda outputs, batch: ...)"
)
Change = Callable[[Any, Params, Params, Batch], "tuple[Tensor, Aux]"]


def with_slope_at(outputs: Any, loss_fn: Loss) -> Loss:
    """Return the loss, which is derived as if the slope of its criterion were elsewhere."""
    if loss_fn.criterion is None:
        raise ValueError(NO_CRITERION)
    slopes = partial(_slopes, loss_fn.criterion)

    def bent(
        returned: Any, params: Params, buffers: Params, batch: Batch
    ) -> tuple[Tensor, Aux]:
        loss, aux = loss_and_aux(returned, buffers)
        there, here = slopes(outputs, batch), slopes(aux.outputs, batch)
        leaves = _floats(aux.outputs)
        # What the loss is beside the criterion, as a penalty on weights, stays as it is.
        parts = [
            ((away - own) * leaf).sum().to(loss.dtype)
            for away, own, leaf in zip(there, here, leaves, strict=True)
        ]
        change = torch.stack(parts).sum()
        return loss + (change - change.detach()), aux

    return _changed(loss_fn, bent)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _floats(outputs: Any) -> list[Tensor]:
    """Return the tensors among outputs that have slopes."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if _is_float(leaf)]


def _slopes(
    criterion: Callable[[Any, Batch], Tensor], outputs: Any, batch: Batch
) -> tuple[Tensor, ...]:
    """Return the gradient of a criterion in each of `_floats`, in float32 or wider."""
    leaves, structure = pytree.tree_flatten(outputs)

    def loss_of(floats: tuple[Tensor, ...]) -> Tensor:
        through = iter(floats)
        given = [next(through) if _is_float(leaf) else leaf for leaf in leaves]
        return criterion(pytree.tree_unflatten(given, structure), batch).mean()

    # Half precision has no room for slopes that no scale of the loss has raised.
    wide = (torch.promote_types(leaf.dtype, torch.float32) for leaf in _floats(outputs))
    pairs = zip(_floats(outputs), wide, strict=True)
    if not (floats := tuple(leaf.detach().to(dtype) for leaf, dtype in pairs)):
        raise ValueError(NO_CRITERION)
    found: tuple[Tensor, ...] = grad(loss_of)(floats)
    return found


def _changed(loss_fn: Loss, change: Change) -> Loss:
    """Return a loss with a change of what it returns, given that and its arguments."""
    inner = cast(Any, loss_fn.differentiating)

    def function(params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        given = params, buffers, batch
        return change(loss_fn.function(*given), *given)

    @contextmanager
    def differentiating(
        params: Params, buffers: Params, batch: Batch, **how: bool
    ) -> Iterator[Any]:
        given = params, buffers, batch
        with inner(*given, **how) as returned:
            yield change(returned, *given)

    lent = None if loss_fn.differentiating is None else differentiating
    return replace(loss_fn, function=function, differentiating=lent)


def l2_regularized(
    loss_fn: LossFn, weight_decay: float, *, without: Collection[str] = ()
) -> Loss:
    """Return the loss function with weight decay inside the loss.

    loss(w) + weight_decay / 2 * ||w||^2

    The decay then bends the ascent direction too, as in the original SAM code; a
    `weight_decay` of the optimizer acts on the descent alone. Use one of them.

    Args:
        loss_fn: loss(w).
        weight_decay: in units of loss per squared weight; at least 0.
        without: names of parameters that do not decay, as `samfn.no_decay_parameters`
            gives; where all are, nothing does.

    Raises:
        TypeError: `without` is a text.
        ValueError: `weight_decay` is negative; in a step, `without` names what is no
            parameter.

    Source:
        github.com/google-research/sam, sam_jax/training_utils/flax_training.py.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    checks.require_no_text(without, what="without")
    spared = frozenset(without)

    loss_fn = as_loss(loss_fn)

    def penalised(
        returned: Any, params: Params, buffers: Params, batch: Batch
    ) -> tuple[Tensor, Aux]:
        loss, aux = loss_and_aux(returned, buffers)
        decaying = [w for name, w in params.items() if name not in spared]
        if not decaying:
            return loss, aux
        penalty = weight_decay / 2 * _sum_of_squares(decaying)
        if aux.losses is not None:
            aux = aux._replace(losses=aux.losses + penalty)
        return loss + penalty, aux

    def check(params: Params, buffers: Params) -> None:
        checks.require_names_of(params, spared, what="without")
        loss_fn.check(params, buffers)

    return replace(_changed(loss_fn, penalised), check=check)


def _sum_of_squares(leaves: list[Tensor]) -> Tensor:
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in leaves]
    sums = [w.square().sum() for w in wide]
    return total(sums) if tree.is_sharded(sums[0]) else torch.stack(sums).sum()


def loss_and_aux(returned: Any, buffers: Params) -> tuple[Tensor, Aux]:
    """Return what a loss function returned, as a pair.

    Raises:
        TypeError: it is neither a loss nor a pair of loss and `Aux`.
        ValueError: the loss is no floating-point scalar, or the buffers changed in names,
            shapes or dtypes.
    """
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
    checks.require_same_layout(buffers, aux.buffers, names="buffers and new buffers")
    return loss, aux
