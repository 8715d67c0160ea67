"""The methods of the literature: how a batch becomes the gradient that descends.

To add one, write a function here that returns a `Method`; most are a `two_pass` with a
metric, a direction or a combination of their own. In the formulas, L is the loss of the
batch, g = grad L(w), and <- is what goes to the base optimizer.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from samfn import tree
from samfn.gradient import Evaluate, Pass
from samfn.methods.base import (
    Combined,
    Descended,
    Descent,
    Direction,
    Method,
    MethodState,
    Point,
    is_number_zero,
    look,
    move,
    perturbed_descent,
    plain,
    scalar_like,
    two_pass,
    unperturbed,
    uphill,
)
from samfn.perturb import (
    Adapts,
    Perturb,
    perturb,
    perturb_adaptive,
    perturb_fisher,
    perturb_layerwise,
    rate,
)
from samfn.support import checks
from samfn.support.batches import length_of, rows_of
from samfn.support.collectives import placed_as
from samfn.tree import Params


def sam(direction: Direction = uphill) -> Method:
    """Sharpness-aware minimisation: descend with the gradient at the worst point nearby.

    e = rho g / ||g||;  <- grad L(w + e)

    Two gradients a step, one where rho is the number 0. rho = 0.05 is a good start.

    Args:
        direction: what is climbed along in place of g, as `preconditioned()`.

    Source:
        Foret et al., 2021, arXiv:2010.01412, algorithm 1.
    """
    return two_pass(direction=direction)


def asam(eta: float = 0.01, *, adapts: Adapts | None = None) -> Method:
    """Adaptive SAM: the ball is measured relative to the size of each weight.

    e = rho T^2 g / ||T g||, T = |w| + eta;  <- grad L(w + e)

    Two gradients a step. rho = 0.5 is the official start for CIFAR-10; with
    `adapts=everything` and `eta=0`, the form of davda54/sam, it is 2.

    Args:
        eta: smallest T, in units of w.
        adapts: which parameters T adapts to, as in `samfn.perturb_adaptive`.

    Source:
        Kwon et al., 2021, arXiv:2102.11600, algorithm 1.
    """
    return two_pass(partial(perturb_adaptive, eta=eta, adapts=adapts))


def fisher_sam(eta: float = 1.0) -> Method:
    """SAM in a ball that is long where the loss hardly depends on a weight.

    e = rho F^-1 g / sqrt(g . F^-1 g), F = 1 + eta g^2;  <- grad L(w + e)

    Two gradients a step. rho = 0.1 with eta between 0.2 and 1 in the paper.

    Args:
        eta: weight of the Fisher information, as in `samfn.perturb_fisher`.

    Source:
        Kim et al., 2022, arXiv:2206.04920; no official code was found.
    """
    return two_pass(partial(perturb_fisher, eta=eta))


def gsam(alpha: float = 0.4, *, metric: Perturb = perturb) -> Method:
    """Surrogate gap guided SAM: also lower the loss's own share of the gap.

    g_p = grad L(w + e);  <- g_p - alpha g_v, where g_v = g - (g . g_p / ||g_p||^2) g_p

    g_v is the part of g that is orthogonal to g_p, over all parameters together. Two
    gradients a step. The paper lets rho fall with lr, as `schedules.proportional` does.

    Args:
        alpha: weight of the orthogonal part; 0 is SAM. 0.01 to 1 in the paper.
        metric: `perturb`, or another perturbation like it.

    Source:
        Zhuang et al., 2022, arXiv:2203.08065, algorithm 1; alpha = 0.4 is the default
        of github.com/juntang-zhuang/GSAM.
    """

    def combine(clean: Params, worst: Params) -> Combined:
        return tree.add_scaled(worst, -alpha, _orthogonal(clean, worst)), None

    return two_pass(metric, combine=combine)


def wsam(
    gamma: float = 0.9, *, max_norm: float | None = None, metric: Perturb = perturb
) -> Method:
    """Weighted SAM: sharpness as a regulariser of its own weight, beside the optimizer.

    <- g;  then w <- w - lr gamma / (1 - gamma) (grad L(w + e) - g)

    The sharpness part passes by the base optimizer and its momentum, so that `clipped`
    would not bound it, and is refused. Two gradients a step. With gamma = 1/2 and SGD
    without momentum it is SAM.

    Args:
        gamma: weight of the sharpness, at least 0 and below 1; 0 is the base optimizer.
            0.8 to 0.95 do alike in the paper.
        max_norm: largest norm of g and of grad L(w + e), each clipped before they are
            subtracted, as in the official code; None clips neither.
        metric: `perturb`, or another perturbation like it.

    Source:
        Yue et al., 2023, arXiv:2305.15817, algorithm 1.
    """
    checks.require_below_one("gamma", gamma)
    if max_norm is not None:
        checks.require_positive("max_norm", max_norm)

    def combine(clean: Params, worst: Params) -> Combined:
        if max_norm is not None:
            clean, worst = tree.clip(clean, max_norm), tree.clip(worst, max_norm)
        sharpness = tree.subtract(worst, clean)
        return dict(clean), tree.scale(sharpness, gamma / (1 - gamma))

    return two_pass(metric, combine=combine)._replace(beside=True)


def ssam(*, metric: Perturb = perturb) -> Method:
    """Stable SAM: the perturbed gradient's direction, with the length of the clean one.

    <- ||g|| / ||g_s|| g_s, where g_s = grad L(w + e)

    Both norms are over all parameters together. Two gradients a step; rho as for `sam`. It
    keeps steps small where g_s is large, and so takes a larger lr.

    Args:
        metric: `perturb`, or another perturbation like it.

    Source:
        Tan et al., 2024, arXiv:2401.07250; github.com/cltan023/stablesam2024, sam.py,
        whose adaptive form measures both gradients in the metric.
    """

    def combine(clean: Params, worst: Params) -> Combined:
        factor = _quotient(tree.norm(clean), tree.norm(worst))
        return tree.scale(worst, factor), None

    return two_pass(metric, combine=combine)


def awp() -> Method:
    """Adversarial weight perturbation: each weight by rho relative to its own norm.

    e_l = rho ||w_l|| g_l / ||g_l|| for each w_l of two or more dimensions, else 0;
    <- grad L(w + e)

    The attack on the inputs comes before: a batch has those that were attacked. Two
    gradients a step. rho = 0.01 in the official code, for adversarial training.

    The official code climbs the loss alone, and descends with weight decay taken at w + e:
    `ascent_on(awp(), loss_fn)`, in a step on `l2_regularized(loss_fn, decay)`, is that.

    Source:
        Wu et al., 2020, arXiv:2004.05884; github.com/csdongxian/AWP, whose steps also
        count the perturbed pass in BatchNorm's statistics.
    """
    return two_pass(perturb_layerwise)


def friendly_sam(
    sigma: float = 1.0, decay: float = 0.9, *, metric: Perturb = perturb
) -> Method:
    """Friendly SAM: climb along the noise of the batch, not along the full gradient.

    e = rho d / ||d||, d = g - sigma m;  m <- decay m + (1 - decay) g;  <- grad L(w + e)

    m estimates the full gradient by that of the batches before; as in the official code
    it is subtracted before it is updated, and starts as the first gradient, after a first
    step that is SAM's. Two gradients a step.

    Args:
        sigma: share of m that is taken away; 0 is SAM.
        decay: of m, in [0, 1); 0.6 to 0.95 in the paper.
        metric: `perturb`, or another perturbation like it.

    Source:
        Li et al., 2024, arXiv:2403.12350; github.com/nblt/F-SAM.
    """
    checks.require_below_one("decay", decay)

    def update(grads: Params, memory: MethodState) -> tuple[dict[str, Tensor], MethodState]:
        direction = tree.add_scaled(grads, -sigma, memory["mean"])
        return direction, _averaged(memory, grads, 1 - decay)

    return two_pass(metric, Direction(_no_average, update))


def vasso(theta: float = 0.9, *, metric: Perturb = perturb) -> Method:
    """SAM with variance suppression: climb along an average of the gradients.

    e = rho d / ||d||, d <- (1 - theta) d + theta g;  <- grad L(w + e)

    d starts as the first gradient. Two gradients a step.

    Args:
        theta: share of the new gradient, in (0, 1]; 1 is SAM.
        metric: `perturb`, or another perturbation like it.

    Source:
        Li and Giannakis, 2023, arXiv:2309.15639, algorithm 1; theta = 0.9 as in the
        scripts of github.com/BingcongLi/VaSSO.
    """
    checks.require_share("theta", theta)

    def update(grads: Params, memory: MethodState) -> tuple[dict[str, Tensor], MethodState]:
        memory = _averaged(memory, grads, theta)
        return dict(memory["mean"]), memory

    return two_pass(metric, Direction(_no_average, update))


def looksam(k: int = 5, alpha: float = 0.7, *, metric: Perturb = perturb) -> Method:
    """LookSAM: SAM at every k-th step, and in between the direction that it had found.

    every k-th step: <- g_s = grad L(w + e), and keep g_v = g_s - (g . g_s / ||g||^2) g;
    other steps:     <- g + alpha ||g|| / ||g_v|| g_v

    g_v is the part of g_s that is orthogonal to g, over all parameters together. 1 + 1/k
    gradients a step: between, the second pass is left out.

    Args:
        k: steps from one perturbation to the next; 1 is SAM.
        alpha: weight of g_v; 0.7 in the paper for vision transformers, 0.1 in
            arXiv:2401.12033 for networks of convolutions.
        metric: `perturb`, or another perturbation like it.

    Source:
        Liu et al., 2022, arXiv:2203.02714, algorithm 1.
    """
    checks.require_count("k", k)

    def keep(clean: Params, worst: Params) -> Combined:
        return dict(worst), _orthogonal(worst, clean)

    looking = two_pass(metric, combine=keep)

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if is_number_zero(point.rho):
            return plain(evaluate, point), memory
        if point.kind == "look":
            seen, _ = looking.descent(evaluate, point, {})
            return seen._replace(beside=None), {"orthogonal": seen.beside}
        seen, kept = plain(evaluate, point), memory["orthogonal"]
        length = tree.norm(seen.grads)
        factor = _quotient(alpha * length, tree.norm(kept))
        return seen._replace(grads=tree.add_scaled(seen.grads, factor, kept)), memory

    return Method(
        lambda params, moved: {"orthogonal": tree.zeros_like(params)},
        descent,
        kind=lambda step: "go on" if step % k else "look",
        gradients=1 + 1 / k,
    )


def multi_step_sam(ascents: int = 2, *, metric: Perturb = perturb) -> Method:
    """SAM that climbs in several steps, each up the slope where it stands.

    w_0 = w;  w_(i+1) = w_i + rho / n grad L(w_i) / ||grad L(w_i)||;  <- grad L(w_n)

    n + 1 gradients a step. The way is at most rho long as the crow flies.

    Args:
        ascents: n; 1 is SAM.
        metric: `perturb`, or another perturbation like it.

    Source:
        Foret et al., 2021, arXiv:2010.01412, appendix; steps of rho / n as in
        Andriushchenko and Flammarion, 2022, arXiv:2206.06232. Neither found that more
        than one step helps.
    """
    checks.require_count("ascents", ascents)

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if is_number_zero(point.rho):
            return plain(evaluate, point), memory
        seen = clean = look(evaluate, point)
        there: Params = point.params
        for i in range(ascents):
            if i:
                seen = look(evaluate, point._replace(params=there))
            up, rho = tree.only(seen.grads, point.moved), point.rho / ascents
            there, length = move(metric, point, up, start=there, rho=rho)
        worst = evaluate(there, point.buffers, point.batch)
        return perturbed_descent(point, clean, worst, length), memory

    return Method(_nothing, descent, gradients=1.0 + ascents)


def esam(
    beta: float = 0.5,
    gamma: float = 0.5,
    *,
    draws: Literal["entries", "tensors"] = "entries",
) -> Method:
    """Efficient SAM: perturb some of the weights, descend with the sharpest examples.

    e = m rho g / ||g|| / beta, m random in {0, 1} with mean beta;  <- grad L_S(w + e)

    S holds the share gamma of the batch whose losses grew most from w to w + e. Two
    gradients, the second of a smaller batch, and one forward pass between them. The loss
    function must tell the loss of each example: give `samfn.supervised` a criterion with
    reduction="none".

    Args:
        beta: share of the weights that are perturbed, in (0, 1]; all of them descend.
        gamma: share of the batch that descends, in (0, 1], rounded up. beta = gamma = 1
            is SAM.
        draws: "entries", as the paper: m is drawn for each weight, and e is about
            rho / sqrt(beta) long. "tensors", as the official code: m is one for each
            tensor, and e = m rho g / ||m g|| / beta, which is rho / beta long.

    Source:
        Du et al., 2022, arXiv:2110.03141, algorithm 1; github.com/dydjw9/Efficient_SAM,
        utils/Esam.py, where frozen tensors skip the ascent alone. The length of its rho is
        that of rho / sqrt(beta) with "entries". Its code takes one example less than
        gamma n, rounded down.
    """
    if draws not in ("entries", "tensors"):
        raise ValueError(f'draws must be "entries" or "tensors", got {draws!r}')
    checks.require_share("beta", beta)
    checks.require_share("gamma", gamma)

    def thinned(params: Params, grads: Params, rho: float | Tensor) -> dict[str, Tensor]:
        if beta == 1:
            return perturb(params, grads, rho)
        toss = _coins if draws == "entries" else _one_coin
        chosen = {n: placed_as(toss(w, beta), w) for n, w in params.items()}
        kept = tree.multiply(chosen, grads)
        length = tree.norm(grads if draws == "entries" else kept)
        return tree.add_scaled(params, rate(length, rho) / beta, kept)

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if is_number_zero(point.rho):
            return plain(evaluate, point), memory
        if point.share < 1 or point.climbed is not None:
            raise ValueError(
                "esam compares all losses of a batch: leave its ascent whole, and on the"
                " step's own loss"
            )
        clean = look(evaluate, point)
        there, length = move(thinned, point, tree.only(clean.grads, point.moved))
        if gamma == 1:
            worst = evaluate(there, point.buffers, point.batch)
            return Descent(worst.grads, clean, worst.loss, length), memory
        again = evaluate(there, point.buffers, point.batch, wrt=())
        rows = _largest(_losses(again) - _losses(clean), gamma, length_of(point.batch))
        sharpest = rows_of(point.batch, rows)
        worst = evaluate(there, point.buffers, sharpest)
        return Descent(worst.grads, clean, again.loss, length), memory

    return Method(_nothing, descent)


def ae_sam(
    steps: int, first: float = 1.0, last: float = -1.0, decay: float = 0.9
) -> Method:
    """Adaptive policy SAM: perturb only where the gradient is large for its time.

    SAM's step if ||g||^2 >= mean + c sd, else the base optimizer's, where mean and sd are
    running ones of ||g||^2 that start with the first, and c goes from `first` to `last`

    One or two gradients a step, as the gradient decides. No graph can hold such a choice:
    `samfn.compile_update` compiles the pass, and a GPU waits once a step for the norm.

    Args:
        steps: of the whole training.
        first: c at its start.
        last: c at its end.
        decay: of the running mean and variance, in [0, 1).

    Source:
        Jiang et al., 2023, arXiv:2304.14647, algorithm 1. It leaves the start of mean and
        variance open. The only code that was found starts them with 0 and 1e-10, and so
        perturbs more at first: 21 of 40 steps where this perturbed 11.
    """
    checks.require_count("steps", steps)
    checks.require_below_one("decay", decay)

    def init(params: Params, moved: Params) -> MethodState:
        device = next(iter(params.values())).device
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return {"mean": zero, "variance": zero.clone(), "steps": zero.clone()}

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        clean = look(evaluate, point, everywhere=True)
        square = tree.norm(clean.grads).square().float()
        old = torch.where(memory["steps"] > 0, decay, 0.0)
        mean = old * memory["mean"] + (1 - old) * square
        variance = old * memory["variance"] + (1 - old) * (square - mean).square()
        c = first + (last - first) * (memory["steps"] / steps).clamp(max=1.0)
        memory = {"mean": mean, "variance": variance, "steps": memory["steps"] + 1}
        if is_number_zero(point.rho) or not square >= mean + c * variance.sqrt():
            return unperturbed(clean), memory
        perturbed, length = move(perturb, point, tree.only(clean.grads, point.moved))
        worst = evaluate(perturbed, point.buffers, point.batch)
        return Descent(worst.grads, clean, worst.loss, length), memory

    return Method(init, descent, traces=False)


def _nothing(params: Params, moved: Params) -> MethodState:
    return {}


def _orthogonal(vector: Params, to: Params) -> dict[str, Tensor]:
    """Return what is left of `vector` without its part along `to`."""
    length = tree.norm(to)
    # Divided twice: the square of a small length would be 0.
    along = _quotient(_quotient(tree.dot(vector, to), length), length)
    return tree.add_scaled(vector, -along, to)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)


def _no_average(moved: Params) -> MethodState:
    return {"mean": tree.zeros_like(moved), "begun": scalar_like(moved)}


def _averaged(memory: MethodState, grads: Params, share: float) -> MethodState:
    """Return the running mean with `share` of the new gradient; the first is all new."""
    old = memory["begun"] * (1 - share)
    mean = tree.add(tree.scale(memory["mean"], old), tree.scale(grads, 1 - old))
    return {"mean": mean, "begun": torch.ones_like(memory["begun"])}


def _coins(like: Tensor, share: float) -> Tensor:
    """Draw ones, of which that share is expected, and zeros."""
    if not tree.is_sharded(like):
        return torch.bernoulli(torch.full_like(like, share))
    return torch.bernoulli(
        torch.full(like.shape, share, dtype=like.dtype, device=like.device)
    )


def _one_coin(like: Tensor, share: float) -> Tensor:
    """Draw ones or zeros, all alike."""
    coin = torch.full((), share, dtype=like.dtype, device=like.device).bernoulli()
    return coin.expand(like.shape).contiguous()


def _losses(seen: Pass) -> Tensor:
    if seen.losses is None:
        raise ValueError(
            "esam needs the loss of each example, the loss function gives their mean alone:"
            ' let the criterion of samfn.supervised have reduction="none"'
        )
    return seen.losses


def _largest(values: Tensor, share: float, rows: int) -> Tensor:
    if len(values) != rows:
        raise ValueError(f"esam needs {rows} losses, one for each example: {len(values)}")
    return values.topk(checks.rounded_up(share, rows)).indices
