"""SAM that moves the network and not what the loss makes of it, and the ascent of Adam."""

from torch import Tensor

from samfn import tree
from samfn.gradient import Evaluate
from samfn.loss import NO_CRITERION
from samfn.methods.base import (
    Descended,
    Descent,
    Direction,
    Method,
    MethodState,
    Point,
    is_number_zero,
    look,
    move,
    unperturbed,
    uphill,
)
from samfn.perturb import perturb
from samfn.support import checks
from samfn.tree import Params

EPS = 1e-8  # as Adam's, in units of the gradient


def functional_sam(direction: Direction = uphill) -> Method:
    """Functional SAM: the network is perturbed, the slope of the loss in its outputs not.

    e = rho d / ||d||, d = g;  <- J(w + e)^T dl/doutputs(w), where J = doutputs/dw

    SAM also moves dl/doutputs to w + e, and in language models lowers sharpness by that
    part alone, as by smaller logits. Two gradients a step, and three of the criterion. rho
    is in the units of SAM's; what was read of the paper names none.

    The loss must be a criterion of outputs, as that of `samfn.supervised(model, criterion)`
    is; penalties on weights, as of `l2_regularized`, are derived at w + e. With dropout
    put `same_randomness` around it, or outputs and Jacobian are of two masks.

    Args:
        direction: d from g; `preconditioned()` is the paper's other half.

    Source:
        Singh et al., 2025, arXiv:2502.02407, PMLR 267:55702; the formula as an
        encyclopedia of methods (junaidaliop.github.io/zij) gives it, since only the
        paper's abstract was at hand. No official code was found.
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if point.share < 1:
            raise ValueError("functional_sam needs all outputs: leave its ascent whole")
        clean = look(evaluate, point)
        up, memory = direction.update(tree.only(clean.grads, point.moved), memory)
        if is_number_zero(point.rho):
            return unperturbed(clean), memory
        if clean.outputs is None:
            raise ValueError(NO_CRITERION)
        there, length = move(perturb, point, up)
        moved = evaluate(there, point.buffers, point.batch, slope_at=clean.outputs)
        return Descent(moved.grads, clean, moved.loss, length), memory

    return Method(lambda params, moved: direction.init(moved), descent, gradients=2.0)


def preconditioned(decay: float = 0.999) -> Direction:
    """Climb along the gradient as Adam scales it, so that no few large entries rule.

    d = g / (sqrt(v) + 1e-8), v <- decay v + (1 - decay) g^2;  e = rho d / ||d||,
    by `sam(preconditioned())` and `functional_sam(preconditioned())`

    Adam's correction of v at the start would not turn d, and its length does not count. v
    is of the clean gradients of all steps, this one among them, where Adam's own is of
    the gradients that descend. The perturbation is rho long. v is in float32 or wider, as
    squares of gradients vanish in half precision.

    Args:
        decay: of v, in [0, 1); Adam's beta2.

    Source:
        Singh et al., 2025, arXiv:2502.02407, by its abstract: "preconditioning the SAM
        perturbation". A reimplementation by others takes v from the base optimizer and
        divides by ||g||, so that its e has another length; no official code was found.
    """
    checks.require_below_one("decay", decay)

    def update(grads: Params, memory: MethodState) -> tuple[dict[str, Tensor], MethodState]:
        up = tree.wide(grads)
        squares = tree.scale(tree.multiply(up, up), 1 - decay)
        square = tree.add(tree.scale(memory["square"], decay), squares)
        inverse = {name: (v.sqrt() + EPS).reciprocal() for name, v in square.items()}
        scaled = tree.typed_as(grads, tree.multiply(inverse, up))
        return scaled, {"square": square}

    return Direction(lambda moved: {"square": tree.wide(tree.zeros_like(moved))}, update)
