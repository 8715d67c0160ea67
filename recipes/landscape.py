"""Draw the loss around what runs of recipes.cifar_wrn have learned, on one scale.

    python -m recipes.landscape runs/SGD runs/SAM
    python -m recipes.landscape runs/SAM --points 41 --span 0.5     # finer, and closer by
    python -m recipes.landscape runs/*/checkpoints/step_000001000.safetensors

The loss is cross-entropy in float32, without augmentation, label smoothing or dropout, and
with the statistics of BatchNorm that training ended with. Two random directions have
filters as long as those of the weights; of one seed, they are the same for runs of one
network but for these lengths.
"""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

import samfn
from recipes import augment, command, plots
from recipes.batches import EVAL_BATCH
from recipes.config import Config, ConfigError, plain_values, run_of
from recipes.console import Display
from recipes.keeping import reopen
from recipes.running import name
from recipes.task import generator
from samfn import files, landscape
from samfn.gradient import LossFn
from samfn.landscape import Line, Plane, Told
from samfn.tree import Params

PROGRAM = "python -m recipes.landscape"
DATA, SURFACES, LINES = "landscape.json", "surfaces.png", "lines.png"


@dataclass(frozen=True)
class Settings:
    """Draw the loss around what runs have learned, side by side and on one scale."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, of which the best epoch counts, or checkpoints of runs."""
    last: bool = False
    """Of a directory, take the last checkpoint and not the best."""
    points: int = 15
    """Points of each axis; odd, so that one of them is the solution. A surface has points
    times points of them, a line almost 2 times points; each is a pass over the images."""
    span: float = 1.0
    """Largest coordinate along each of the random directions, in norms of a filter."""
    rho: float = 0.5
    """Largest distance along SAM's perturbation, in units of the weights."""
    images: int = 1000
    """Images that the loss is the mean of; those of all runs are the same if their data
    are."""
    split: Literal["train", "test"] = "train"
    """Images of the training set, with the labels trained on, or of the test set."""
    seed: int = 0
    """Of the directions and of the choice of images."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ... auto takes a GPU if there is one."""
    output: Path | None = None
    """Directory of the pictures and data; what it holds of another call is replaced. None
    is landscape, beside the first run."""


class Solution(NamedTuple):
    """What a run has learned, and what its loss is of."""

    name: str
    """In pictures; different for each of the runs."""
    path: Path
    config: Config
    epoch: int
    params: Params
    buffers: Params
    loss_fn: LossFn
    images: Tensor
    """Normalised, NCHW."""
    labels: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return the images and labels in batches of at most this size."""
        parts = torch.split(self.images, size), torch.split(self.labels, size)
        return list(zip(*parts, strict=True))


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
    return command.run(
        lambda display, _: draw(tyro.cli(Settings, prog=PROGRAM, args=args), display)
    )


def draw(settings: Settings, display: Display) -> int:
    """Evaluate, write data and pictures, and say what they show."""
    validate(settings)
    solutions = named([read(path, settings, display) for path in settings.runs])
    output = settings.output or run_of(settings.runs[0]).resolve().parent / "landscape"
    try:
        files.make_directory(output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from error
    explored, way = explore(solutions, settings, display)
    try:
        write(output / DATA, settings, explored, way)
        draw_surfaces(output / SURFACES, settings, explored)
        draw_lines(output / LINES, settings, explored, way)
    except OSError as error:
        display.fail(f"cannot write {output}: {error}")
        return command.NOT_WRITTEN
    display.facts("loss landscape", summarise(settings, explored, output))
    return 0


def validate(settings: Settings) -> None:
    """Raise unless every value is in its range.

    Raises:
        ConfigError: names the flag, what was expected and what came.
    """
    finite = float("inf")
    odd = settings.points % 2 == 1 and settings.points >= 5
    for flag, holds, expected in (
        ("points", odd, "an odd number of at least 5"),
        ("span", 0 < settings.span < finite, "a finite number above 0"),
        ("rho", 0 < settings.rho < finite, "a finite number above 0"),
        ("images", settings.images >= 1, "at least 1"),
    ):
        if not holds:
            raise ConfigError(
                f"--{flag}: expected {expected}, got {getattr(settings, flag)}"
            )
    if not settings.runs:
        raise ConfigError("expected at least one run, got none")
    paths = [path.resolve() for path in settings.runs]
    if twice := [path for path in settings.runs if paths.count(path.resolve()) > 1]:
        raise ConfigError(f"expected different runs, got {twice[0]} twice")


def read(path: Path, settings: Settings, display: Display) -> Solution:
    """Read what a run has learned, and choose its images.

    Raises:
        ConfigError: there is no run, no checkpoint that is whole, or no such device.
        DataError: the data are not there any more.
    """
    task, state, epoch = reopen(path, settings.device, display, last=settings.last)
    task.model.eval()
    images, labels = task.test[1:]
    if settings.split == "train":
        images, labels = task.train_images, task.train_labels
    source = generator(settings.seed, "images", settings.split)
    chosen = torch.randperm(len(labels), generator=source)[: settings.images]
    chosen = chosen.to(task.device)
    inputs = augment.normalise(images[chosen], task.mean, task.std)
    return Solution(
        name=name(task.config),
        path=path,
        config=task.config,
        epoch=epoch,
        params=state.params,
        buffers=state.buffers,
        loss_fn=samfn.supervised(task.model, F.cross_entropy),
        images=inputs.contiguous(memory_format=torch.channels_last),
        labels=labels[chosen],
    )


def named(solutions: Sequence[Solution]) -> list[Solution]:
    """Give the solutions the shortest names that differ."""
    ways: tuple[Callable[[Solution], str], ...] = (
        lambda s: name(s.config),
        lambda s: f"{name(s.config)}, seed {s.config.seed}",
        lambda s: run_of(s.path).resolve().name,
        lambda s: f"{run_of(s.path).resolve().name}, epoch {s.epoch}",
        lambda s: str(s.path),
    )
    for way in ways:
        names = [way(solution) for solution in solutions]
        if len({*names}) == len(names):
            break
    return [s._replace(name=n) for s, n in zip(solutions, names, strict=True)]


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
    display.say(f"evaluating {points:,} points, each on {count:,} {kind(settings)} images")
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
    loss_fn, batches = solution.loss_fn, solution.batches(EVAL_BATCH)
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
        first.batches(EVAL_BATCH),
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
    path: Path, settings: Settings, explored: Sequence[Explored], way: Line | None
) -> None:
    """Write all numbers and settings to a JSON file.

    Lists of lists have a row for each coordinate `at` along the first direction. What is
    not finite is the text "nan", "inf" or "-inf", which JSON has no numbers for and `float`
    and `numpy.array(..., dtype=float)` read.
    """
    found: dict[str, Any] = {
        "settings": dataclasses.asdict(settings) | {"runs": [*map(str, settings.runs)]},
        "torch": torch.__version__,
        "runs": [record(one) for one in explored],
        "between": way and numbers(way._asdict()),
    }
    text = json.dumps(found, indent=1, default=str, allow_nan=False)
    # One line for each list of numbers. No text of JSON has a line break in it.
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda row: re.sub(r"\s*\n\s*", " ", row[0]), text)
    with files.replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def record(one: Explored) -> dict[str, Any]:
    """Return what the data file says of a run."""
    solution = one.solution
    return {
        "name": solution.name,
        "path": str(solution.path),
        "epoch": solution.epoch,
        "images": len(solution.labels),
        "rise": numbers(one.rise),
        "plane": numbers(one.plane._asdict()),
        "ascent": numbers(one.ascent._asdict()),
        "config": plain_values(solution.config),
    }


def numbers(value: Any) -> Any:
    """Return tensors as lists, and what JSON has no number for as text."""
    if isinstance(value, Tensor):
        return numbers(value.tolist())
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, float):
        # Losses are of float32, which has no more digits.
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


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
    return f"{'; '.join(tasks)}: loss of {count:,} {kind(settings)} images"


def kind(settings: Settings) -> str:
    """Return what the images are called in words."""
    return {"train": "training", "test": "test"}[settings.split]


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
