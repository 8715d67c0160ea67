"""How sharp a minimum is: measurements that change nothing.

For example::

    objective = samfn.Objective(loss_fn, state.buffers, batches)
    samfn.measure.sharpness.worst_case(objective, state.params, rho=0.05)

Costs are in gradient evaluations over all batches of the objective.
"""

from collections.abc import Callable
from math import exp, hypot, inf, isfinite, log, nan, pi, sqrt
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from samfn import tree
from samfn.measure.objective import GRADIENT, LOSS, PRODUCT, Objective
from samfn.perturb import rate
from samfn.support import checks
from samfn.support.collectives import placed_as
from samfn.tree import Params

Progress = Callable[[int, int], None]
"""(parts done, parts that there are at most, or 0 where that is not known)."""

PIECE = 2**22  # entries of a vector that are in float64 at a time


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


class Estimate(NamedTuple):
    """A number, and how far it may be off."""

    value: float
    error: float
    """Standard error of the value."""
    cost: float
    """In gradient evaluations over all batches."""


class Ascent(NamedTuple):
    """The worst point that was found near a state."""

    loss: float
    """L(w)."""
    increase: float
    """L(w + e) - L(w), the largest that was seen; at least 0, or NaN if one was."""
    perturbation: dict[str, Tensor]
    """e, where that was seen."""
    cost: float
    """In gradient evaluations over all batches."""


def worst_case(
    objective: Objective,
    params: Params,
    *,
    rho: float,
    steps: int = 1,
    metric: Params | None = None,
    progress: Progress = no_progress,
) -> Ascent:
    """Look for the largest increase of the loss within `rho`.

    max over ||T^-1 e|| <= rho of L(w + e) - L(w), by projected gradient ascent

    With one step this is the sharpness that SAM lowers, rho along the gradient. Further
    steps go rho along the gradient where they stand and back into the ball; they find
    more where the loss is not linear, and a lower bound of the maximum in any case.

    Args:
        objective: L.
        params: w.
        rho: radius, in units of w; of T^-1 w with a metric.
        steps: gradients that are followed.
        metric: T, names and shapes of `params`, as `samfn.adaptive_metric` gives for
            adaptive sharpness. None is 1.
        progress: is called after every step.

    Returns:
        The worst point of all that were visited. It costs `steps` gradients and a third.

    Raises:
        ValueError: `rho` is negative, `steps` below 1, or the metric's names differ.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 2; adaptive as Kwon et al., 2021,
        arXiv:2102.11600, section 3; the ascent of Madry et al., 2018, arXiv:1706.06083.
    """
    checks.require_dial("rho", rho)
    checks.require_count("steps", steps)
    start, grads = objective.gradient(params)
    place, best = tree.zeros_like(params), (start, tree.zeros_like(params))
    for done in range(1, steps + 1):
        up = _in(metric, grads)
        place = _project(tree.add_scaled(place, rate(tree.norm(up), rho), up), rho)
        shift = _in(metric, place)
        there = tree.add(params, shift)
        if done < steps:
            loss, grads = objective.gradient(there)
        else:
            loss = objective.loss(there)
        best = max(best, (loss, shift), key=lambda found: float(found[0].nan_to_num(inf)))
        progress(done, steps)
    return Ascent(float(start), float(best[0] - start), best[1], steps + LOSS)


def m_sharpness(
    objective: Objective,
    params: Params,
    *,
    m: int,
    rho: float,
    steps: int = 1,
    metric: Params | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Average the worst increase of the loss over groups of `m` examples.

    mean over groups S of m examples of max over ||T^-1 e|| <= rho of L_S(w + e) - L_S(w)

    Each group has a perturbation of its own, as each device has in the original SAM. The
    smaller m, the larger the value.

    Args:
        objective: L, whose batches are cut into groups in their order; what is left of a
            batch counts as much as it has examples.
        params: w.
        m: examples in a group; at DTensors, those of each rank in it.
        rho: radius, as for `worst_case`.
        steps: as for `worst_case`.
        metric: as for `worst_case`.
        progress: is called after every batch.

    Returns:
        The mean, and its standard error over the groups. It costs what `worst_case` does.

    Source:
        Foret et al., 2021, arXiv:2010.01412, section 4.1.
    """
    checks.require_count("m", m)
    found, sizes = [], []
    for done, batch in enumerate(objective.each(), 1):
        for group in batch.groups(m):
            seen = worst_case(group, params, rho=rho, steps=steps, metric=metric)
            found.append(seen.increase)
            sizes.append(group.examples(params))
        progress(done, objective.number)
    return _mean(found, sizes, cost=steps + LOSS)


def average_case(
    objective: Objective,
    params: Params,
    *,
    rho: float,
    samples: int = 10,
    generator: Generator | None = None,
    metric: Params | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Average the increase of the loss over random perturbations of length `rho`.

    E L(w + e) - L(w), e = rho T z / ||z||, z of independent normal entries

    Args:
        objective: L.
        params: w.
        rho: length, in units of w; of T^-1 w with a metric.
        samples: perturbations, at least 2.
        generator: of z, on any device. None is PyTorch's own.
        metric: T, as for `worst_case`.
        progress: is called after every perturbation.

    Returns:
        The mean, and its standard error over the perturbations; the batches are the same
        for all. It costs a third of a gradient for each, and one more third.
    """
    checks.require_dial("rho", rho)
    checks.require_count("samples", samples, least=2)
    clean, found = objective.loss(params), []
    for done in range(1, samples + 1):
        noise = _normal(params, generator)
        shift = tree.scale(_in(metric, noise), rate(tree.norm(noise), rho))
        found.append(float(objective.loss(tree.add(params, shift)) - clean))
        progress(done, samples)
    return _mean(found, cost=(samples + 1) * LOSS)


class Eigenvalues(NamedTuple):
    """The largest eigenvalues of a Hessian."""

    values: list[float]
    """Largest first."""
    errors: list[float]
    """||H v - value v|| for each: an eigenvalue is at most so far from the value. This is
    certain, but for the rounding of H v in the dtype of the parameters, and says nothing of
    others that are larger."""
    highest: float
    """The largest eigenvalue is at least values[0], and at most this with a probability of
    1 - MISSED over the first vector."""
    cost: float
    """In gradient evaluations over all batches."""


MISSED = 1e-4
"""Probability that the largest eigenvalue is above what is said of it, at most."""


def hessian_eigenvalues(
    objective: Objective,
    params: Params,
    *,
    count: int = 1,
    iterations: int = 50,
    tolerance: float = 1e-2,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> Eigenvalues:
    """Find the largest eigenvalues of the Hessian of the loss (Lanczos).

    H v = value v, H the matrix of second derivatives of L at w, all parameters together

    An eigenvector that the first vector is all but orthogonal to comes late, and a smaller
    eigenvalue can have settled before. After k iterations, the next vector is p(H) times
    the first, p(x) = prod (x - value_j) / prod beta_j over the k values of the tridiagonal
    matrix with beta_j beside its diagonal. Both vectors have length 1, so the first has a
    part `|c| <= 1 / |p(x)|` along the eigenvector of any eigenvalue x. The probability that
    `|c|` is below sqrt(pi / (2 n)) MISSED, for n parameters, is at most MISSED. Where `|p|`
    is larger than the inverse of that, an eigenvalue is therefore unlikely.

    Args:
        objective: L; its loss function must be twice differentiable.
        params: w; no DTensors.
        count: eigenvalues.
        iterations: at most; each holds one more vector as large as the parameters.
        tolerance: share of the largest value. Stop when every error is at most so large,
            and any eigenvalue above the last of `count` that is farther from all values was
            missed with a probability of `MISSED` at most.
        generator: of the first vector, on any device. None is PyTorch's own.
        progress: is called after every iteration.

    Returns:
        Fewer than `count` values where no more directions are curved, or there are fewer
        parameters. An eigenvalue of several directions is there once. Where `iterations`
        were too few, `errors` and `highest` say how far values may be off. Where a product
        with H is not finite, all are NaN. It costs three gradients an iteration.

    Raises:
        TypeError: `params` are DTensors.
        ValueError: `count` is above `iterations`; `params` have no entries, or are not
            floating point.

    Source:
        Golub and Van Loan, 2013, Matrix Computations, section 10.1, with full
        reorthogonalisation; for networks Ghorbani et al., 2019, arXiv:1901.10159. The bound
        by p: van Dorsselaer, Hochstenbach and van der Vorst, 2000, SIAM Journal on Matrix
        Analysis and Applications 22(3). One that is known beforehand: after k iterations,
        the largest value is short of the largest eigenvalue by more than a share s of the
        spectrum's width with probability at most 1.648 sqrt(n) exp(-(2 k - 1) sqrt(s))
        (Kuczynski and Wozniakowski, 1992, the same journal, 13(4)).
    """
    checks.require_tensors("params", params)
    checks.require_count("count", count)
    checks.require_count("iterations", iterations, least=count)
    size = sum(w.numel() for w in params.values())
    if not size:
        raise ValueError(f"params must have entries, got {len(params)} tensors without any")
    iterations = min(iterations, size)
    least = -log(sqrt(pi / 2 / size) * MISSED)
    basis = [_unit(_flat(_normal(params, generator)))]
    diagonal: list[float] = []
    beside: list[float] = []
    for done in range(1, iterations + 1):
        product = _flat(objective.product(params, _shaped(basis[-1], params)))
        diagonal.append(float(_dot(product, basis[-1])))
        if not isfinite(diagonal[-1]):
            unknown = [nan] * count
            return Eigenvalues(unknown, unknown, nan, done * PRODUCT)
        rest = _without(basis, product)
        values, vectors = _tridiagonal(diagonal, beside)
        beside.append(float(_length(rest)))
        errors = beside[-1] * vectors[-1].abs()
        progress(done, iterations)
        near = tolerance * float(values[0].abs())
        settled = done >= count and bool((errors[:count] <= near).all())
        ended = beside[-1] <= torch.finfo(product.dtype).eps * float(values.abs().max())
        if ended or done == iterations:
            break
        if settled and _would_be_seen(_gaps(values, near, count), values, beside, least):
            break
        basis.append(rest / beside[-1])
    highest = float(values[0]) if ended else _highest(values, beside, least)
    found = values[:count].tolist(), errors[:count].tolist()
    return Eigenvalues(*found, highest, done * PRODUCT)


def hessian_trace(
    objective: Objective,
    params: Params,
    *,
    probes: int = 10,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Estimate the trace of the Hessian of the loss, the sum of its eigenvalues.

    tr H = E z . H z, z of independent entries -1 and 1

    Args:
        objective: L; its loss function must be twice differentiable.
        params: w.
        probes: how many z, at least 2.
        generator: of z, on any device. None is PyTorch's own.
        progress: is called after every probe.

    Returns:
        The mean, and its standard error over the probes. It costs three gradients each.

    Source:
        Hutchinson, 1990, Communications in Statistics 19(2).
    """
    checks.require_count("probes", probes, least=2)
    found = []
    for done in range(1, probes + 1):
        signs = {name: _sign(z) for name, z in _normal(params, generator).items()}
        found.append(float(tree.dot(signs, objective.product(params, signs))))
        progress(done, probes)
    return _mean(found, cost=probes * PRODUCT)


class Noise(NamedTuple):
    """How much the gradient of a few examples differs from that of all."""

    variance: Estimate
    """tr Cov(g), g the gradient of one example."""
    square: Estimate
    """||grad L||^2, without what the noise adds to that of a finite sample."""
    scale: float
    """variance / square: examples in a batch whose noise is as large as the gradient."""


def gradient_noise(
    objective: Objective, params: Params, *, progress: Progress = no_progress
) -> Noise:
    """Measure the noise of the gradient of a batch, and what batch size it calls for.

    tr Cov(g) = B sum over K batches of ||g_k - mean g||^2 / (K - 1), batches of B examples

    Args:
        objective: L, of two batches at least, drawn at random. Those of another length
            than the first are left out.
        params: w.
        progress: is called after every batch.

    Returns:
        Both estimates are unbiased. It costs two gradients, to hold no more than one.

    Raises:
        ValueError: there are fewer than two batches of one length.

    Source:
        McCandlish et al., 2018, arXiv:1812.06162, section 2.2 and appendix A.1.
    """
    mean, count, size = _mean_gradient(objective, params)
    length = float(tree.norm(mean)) ** 2
    apart, along = [], []
    for batch in objective.each():
        if batch.examples(params) == size:
            grads = batch.gradient(params)[1]
            apart.append(float(tree.norm(tree.subtract(grads, mean))) ** 2)
            along.append(float(tree.dot(grads, mean)))
            progress(len(apart), count)
    cost = 2 * GRADIENT
    scale = size * count / (count - 1)
    variance = _mean([scale * square for square in apart], cost=cost)
    # The mean of `count` batches has their noise in its square, divided by `count`.
    square = length - variance.value / (size * count)
    errors = 2 * _mean(along).error, variance.error / (size * count)
    return Noise(variance, Estimate(square, hypot(*errors), cost), variance.value / square)


def _mean_gradient(
    objective: Objective, params: Params
) -> tuple[dict[str, Tensor], int, int]:
    """Return the mean gradient of batches that are as long as the first, with counts."""
    total: dict[str, Tensor] = {}
    size = count = 0
    for batch in objective.each():
        size = size or batch.examples(params)
        if batch.examples(params) == size:
            grads = batch.gradient(params)[1]
            total = tree.add(total, grads) if total else grads
            count += 1
    if count < 2:
        raise ValueError(f"expected two batches or more of one length, got {count}")
    return tree.scale(total, 1 / count), count, size


def _in(metric: Params | None, leaves: Params) -> dict[str, Tensor]:
    """Return T v."""
    if metric is None:
        return dict(leaves)
    checks.require_same_layout(leaves, metric, names="params and metric")
    return tree.multiply(metric, leaves)


def _project(place: Params, rho: float) -> dict[str, Tensor]:
    """Return the nearest point of the ball around 0."""
    return tree.scale(place, rate(tree.norm(place), rho).clamp(max=1.0))


def _normal(params: Params, generator: Generator | None) -> dict[str, Tensor]:
    """Draw normal entries where the generator is, so that its device decides on them."""
    if whole := [name for name, w in params.items() if not w.is_floating_point()]:
        raise ValueError(
            f"params must be floating point, {checks.some(whole)} are not: leave them among"
            " the buffers"
        )
    where = generator.device if generator is not None else None
    return {
        name: placed_as(
            torch.randn(
                w.shape, generator=generator, device=where or w.device, dtype=w.dtype
            ).to(w.device),
            w,
        )
        for name, w in params.items()
    }


def _mean(
    values: list[float], weights: list[int] | None = None, cost: float = 0.0
) -> Estimate:
    """Return the weighted mean of independent values and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    shares = torch.tensor(weights or [1] * len(values), dtype=torch.float64)
    shares = shares / shares.sum()
    mean = shares @ found
    spread = (
        (shares * (found - mean)).square().sum() * len(values) / max(1, len(values) - 1)
    )
    error = float(spread.sqrt()) if len(values) > 1 else float("nan")
    return Estimate(float(mean), error, cost)


def _sign(noise: Tensor) -> Tensor:
    return 1 - 2 * (noise < 0).to(noise.dtype)  # Never 0, unlike torch.sign.


def _flat(leaves: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves.values()])


def _shaped(vector: Tensor, like: Params) -> dict[str, Tensor]:
    parts = torch.split(vector, [w.numel() for w in like.values()])
    return {
        name: part.view(w.shape).to(w.dtype)
        for (name, w), part in zip(like.items(), parts, strict=True)
    }


def _unit(vector: Tensor) -> Tensor:
    return vector / _length(vector)


def _length(vector: Tensor) -> Tensor:
    # In float32, squares of curvatures below 1e-23 are 0, and above 1e19 infinite.
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return an inner product in float64, in pieces, whose copies need little memory."""
    pairs = zip(torch.split(left, PIECE), torch.split(right, PIECE), strict=True)
    # `@` goes by autocast.
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in pairs]).sum()


def _without(basis: list[Tensor], vector: Tensor) -> Tensor:
    """Return the part of a vector that is orthogonal to the basis."""
    for _ in range(2):  # Once leaves what rounding put back.
        for known in basis:
            vector = vector - _dot(known, vector) * known
    return vector


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors of a symmetric matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for row, value in enumerate(beside[: len(diagonal) - 1]):
        matrix[row, row + 1] = matrix[row + 1, row] = value
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _gaps(values: Tensor, near: float, count: int) -> Tensor:
    """Return where the parts end, above values[count - 1], that are near to no value."""
    edges = torch.cat([values[:count] + near, values[: count - 1] - near])
    apart = (edges[:, None] - values).abs() >= near * (1 - 1e-9)
    return edges[apart.all(1)]


def _would_be_seen(
    points: Tensor, values: Tensor, beside: list[float], least: float
) -> bool:
    """Return whether |p| is at least exp(least) at each of some points.

    Between two neighbouring values, log |p| is concave: least at the ends of any part.
    """
    sizes = (points[:, None] - values).abs().log().sum(1) - sum(map(log, beside))
    return bool((sizes >= least).all())


def _highest(values: Tensor, beside: list[float], least: float) -> float:
    """Return the point above all values from which on |p| is at least exp(least)."""
    # There the distance to the largest value alone, to the power of the degree, suffices.
    low, high = 0.0, exp((least + sum(map(log, beside))) / len(beside))
    for _ in range(60):
        middle = (low + high) / 2
        if _would_be_seen(values[:1] + middle, values, beside, least):
            high = middle
        else:
            low = middle
    return float(values[0]) + high
