"""Combinators: from a method to another one, whatever it is."""

import random
from collections.abc import Callable, Collection, Hashable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from math import inf, nan
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import tree
from samfn.gradient import Evaluate, Pass
from samfn.loss import LossFn
from samfn.methods.base import (
    Descended,
    Descent,
    Method,
    MethodState,
    Point,
    combinator,
    plain,
)
from samfn.perturb import Adapts
from samfn.support import checks
from samfn.support.batches import cut, length_of
from samfn.tree import Batch, Params

Statistics = Literal["in turn", "averaged"]

SCALE, GOOD = "loss_scale", "loss_scale_finite_steps"  # in the memory of `loss_scaled`
SMALLEST = 2.0**-24  # scale; at 0 it would never grow again


@combinator
def accumulated(method: Method, size: int, *, statistics: Statistics = "in turn") -> Method:
    """Evaluate in micro-batches of `size` examples, with one perturbation for them all.

    Each gradient is the mean over the micro-batches, weighted by what their losses are
    means over: the same step as on the whole batch, in less memory. Only BatchNorm sees
    the difference: it normalises by each micro-batch.

    Args:
        method: any method.
        size: examples in a micro-batch; the last one may be smaller.
        statistics: what becomes of the buffers, as for `per_micro_batch`.
    """
    checks.require_count("size", size)
    _require_statistics(statistics)

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        def evaluate_all(
            params: Params, buffers: Params, batch: Batch, slope_at: Any = None, **how: Any
        ) -> Pass:
            total: Pass | None = None
            seen, parts, weights = [], cut(batch, size), None
            slopes = _cut_alike(slope_at, size, parts)
            for index, (micro_batch, _) in enumerate(parts):
                where = {} if slope_at is None else {"slope_at": slopes[index]}
                part = evaluate(params, buffers, micro_batch, **where, **how)
                weights = weights or _weights(parts, point.weigh)
                total = _add_pass(total, part, weights[index])
                seen.append((part.buffers, weights[index]))
                if statistics == "in turn":
                    buffers = part.buffers
            joined = _joined(total)
            averaged = statistics == "averaged"
            return joined._replace(buffers=_averaged(seen)) if averaged else joined

        return method.descent(evaluate_all, point, memory)

    return method._replace(descent=descent, cuts=True)


@combinator
def per_micro_batch(
    method: Method, size: int, *, statistics: Statistics = "in turn"
) -> Method:
    """Perturb for each micro-batch of `size` examples on its own (m-sharpness).

    descend with the mean over micro-batches B_j of grad L_j(w + e_j), e_j from L_j alone

    The mean is weighted by what the losses are means over. Metrics are means too; outputs
    are concatenated, and scalars among them averaged. BatchNorm normalises by each
    micro-batch.

    Args:
        method: any method.
        size: m, the examples in a micro-batch; the last one may be smaller. The whole
            batch gives back `method`.
        statistics: what becomes of the buffers, and of what the method remembers. "in
            turn": they pass through the clean passes one after the other, so that BatchNorm
            counts each micro-batch, and so do `unified_sam` and `ae_sam`. "averaged": each
            starts from those before the step, and their mean, weighted likewise, is kept,
            so that the step counts once, as on several devices. A micro-batch in which
            nothing counts leaves what is remembered as it was.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 4.1; Andriushchenko and
        Flammarion, 2022, arXiv:2206.06232.
    """
    checks.require_count("size", size)
    _require_statistics(statistics)

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        total: Descent | None = None
        buffers, seen, memories = point.buffers, [], []
        parts, weights = cut(point.batch, size), None
        for index, (micro_batch, _) in enumerate(parts):
            part, new = method.descent(
                evaluate, point._replace(batch=micro_batch, buffers=buffers), memory
            )
            weights = weights or _weights(parts, point.weigh)
            total = _add_descent(total, part, weights[index])
            seen.append((part.clean.buffers, weights[index]))
            memories.append((new, weights[index]))
            if statistics == "in turn":
                buffers = part.clean.buffers
                memory = _if_counting(weights[index], new, memory)
        assert total is not None  # There is at least one micro-batch.
        clean = _joined(total.clean)
        if statistics == "averaged":
            clean, memory = clean._replace(buffers=_averaged(seen)), _averaged(memories)
        return total._replace(clean=clean), memory

    return method._replace(descent=descent, cuts=True)


@combinator
def on_parameters(method: Method, which: str | Collection[str] | Adapts) -> Method:
    """Perturb some of the parameters only; all of them descend.

    For `sam`: e = rho g_S / ||g_S|| on the parameters of S, 0 elsewhere

    SAM-ON is `on_parameters(sam(), samfn.norm_parameters(model))`. The ascent then has no
    gradient of the other weights to compute, unless the method compares both gradients;
    `metrics.grad_norm` is over those that it computes. A small S wants a large rho.

    Args:
        method: any method.
        which: names, a pattern as "layer?.*.bias" in the manner of a shell, or a function
            of a name and its tensor.

    Raises:
        ValueError: when a state is made, `which` holds for no parameter, or names one that
            there is not.

    Source:
        Mueller et al., 2023, arXiv:2306.04226, for normalisation layers alone.
    """
    if not isinstance(which, str) and not callable(which):
        which = frozenset(which)  # Gone through in each step.

    def chosen(params: Params, moved: Collection[str]) -> tuple[str, ...]:
        if isinstance(which, str):
            names: tuple[str, ...] = _matching(which, tuple(moved))
            return names
        if callable(which):
            return tuple(name for name in moved if which(name, params[name]))
        return tuple(name for name in moved if name in which)

    def init(params: Params, moved: Params) -> MethodState:
        if isinstance(which, frozenset):
            checks.require_names_of(params, which, what="on_parameters")
        names = chosen(params, moved)
        if not names:
            raise ValueError(
                f"on_parameters: {which!r} is none of the {len(moved)} parameters"
                f" {', '.join([*moved][:5])}, ..."
            )
        return method.init(params, tree.only(moved, names))

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        names = chosen(point.params, point.moved)
        return method.descent(evaluate, point._replace(moved=names), memory)

    return method._replace(init=init, descent=descent)


@combinator
def every(method: Method, k: int) -> Method:
    """Take the method's step every k steps, and the base optimizer's in between.

    Those in between are the method's with a rho of 0, as in the parts of `accumulated` or
    on both losses of `on_loss`, and leave what it remembers as it was. The first step is
    the method's, and then steps k, 2k, ... counted from 0; composer's are k - 1, 2k - 1,
    ... 1 + 1/k gradients a step for `sam`. A rho that is the number 0 for a part of the
    training keeps the method to the other part.

    Args:
        method: any method, but not `loss_scaled`, which goes around.
        k: steps from one to the next; 1 gives back `method`.

    Source:
        The `interval` of mosaicml/composer, composer/algorithms/sam.
    """
    checks.require_count("k", k)
    _require_no_scale(method, "every")

    def kind(step: int) -> Hashable:
        if step % k:
            return "plain"
        return method.kind(step // k) if method.kind else None

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if point.kind == "plain":  # In parts, where the method is, and of all its losses.
            return method.descent(evaluate, point._replace(rho=0.0), memory)[0], memory
        return method.descent(evaluate, point, memory)

    # Of losses beside the step's own, it is not known whether plain steps take them, too.
    cost = None if method.losses else method.gradients
    cost = None if cost is None else 1 + (cost - 1) / k
    return method._replace(descent=descent, kind=kind, gradients=cost)


@combinator
def sub_batch_ascent(method: Method, share: float = 0.25) -> Method:
    """Find the perturbation on a part of the batch, and descend on all of it.

    g of the first rows of the batch, that share of them, rounded up

    1 + share gradients a step. The clean pass sees that part alone, and so do the metrics
    and BatchNorm's statistics that come from it: `metrics.outputs` has its rows.

    Args:
        method: one that only climbs by its first gradient, as `sam`, `asam`, `vasso`; not
            one that also descends with it, as `gsam` and `wsam`, or compares single
            examples, as `esam`.
        share: in (0, 1]; 1 gives back `method`.

    Raises:
        ValueError: in a step, the method descends with the gradient that it climbs by.

    Source:
        Bahri et al., 2022, arXiv:2110.08529, section 4; share = 1/4 there.
    """
    checks.require_share("share", share)

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        part = point._replace(share=point.share * share)
        return method.descent(evaluate, part, memory)

    # Of others than two passes it is not known how many gradients are of the part.
    cost = 1 + share if method.gradients == 2 else None
    return method._replace(descent=descent, gradients=cost)


@combinator
def ascent_on(method: Method, loss_fn: LossFn) -> Method:
    """Climb another loss, and descend the step's own at the point that was found.

    For `sam`: e = rho g / ||g||, g = grad L_a(w);  <- grad L(w + e)

    L_a is `loss_fn` here, and L the loss function of the step. Loss, outputs and buffers
    are those of L, and so of the pass at w + e, as no other one evaluates it; `grad_norm`
    is ||g||, of L_a. For example, with `plain = samfn.supervised(model, criterion)`::

        ascent_on(awp(), plain)                 # and l2_regularized(plain, decay) descends:
        ascent_on(sam(), plain)                 # sharpness without the regulariser
        ascent_on(sam(), forget_loss)           # unlearning that resists relearning

    Args:
        method: one that only climbs by its first gradient, as `sam`, `asam`, `awp`,
            `vasso`, `usam`; not one that also descends with it, as `gsam` and `wsam`.
        loss_fn: (params, buffers, batch) -> loss or (loss, Aux), of the same batch. Where a
            step sees parts of a batch, its parts count as those of the step's own loss.

    Raises:
        ValueError: in a step, the method climbs by no gradient of its batch, or descends
            with the one that it climbs by.

    Source:
        Wu et al., 2020, arXiv:2004.05884 (AWP, whose regulariser is not climbed); Fan et
        al., 2025, arXiv:2502.05374 (unlearning).
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        return method.descent(evaluate, point._replace(climbed=loss_fn), memory)

    return method._replace(descent=descent, losses=(*method.losses, loss_fn))


@combinator
def on_loss(method: Method, loss_fn: LossFn) -> Method:
    """Take the method's step on a part of the loss, and descend plainly on the rest.

    For `sam`: e = rho g / ||g||, g = grad L_a(w);  <- grad L(w) + grad L_a(w + e)

    L_a is `loss_fn` here, and L, the rest, the loss function of the step. One gradient more
    than the method; two of them, and no perturbation, where rho is the number 0. Loss and
    `perturbed_loss` are sums of both; outputs and buffers are those of L, at w; `grad_norm`
    is of the sum. Focal-SAM has L_a = mean of c_i L_i and L = mean of (1 - c_i) L_i with
    c_i = lambda (1 - share of the class of i)^gamma; ImbSAM has the classes of few examples
    in L_a, which its script multiplies by 2, and the others in L.

    Args:
        method: any method.
        loss_fn: (params, buffers, batch) -> loss or (loss, Aux), of the same batch and a
            mean over the same as the step's own.

    Source:
        Li et al., 2025, arXiv:2505.01660, github.com/scongl/Focal-SAM; Zhou et al., 2023,
        arXiv:2308.07815, github.com/cool-xuan/Imbalanced_SAM.
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        rest = plain(evaluate, point).clean
        part, memory = method.descent(partial(evaluate, other=loss_fn), point, memory)
        seen = part._replace(
            grads=tree.add(rest.grads, part.grads),
            clean=rest._replace(
                loss=rest.loss + part.clean.loss,
                grads={**rest.grads, **tree.add(part.clean.grads, rest.grads)},
                losses=None,
            ),
            perturbed_loss=rest.loss + part.perturbed_loss,
        )
        return seen, memory

    cost = None if method.gradients is None else 1 + method.gradients
    losses = *method.losses, loss_fn
    return method._replace(descent=descent, gradients=cost, losses=losses)


@combinator
def same_randomness(method: Method) -> Method:
    """Draw the same random numbers, as for dropout, in every pass of a step.

    The original SAM code does so; a plain PyTorch loop draws anew in each pass. Put it
    inside of `accumulated` and `per_micro_batch`: around them, it would give every
    micro-batch the same mask. It reads the state of the generators (PyTorch's for the CPU
    and the device, NumPy's and Python's global ones), which no graph can hold:
    `samfn.compile_update` compiles the gradient alone then.
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        device = next(iter(point.params.values())).device
        before = _random_state(device)

        def replay(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
            _set_random_state(device, before)
            return evaluate(params, buffers, batch, **how)

        return method.descent(replay, point, memory)

    return method._replace(descent=descent, traces=False)


@combinator
def loss_scaled(
    method: Method,
    initial: float = 2.0**16,
    *,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> Method:
    """Scale the loss while it is differentiated, for activations in float16.

    g = grad (s L) / s in every pass of a step, with one s

    Gradients of float16 activations below 6e-8 would be 0, and above 65504 infinite. s
    stands in the state's memory of the method, as "loss_scale". A step that is not finite
    changes no parameter, and s is multiplied by `backoff`; after `interval` finite steps
    in a row by `growth`. bfloat16 needs none of this.

    Args:
        method: any method.
        initial: s at first.
        growth: at least 1.
        backoff: between 0 and 1.
        interval: in steps.

    Source:
        Micikevicius et al., 2018, arXiv:1710.03740, section 3.2; numbers as in
        `torch.amp.GradScaler`.
    """
    if not (0 < initial < inf and growth >= 1 and 0 < backoff < 1):
        raise ValueError(
            "expected a finite initial > 0, growth >= 1 and 0 < backoff < 1, got"
            f" {initial}, {growth} and {backoff}"
        )
    checks.require_count("interval", interval)
    _require_no_scale(method, "loss_scaled")

    def init(params: Params, moved: Params) -> MethodState:
        device = next(iter(params.values())).device
        own = {
            SCALE: torch.tensor(float(initial), dtype=torch.float32, device=device),
            GOOD: torch.zeros((), dtype=torch.int64, device=device),
        }
        return {**method.init(params, moved), **own}

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        def scaled(params: Params, buffers: Params, batch: Batch, **how: Any) -> Pass:
            return evaluate(params, buffers, batch, scale=memory[SCALE], **how)

        seen, inner = method.descent(scaled, point, _without_scale(memory))
        return seen, {**inner, SCALE: memory[SCALE], GOOD: memory[GOOD]}

    def settle(finite: Tensor, new: MethodState, old: MethodState) -> MethodState:
        scale, good = old[SCALE], old[GOOD] + 1
        grown = torch.where(good < interval, scale, scale * growth)
        own = {
            SCALE: torch.where(finite, grown, scale * backoff).clamp(min=SMALLEST),
            GOOD: torch.where(finite, good % interval, 0),
        }
        inner = method.settle(finite, _without_scale(new), _without_scale(old))
        return {**inner, **own}

    return method._replace(init=init, descent=descent, settle=settle)


def _require_no_scale(method: Method, name: str) -> None:
    if method.settle is not tree.select:
        raise ValueError(f"{name} goes inside of loss_scaled, not around it")


def _without_scale(memory: MethodState) -> MethodState:
    return {key: value for key, value in memory.items() if key not in (SCALE, GOOD)}


def _matching(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if fnmatchcase(name, pattern))


# As torch.compiler.assume_constant_result says it, which would import Dynamo.
_matching._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _require_statistics(statistics: Statistics) -> None:
    if statistics not in ("in turn", "averaged"):
        raise ValueError(f'statistics must be "in turn" or "averaged", got {statistics!r}')


def _cut_alike(outputs: Any, size: int, parts: list[tuple[Batch, float]]) -> list[Any]:
    """Return the outputs that belong to the parts of a batch."""
    if outputs is None:
        return []
    own = cut(outputs, size)
    if [share for _, share in own] != [share for _, share in parts]:
        raise ValueError(
            "accumulated cuts outputs as it cuts the batch: expected one row for each"
            f" example, got {length_of(outputs)} rows"
        )
    return [part for part, _ in own]


def _weights(
    parts: list[tuple[Batch, float]], weigh: Callable[[Batch], int | Tensor]
) -> list[float | Tensor]:
    """Return each part's share of what counts; asked after a pass, which may have told."""
    weights = [weigh(part) for part, _ in parts]
    total: Any = sum(weights)
    if not isinstance(total, Tensor) and not total:  # The mean of nothing is NaN.
        total = nan
    return [weight / total for weight in weights]


def _averaged(parts: list[tuple[Any, float | Tensor]]) -> Any:
    """Return the weighted mean of nested mappings; whole numbers are alike in all."""
    first = parts[0][0]
    if isinstance(first, Mapping):
        return {
            key: _averaged([(part[key], weight) for part, weight in parts]) for key in first
        }
    if not first.is_floating_point():
        return first
    return torch.stack([_counting(part, weight) * weight for part, weight in parts]).sum(0)


def _add_pass(total: Pass | None, part: Pass, weight: float | Tensor) -> Pass:
    """Add a micro-batch to the weighted mean; outputs are gathered in a list."""
    return Pass(
        loss=_add(total and total.loss, part.loss, weight),
        outputs=[*(total.outputs if total else ()), (part.outputs, weight)],
        buffers=part.buffers,
        grads=add_weighted(total and total.grads, part.grads, weight),
        losses=_cat(total and total.losses, part.losses),
    )


def _add_descent(total: Descent | None, part: Descent, weight: float | Tensor) -> Descent:
    norm = total and total.perturbation_norm
    return Descent(
        grads=add_weighted(total and total.grads, part.grads, weight),
        clean=_add_pass(total and total.clean, part.clean, weight),
        perturbed_loss=_add(total and total.perturbed_loss, part.perturbed_loss, weight),
        perturbation_norm=_add(norm, part.perturbation_norm, weight),
        beside=part.beside and add_weighted(total and total.beside, part.beside, weight),
    )


def _cat(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else torch.cat([total, part])


def _counting(part: Tensor, weight: float | Tensor) -> Tensor:
    # What has no weight is the mean of nothing, NaN, which a weight of 0 would not remove.
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, part, 0)
    return part if weight else torch.zeros_like(part)


def _if_counting(weight: float | Tensor, new: MethodState, old: MethodState) -> MethodState:
    """Return what is remembered after a part, which leaves it as it was if none counts."""
    if isinstance(weight, Tensor):
        kept: MethodState = tree.select(weight > 0, new, old)
        return kept
    return new if weight else old


def _add(total: Tensor | None, part: Tensor, weight: float | Tensor) -> Tensor:
    part = _counting(part, weight) * weight
    return part if total is None else total + part


def add_weighted(
    total: dict[str, Tensor] | None, part: dict[str, Tensor], weight: float | Tensor
) -> dict[str, Tensor]:
    """Return a sum with a part times its weight; one of weight 0 may be NaN."""
    if not part:
        return {}
    part = {name: _counting(leaf, weight) for name, leaf in part.items()}
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
        each = [_counting(p, w) * w for p, w in zip(parts, weights, strict=True)]
        return torch.stack(each).sum()

    return total._replace(outputs=pytree.tree_map(join, *outputs))


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the generators that a pass on a device may draw from."""
    state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    if device.type == "cpu":
        return state
    return *state, torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch, *of_device = state
    random.setstate(of_python)
    numpy.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if of_device:
        torch.get_device_module(device).set_rng_state(of_device[0], device)
