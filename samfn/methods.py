"""Methods: how a batch becomes the gradient that descends.

A method is a value, a pair of functions, and combinators take methods to methods. To
add one, write a function here that returns a `Method`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.gradient import Evaluate, Pass
from samfn.perturb import Adapts, perturb, perturb_adaptive
from samfn.tree import Batch, Params

MethodState = Mapping[str, Any]
Perturb = Callable[[Params, Params, "float | Tensor"], dict[str, Tensor]]


class Point(NamedTuple):
    """Where a step starts, and how far it looks."""

    params: Params
    buffers: Params
    batch: Batch
    rho: float | Tensor


class Descent(NamedTuple):
    """The gradient that descends, and what was seen on the way to it."""

    grads: dict[str, Tensor]
    clean: Pass
    """The pass at the parameters: loss, outputs, buffers and gradient there."""
    perturbed_loss: Tensor
    perturbation_norm: Tensor
    """Euclidean length of the perturbation, shape (), in units of the weights."""


class Method(NamedTuple):
    """A way from a batch to the gradient that descends."""

    init: Callable[[Params], MethodState]
    """params -> what the method remembers; empty for most."""
    descent: Callable[[Evaluate, Point, MethodState], tuple[Descent, MethodState]]
    """(evaluate, point, memory) -> (Descent, memory)."""
    traces: bool = True
    """Whether `descent` is made of operations that a graph can hold."""


def sam() -> Method:
    """Sharpness-aware minimisation: descend with the gradient at the worst point nearby.

    g = grad L(w);  e = rho g / ||g||;  descend with grad L(w + e)

    Two gradients a step, one where rho is the number 0. rho = 0.05 is a good start.

    Source:
        Foret et al., 2021, arXiv:2010.01412, algorithm 1.
    """
    return _two_pass(perturb)


def asam(eta: float = 0.01, *, adapts: Adapts | None = None) -> Method:
    """Adaptive SAM: the ball is measured relative to the size of each weight.

    g = grad L(w);  e = rho T^2 g / ||T g||, T = |w| + eta;  descend with grad L(w + e)

    Two gradients a step. rho = 0.5 is the official start for CIFAR-10; with
    `adapts=everything` and `eta=0`, the form of davda54/sam, it is 2.

    Args:
        eta: smallest T, in units of w.
        adapts: which parameters T adapts to, as in `samfn.perturb_adaptive`.

    Source:
        Kwon et al., 2021, arXiv:2102.11600, algorithm 1.
    """
    return _two_pass(
        lambda params, grads, rho: perturb_adaptive(params, grads, rho, eta, adapts=adapts)
    )


def accumulated(method: Method, size: int) -> Method:
    """Evaluate in micro-batches of `size` examples, with one perturbation for them all.

    Each gradient is the mean over the micro-batches, weighted by their sizes: the same
    step as on the whole batch, in less memory. Only BatchNorm sees the difference: it
    normalises by each micro-batch, and updates its statistics once for each.

    Args:
        method: any method.
        size: examples in a micro-batch; the last one may be smaller.
    """
    _require_size(size)

    def descent(
        evaluate: Evaluate, point: Point, memory: MethodState
    ) -> tuple[Descent, MethodState]:
        def evaluate_all(params: Params, buffers: Params, batch: Batch) -> Pass:
            total: Pass | None = None
            for micro_batch, weight in _micro_batches(batch, size):
                part = evaluate(params, buffers, micro_batch)
                total = _add_pass(total, part, weight)
                buffers = part.buffers
            return _joined(total)

        return method.descent(evaluate_all, point, memory)

    return method._replace(descent=descent)


def per_micro_batch(method: Method, size: int) -> Method:
    """Perturb for each micro-batch of `size` examples on its own (m-sharpness).

    descend with the mean over micro-batches B_j of grad L_j(w + e_j), e_j from L_j alone

    The mean is weighted by the sizes. Metrics are means too, outputs are concatenated
    (scalars averaged), and BatchNorm's statistics pass through the clean passes in turn.

    Args:
        method: any method.
        size: m, the examples in a micro-batch; the last one may be smaller. The whole
            batch gives back `method`.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 4.1; Andriushchenko and
        Flammarion, 2022, arXiv:2206.06232.
    """
    _require_size(size)

    def descent(
        evaluate: Evaluate, point: Point, memory: MethodState
    ) -> tuple[Descent, MethodState]:
        total: Descent | None = None
        for micro_batch, weight in _micro_batches(point.batch, size):
            part, memory = method.descent(
                evaluate, point._replace(batch=micro_batch), memory
            )
            total = _add_descent(total, part, weight)
            point = point._replace(buffers=part.clean.buffers)
        assert total is not None  # There is at least one micro-batch.
        return total._replace(clean=_joined(total.clean)), memory

    return method._replace(descent=descent)


def same_randomness(method: Method) -> Method:
    """Draw the same random numbers, as for dropout, in every pass of a step.

    The original SAM code does so; a plain PyTorch loop draws anew in each pass. Put it
    inside of `accumulated` and `per_micro_batch`: around them, it would give every
    micro-batch the same mask. It reads the state of the generator, which no graph can
    hold: `samfn.compile_update` compiles the gradient alone then.
    """

    def descent(
        evaluate: Evaluate, point: Point, memory: MethodState
    ) -> tuple[Descent, MethodState]:
        device = next(iter(point.params.values())).device
        before = _random_state(device)

        def replay(params: Params, buffers: Params, batch: Batch) -> Pass:
            _set_random_state(device, before)
            return evaluate(params, buffers, batch)

        return method.descent(replay, point, memory)

    return method._replace(descent=descent, traces=False)


def _two_pass(ascend: Perturb) -> Method:
    def descent(
        evaluate: Evaluate, point: Point, memory: MethodState
    ) -> tuple[Descent, MethodState]:
        params, buffers, batch, rho = point
        clean = evaluate(params, buffers, batch)
        if _is_number_zero(rho):
            zero = torch.zeros_like(clean.loss)
            return Descent(clean.grads, clean, clean.loss, zero), memory
        perturbed = ascend(params, clean.grads, rho)
        worst = evaluate(perturbed, buffers, batch)
        length = tree.norm(tree.subtract(perturbed, params))
        return Descent(worst.grads, clean, worst.loss, length), memory

    return Method(lambda params: {}, descent)


def _is_number_zero(rho: float | Tensor) -> bool:
    # What a tensor holds is not looked at: a graph has one shape for every rho.
    return not isinstance(rho, Tensor) and rho == 0


def _micro_batches(batch: Batch, size: int) -> list[tuple[Batch, float]]:
    """Cut every tensor of a batch along its first dimension; give each part's share."""
    leaves, structure = pytree.tree_flatten(batch)
    lengths = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
    if len(lengths) != 1 or not (length := next(iter(lengths))) or not length[0]:
        found = [tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in leaves]
        raise ValueError(
            "micro-batches need a batch of tensors of one length, got shapes"
            f" {', '.join(map(str, found))}"
        )
    cut = [leaf.split(size) for leaf in leaves]
    return [
        (pytree.tree_unflatten(part, structure), len(part[0]) / length[0])
        for part in map(list, zip(*cut, strict=True))
    ]


def _add_pass(total: Pass | None, part: Pass, weight: float) -> Pass:
    """Add a micro-batch to the weighted mean; outputs are gathered in a list."""
    return Pass(
        loss=_add(total and total.loss, part.loss, weight),
        outputs=[*(total.outputs if total else ()), (part.outputs, weight)],
        buffers=part.buffers,
        grads=_add_tree(total and total.grads, part.grads, weight),
    )


def _add_descent(total: Descent | None, part: Descent, weight: float) -> Descent:
    norm = total and total.perturbation_norm
    return Descent(
        grads=_add_tree(total and total.grads, part.grads, weight),
        clean=_add_pass(total and total.clean, part.clean, weight),
        perturbed_loss=_add(total and total.perturbed_loss, part.perturbed_loss, weight),
        perturbation_norm=_add(norm, part.perturbation_norm, weight),
    )


def _add(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    return part * weight if total is None else total + part * weight


def _add_tree(
    total: dict[str, Tensor] | None, part: dict[str, Tensor], weight: float
) -> dict[str, Tensor]:
    if total is None:
        return tree.scale(part, weight)
    return tree.add_scaled(total, weight, part)


def _joined(total: Pass | None) -> Pass:
    """Make one tree of the gathered outputs: scalars averaged, tensors concatenated."""
    assert total is not None  # There is at least one micro-batch.
    outputs, weights = zip(*total.outputs, strict=True)

    def join(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if parts[0].ndim:
            return torch.cat(parts)
        return torch.stack([p * w for p, w in zip(parts, weights, strict=True)]).sum()

    return total._replace(outputs=pytree.tree_map(join, *outputs))


def _require_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"a micro-batch holds at least one example, got size {size}")


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
