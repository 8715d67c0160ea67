"""Loss landscapes: the loss along directions from a solution, which stays as it is.

Every point is computed from the solution anew, so nothing drifts, and no module is
written to. A direction maps names of parameters, and of buffers that are to move along,
to what is added to them at the coordinate 1; what it does not name stays.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from samfn import tree
from samfn.gradient import evaluate
from samfn.loss import LossFn, as_loss
from samfn.measure.objective import Objective
from samfn.perturb import rate
from samfn.support import checks
from samfn.support.batches import repeatable
from samfn.support.collectives import over_parts, placed_as, sum_over_parts
from samfn.training import loop
from samfn.tree import Batch, Params

Coordinates = Sequence[float] | Tensor
Told = Callable[[int, int], None]
"""Called with (points done, points in all) after every point."""


class Line(NamedTuple):
    """The loss along a direction; float64, on the CPU."""

    at: Tensor
    """Coordinates, shape (n,)."""
    loss: Tensor
    """Mean over all examples, shape (n,); infinite or NaN where it was."""
    accuracy: Tensor | None
    """In percent, shape (n,); None where outputs and targets do not tell."""


class Plane(NamedTuple):
    """The loss on the plane of two directions; float64, on the CPU."""

    at: Tensor
    """Coordinates along the first direction, shape (n,)."""
    at2: Tensor
    """Coordinates along the second direction, shape (m,)."""
    loss: Tensor
    """Mean over all examples, shape (n, m); infinite or NaN where it was."""
    accuracy: Tensor | None
    """In percent, shape (n, m); None where outputs and targets do not tell."""
    cosine: float
    """Of the angle between the two directions; NaN where one of them is zero."""


def filter_normalised(
    params: Params, generator: Generator, *, over: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Draw a random direction whose filters are as long as those of the weights.

    d_f <- d_f ||w_f|| / ||d_f|| for each filter f; d = 0 for biases and normalisation

    Two such directions are not made orthogonal: in N dimensions the cosine of their angle
    is of the order of 1 / sqrt(N), and `plane` reports it.

    Args:
        params: w. A filter is what belongs to one output, an index of the first dimension.
            Tensors of fewer than two dimensions get zero.
        generator: on the CPU. The direction is that of the same seed on every device: the
            normal entries are drawn there, name by name in sorted order.
        over: dimensions that a filter extends over; None is all but the first. (0,) is
            what ml-cvnets does, whose vectors run across the filters.

    Returns:
        d, with the names, shapes, dtypes and devices of `params`. A filter of zeros gets
        zeros.

    Raises:
        ValueError: the generator is not on the CPU.

    Source:
        Li et al., 2018, arXiv:1712.09913, section 4; what gets zero is that of their code,
        github.com/tomgoldstein/loss-landscape, net_plotter.py with "biasbn". ml-cvnets:
        loss_landscape/landscape_utils.py.
    """
    checks.require_tensors("params", params, sharded=True)
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
    drawn = {
        name: torch.randn(params[name].shape, generator=generator)
        for name in sorted(params)
        if params[name].ndim >= 2
    }
    return {
        name: _as_long_as(w, drawn[name], over) if name in drawn else torch.zeros_like(w)
        for name, w in params.items()
    }


def between(start: Params, end: Params) -> dict[str, Tensor]:
    """Return the direction from one solution to another, which lies at the coordinate 1.

    end - start, without what is not floating point, as the counters of batches

    With `params | buffers` of both solutions, the statistics of BatchNorm move along. In
    between they are interpolated like the weights, and are not what the interpolated
    weights would give, whose activations can vary far less (Jordan et al., 2022,
    arXiv:2211.08403). Outside of [0, 1] a variance can be negative, and the loss NaN. With
    `params` alone the statistics stay those of the start, also at the end.

    Raises:
        ValueError: names, shapes or dtypes differ.
    """
    checks.require_same_layout(start, end, names="start and end")
    moving = [name for name, leaf in start.items() if leaf.is_floating_point()]
    return tree.subtract(tree.only(end, moving), tree.only(start, moving))


def ascent(
    params: Params,
    buffers: Params,
    batches: Iterable[Batch] | Batch,
    *,
    loss_fn: LossFn,
) -> dict[str, Tensor]:
    """Return the direction of SAM's perturbation, of length 1.

    g / ||g||, g the gradient at w of the mean loss over all examples

    The coordinate along it is rho, and the loss there is the one that a step of SAM with
    these examples as its batch descends from.

    Args:
        params: w.
        buffers: what `loss_fn` reads beside them.
        batches: as for `line`.
        loss_fn: as for `line`.

    Returns:
        Names, shapes and dtypes of `params`; zero where the gradient is zero.

    Raises:
        TypeError, ValueError: as `line`.

    Source:
        Foret et al., 2021, arXiv:2010.01412, equation 2 with p = 2.
    """
    _require_solution(params, buffers, loss_fn)
    grads = Objective(loss_fn, buffers, batches).gradient(params)[1]
    return tree.scale(grads, rate(tree.norm(grads), 1.0))


def line(
    params: Params,
    buffers: Params,
    batches: Iterable[Batch] | Batch,
    direction: Params,
    at: Coordinates,
    *,
    loss_fn: LossFn,
    progress: Told = lambda done, total: None,
) -> Line:
    """Evaluate the loss along a direction.

    a -> mean over all examples of loss(w + a d)

    It takes one forward pass over all batches for every point, and memory for a copy of
    what moves. The state is not written to, and nothing is differentiated.

    Args:
        params: w.
        buffers: what `loss_fn` reads beside them. The statistics of BatchNorm are those
            given at every point, unless `direction` moves them.
        batches: a list or a loader, gone through at every point; a tuple, tensor or mapping
            is one batch. Tensors of a batch have one length, the number of its examples.
        direction: d, names of `params` or `buffers` with their shapes and dtypes.
        at: the coordinates a, in units of d.
        loss_fn: (params, buffers, batch) -> the mean loss of the batch, or (loss, Aux).
            With `supervised`, the mode of the model counts: `model.eval()` first.
        progress: told (points done, points in all) after every point.

    Returns:
        Coordinates, losses, and accuracies where batches are (inputs, labels), labels are
        whole numbers and outputs are scores, shape (examples, classes).

    Raises:
        TypeError: a tensor, mapping or loader is something else; `batches` can be gone
            through only once.
        ValueError: names, shapes, dtypes or devices do not fit, `at` is no list of finite
            numbers, there is no example.
    """
    points = _coordinates("at", at)
    ways = [(direction, points)]
    return Line(points, *_on_grid(params, buffers, batches, loss_fn, ways, progress))


def plane(
    params: Params,
    buffers: Params,
    batches: Iterable[Batch] | Batch,
    directions: tuple[Params, Params],
    at: Coordinates,
    at2: Coordinates,
    *,
    loss_fn: LossFn,
    progress: Told = lambda done, total: None,
) -> Plane:
    """Evaluate the loss on a grid in the plane of two directions.

    (a, b) -> mean over all examples of loss(w + a d1 + b d2)

    As `line`, with n times m points.

    Args:
        params: w.
        buffers: as for `line`.
        batches: as for `line`.
        directions: d1 and d2.
        at: the coordinates a, n of them, in units of d1.
        at2: the coordinates b, m of them, in units of d2.
        loss_fn: as for `line`.
        progress: as for `line`.

    Raises:
        TypeError, ValueError: as `line`.
    """
    rows, columns = _coordinates("at", at), _coordinates("at2", at2)
    ways = list(zip(directions, (rows, columns), strict=True))
    found = _on_grid(params, buffers, batches, loss_fn, ways, progress)
    return Plane(rows, columns, *found, _cosine(*directions))


Evaluated = tuple[Tensor, Tensor | None]
"""Loss and accuracy, one shape."""


@torch.no_grad()
def _on_grid(
    params: Params,
    buffers: Params,
    batches: Iterable[Batch] | Batch,
    loss_fn: LossFn,
    ways: Sequence[tuple[Params, Tensor]],
    progress: Told,
) -> Evaluated:
    """Evaluate wherever a coordinate of each of the ways leads, the last one fastest."""
    _require_solution(params, buffers, loss_fn)
    start, batches = {**params, **buffers}, repeatable(batches)
    directions, axes = zip(*ways, strict=True)
    for direction in directions:
        _require_direction(start, direction)
    # All that is ever written to, in place: one more copy of what moves.
    moved = {name: torch.empty_like(start[name]) for d in directions for name in d}
    here = {name: moved.get(name, leaf) for name, leaf in start.items()}
    params, buffers = tree.only(here, params), tree.only(here, buffers)
    points = list(product(*(axis.tolist() for axis in axes)))
    found = []
    for done, point in enumerate(points, 1):
        _move(moved, start, directions, point)
        found.append(_means(params, buffers, batches, loss_fn))
        progress(done, len(points))
    return _shaped(found, [len(axis) for axis in axes])


def _move(
    moved: dict[str, Tensor],
    start: Params,
    directions: Sequence[Params],
    point: Sequence[float],
) -> None:
    """Write w + a d1 + b d2 into `moved`."""
    for name, leaf in moved.items():  # torch._foreach_copy_ takes no DTensors.
        leaf.copy_(start[name])
    for direction, a in zip(directions, point, strict=True):
        leaves = [moved[name] for name in direction]
        torch._foreach_add_(leaves, list(direction.values()), alpha=a)


def _means(
    params: Params, buffers: Params, batches: Iterable[Batch], loss_fn: LossFn
) -> tuple[float, float | None]:
    """Return the mean loss of all examples, and the accuracy in percent."""
    weights, losses, right = [], [], []
    known = as_loss(loss_fn)
    weigh = over_parts(known.weigh, params)
    for batch in batches:
        seen = evaluate(loss_fn, params, buffers, batch, wrt=())
        whole = torch.ones_like(seen.loss, dtype=torch.float64)
        weights.append(whole * weigh(batch))
        losses.append(seen.loss)
        right.append(_count_right(batch, seen.outputs, known.counts(batch)))
    _require_some(len(losses))
    # Read together, so that a GPU waits once a point and not at every batch.
    means, counts = torch.stack(losses).tolist(), torch.stack(weights).tolist()
    pairs = [(mean, n) for mean, n in zip(means, counts, strict=True) if n]
    _require_some(len(pairs))
    loss = sum(mean * n for mean, n in pairs) / sum(counts)
    found = [pair for pair in right if pair is not None]
    if len(found) < len(right):
        return loss, None
    number, examples = sum_over_parts(torch.stack(found).sum(0), params).tolist()
    return loss, 100 * number / examples


def _count_right(batch: Batch, outputs: Any, counts: Tensor | None) -> Tensor | None:
    """Return how often the label has the highest score, and of how many that count.

    None if there are no scores.
    """
    match batch:
        case [_, Tensor() as labels] if _are_scores(outputs, labels):
            all_of_them = torch.ones_like(labels, dtype=torch.bool)
            counts = all_of_them if counts is None else counts
            right = loop.right(outputs, labels) & counts
            return torch.stack([right.sum(), counts.sum()])
    return None


def _are_scores(outputs: Any, labels: Tensor) -> bool:
    if not isinstance(outputs, Tensor) or labels.is_floating_point():
        return False
    return outputs.ndim == 2 and outputs.shape[1] > 1 and labels.shape == outputs.shape[:1]


def _shaped(found: list[tuple[float, float | None]], shape: list[int]) -> Evaluated:
    losses, accuracies = zip(*found, strict=True)
    loss = torch.tensor(losses, dtype=torch.float64).view(shape)
    if None in accuracies:
        return loss, None
    return loss, torch.tensor(accuracies, dtype=torch.float64).view(shape)


def _as_long_as(w: Tensor, drawn: Tensor, over: Sequence[int] | None) -> Tensor:
    """Return what was drawn with the lengths of w, on its device, in its layout."""
    wide = torch.promote_types(w.dtype, torch.float32)
    drawn = torch.empty_like(w, dtype=wide).copy_(placed_as(drawn, w))
    dims = tuple(over or range(1, w.ndim))
    length, wanted = (
        torch.linalg.vector_norm(leaf, dim=dims, keepdim=True, dtype=wide)
        for leaf in (drawn, w)
    )
    return (drawn * rate(length, wanted)).to(w.dtype)


def _cosine(first: Params, second: Params) -> float:
    shared = [name for name in first if name in second]
    if not shared:
        return 0.0
    inner = tree.dot(tree.only(first, shared), tree.only(second, shared))
    return float(inner / (tree.norm(first) * tree.norm(second)))


def _coordinates(name: str, values: Coordinates) -> Tensor:
    points = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if points.ndim != 1 or not len(points) or not points.isfinite().all():
        raise ValueError(f"{name} must be a list of finite numbers, got {values}")
    return points


def _require_solution(params: Params, buffers: Params, loss_fn: LossFn) -> None:
    checks.require_trainable(params, buffers)
    checks.require_apart(params, buffers)
    as_loss(loss_fn).check(params, buffers)


def _require_direction(start: Params, direction: Params) -> None:
    checks.require_tensors("a direction", direction, sharded=True)
    if not direction or direction.keys() - start.keys():
        unknown = sorted(direction.keys() - start.keys())
        raise ValueError(f"a direction must name params or buffers, got {unknown}")
    if whole := [n for n, leaf in direction.items() if not leaf.is_floating_point()]:
        raise ValueError(f"only what is floating point can move, not {whole}")
    names = "the solution and a direction"
    checks.require_gradients(tree.only(start, direction), direction, names=names)


def _require_some(examples: int) -> None:
    if not examples:
        raise ValueError("expected an example that counts in the loss, got none")
