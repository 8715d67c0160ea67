"""One evaluation of a loss and its gradient: what each pass of a step is.

Eagerly, a `Loss` that is known to be pure is differentiated by PyTorch's autograd, and any
other function by `torch.func`; a graph takes `torch.func` for both.
"""

import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.loss import Aux, Loss, LossFn, as_loss, loss_and_aux, with_slope_at
from samfn.support import checks
from samfn.support.collectives import all_ranks, changed, kept, mean, summed, wholes
from samfn.support.nested import mapped
from samfn.tree import Batch, Params

REENTRANT = "CheckpointFunctionBackward"  # as autograd calls what it does
WRITES = (
    "the loss function writes to a tensor that it was given, in params, buffers or the"
    " batch, or to one that it keeps: let it write to a copy, and return new buffers in Aux"
)
Result = TypeVar("Result")


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
        loss_fn = with_slope_at(slope_at, loss_fn)
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
