"""The ascent half of SAM: from the weights to the worst point nearby.

Each metric measures the ball ||T^-1 e|| <= rho with its own T, and the point of the
ball that a linear loss makes worst is w + rho T^2 g / ||T g||; that of `perturb_spectral`
measures matrices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samfn import tree
from samfn.support import checks
from samfn.support.collectives import placed_as
from samfn.support.orthogonal import MUON, TAYLOR, as_matrix, newton_schulz
from samfn.tree import Params

Adapts = Callable[[str, Tensor], bool]
Perturb = Callable[[Params, Params, "float | Tensor"], dict[str, Tensor]]


def perturb(params: Params, grads: Params, rho: float | Tensor) -> dict[str, Tensor]:
    """Move the weights by the distance `rho` in the direction of steepest ascent.

    w + rho g / ||g||, with one norm over all tensors together

    Args:
        params: w. Floating point, any shapes.
        grads: g, the gradient of the loss at w; names and shapes of `params`.
        rho: radius of the ball, in units of w; at least 0. A number, or a 0-d tensor,
            whose value may change from call to call without recompiling.

    Returns:
        The perturbed weights; names, shapes and dtypes of `params`. A zero gradient
        gives back w exactly.

    Raises:
        ValueError: names, shapes, dtypes or devices differ, the mappings are empty, or
            `rho` is a negative number.

    Source:
        Foret et al., 2021, arXiv:2010.01412, equation 2 with p = 2. Implementations add
        a small number to the norm, and so fall short of rho where the gradient is small:
        most 1e-12, SamsungLabs 1e-16, VaSSO and ESAM 1e-7, which is 9 % at a norm of 1e-6.
        Here the length is rho, or 0 where the norm cannot be told from 0 or infinity: in
        float32 below 1e-15 or above 1e19, as its square is summed there.
    """
    rho = _checked(params, grads, rho)
    return tree.add_scaled(params, rate(tree.norm(grads), rho), grads)


def perturb_adaptive(
    params: Params,
    grads: Params,
    rho: float | Tensor,
    eta: float = 0.01,
    *,
    adapts: Adapts | None = None,
) -> dict[str, Tensor]:
    """Move the weights by `rho`, each in proportion to its own size (ASAM).

    w + rho T^2 g / ||T g||, T = |w| + eta where `adapts` holds, else 1

    Args:
        params: w. Floating point, any shapes.
        grads: g, the gradient of the loss at w; names and shapes of `params`.
        rho: radius of the ball, in units of T^-1 w, hence about 10 times that of SAM.
        eta: smallest T, in units of w; at least 0.
        adapts: of a name and its tensor, whether T is `|w| + eta` there; None is
            `named_weight`, the official choice. `everything` with eta = 0 is the form
            of davda54/sam.

    Returns:
        The perturbed weights; names, shapes and dtypes of `params`. A zero gradient
        gives back w exactly.

    Raises:
        ValueError: names or shapes differ, the mappings are empty, or `rho` or `eta`
            is a negative number.

    Source:
        Kwon et al., 2021, arXiv:2102.11600, algorithm 1; the choice of names and
        eta = 0.01 from github.com/SamsungLabs/ASAM, asam.py.
    """
    rho = _checked(params, grads, rho)
    return _perturb_in(adaptive_metric(params, eta, adapts=adapts), params, grads, rho)


def adaptive_metric(
    params: Params, eta: float = 0.01, *, adapts: Adapts | None = None
) -> dict[str, Tensor]:
    """Return T of adaptive SAM, the diagonal of a matrix, as `params`.

    T = |w| + eta where `adapts` holds, else 1; see `perturb_adaptive`
    """
    _require_eta(eta)
    adapts = adapts or named_weight
    return {
        name: w.abs() + eta if adapts(name, w) else torch.ones_like(w)
        for name, w in params.items()
    }


def perturb_fisher(
    params: Params, grads: Params, rho: float | Tensor, eta: float = 1.0
) -> dict[str, Tensor]:
    """Move the weights by `rho` in the metric of the Fisher information (Fisher SAM).

    w + rho F^-1 g / sqrt(g . F^-1 g), F = 1 + eta g^2, the diagonal, from one batch

    Args:
        params: w. Floating point, any shapes.
        grads: g, the gradient of the loss at w; names and shapes of `params`.
        rho: radius of the ball ||F^(1/2) e|| <= rho, in units of w.
        eta: weight of the Fisher information, in units of g^-2; at least 0. With 0 this
            is `perturb`.

    Returns:
        The perturbed weights; names, shapes and dtypes of `params`. A zero gradient
        gives back w exactly.

    Raises:
        ValueError: names or shapes differ, the mappings are empty, or `rho` or `eta`
            is a negative number.

    Source:
        Kim et al., 2022, arXiv:2206.04920.
    """
    rho = _checked(params, grads, rho)
    _require_eta(eta)
    squares = {name: g.square() for name, g in tree.wide(grads).items()}
    metric = {name: (1 + eta * square).rsqrt() for name, square in squares.items()}
    return _perturb_in(metric, params, grads, rho)


def perturb_layerwise(
    params: Params, grads: Params, rho: float | Tensor
) -> dict[str, Tensor]:
    """Move each weight by `rho`, relative to its own norm (AWP).

    w_l + rho ||w_l|| g_l / ||g_l|| for each tensor of two or more dimensions; others stay

    Args:
        params: w. Floating point, any shapes.
        grads: g, the gradient of the loss at w; names and shapes of `params`.
        rho: ||e_l|| / ||w_l||, the same for each tensor that moves; at least 0.

    Returns:
        The perturbed weights; names, shapes and dtypes of `params`. A tensor whose
        gradient is 0 stays w exactly.

    Raises:
        ValueError: names, shapes, dtypes or devices differ, the mappings are empty, or
            `rho` is a negative number.

    Source:
        Wu et al., 2020, arXiv:2004.05884; github.com/csdongxian/AWP, utils_awp.py, which
        also leaves out tensors without "weight" in their names, as embeddings of places.
    """
    rho = _checked(params, grads, rho)
    grads = tree.wide(tree.only(grads, params))
    rates = rate(tree.norms(grads), rho * tree.norms(params)).unbind()
    shift = {
        name: factor.to(g.dtype) * g
        for (name, g), factor in zip(grads.items(), rates, strict=True)
    }
    moved = {name: w if w.ndim < 2 else w + shift[name] for name, w in params.items()}
    return tree.typed_as(params, moved)


def filter_noise(weight: Tensor) -> Tensor:
    """Return normal noise whose deviation is the norm of the filter that it is added to.

    z_ij ~ N(0, ||w_i||^2), w_i the filters along the first dimension; a vector is one.
    """
    inner = tuple(range(1, weight.ndim)) or None
    lengths: Tensor = torch.linalg.vector_norm(weight, 2, inner, weight.ndim > 1)
    if not tree.is_sharded(weight):
        return lengths * torch.randn_like(weight)
    drawn = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device)
    return lengths * placed_as(drawn, weight)


def perturb_spectral(
    params: Params, grads: Params, rho: float | Tensor
) -> dict[str, Tensor]:
    """Move every matrix by `rho` in the spectral norm, the geometry of Muon.

    w_l + rho U V^T, with g_l = U S V^T

    The ball is ||e_l||_2 <= rho for every l: <g_l, e_l> <= ||g_l||_* ||e_l||_2, as the
    nuclear norm is dual to the spectral one, with equality at e_l = rho U V^T; the layers
    do not share rho, so each goes to its own bound. The filters of a convolution are one
    matrix, (out, in * height * width); a vector is one of one column, whose spectral norm
    is its length: e_l = rho g_l / ||g_l||.

    Args:
        params: w. Floating point, any shapes.
        grads: g, the gradient of the loss at w; names and shapes of `params`.
        rho: largest singular value of each tensor's perturbation. Its Euclidean length is
            rho sqrt(rank), and of all together rho sqrt(sum of the ranks), so rho is to
            be that much smaller than SAM's.

    Returns:
        The perturbed weights; names, shapes and dtypes of `params`. A tensor whose
        gradient is zero stays as it is.

    Raises:
        ValueError: as for `perturb`.

    Source:
        None was found: SAM in this ball is not published. U V^T is found by eight
        Newton-Schulz steps, five with the polynomial of Muon and three that converge:
        to 1e-9, or what the dtype holds, for singular values above a thousandth of the
        Frobenius norm. What is smaller moves less, and hardly raises the loss.
    """
    rho = _checked(params, grads, rho)
    # Not by Newton-Schulz itself, whose divisor has a least value of its own.
    grads = tree.wide(grads)
    units = zip(grads, rate(tree.norms(grads), 1.0).unbind(), strict=True)
    scaled = {name: unit.to(grads[name].dtype) * grads[name] for name, unit in units}
    return tree.add_scaled(
        params, rho, {name: as_matrix(_orthogonal, g) for name, g in scaled.items()}
    )


def _orthogonal(matrix: Tensor) -> Tensor:
    # In half precision a small singular value would be rounding, raised to 1.
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return newton_schulz(matrix, [MUON] * 5 + [TAYLOR] * 3, wide)


def _perturb_in(
    metric: Params, params: Params, grads: Params, rho: float | Tensor
) -> dict[str, Tensor]:
    scaled = tree.multiply(metric, tree.wide(grads))
    direction = tree.multiply(metric, scaled)
    return tree.add_scaled(params, rate(tree.norm(scaled), rho), direction)


def named_weight(name: str, tensor: Tensor) -> bool:
    """Return whether "weight" is in the name, as official ASAM chooses."""
    return "weight" in name


def everything(name: str, tensor: Tensor) -> bool:
    """Return True: every parameter is adapted, as davda54/sam does."""
    return True


def rate(length: Tensor, rho: float | Tensor) -> Tensor:
    """Return rho / length, and 0 where the length is infinite or cannot be told from 0."""
    # Below this length the squares that it was summed from have underflowed, and
    # dividing by it would give a perturbation of any length but rho.
    smallest = 1e4 * torch.finfo(length.dtype).tiny ** 0.5
    return torch.where(length > smallest, rho / length, 0.0)


def _checked(params: Params, grads: Params, rho: float | Tensor) -> float | Tensor:
    checks.require_gradients(params, grads)
    return checks.require_radius("rho", rho)


def _require_eta(eta: float) -> None:
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
