"""What a method is: a direction, a metric, a length, the passes, and their combination.

A method is a value, a few pure functions. Those of the literature are in `published`,
and what turns methods into others is in `combinators`.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, cast

import torch
from torch import Tensor

from samfn import tree
from samfn.gradient import Evaluate, Pass
from samfn.loss import LossFn
from samfn.perturb import Perturb, perturb
from samfn.support.batches import first_rows, length_of
from samfn.tree import Batch, Params

MethodState = Mapping[str, Any]  # tensors, and mappings of names to tensors


class Point(NamedTuple):
    """Where a step starts, and how far and how it looks around."""

    params: Params
    buffers: Params
    batch: Batch
    rho: float | Tensor
    moved: tuple[str, ...]
    """Names of the parameters that are perturbed."""
    share: float = 1.0
    """Share of the batch that the ascent looks at; the first rows of it."""
    kind: Hashable = None
    """Which of the method's kinds of step this is."""
    weigh: Callable[[Batch], int | Tensor] = length_of
    """What the loss of a batch is a mean over, as `Loss.weigh`."""
    climbed: LossFn | None = None
    """The loss whose slope the ascent looks up; None is the step's own."""


class Descent(NamedTuple):
    """The gradient that descends, and what was seen on the way to it."""

    grads: dict[str, Tensor]
    clean: Pass
    """The pass at the parameters: loss, outputs, buffers and gradient there."""
    perturbed_loss: Tensor
    perturbation_norm: Tensor
    """Euclidean length of the perturbation, shape (), in units of the weights."""
    beside: dict[str, Tensor] | None = None
    """A direction that goes past the optimizer: w <- w - lr beside."""
    grad_norm: Tensor | None = None
    """Mean of the clean gradients' norms, where several perturbations were found."""
    watched: Callable[[Params], Any] | None = None
    """New parameters -> what `Metrics.layers` tells of the step, if that was asked for."""


Descended = tuple[Descent, MethodState]


class Method(NamedTuple):
    """A way from a batch to the gradient that descends."""

    init: Callable[[Params, Params], MethodState]
    """(params, those of them that are perturbed) -> what the method remembers."""
    descent: Callable[[Evaluate, Point, MethodState], Descended]
    """(evaluate, point, memory) -> (Descent, memory)."""
    kind: Callable[[int], Hashable] | None = None
    """Number of a step -> `Point.kind`, for methods whose steps differ in their passes.
    Each kind is compiled on its own."""
    settle: Callable[[Tensor, MethodState, MethodState], MethodState] = tree.select
    """(finite, new memory, old memory) -> what is remembered of a step."""
    traces: bool = True
    """Whether torch.compile can trace `descent`."""
    gradients: float | None = None
    """How many gradients of a batch a step takes, on average; a part of the batch counts as
    that part, a gradient by some parameters as a whole one. None where data decide."""
    losses: tuple[LossFn, ...] = ()
    """Loss functions that it evaluates beside the step's own."""
    beside: bool = False
    """Whether a part of it goes past the optimizer, as `Descent.beside`."""
    cuts: bool = False
    """Whether it takes means over parts of a batch, as of a loss that is one."""
    outermost: str | None = None
    """Name of the combinator that made it, if no other one may be put around it."""


P = ParamSpec("P")
Combinator = Callable[Concatenate[Method, P], Method]


def combinator(make: Combinator[P]) -> Combinator[P]:
    """Let a function from a method to another one refuse what has to stay outermost."""

    @wraps(make)
    def checked(method: Method, *args: P.args, **options: P.kwargs) -> Method:
        if method.outermost:
            raise ValueError(f"{make.__name__} goes inside of {method.outermost}")
        return make(method, *args, **options)

    return cast(Combinator[P], checked)


class Direction(NamedTuple):
    """The ascent direction, which may depend on earlier steps."""

    init: Callable[[Params], MethodState]
    """perturbed parameters -> what is remembered."""
    update: Callable[[Params, MethodState], tuple[dict[str, Tensor], MethodState]]
    """(gradient of the clean pass, memory) -> (direction, memory)."""


class Length(NamedTuple):
    """How far the ascent goes, which may depend on the slope and on earlier steps."""

    init: Callable[[Params], MethodState]
    """perturbed parameters -> what is remembered."""
    update: Callable[
        [Params, float | Tensor, MethodState], tuple[float | Tensor, MethodState]
    ]
    """(direction, rho, memory) -> (radius that the metric is given, memory)."""


Combined = tuple[dict[str, Tensor], dict[str, Tensor] | None]
Combine = Callable[[Params, Params], Combined]

uphill = Direction(lambda moved: {}, lambda grads, memory: (dict(grads), memory))
by_rho = Length(lambda moved: {}, lambda up, rho, memory: (rho, {}))


def two_pass(
    metric: Perturb = perturb,
    direction: Direction = uphill,
    combine: Combine | None = None,
    length: Length = by_rho,
) -> Method:
    """Return the method that looks up the slope, moves there, and looks again.

    Args:
        metric: (params, direction, rho) -> the worst point within rho.
        direction: from the gradient of the clean pass to the way up.
        combine: (clean gradient, perturbed gradient) -> (what descends, and what descends
            past the optimizer). None is the perturbed gradient alone; the clean pass then
            differentiates only what is perturbed.
        length: from that direction and rho to how far it goes.
    """

    def init(params: Params, moved: Params) -> MethodState:
        return {**direction.init(moved), **length.init(moved)}

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        clean = look(evaluate, point, everywhere=combine is not None)
        up, own = direction.update(tree.only(clean.grads, point.moved), memory)
        radius, others = length.update(up, point.rho, memory)
        memory = {**own, **others}
        if is_number_zero(point.rho):
            return unperturbed(clean), memory
        perturbed, distance = move(metric, point, up, rho=radius)
        worst = evaluate(perturbed, point.buffers, point.batch)
        seen = perturbed_descent(point, clean, worst, distance)
        if combine is not None:
            grads, beside = combine(clean.grads, worst.grads)
            seen = seen._replace(grads=grads, beside=beside)
        return seen, memory

    return Method(init, descent, gradients=2.0)


def one_pass(
    start: Callable[[Params], MethodState],
    up: Callable[[MethodState], Params],
    remember: Callable[[Params, MethodState], MethodState],
    metric: Perturb = perturb,
) -> Method:
    """Return the method that moves along what it remembers, and looks only there.

    As the one pass is the perturbed one, loss, outputs and buffers are of that.

    Args:
        start: perturbed parameters -> memory.
        up: memory -> the way up.
        remember: (gradient of the pass, memory) -> memory.
        metric: as for `two_pass`.
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if is_number_zero(point.rho):
            seen = plain(evaluate, point)
        elif point.climbed is not None:
            raise ValueError("ascent_on: the method has no pass that looks up the slope")
        else:
            ahead, length = move(metric, point, up(memory))
            there = evaluate(ahead, point.buffers, point.batch)
            seen = unperturbed(there)._replace(perturbation_norm=length)
        return seen, remember(tree.only(seen.grads, point.moved), memory)

    return Method(lambda params, moved: start(moved), descent, gradients=1.0)


def look(evaluate: Evaluate, point: Point, *, everywhere: bool = False) -> Pass:
    """Take the clean pass, on the ascent's share of the batch.

    Args:
        evaluate: the loss function.
        point: where.
        everywhere: differentiate by all parameters, and not only by what is perturbed.
    """
    params, buffers, batch, rho, moved, share, *_ = point
    if is_number_zero(rho):  # No other pass will follow.
        return evaluate(params, buffers, batch)
    if share < 1:
        if everywhere:
            raise ValueError(
                "sub_batch_ascent: the method also descends with the gradient that it"
                " climbs by, which is of a part of the batch here: expected one that only"
                " climbs by it, as sam or asam"
            )
        batch = first_rows(batch, share)
    wrt = None if everywhere or len(moved) == len(params) else moved
    if point.climbed is None:
        return evaluate(params, buffers, batch, wrt=wrt)
    if everywhere:
        raise ValueError(
            "ascent_on: the method also descends with the gradient that it climbs by, which"
            " is of another loss here: expected one that only climbs by it, as sam or asam"
        )
    return evaluate(params, buffers, batch, wrt=wrt, other=point.climbed)


def move(
    metric: Perturb,
    point: Point,
    direction: Params,
    *,
    start: Params | None = None,
    rho: float | Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the perturbed parameters, and how far they are from those of the point.

    Args:
        metric: (params, direction, rho) -> the worst point within rho.
        point: has the parameters, and what of them moves.
        direction: names of `point.moved`.
        start: parameters to move from; None is those of the point.
        rho: how far; None is as far as the point says.
    """
    there = tree.only(start or point.params, point.moved)
    moved = metric(there, direction, point.rho if rho is None else rho)
    length = tree.norm(tree.subtract(moved, tree.only(point.params, point.moved)))
    return {**point.params, **moved}, length


def perturbed_descent(point: Point, clean: Pass, worst: Pass, length: Tensor) -> Descent:
    """Return what descends with the gradient of the last pass."""
    if point.climbed is not None:  # Of the step's own loss there is no other pass.
        clean = worst._replace(grads=clean.grads)
    return Descent(worst.grads, clean, worst.loss, length)


def plain(evaluate: Evaluate, point: Point) -> Descent:
    """Take the step of the base optimizer: one pass, no perturbation."""
    return unperturbed(evaluate(point.params, point.buffers, point.batch))


def unperturbed(clean: Pass) -> Descent:
    """Return what descends where nothing was perturbed."""
    return Descent(clean.grads, clean, clean.loss, torch.zeros_like(clean.loss))


def scalar_like(moved: Params) -> Tensor:
    """Return 0, shape (), float32 or wider, to remember what is of all tensors together."""
    weight = next(iter(moved.values()))
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros((), dtype=wide, device=weight.device)


def is_number_zero(rho: float | Tensor) -> bool:
    """Return whether a step is not to be perturbed, as far as that can be seen.

    What a tensor holds is not looked at: a graph has one shape for every rho.
    """
    return not isinstance(rho, Tensor) and rho == 0
