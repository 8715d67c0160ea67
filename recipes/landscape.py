"""Draw the loss around what runs have learned, on one scale.

    python -m recipes.landscape runs/SGD runs/SAM
    python -m recipes.landscape runs/SAM --points 41 --span 0.5     # finer, and closer by
    python -m recipes.landscape runs/*/checkpoints/step_000001000.safetensors

The loss is cross-entropy in float32, without augmentation, label smoothing or dropout, and
with the statistics of BatchNorm that training ended with. Two random directions have
filters as long as those of the weights; of one seed, they are the same for runs of one
network but for these lengths.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes import errors, plots
from recipes.roles import ABOVE_0, Range, setting
from recipes.settings.config import plain_values
from recipes.settings.saved import run_of
from recipes.study.report import called
from recipes.study.runs import (
    Inspection,
    Solution,
    among,
    make_directory,
    make_way,
    named,
    read,
    real,
    validate,
    write_json,
)
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.train.batches import eval_batch
from recipes.train.build import generator
from samfn.measure import landscape
from samfn.measure.landscape import Line, Plane, Told

PROGRAM = "python -m recipes.landscape"
DATA, SURFACES, LINES = "landscape.json", "surfaces.png", "lines.png"
ODD = Range(lambda n: n % 2 == 1 and 5 <= n < 1000, "an odd number from 5 to 999")


@dataclass(frozen=True, kw_only=True)
class Settings(Inspection):
    """Draw the loss around what runs have learned, side by side and on one scale."""

    points: int = setting(15, ODD)
    """Points of each axis; odd, so that one of them is the solution. A surface has points
    times points of them, a line almost 2 times points; each is a pass over the images."""
    span: float = setting(1.0, ABOVE_0)
    """Largest coordinate along each of the random directions, in norms of a filter."""
    rho: float = setting(0.5, ABOVE_0)
    """Largest distance along SAM's perturbation, in units of the weights."""
    output: Path | None = None
    """Directory of pictures and data, in place of those of another call. None is landscape,
    beside the first run."""


class Explored(NamedTuple):
    """The loss around a solution."""

    solution: Solution
    plane: Plane
    """In random directions, filter-normalised."""
    ascent: Line
    """Along SAM's perturbation, by rho."""
    rise: float
    """Mean loss within half of the span in the plane, minus that of the solution."""


def main(args: Sequence[str] | None = None) -> int:
    """Draw; return the exit code."""
    given = sys.argv[1:] if args is None else args
    return cli.run(
        lambda display, _: draw(
            cli.parsed(Settings, prog=PROGRAM, args=given), called(PROGRAM, given), display
        ),
        left="nothing was written",
    )


def draw(settings: Settings, command: str, display: Display) -> int:
    """Evaluate, write data and pictures, and say what they show."""
    settings = replace(settings, runs=among(settings.runs, display))
    validate(settings)
    solutions = named([read(path, settings, display) for path in settings.runs])
    output = settings.output or real(run_of(settings.runs[0])).parent / "landscape"
    make_directory(output)
    explored, way = explore(solutions, settings, display)
    try:
        make_way(output, [DATA, SURFACES, LINES], PROGRAM, display.warn)
        write(output / DATA, command, settings, explored, way)
        draw_surfaces(output / SURFACES, settings, explored)
        draw_lines(output / LINES, settings, explored, way)
    except OSError as error:
        display.fail(f"cannot write {output}: {error}")
        return errors.NOT_WRITTEN
    display.facts("loss landscape", summarise(settings, explored, output))
    return 0


def explore(
    solutions: Sequence[Solution], settings: Settings, display: Display
) -> tuple[list[Explored], Line | None]:
    """Evaluate the loss around each solution, and between two of one network."""
    pair = solutions if len(solutions) == 2 and same_task(*solutions) else ()
    if len(solutions) == 2 and not pair:
        display.say("no line between the two: their networks, images or labels differ")
    along = len(on_a_line(settings))
    points = len(solutions) * (settings.points**2 + along) + along * bool(pair)
    count = len(solutions[0].labels)
    display.say(f"evaluating {points:,} points, each on {count:,} {settings.kind} images")
    started = time.perf_counter()
    with display.counting(points, "evaluating") as advance:

        def told(done: int, total: int) -> None:
            advance()

        explored = [around(solution, settings, told) for solution in solutions]
        way = between(pair[0], pair[1], settings, told) if pair else None
    display.say(f"evaluating took {time.perf_counter() - started:.1f} s")
    return explored, way


def around(solution: Solution, settings: Settings, told: Told) -> Explored:
    """Evaluate the loss around a solution."""
    given = solution.params, solution.buffers
    loss_fn = solution.loss_fn
    batches = solution.batches(eval_batch(solution.images))
    # A backward pass takes memory; batches of this size had it when the run was trained.
    small = solution.batches(solution.config.batch_size)
    source = generator(settings.seed, "directions")
    first, second = (landscape.filter_normalised(given[0], source) for _ in range(2))
    half = settings.points // 2
    at = settings.span * torch.arange(-half, half + 1).double() / half  # 0 is 0
    rhos = settings.rho * on_a_line(settings)
    plane = landscape.plane(
        *given, batches, (first, second), at, at, loss_fn=loss_fn, progress=told
    )
    uphill = landscape.ascent(*given, small, loss_fn=loss_fn)
    ascent = landscape.line(*given, batches, uphill, rhos, loss_fn=loss_fn, progress=told)
    return Explored(solution, plane, ascent, rise(plane, settings.span / 2))


def between(first: Solution, second: Solution, settings: Settings, told: Told) -> Line:
    """Evaluate the loss on the line from one solution to another, statistics and all."""
    return landscape.line(
        first.params,
        first.buffers,
        first.batches(eval_batch(first.images)),
        landscape.between(
            {**first.params, **first.buffers}, {**second.params, **second.buffers}
        ),
        on_a_line(settings),
        loss_fn=first.loss_fn,
        progress=told,
    )


def on_a_line(settings: Settings) -> Tensor:
    """Return the coordinates of a line: more than a surface has, as they cost less."""
    return torch.linspace(0, 1, 2 * settings.points - 1, dtype=torch.float64)


def same_task(first: Solution, second: Solution) -> bool:
    """Return whether two solutions are of one network, on the same images and labels."""
    layouts = [
        {n: leaf.shape for n, leaf in {**s.params, **s.buffers}.items()}
        for s in (first, second)
    ]
    return (
        layouts[0] == layouts[1]
        and torch.equal(first.images, second.images)
        and torch.equal(first.labels, second.labels)
    )


def rise(plane: Plane, within: float) -> float:
    """Return by how much the mean loss within a radius is above that of the solution."""
    near = torch.hypot(plane.at[:, None], plane.at2) <= within * (1 + 1e-6)
    middle = plane.loss[len(plane.at) // 2, len(plane.at2) // 2]
    return float(plane.loss[near].mean() - middle)


def write(
    path: Path,
    command: str,
    settings: Settings,
    explored: Sequence[Explored],
    way: Line | None,
) -> None:
    """Write all numbers and settings to a JSON file.

    Lists of lists have a row for each coordinate `at` along the first direction.
    """
    found: dict[str, Any] = {
        "command": command,
        "settings": dataclasses.asdict(settings) | {"runs": [*map(str, settings.runs)]},
        "torch": torch.__version__,
        "runs": [record(one) for one in explored],
        "between": way and way._asdict(),
    }
    write_json(path, found)


def record(one: Explored) -> dict[str, Any]:
    """Return what the data file says of a run."""
    solution = one.solution
    return {
        "name": solution.name,
        "path": str(solution.path),
        "epoch": solution.epoch,
        "images": len(solution.labels),
        "rise": one.rise,
        "plane": one.plane._asdict(),
        "ascent": one.ascent._asdict(),
        "config": plain_values(solution.config),
    }


def draw_surfaces(path: Path, settings: Settings, explored: Sequence[Explored]) -> None:
    """Draw the planes as contours and surfaces."""
    notes = {
        one.solution.name: f"mean rise within {settings.span / 2:g}: {one.rise:.3g}"
        for one in explored
    }
    planes = {one.solution.name: one.plane for one in explored}
    plots.surfaces(planes, notes, path, title(settings, explored))


def draw_lines(
    path: Path, settings: Settings, explored: Sequence[Explored], way: Line | None
) -> None:
    """Draw the loss along SAM's perturbation, and between two solutions."""
    ascents = {one.solution.name: one.ascent for one in explored}
    plots.lines(ascents, way, path, title(settings, explored))


def title(settings: Settings, explored: Sequence[Explored]) -> str:
    """Return what all runs have in common."""
    configs = [one.solution.config for one in explored]
    tasks = sorted({f"{config.data}, {config.model}" for config in configs})
    count = len(explored[0].solution.labels)
    return f"{'; '.join(tasks)}: loss of {count:,} {settings.kind} images"


def summarise(
    settings: Settings, explored: Sequence[Explored], output: Path
) -> dict[str, str]:
    """Return what the closing summary says."""
    middle, facts = settings.points // 2, {}
    for one in explored:
        loss = one.plane.loss[middle, middle]
        climb = one.ascent.loss[-1] - one.ascent.loss[0]
        facts[one.solution.name] = (
            f"loss {loss:.4f} after epoch {one.solution.epoch}; mean rise within"
            f" {settings.span / 2:g} {one.rise:.3g}; rise at rho {settings.rho:g}"
            f" {climb:.3g}"
        )
    facts["pictures"] = f"{output / SURFACES}, {output / LINES}"
    return facts | {"data": str(output / DATA)}


if __name__ == "__main__":
    sys.exit(main())
