"""Measure how sharp the minima are that runs of recipes.cifar_wrn ended in.

    python -m recipes.sharpness runs/SGD runs/SAM
    python -m recipes.sharpness runs/SAM --rho 0.1 --steps 20       # a larger ball
    python -m recipes.sharpness runs/SAM --eigenvalues 0 --probes 0 # cheap: no Hessian

The loss is cross-entropy in float32, without augmentation, label smoothing or dropout, and
with the statistics of BatchNorm that training ended with. Weights of one network can be
compared; those of two networks differ in scale, and so do all distances and curvatures.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import samfn
from recipes import errors
from recipes.errors import ConfigError, DataError
from recipes.roles import ABOVE_0, Range, Rule, at_least, setting
from recipes.settings.config import Config, of_roles, plain_values
from recipes.settings.saved import of_run, run_of
from recipes.study.groups import MISSING, quantity
from recipes.study.runs import (
    Inspection,
    Solution,
    among,
    checkpoint_of,
    digest,
    labels,
    numbers,
    read,
    validate,
    write_json,
)
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.train.batches import eval_batch
from recipes.train.build import generator
from recipes.train.directory import parsed
from samfn.measure import sharpness
from samfn.measure.curvature import NotTwiceDifferentiableError
from samfn.measure.objective import GRADIENT, LOSS, PRODUCT, Objective
from samfn.storage import files
from samfn.tree import Params

PROGRAM = "python -m recipes.sharpness"
DATA = "sharpness.json"

VERSION = 2  # of what the numbers mean; those of another one are measured anew
# Settings that change no number: the checkpoint is known by its content, and the
# device only rounds.
NOT_MEASURED = {"runs", "last", "device"}
BATCHES = 4  # fewer would not show how far the variance among them is off

LEAST = {"loss": 0.0, "noise": 0.0}  # of numbers that have a bound

Record = dict[str, Any]
"""Measurements of one run, as JSON holds them."""
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


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """Measure how sharp the minima are that runs ended in."""

    output: Path | None = None
    """File to write. None is sharpness.json in the directory of each run. Records of other
    settings or checkpoints stay in it."""


class Number(NamedTuple):
    """One of the numbers that are measured."""

    value: float
    error: float | None
    """Standard error, or the bound of an eigenvalue's error; None is not known."""
    cost: float
    """In gradients over all images."""


def main(args: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    return cli.run(
        lambda display, _: measure(cli.parsed(Settings, prog=PROGRAM, args=args), display),
        left="what was measured of whole runs is kept",
    )


def measure(settings: Settings, display: Display) -> int:
    """Measure each run, write what was found, and show it."""
    settings = replace(settings, runs=among(settings.runs, display))
    validate(settings)
    configs = [of_run(path) for path in settings.runs]
    runs = [(p, c, p.stem) for p, c in zip(settings.runs, configs, strict=True)]
    places = dict(zip(labels(runs), settings.runs, strict=True))
    written = {path: file_of(path, settings.output) for path in settings.runs}
    for file in written.values():
        require_writable(file)
    if settings.output is not None:
        require_records(settings.output)
    code, found = 0, []
    for record in measured(places, settings, display):
        found.append(record)
        try:
            keep(record, file := written[Path(record["path"])], display)
        except OSError as error:  # What was measured is still shown.
            display.fail(f"cannot write {file}: {error}")
            code = errors.NOT_WRITTEN
    rows = table(settings, dict(zip(places, found, strict=True)))
    display.table(["", *columns(settings).values()], rows)
    tasks = {
        (c.data, c.data_dir, c.images.image_size, c.model, c.network.layout)
        for c in configs
    }
    if len(tasks) > 1:
        display.warn("these are of other networks or data, and no measure of each other")
    said = ", ".join(dict.fromkeys(map(str, written.values())))
    display.facts("sharpness", legend(settings) | {"data": said})
    return code


def require_writable(file: Path) -> None:
    """Raise if it is plain that a file cannot be written, before hours are spent on it.

    Raises:
        ConfigError: it is a directory, or its directory is not there or read-only.
    """
    if file.is_dir():
        raise ConfigError(f"--output: expected a file, got the directory {file}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        text = f"--output: {file.parent} is no directory that can be written"
        raise ConfigError(text)


def require_records(file: Path) -> None:
    """Raise if a file is there that somebody named, and that holds something else."""
    try:
        _measurements(file)
    except UNREADABLE as error:
        text = f"--output: expected a new file, or one of records, got {file}"
        raise ConfigError(text) from error


def measured(
    runs: Mapping[str, Path],
    settings: Measuring,
    display: Display,
    *,
    lenient: bool = False,
) -> Iterator[Record]:
    """Measure runs one after the other, say what it costs, and show how far it is.

    Args:
        runs: by their names.
        settings: what is measured.
        display: where it is shown.
        lenient: leave out, with a warning, what cannot be read.

    Raises:
        ConfigError, DataError: as `read`, if not lenient.
    """
    if not runs:
        return
    each, count = sum(costs(settings).values()), len(runs)
    several = f"{count} runs: at most {count * each:,.0f} gradients, {each:,.0f} a run"
    one = f"one run: at most {each:,.0f} gradients"
    display.say(
        f"measuring {several if count > 1 else one}, each over"
        f" {settings.images:,} {settings.kind} images"
    )
    for index, (name, path) in enumerate(runs.items()):
        started = time.perf_counter()
        try:
            solution = read(path, settings, display)
            sha256 = digest(solution.checkpoint)
        except (ConfigError, DataError, OSError) as error:
            if not lenient:
                raise
            display.warn(f"{name} is not measured: {error}")
            continue
        done, total = index * each, count * each
        with display.counting(total, f"measuring {name}", done) as advance:
            left_out: dict[str, str] = {}
            found = numbers_of(solution, settings, advance, left_out.__setitem__)
        seconds = time.perf_counter() - started
        spent = sum(number.cost for number in found.values())
        display.say(f"measuring {name} took {seconds:.1f} s and {spent:,.0f} gradients")
        made = record(solution, sha256, settings, found, left_out, seconds)
        tell_left_out(name, made, display)
        yield made


def tell_left_out(name: str, record: Record, display: Display) -> None:
    """Warn of what could not be measured of a run."""
    for measure, why in record.get("left_out", {}).items():
        display.warn(f"{name}: {measure} is left out: {why}")


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


def record(
    solution: Solution,
    sha256: str,
    settings: Measuring,
    found: Mapping[str, Number],
    left_out: Mapping[str, str],
    seconds: float,
) -> Record:
    """Return what the data file says of a run."""
    made: Record = numbers(
        {
            "version": VERSION,
            "path": str(solution.path),
            "checkpoint": solution.checkpoint.name,
            "sha256": sha256,
            "epoch": solution.epoch,
            "images": len(solution.labels),
            "settings": asked(settings),
            "config": trained(solution.config),
            "numbers": {name: number._asdict() for name, number in found.items()},
            "left_out": left_out,
            "seconds": seconds,
            "device": str(solution.labels.device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
    )
    return made | {"checksum": checksum(made)}


def checksum(record: Record) -> str:
    """Return the SHA-256 of what a record says, but for that of the record itself."""
    said = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def asked(settings: Measuring) -> dict[str, Any]:
    """Return the settings that decide on the numbers."""
    names = {field.name for field in dataclasses.fields(Measuring)} - NOT_MEASURED
    return {name: getattr(settings, name) for name in sorted(names)}


def trained(config: Config) -> dict[str, Any]:
    """Return the settings of a run that decide on its network, weights and images."""
    return of_roles(plain_values(config))


def file_of(path: Path, output: Path | None = None) -> Path:
    """Return where the records of a run are kept."""
    return output or run_of(path) / DATA


def keep(record: Record, file: Path, display: Display) -> None:
    """Write a record to a file, beside those of other settings and checkpoints.

    A file that holds no records, as one of another program, is renamed and not replaced.

    Raises:
        OSError: the file cannot be written; it is what it was.
    """
    same = ("path", *IDENTITY)
    lock = file.with_name(f".{file.name}.lock")
    with files.locked(lock, str(file), wait=True, tell=display.warn):
        try:
            before = _measurements(file)
        except UNREADABLE:
            before, aside = [], files.put_aside(file, "corrupt")
            display.warn(f"{file} held no records; kept as {aside.name}")
        others = [
            one
            for one in before
            # Older versions wrote no checksum; what they measured is kept, not believed.
            if (is_whole(one) or "checksum" not in one)
            and any(one.get(key) != record[key] for key in same)
        ]
        write_json(file, {"measurements": [*others, record]})


IDENTITY = ("version", "sha256", "settings", "config")
UNREADABLE = (OSError, ValueError, TypeError, LookupError, RecursionError)


def known(
    path: Path, config: Config, settings: Measuring, display: Display
) -> Record | None:
    """Return the record of a run that was measured so before, if nothing has changed."""
    checkpoint = checkpoint_of(path, config, last=settings.last)
    records = kept(file_of(path), display)
    if checkpoint is None or not records:
        return None
    values = numbers([asked(settings), trained(config)])
    wanted = dict(zip(IDENTITY, [VERSION, digest(checkpoint), *values], strict=True))
    for one in records:
        if all(one[key] == value for key, value in wanted.items()):
            return one
    return None


def kept(file: Path, display: Display) -> list[Record]:
    """Return the records in a file; those that are damaged or were edited are none."""
    found = measurements(file, display)
    whole = [one for one in found if is_whole(one)]
    if odd := len(found) - len(whole):
        text = f"{odd} of {len(found)} records are not as they were written"
        display.warn(f"{file}: {text}, and are measured anew where they are asked for")
    return whole


def measurements(file: Path, display: Display) -> list[Record]:
    """Return the records in a file as they are there; one that cannot be read has none."""
    try:
        return _measurements(file)
    except UNREADABLE as error:
        display.warn(f"{file} cannot be read, and is measured anew: {error}")
        return []


def _measurements(file: Path) -> list[Record]:
    """Return the records in a file, of which there are none where it is not there."""
    try:
        found = parsed(files.read_text(file))["measurements"]
    except FileNotFoundError:
        return []
    return [one if isinstance(one, dict) else {} for one in found]


def is_whole(record: Record) -> bool:
    """Return whether a record is as it was written, of numbers that can be measured."""
    try:
        return (
            record["checksum"] == checksum(record)
            and all(key in record for key in ("path", "epoch", "images", *IDENTITY))
            and all(
                math.isfinite(float(number["value"]))
                and float(number["value"]) >= LEAST.get(name, -math.inf)
                and 0 <= float(number["cost"]) < math.inf
                and not float(number["error"] or 0) < 0  # NaN, where one group is all
                for name, number in record["numbers"].items()
            )
            and isinstance(record.get("left_out", {}), dict)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


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


def table(settings: Measuring, records: Mapping[str, Record]) -> list[list[str]]:
    """Return a row of cells for each record."""
    rows = []
    for name, one in records.items():
        found = [one["numbers"].get(column) for column in columns(settings)]
        cells = [quantity(n["value"], n["error"]) if n else MISSING for n in found]
        rows.append([name, *cells])
    return rows


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


if __name__ == "__main__":
    sys.exit(main())
