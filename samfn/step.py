"""One training step as a pure function: gradient, perturb, gradient, descend."""

from collections.abc import Callable, Hashable
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samfn import tree
from samfn.descend import Optimizer, OptState, descend
from samfn.gradient import Evaluate, Pass, evaluator
from samfn.loss import LossFn, as_loss
from samfn.methods import sam
from samfn.methods.base import Method, MethodState, Point
from samfn.methods.watched import Layers
from samfn.support import checks
from samfn.support.batches import length_of
from samfn.support.collectives import over_parts
from samfn.tree import Batch, Params


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Params
    buffers: Params
    opt_state: OptState
    method_state: MethodState
    step: Tensor
    """Calls of `sam_update` so far, skipped ones too; int64, shape ()."""
    skipped: Tensor
    """Steps that were skipped, since they were not finite; int64, shape ()."""
    skipped_in_a_row: Tensor
    """Those since the last step that was finite; int64, shape ()."""


class Metrics(NamedTuple):
    """What a step saw; 0-d tensors of the clean pass unless the name says otherwise."""

    loss: Tensor
    outputs: Any
    """The model's outputs in the clean pass."""
    grad_norm: Tensor
    """||grad L(w)||."""
    perturbation_norm: Tensor
    """||e||, Euclidean: rho for `sam`, and 0 where the gradient is 0."""
    perturbed_loss: Tensor
    """L(w + e); minus `loss`, it is the sharpness that SAM lowers."""
    descent_norm: Tensor
    """Norm of the gradient that descended."""
    finite: Tensor
    """Whether all losses, gradients and dials were finite. If not, the step was skipped."""
    layers: Layers | None = None
    """Norms of each parameter's gradient, perturbation and update, by `watched`."""


def init(
    params: Params,
    buffers: Params,
    *,
    optimizer: Optimizer,
    method: Method = sam(),
) -> TrainState:
    """Make the state that training starts from.

    Args:
        params: detached floating-point tensors, as `samfn.split` gives them.
        buffers: what the loss function reads beside them; may be empty.
        optimizer: as `samfn.sgd()`.
        method: as `samfn.sam()`, the default.

    Raises:
        TypeError: a value is no tensor.
        ValueError: `params` is empty, or holds a tensor that requires grad or is not
            floating point; tensors are on several devices; a name stands in both.
    """
    checks.require_trainable(params, buffers)
    checks.require_apart(params, buffers)
    zero = torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)
    return TrainState(
        params=dict(params),
        buffers=dict(buffers),
        opt_state=optimizer.init(params),
        method_state=method.init(params, params),
        step=zero,
        skipped=zero.clone(),
        skipped_in_a_row=zero.clone(),
    )


def sam_update(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    rho: float | Tensor = 0.05,
    lr: float | Tensor,
    method: Method = sam(),
) -> tuple[TrainState, Metrics]:
    """Take one sharpness-aware step.

    g = grad L(w);  e = rho g / ||g||;  w <- optimizer(w, grad L(w + e))

    The buffers of the clean pass are kept, those of the perturbed pass dropped. If a
    loss or gradient of either pass, or a dial, is not finite, parameters, buffers, and the
    memory of optimizer and method stay as they were, and only the counters move on, and the
    scale of `loss_scaled`; `require_finite` raises then, if that is wanted. A gradient
    is finite if its norm is: above 1e19, float32 does not hold the square.

    Args:
        state: from `init` or the step before; unchanged.
        batch: what `loss_fn` takes.
        loss_fn: (params, buffers, batch) -> loss or (loss, Aux).
        optimizer: the one that `state` was made with.
        rho: radius of the perturbation, in units of the weights. With the number 0 the
            step is the base optimizer's, bit for bit and in one pass.
        lr: learning rate. Both dials are numbers or 0-d tensors, finite and at least 0;
            inside of `torch.compile`, tensors change without recompiling. What a tensor
            holds on a GPU, or there, is not known before: a negative one goes unseen.
        method: the one that `state` was made with; `samfn.sam()` by default. One that
            `samfn.distributed.placed` made takes the step on all devices. A state of
            DTensors, as `samfn.distributed.shard` makes it, needs none: all ranks share
            one perturbation, and m is the global batch.

    Returns:
        The new state, which shares no memory that training changes with the old one,
        and the metrics.

    Raises:
        TypeError, ValueError: an argument is not as described; says what was expected
            and what came, before anything is computed.

    Source:
        Foret et al., 2021, arXiv:2010.01412, algorithm 1.
    """
    rho, lr = checks.require_dial("rho", rho), checks.require_dial("lr", lr)
    require_state(state, loss_fn=loss_fn, optimizer=optimizer, method=method)
    # Reading the step counter synchronises the GPU: only for methods whose steps differ.
    kind = method.kind(int(state.step)) if method.kind else None
    run = evaluator(loss_fn)
    how: Any = {"rho": rho, "lr": lr, "kind": kind, "weigh": as_loss(loss_fn).weigh}
    with torch.no_grad():  # A dial that requires grad would leave its graph in the state.
        return take_step(state, batch, run, optimizer, method, **how)


class NonFiniteError(ArithmeticError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def require_finite(state: TrainState, *, in_a_row: int = 1) -> None:
    """Raise if the last `in_a_row` steps were all skipped.

    It waits for a GPU; call it as seldom as that allows.

    Raises:
        NonFiniteError: they were.
    """
    if (found := int(state.skipped_in_a_row)) >= in_a_row:
        raise NonFiniteError(
            f"the last {found} of {int(state.step)} steps had a loss or gradient that is"
            " not finite, and changed nothing: try a lower lr or rho"
        )


def find_nonfinite(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    rho: float | Tensor = 0.05,
    method: Method = sam(),
) -> str | None:
    """Take the passes of a step again, and tell what of them is not finite.

    A step that was skipped changed nothing that its passes see, so they can be repeated,
    without compiling; for dropout, with the same seed.

    Args:
        state: that the skipped step returned.
        batch: that it was given.
        loss_fn: as for `sam_update`.
        rho: as for `sam_update`.
        method: as for `sam_update`; on several devices all ranks have to call this, and
            each is told of its own passes; of DTensors, all are told the same.

    Returns:
        As "pass 2: the gradient of conv.weight", or None if all of it is finite, as
        with `loss_scaled`, which has lowered the scale since, or where a dial was not.
    """
    passes: list[Pass] = []
    run = evaluator(loss_fn)

    def noted(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
        passes.append(run(params, buffers, batch, **how))
        return passes[-1]

    params, buffers, _, method_state, step, *_ = state
    kind = method.kind(int(step) - 1) if method.kind else None
    weigh = over_parts(as_loss(loss_fn).weigh, params)
    point = Point(params, buffers, batch, rho, tuple(params), kind=kind, weigh=weigh)
    method.descent(noted, point, method_state)
    for number, seen in enumerate(passes, 1):
        if not seen.loss.isfinite():
            return f"pass {number}: the loss is {seen.loss.item()}"
        for name, leaf in seen.grads.items():
            if tree.norm({name: leaf.isfinite().logical_not().float()}):
                return f"pass {number}: the gradient of {name}"
    return None


def require_state(
    state: TrainState, *, loss_fn: LossFn, optimizer: Optimizer, method: Method
) -> None:
    """Raise unless `state` is one that the others can work with.

    Raises:
        TypeError, ValueError: says what was expected and what came.
    """
    checks.require_trainable(state.params, state.buffers)
    for one in (loss_fn, *method.losses):
        as_loss(one).check(state.params, state.buffers)
    optimizer.check(state.opt_state, state.params)
    require_bounded(optimizer, method.beside)
    if not torch.compiler.is_compiling():
        _require_memory(state, method)


def require_bounded(optimizer: Optimizer, beside: bool) -> None:
    """Raise if what a method moves beside its optimizer would escape what that bounds.

    Raises:
        ValueError: it would; says what to do.
    """
    if optimizer.clips and beside:
        raise ValueError(
            "what wsam moves past the optimizer would escape its clip, and move what"
            " frozen_after leaves alone: expected an optimizer without either, and"
            " wsam(max_norm=...), which clips both gradients"
        )


def _require_memory(state: TrainState, method: Method) -> None:
    known = _known_of(method.init)
    if not known:
        known.append(sorted(method.init(state.params, state.params)))
    if (came := sorted(state.method_state)) != known[0]:
        raise ValueError(
            "the state was made with another method: expected its memory to hold"
            f" {known[0]}, got {came}: give samfn.init and the step the same method"
        )


@lru_cache(maxsize=16)
def _known_of(init: Callable[..., MethodState]) -> list[list[str]]:
    """Return a list for the names of what a method remembers, found out once."""
    return []


def take_step(
    state: TrainState,
    batch: Batch,
    evaluate: Evaluate,
    optimizer: Optimizer,
    method: Method,
    *,
    rho: float | Tensor,
    lr: float | Tensor,
    kind: Hashable = None,
    weigh: Callable[[Batch], int | Tensor] = length_of,
) -> tuple[TrainState, Metrics]:
    """Take the step of `sam_update`, with arguments that were checked.

    Args:
        state: as for `sam_update`.
        batch: as for `sam_update`.
        evaluate: (params, buffers, batch) -> Pass.
        optimizer: as for `sam_update`.
        method: as for `sam_update`.
        rho: as for `sam_update`.
        lr: as for `sam_update`.
        kind: which of the method's kinds of step this is.
        weigh: what the loss of a batch is a mean over, as `Loss.weigh`.
    """
    params, buffers, opt_state, method_state, step, skipped, in_a_row = state
    weigh = over_parts(weigh, params)
    point = Point(params, buffers, batch, rho, tuple(params), kind=kind, weigh=weigh)
    seen, new_method_state = method.descent(evaluate, point, method_state)
    new_params, new_opt_state = descend(
        params, seen.grads, opt_state, optimizer=optimizer, lr=lr
    )
    grad_norm = tree.norm(seen.clean.grads) if seen.grad_norm is None else seen.grad_norm
    known = seen.grad_norm is None and _are(seen.grads, seen.clean.grads)
    descent_norm = grad_norm if known else tree.norm(seen.grads)
    looked_at = [seen.clean.loss, grad_norm, seen.perturbed_loss, descent_norm]
    if seen.beside is not None:
        require_bounded(optimizer, beside=True)
        new_params = tree.add_scaled(new_params, -lr, seen.beside)
        looked_at.append(tree.norm(seen.beside))
    # Others were read before.
    dials = [dial for dial in (rho, lr) if isinstance(dial, Tensor)]
    looked_at += [dial for dial in dials if not checks.is_readable(dial)]
    finite = _all_finite(*looked_at)
    bad = finite.logical_not().to(step.dtype)
    new_state = TrainState(
        params=tree.select(finite, new_params, params),
        buffers=tree.select(finite, seen.clean.buffers, buffers),
        opt_state=tree.select(finite, new_opt_state, opt_state),
        method_state=method.settle(finite, new_method_state, method_state),
        step=step + 1,
        skipped=skipped + bad,
        skipped_in_a_row=(in_a_row + bad) * bad,
    )
    return new_state, Metrics(
        loss=seen.clean.loss,
        outputs=seen.clean.outputs,
        grad_norm=grad_norm,
        perturbation_norm=seen.perturbation_norm,
        perturbed_loss=seen.perturbed_loss,
        descent_norm=descent_norm,
        finite=finite,
        layers=None if seen.watched is None else seen.watched(new_params),
    )


def _are(tree: Params, other: Params) -> bool:
    """Return whether two mappings hold the same tensors, as those of a plain step do."""
    # PyTorch 2.11 cannot ask in a graph whether they are the same mapping.
    alike = len(tree) == len(other)
    return alike and all([leaf is other.get(name) for name, leaf in tree.items()])


def _all_finite(*values: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # As in tree.norm: to stack them takes n kernels.
        return reduce(torch.logical_and, [value.isfinite() for value in values])
    wide = reduce(torch.promote_types, (value.dtype for value in values))
    return torch.stack([value.to(wide) for value in values]).isfinite().all()
