"""A loss as a value, and its gradient: the first half of every pass.

A loss function takes `(params, buffers, batch)` and returns the loss, a 0-d tensor,
alone or together with an `Aux`. It reads no other state and changes nothing. Any function
will do; a `Loss` is one of which more is known.
"""

import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.func import grad, grad_and_value
from torch.utils import _pytree as pytree

from samfn import checks, tree
from samfn.batches import length_of
from samfn.collectives import all_ranks, changed, kept, mean, summed, total, wholes
from samfn.nested import mapped
from samfn.tree import Batch, Params


class Aux(NamedTuple):
    """What a loss function returns beside the loss."""

    outputs: Any
    """Predictions of the model, or anything else worth reporting; None if nothing."""
    buffers: Params
    """The buffers after this pass, same names as before it."""
    losses: Tensor | None = None
    """The loss of each example, shape (examples,); their mean is the loss."""


REENTRANT = "CheckpointFunctionBackward"  # as autograd calls what it does
WRITES = (
    "the loss function writes to a tensor that it was given, in params, buffers or the"
    " batch, or to one that it keeps: let it write to a copy, and return new buffers in Aux"
)
Result = TypeVar("Result")
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


class GradientError(ValueError):
    """A loss depends on no parameter, or on one that is not among those given."""


class Pass(NamedTuple):
    """One evaluation of a loss function and its gradient."""

    loss: Tensor
    """Shape ()."""
    outputs: Any
    """As the loss function returned them, detached."""
    buffers: Params
    """The buffers after the pass."""
    grads: dict[str, Tensor]
    """Gradient of the loss, names and shapes of the parameters that it was asked for."""
    losses: Tensor | None = None
    """The loss of each example, where the loss function tells."""


class Evaluate(Protocol):
    """A loss function that is known, ready to be evaluated."""

    def __call__(
        self,
        params: Params,
        buffers: Params,
        batch: Batch,
        *,
        wrt: Collection[str] | None = None,
        scale: Tensor | None = None,
        slope_at: Any = None,
        other: LossFn | None = None,
    ) -> Pass:
        """Evaluate it, or another one in its place, as `evaluate` does."""


def evaluator(loss_fn: LossFn) -> Evaluate:
    """Return a loss function as what methods evaluate."""
    return partial(_evaluate_either, loss_fn)


def _evaluate_either(
    loss_fn: LossFn, *given: Any, other: LossFn | None = None, **how: Any
) -> Pass:
    return evaluate(loss_fn if other is None else other, *given, **how)


def evaluate(
    loss_fn: LossFn,
    params: Params,
    buffers: Params,
    batch: Batch,
    *,
    wrt: Collection[str] | None = None,
    scale: Tensor | None = None,
    slope_at: Any = None,
) -> Pass:
    """Evaluate the loss, its gradient in `params`, and the new buffers.

    A parameter that the loss does not use has gradient zero.

    Where parameters are DTensors, each rank has a batch of its own: loss, gradient and
    new buffers are means over the examples of all ranks, outputs the rank's own. The loss
    function sees whole tensors; gradients are placed as the parameters are.

    Args:
        loss_fn: what is evaluated.
        params: where. DTensors are over all ranks.
        buffers: what `loss_fn` reads beside them.
        batch: what `loss_fn` takes.
        wrt: names of the parameters whose gradient is computed, in their order. None is
            all of them; none of them leaves the backward pass out.
        scale: multiplies the loss before it is differentiated, and divides the gradients,
            so that those of float16 activations neither vanish nor overflow on the way.
        slope_at: outputs, as of another pass on this batch, at which the slope of the
            criterion is taken: the gradient is J^T dl/doutputs there, with J = doutputs/dw
            at `params`. None takes it at the outputs of this pass.

    Raises:
        TypeError: `loss_fn` returned neither a loss nor a pair of loss and `Aux`.
        ValueError: the loss is no floating-point scalar, or the buffers changed in names,
            shapes or dtypes; some parameters are DTensors, and not all over all ranks;
            `slope_at` is given, and the loss has no criterion of its own.
        GradientError: the loss depends on none of the parameters.
        RuntimeError: `loss_fn` writes to a tensor.
    """
    loss_fn = as_loss(loss_fn)
    if slope_at is not None:
        loss_fn = _with_slope_at(slope_at, loss_fn)
    names = tuple(params if wrt is None else wrt)
    given = params, buffers, batch
    if tree.any_sharded(params.values()):
        loss, aux, grads = _on_all_ranks(loss_fn, *given, names, scale)
    else:
        loss, aux, grads = _evaluated(loss_fn, *given, names, scale)
    if wrt is None and not grads:
        raise GradientError(
            f"the loss depends on none of the parameters ({checks.some([*params])}): it"
            " must be computed from the `params` that the loss function is given"
        )
    if scale is not None and grads:
        grads = tree.scale(grads, scale.reciprocal())
    grads = {
        name: grads[name] if name in grads else torch.zeros_like(params[name])
        for name in names
    }
    return Pass(loss, aux.outputs, dict(aux.buffers), grads, aux.losses)


def leaving(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function leave all of its contexts where Ctrl-C ends it.

    Between a context's own code and what it is around, Ctrl-C leaves a generator waiting,
    as long as the frames of the traceback are kept: what it would put back is not.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                traceback.clear_frames(error.__traceback__)
            raise

    return call


@contextmanager
def _unwritten(given: Any) -> Iterator[None]:
    """Raise where tensors are written to inside, as torch.func does.

    Raises:
        RuntimeError: one was.
    """
    if torch.compiler.is_compiling():
        yield
        return
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    watched = [x for x in leaves if not x.is_inference()]
    before = [x._version for x in watched]
    yield
    if [x._version for x in watched] != before:
        raise RuntimeError(WRITES)


Evaluated = tuple[Tensor, Aux, dict[str, Tensor]]
"""Loss, what came beside it, and the gradient: of those parameters that the loss reaches,
or of all if it reaches any; detached."""


def _evaluated(
    loss_fn: Loss,
    params: Params,
    buffers: Params,
    batch: Batch,
    names: Collection[str],
    scale: Tensor | None,
) -> Evaluated:
    given = params, buffers, batch
    if not names:
        with torch.no_grad(), _unwritten(given):
            loss, aux = loss_and_aux(loss_fn.function(*given), buffers)
            # A forward pass may have switched gradients on again, for those by its inputs.
            loss, aux = mapped(_detached, (loss, aux))
            return loss, aux, {}
    # torch.func refuses a function that changes what it captured, such as a module's own
    # buffers, and it compiles. Eagerly it wraps every operation, which takes as long as
    # the operations of a small network; a function that is known to be pure is spared it.
    if not torch.compiler.is_compiling() and loss_fn.differentiating:
        return _by_autograd(loss_fn.differentiating, *given, names, scale)
    # What sets its precision by itself sets that of the backward pass, too.
    unmixed = loss_fn.differentiating is not None  # PyTorch 2.11 takes no function as true.
    with tree.unmixed(params) if unmixed else nullcontext():
        return _by_func(loss_fn.function, *given, names, scale)


def _on_all_ranks(
    loss_fn: Loss,
    params: Params,
    buffers: Params,
    batch: Batch,
    names: Collection[str],
    scale: Tensor | None,
) -> Evaluated:
    """Evaluate at DTensors: means over the ranks, and gradients placed as parameters."""
    cut = {name: b for name, b in buffers.items() if tree.is_sharded(b)}
    group = all_ranks({**params, **cut})

    def shared(loss: Tensor, aux: Aux) -> tuple[Tensor, Aux, float | Tensor]:
        rows = loss_fn.weigh(batch)  # After a pass, which may have told.
        own = {"loss": loss, "buffers": changed(aux.buffers, buffers)}
        found, examples = mean(own, rows, group, {})
        aux = aux._replace(buffers={**aux.buffers, **found["buffers"]})
        return found["loss"], aux, rows / examples

    if not torch.compiler.is_compiling() and loss_fn.differentiating:
        if names:
            given = loss_fn.differentiating, params, buffers, batch
            return _by_autograd(*given, names, scale, shared)
        loss, aux, _ = _evaluated(loss_fn, params, buffers, batch, names, scale)
        return *shared(loss, aux)[:2], {}
    with torch.no_grad():
        full, beside = wholes(params), wholes(buffers)
    loss, aux, grads = _evaluated(loss_fn, full, beside, batch, names, scale)
    aux = aux._replace(buffers=kept(aux.buffers, beside, buffers))
    loss, aux, share = shared(loss, aux)
    grads = {
        name: summed(share_of(grad, share), params[name]) for name, grad in grads.items()
    }
    return loss, aux, grads


def share_of(value: Tensor, share: float | Tensor) -> Tensor:
    """Return what a rank adds to a mean: of NaN, the mean over nothing, 0."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32)) * share
    return torch.where(share > 0, wide, 0) if isinstance(share, Tensor) else wide


@leaving
def _by_autograd(
    differentiating: Callable[..., AbstractContextManager[Any]],
    params: Params,
    buffers: Params,
    batch: Batch,
    names: Collection[str],
    scale: Tensor | None,
    shared: Callable[[Tensor, Aux], tuple[Tensor, Aux, float | Tensor]] | None = None,
) -> Evaluated:
    require_gradients_here()
    # All of them require grad, as a model may ask its parameters whether they do.
    leaves = {name: w.detach().requires_grad_() for name, w in params.items()}
    asked = {name: leaves[name] for name in names}
    given = leaves, buffers, own_leaves(batch)
    with torch.enable_grad(), differentiating(*given) as returned:
        loss, aux = loss_and_aux(returned, buffers)
        own = loss
        if shared is not None:
            loss, aux, share = shared(loss.detach(), mapped(_detached, aux))
            own = share_of(own, share)
        if own.requires_grad:
            nodes = graph(own)
            _require_known(nodes, leaves)
            # A reentrant checkpoint gives gradients to all that it recomputes, or to none.
            inputs = None if is_reentrant(nodes) else [*asked.values()]
            torch.autograd.backward(own if scale is None else own * scale, inputs=inputs)
    grads = {
        name: dense(leaf.grad) for name, leaf in asked.items() if leaf.grad is not None
    }
    if isinstance(aux.outputs, Tensor):  # As nearly always; it spares a walk.
        outputs, losses = _detached(aux.outputs), _detached(aux.losses)
        buffers = {name: _detached(buffer) for name, buffer in aux.buffers.items()}
        return loss.detach(), Aux(outputs, buffers, losses), grads
    return loss.detach(), mapped(_detached, aux), grads


def require_gradients_here() -> None:
    """Raise where PyTorch's autograd takes no gradient of its own.

    Raises:
        GradientError: inside of inference mode, or of a transform of torch.func.
    """
    if torch.is_inference_mode_enabled():
        raise GradientError(
            "under torch.inference_mode() there are no gradients: leave it out here"
        )
    if peek_interpreter_stack() is not None:
        raise GradientError(
            "inside of torch.vmap or another transform of torch.func, samfn.evaluate takes"
            " no gradient of a loss of samfn.supervised: call the loss function there, as"
            " in torch.func.grad(lambda params: loss_fn(params, buffers, batch)[0])"
        )


def graph(loss: Tensor) -> set[Any]:
    """Return the nodes of the graph that a backward pass from `loss` goes through."""
    seen: set[Any] = {None}
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            for before, _ in node.next_functions:
                ahead.append(before)
    return seen - {None}


def is_reentrant(nodes: Iterable[Any]) -> bool:
    """Return whether one of them computes a part of the forward pass again, reentrantly."""
    return any(kind.__name__ == REENTRANT for kind in {*map(type, nodes)})


def _require_known(nodes: Collection[Any], leaves: Params) -> None:
    """Raise where a graph ends in a parameter that is none of the leaves.

    Raises:
        GradientError: its gradient would be lost.
    """
    kinds = {kind for kind in {*map(type, nodes)} if kind.__name__ == "AccumulateGrad"}
    ends = [node.variable for node in nodes if type(node) in kinds]
    own = {id(leaf) for leaf in leaves.values()}
    for end in ends:
        if id(end) not in own and isinstance(end, torch.nn.Parameter):
            raise GradientError(
                "the loss depends on a parameter that is not in params, of shape"
                f" {tuple(end.shape)}: make it a part of the model, or let it not require"
                " grad"
            )


def own_leaves(batch: Batch) -> Batch:
    """Return a batch whose gradients, if it asks for some, are not the caller's."""

    def own(leaf: Tensor) -> Tensor:
        return leaf.detach().requires_grad_() if leaf.requires_grad else leaf

    if isinstance(batch, tuple) and all(
        isinstance(part, Tensor) and not part.requires_grad for part in batch
    ):
        return batch  # Nearly always, and sooner seen than gone through.
    return pytree.tree_map_only(Tensor, own, batch)


def dense(gradient: Any) -> Tensor:
    """Return a gradient as a strided tensor."""
    strided: Tensor = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return strided


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _by_func(
    function: LossFn,
    params: Params,
    buffers: Params,
    batch: Batch,
    names: Collection[str],
    scale: Tensor | None,
) -> Evaluated:
    around: list[Any] = []

    def objective(leaves: Params) -> tuple[Tensor, list[Tensor]]:
        returned = function({**params, **leaves}, buffers, batch)
        loss, aux = loss_and_aux(returned, buffers)
        # torch.func lets tensors through and nothing else; the rest goes around it.
        flat, structure = pytree.tree_flatten((loss, aux))
        is_tensor = [isinstance(leaf, Tensor) for leaf in flat]
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in flat]
        if not torch.compiler.is_compiling():  # A graph has no objects that hold tensors.
            others = mapped(partial(_put_aside, tensors), others)
        around[:] = others, is_tensor, structure, loss.requires_grad
        return loss if scale is None else loss * scale, tensors

    with explained():
        grads, (_, tensors) = grad_and_value(objective, has_aux=True)(
            {name: params[name] for name in names}
        )
    others, is_tensor, structure, reached = around
    through = iter(tensors)
    flat = [next(through) if through_it else None for through_it in is_tensor]
    if not torch.compiler.is_compiling():
        others = mapped(lambda _: next(through), others)
    flat = [
        leaf if through_it else other
        for leaf, other, through_it in zip(flat, others, is_tensor, strict=True)
    ]
    loss, aux = pytree.tree_unflatten(flat, structure)
    return loss, aux, grads if reached else {}


def _put_aside(tensors: list[Tensor], leaf: Tensor) -> Tensor:
    """Append a tensor to a list, and return another in its place."""
    tensors.append(leaf)
    return torch.empty(0)


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where torch.func meets a function that recomputes, or writes."""
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if "would mutate a captured Tensor" in told:
            raise RuntimeError(WRITES) from error
        if "saved tensor hooks" not in told and "setup_context" not in told:
            raise
        raise RuntimeError(
            "torch.func cannot differentiate this loss function, which recomputes (gradient"
            " checkpointing) or has an autograd.Function of the old form. A loss of"
            " samfn.supervised(model, criterion) needs no torch.func: give it to the step"
            " as it is, and put what you add to it into the criterion"
        ) from error


NO_CRITERION = (
    "this loss is not known to be a criterion of outputs, which functional_sam tells apart:"
    " expected samfn.supervised(model, criterion), with a criterion that has no parameters,"
    " or samfn.Loss(function, criterion=lambda outputs, batch: ...)"
)

Change = Callable[[Any, Params, Params, Batch], "tuple[Tensor, Aux]"]


def _with_slope_at(outputs: Any, loss_fn: Loss) -> Loss:
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
