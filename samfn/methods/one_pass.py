"""Methods that perturb before they look: along what earlier steps left, or at random.

In the formulas, L is the loss of the batch, g = grad L(w), and <- is what goes to the base
optimizer.
"""

from torch import Tensor

from samfn import tree
from samfn.methods.base import Combined, Method, MethodState, one_pass, two_pass
from samfn.perturb import filter_noise
from samfn.support import checks
from samfn.tree import Params


def momentum_sam(momentum: float = 0.9) -> Method:
    """Momentum SAM: perturb along what the optimizer remembers, and save the first pass.

    e = -rho v / ||v||;  <- grad L(w + e);  v <- momentum v + grad L(w + e)

    One gradient a step. v is the momentum of SGD without weight decay, and 0 at first.
    The parameters of the state are always the unperturbed w. As the one pass is the
    perturbed one, loss, outputs and batch statistics are those at w + e. rho = 3 for a
    wide residual network on CIFAR-100.

    The official optimizer has weight decay, taken at w + e, in v: a step on
    `l2_regularized(loss_fn, decay)` with `sgd(momentum)` is that, to rounding. Its script
    estimates BatchNorm's statistics once more after training, as `reestimated` does.

    Args:
        momentum: share of v that stays, in [0, 1).

    Source:
        Becker et al., 2024, arXiv:2401.12033, algorithm 1.
    """
    checks.require_below_one("momentum", momentum)

    def remember(grads: Params, memory: MethodState) -> MethodState:
        return {"momentum": tree.add_scaled(grads, momentum, memory["momentum"])}

    return one_pass(
        lambda moved: {"momentum": tree.zeros_like(moved)},
        lambda memory: tree.scale(memory["momentum"], -1.0),
        remember,
    )


def s2_sam() -> Method:
    """Single-step SAM (S2-SAM): climb along the gradient that descended in the last step.

    e = rho g_prev / ||g_prev||;  <- g_s = grad L(w + e);  g_prev <- g_s

    One gradient a step; the first is the base optimizer's. Loss, outputs and batch
    statistics are those at w + e. The way is up, where that of `momentum_sam(0)` is the
    same vector down. rho as for `sam`; 0.5 in the official script.

    Source:
        Ji et al., NeurIPS 2024, "A Single-Step, Sharpness-Aware Minimization is All You
        Need"; github.com/jjsrf/SSAM-NEURIPS2024, sam.py with v2, which since PyTorch 2.0
        perturbs nothing: `zero_grad` leaves None, and it skips such. AsyncSAM, Jo et al.,
        2025, arXiv:2503.11147, climbs along the last step's gradient at w instead.
    """
    return one_pass(
        lambda moved: {"gradient": tree.zeros_like(moved)},
        lambda memory: memory["gradient"],
        lambda grads, memory: {"gradient": grads},
    )


def rwp(lam: float = 0.5) -> Method:
    """Random weight perturbation: noise on each filter in proportion to its norm.

    z_ij ~ rho ||w_i|| N(0, 1);  <- lam grad L(w + z) + (1 - lam) grad L(w)

    w_i are the filters, the parts of a weight along its first dimension; a vector is one.
    Two gradients a step; one with lam = 1, whose loss, outputs and batch statistics are
    those at w + z. rho = 0.01 in the official code. The noise is drawn from PyTorch's
    generator, whose state `samfn.random_state` keeps, on each rank for itself unless the
    parameters are DTensors.

    Args:
        lam: weight of the perturbed gradient, in (0, 1]; 0.5 in the official code.

    Source:
        Li et al., 2022, arXiv:2211.11489, and 2024, arXiv:2404.00357; github.com/nblt/RWP,
        which takes the two gradients on two batches, each on a GPU of its own. Here both
        are of the same batch.
    """
    checks.require_share("lam", lam)

    def nothing(of: object) -> dict[str, Tensor]:
        return {}

    def noisy(params: Params, grads: Params, rho: float | Tensor) -> dict[str, Tensor]:
        noise = {name: filter_noise(w) for name, w in params.items()}
        return tree.add_scaled(params, rho, noise)

    def combine(clean: Params, worst: Params) -> Combined:
        return tree.add_scaled(tree.scale(worst, lam), 1 - lam, clean), None

    if lam == 1:
        return one_pass(nothing, nothing, lambda grads, memory: {}, noisy)
    return two_pass(noisy, combine=combine)
