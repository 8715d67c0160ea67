"""Methods that choose how far they climb: the radius follows the slope, or earlier steps.

In the formulas, L is the loss of the batch, g = grad L(w), and <- is what goes to the base
optimizer. Each is a `two_pass` with a `Length` of its own, which others may take too.
"""

from torch import Tensor

from samfn import tree
from samfn.methods.base import (
    Combined,
    Length,
    Method,
    MethodState,
    by_rho,
    scalar_like,
    two_pass,
)
from samfn.perturb import rate
from samfn.support import checks
from samfn.tree import Params

Radius = tuple[Tensor, MethodState]


def usam() -> Method:
    """Unnormalised SAM: the gradient itself is the way, and is shorter where it is flat.

    e = rho g;  <- grad L(w + e)

    Two gradients a step. rho is in units of w per unit of g here: where the gradient has
    norm n, it moves as far as SAM with rho n. 0.1 to 0.4 in arXiv:2503.02225, for CIFAR-10.

    Source:
        Andriushchenko and Flammarion, 2022, arXiv:2206.06232, who analyse this form; with
        lambd = 0 in the code of arXiv:2503.02225.
    """

    def update(up: Params, rho: float | Tensor, memory: MethodState) -> Radius:
        return rho * tree.norm(up), {}

    return two_pass(length=Length(by_rho.init, update))


def unified_sam(lam: float | None = None) -> Method:
    """Unified SAM: between the gradient itself and the gradient normalised.

    e = rho (1 - lam + lam / ||g||) g;  <- grad L(w + e)

    Two gradients a step. rho = 0.2 to 0.4 did best in the paper, for CIFAR-10.

    Args:
        lam: share of SAM, 0 to 1; 1 is SAM, and 0 is `usam`. None is 1 - 1/t at step t,
            which begins as `usam` and ends as SAM, the paper's best. t counts the steps
            that were not skipped.

    Source:
        Oikonomou and Loizou, 2025, arXiv:2503.02225;
        github.com/dimitris-oik/unifiedsam, unifiedsam.py.
    """
    if lam is not None and not 0 <= lam <= 1:
        raise ValueError(f"lam must be between 0 and 1, or None, got {lam}")

    def init(moved: Params) -> MethodState:
        return {"steps": scalar_like(moved)} if lam is None else {}

    def update(up: Params, rho: float | Tensor, memory: MethodState) -> Radius:
        if lam is not None:
            return rho * ((1 - lam) * tree.norm(up) + lam), {}
        t = memory["steps"] + 1
        return rho * (tree.norm(up) / t + 1 - 1 / t), {"steps": t}

    return two_pass(length=Length(init, update))


def le_sam(rho_max: float = 0.3) -> Method:
    """Loss-equated SAM: as far as the loss should rise, and not as far as the weights.

    e = min(rho / ||g||, rho_max) g / ||g||;  <- grad L(w + e)

    rho is the paper's sigma, in units of the loss: by how much it rises to first order. Two
    gradients a step. The official script has sigma = 0.35, rising over the first 10 of 200
    epochs, and falling to 0 by half a cosine from epoch 160 on.

    Args:
        rho_max: largest ||e||, in units of w; positive. 0.3 is the default of the official
            script, and its README sets none (999).

    Source:
        Wang et al., 2026, arXiv:2605.10183; github.com/smithgun2005/LE-SAM-ICML2026,
        lesam.py, without its options to take a share of the examples, or of g beside.
    """
    checks.require_positive("rho_max", rho_max)

    def update(up: Params, rho: float | Tensor, memory: MethodState) -> Radius:
        return rate(tree.norm(up), rho).clamp(max=rho_max), {}

    return two_pass(length=Length(by_rho.init, update))


def light_sam() -> Method:
    """LightSAM with AdaGrad-Norm: the radius falls as squares of gradients add up.

    u <- u + ||g||^2;  e = rho g / sqrt(u);  <- grad L(w + e)

    The first step is SAM's. As later radii are shorter, it wants a larger rho than SAM; no
    range of it was found. Two gradients a step. The paper's descent is AdaGrad-Norm too,
    lr / sqrt(v) with v the sum of ||grad L(w + e)||^2; that is the base optimizer's choice
    here. Of its three forms this is the first; those by coordinate, AdaGrad and Adam, are
    not here.

    Source:
        Cheng et al., 2025, arXiv:2505.24399; the equations at second hand, from
        junaidaliop.github.io/zij. No official code was found. u starts at 0 here, and at
        the square of a small number there.
    """

    def init(moved: Params) -> MethodState:
        return {"squares": scalar_like(moved)}

    def update(up: Params, rho: float | Tensor, memory: MethodState) -> Radius:
        length = tree.norm(up)
        squares = memory["squares"] + length.square()
        return rate(squares.sqrt(), rho * length), {"squares": squares}

    return two_pass(length=Length(init, update))


def sagm(alpha: float = 0.001) -> Method:
    """Sharpness-aware gradient matching: let clean and perturbed gradient agree.

    e = (rho / ||g|| - alpha) g;  <- (g + grad L(w + e)) / 2

    It descends L(w), and L at the worst point seen from w - alpha g. Two gradients a step;
    rho = 0.05. With the number 0 for rho it is the base optimizer, with a tensor that holds
    0 the step back by alpha g remains.

    Args:
        alpha: at least 0, in units of lr; 0.001 and 0.0005 in the official commands.

    Source:
        Wang et al., 2023, arXiv:2303.10353; github.com/Wang-pengfei/SAGM, sagm.py, whose
        factor 1/2 is not in the paper's objective, the sum of both losses.
    """
    checks.require_dial("alpha", alpha)

    def update(up: Params, rho: float | Tensor, memory: MethodState) -> Radius:
        return rho - alpha * tree.norm(up), {}

    def combine(clean: Params, worst: Params) -> Combined:
        return tree.scale(tree.add(clean, worst), 0.5), None

    return two_pass(combine=combine, length=Length(by_rho.init, update))
