"""Measures of how sharp a minimum is, what each costs, and how it is called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import samfn
from recipes.roles import ABOVE_0, Range, Rule, at_least, setting
from recipes.study.runs import Inspection, Solution
from recipes.train.batches import eval_batch
from recipes.train.build import generator
from samfn.measure import sharpness
from samfn.measure.curvature import NotTwiceDifferentiableError
from samfn.measure.objective import GRADIENT, LOSS, PRODUCT, Objective
from samfn.tree import Params

BATCHES = 4  # fewer would not show how far the variance among them is off
Advance = Callable[[float], None]
"""Is told how many more gradients were spent."""


@dataclass(frozen=True, kw_only=True)
class Measuring(Inspection):
    """Measures of sharpness, and how thoroughly each is taken."""

    rho: float = setting(0.05, ABOVE_0)
    """Radius of the ball in which the loss rises, in units of the weights."""
    adaptive_rho: float = setting(0.5, ABOVE_0)
    """Radius of ASAM's ball, in which each weight is measured by its own size."""
    sigma: float = setting(0.01, ABOVE_0)
    """Standard deviation of a weight in random perturbations."""
    steps: int = setting(10, at_least(1))
    """Gradients that the thorough search follows, beside the one step that SAM takes."""
    m: int = setting(128, at_least(1))
    """Examples in a group of m-sharpness, and in the gradients whose noise is measured."""
    probes: int = setting(10, Range(lambda n: n == 0 or n >= 2, "0, or at least 2"))
    """Random perturbations of the average case, and random vectors of the trace; 0 leaves
    both out."""
    eigenvalues: int = setting(1, Range(lambda n: 0 <= n <= 1000, "0 to 1000"))
    """Number of the Hessian's largest eigenvalues; 0 leaves them out."""
    iterations: int = 30
    """Products with the Hessian that the eigenvalues may take."""

    def relations(self) -> Iterator[Rule]:
        """Yield what holds of several values together."""
        enough = self.iterations >= max(1, self.eigenvalues)
        yield "iterations", enough, "at least 1, and --eigenvalues"


class Number(NamedTuple):
    """One of the numbers that are measured."""

    value: float
    error: float | None
    """Standard error, or the bound of an eigenvalue's error; None is not known."""
    cost: float
    """In gradients over all images."""


def costs(settings: Measuring) -> dict[str, float]:
    """Return what each measurement costs at most, in gradients over all images."""
    steps, probes = settings.steps, settings.probes
    found = {
        "worst_case": GRADIENT + LOSS,
        "worst_case_steps": (steps * GRADIENT + LOSS) * (steps > 1),
        "adaptive": steps * GRADIENT + LOSS,
        "m_sharpness": GRADIENT + LOSS,
        "average_case": (probes + 1) * LOSS * (probes > 0),
        "eigenvalues": settings.iterations * PRODUCT * (settings.eigenvalues > 0),
        "trace": probes * PRODUCT,
        "noise": 2 * GRADIENT * (settings.images >= BATCHES * settings.m),
    }
    return {name: cost for name, cost in found.items() if cost}


def numbers_of(
    solution: Solution,
    settings: Measuring,
    advance: Advance,
    leave_out: Callable[[str, str], None],
) -> dict[str, Number]:
    """Measure what is around a solution.

    Args:
        solution: what a run has learned.
        settings: what is measured.
        advance: is told what was spent.
        leave_out: is told of a measure that this network does not have, and why.
    """
    found: dict[str, Number] = {}
    for name, cost in costs(settings).items():
        with spending(cost, advance) as told:
            try:
                found |= MEASURES[name](solution, settings, told)
            except NotTwiceDifferentiableError as error:
                leave_out(name, str(error))
    return found


@contextmanager
def spending(cost: float, advance: Advance) -> Iterator[sharpness.Progress]:
    """Yield what is told of parts done; at the end all of the cost counts as spent."""
    spent = 0.0

    def told(done: int, total: int) -> None:
        nonlocal spent
        advance(cost * done / total - spent)
        spent = cost * done / total

    yield told
    advance(cost - spent)


def objective(solution: Solution, size: int) -> Objective:
    """Return the mean loss over the images, computed in batches of a size."""
    return Objective(solution.loss_fn, solution.buffers, solution.batches(size))


def climbed(
    solution: Solution,
    rho: float,
    steps: int,
    told: sharpness.Progress,
    metric: Params | None = None,
) -> sharpness.Ascent:
    """Return the worst point within a radius."""
    # A batch of this size had the memory for a backward pass when the run was trained.
    return sharpness.worst_case(
        objective(solution, solution.config.batch_size),
        solution.params,
        rho=rho,
        steps=steps,
        metric=metric,
        progress=told,
    )


def worst_case(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the loss, and its rise by the one step that SAM takes."""
    found = climbed(solution, settings.rho, 1, told)
    return {
        "loss": Number(found.loss, None, 0.0),  # The ascent begins with it.
        "worst_case": Number(found.increase, None, found.cost),
    }


def worst_case_steps(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the largest rise of the loss that several steps find."""
    found = climbed(solution, settings.rho, settings.steps, told)
    return {"worst_case_steps": Number(found.increase, None, found.cost)}


def adaptive(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the same where each weight moves by its own size."""
    metric = samfn.adaptive_metric(solution.params)
    found = climbed(solution, settings.adaptive_rho, settings.steps, told, metric)
    return {"adaptive": Number(found.increase, None, found.cost)}


def m_sharpness(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the mean rise over groups of images, each with a step of its own."""
    m = settings.m  # Batches of this size are cut into no smaller rests.
    found = sharpness.m_sharpness(
        objective(solution, m), solution.params, m=m, rho=settings.rho, progress=told
    )
    return {"m_sharpness": Number(*found)}


def average_case(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the mean rise in random directions, all as long as such noise is."""
    weights = sum(w.numel() for w in solution.params.values())
    found = sharpness.average_case(
        objective(solution, eval_batch(solution.images)),
        solution.params,
        rho=settings.sigma * weights**0.5,
        samples=settings.probes,
        generator=generator(settings.seed, "average case"),
        progress=told,
    )
    return {"average_case": Number(*found)}


def curved(solution: Solution) -> Objective:
    """Return the mean loss, for products with its Hessian."""
    # One takes the memory of three gradients: 2.9 times, measured on a Wide ResNet.
    return objective(solution, max(1, solution.config.batch_size // 3))


def eigenvalues(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the largest eigenvalues of the Hessian; the first bears the cost of all.

    The error of the first covers how far above it the largest one may be, too.
    """
    found = sharpness.hessian_eigenvalues(
        curved(solution),
        solution.params,
        count=settings.eigenvalues,
        iterations=settings.iterations,
        generator=generator(settings.seed, "eigenvalues"),
        progress=told,
    )
    errors = [max(found.errors[0], found.highest - found.values[0]), *found.errors[1:]]
    pairs = enumerate(zip(found.values, errors, strict=True), 1)
    return {
        f"eigenvalue_{i}": Number(*pair, found.cost if i == 1 else 0.0) for i, pair in pairs
    }


def trace(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the trace of the Hessian."""
    found = sharpness.hessian_trace(
        curved(solution),
        solution.params,
        probes=settings.probes,
        generator=generator(settings.seed, "trace"),
        progress=told,
    )
    return {"trace": Number(*found)}


def noise(
    solution: Solution, settings: Measuring, told: sharpness.Progress
) -> dict[str, Number]:
    """Return the variance of one image's gradient, if there are batches to see it by."""
    if len(solution.labels) < BATCHES * settings.m:
        return {}
    found = sharpness.gradient_noise(
        objective(solution, settings.m), solution.params, progress=told
    )
    return {"noise": Number(*found.variance)}


Measure = Callable[[Solution, Measuring, sharpness.Progress], dict[str, Number]]
MEASURES: dict[str, Measure] = {
    "worst_case": worst_case,
    "worst_case_steps": worst_case_steps,
    "adaptive": adaptive,
    "m_sharpness": m_sharpness,
    "average_case": average_case,
    "eigenvalues": eigenvalues,
    "trace": trace,
    "noise": noise,
}


def columns(settings: Measuring) -> dict[str, str]:
    """Return what each number is called in tables."""
    found = {
        "loss": "loss",
        "worst_case": "worst, 1 step",
        "worst_case_steps": f"worst, {settings.steps} steps",
        "adaptive": "adaptive",
        "m_sharpness": f"m = {settings.m}",
        "average_case": "random",
        **{f"eigenvalue_{i}": f"λ{i}" for i in range(1, settings.eigenvalues + 1)},
        "trace": "trace",
        "noise": "noise",
    }
    measured = {"loss", *costs(settings)}
    return {
        name: text
        for name, text in found.items()
        if name in measured or name.startswith("eigenvalue_")
    }


def legend(settings: Measuring) -> dict[str, str]:
    """Return what the columns of the table mean."""
    texts = {
        "worst_case": f"largest rise of the loss within ρ {settings.rho:g}, by the step"
        f" that SAM takes{f' and by {settings.steps}' * (settings.steps > 1)}",
        "adaptive": f"the same within ρ {settings.adaptive_rho:g}, each weight measured"
        f" by its size; {settings.steps} steps",
        "m_sharpness": f"mean rise over groups of {settings.m} images, a step for each",
        "average_case": f"mean rise by noise of {settings.sigma:g} on each weight",
        "eigenvalues": "largest eigenvalues of the Hessian",
        "trace": "trace of the Hessian",
        "noise": "variance of the gradient of one image",
    }
    names = {"worst_case": "worst", "m_sharpness": f"m = {settings.m}"}
    names |= {"average_case": "random", "eigenvalues": "λ"}
    found = {names.get(n, n): text for n, text in texts.items() if n in costs(settings)}
    return found | {"±": "standard error; of λ a bound, λ1's with probability 0.9999"}
