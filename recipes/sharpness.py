"""Measure how sharp the minima are that runs of recipes.cifar_wrn ended in.

    python -m recipes.sharpness runs/SGD runs/SAM
    python -m recipes.sharpness runs/SAM --rho 0.1 --steps 20       # a larger ball
    python -m recipes.sharpness runs/SAM --eigenvalues 0 --probes 0 # cheap: no Hessian

The loss is cross-entropy in float32, without augmentation, label smoothing or dropout, and
with the statistics of BatchNorm that training ended with. Weights of one network can be
compared; those of two networks differ in scale, and so do all distances and curvatures.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes import errors
from recipes.errors import ConfigError, DataError
from recipes.settings.saved import of_run
from recipes.study.groups import MISSING, quantity
from recipes.study.measurements import (
    Record,
    file_of,
    keep,
    record,
    require_records,
    require_writable,
)
from recipes.study.measures import Measuring, columns, costs, legend, numbers_of
from recipes.study.runs import among, digest, labels, read, validate
from recipes.terminal import cli
from recipes.terminal.console import Display

PROGRAM = "python -m recipes.sharpness"


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """Measure how sharp the minima are that runs ended in."""

    output: Path | None = None
    """File to write. None is sharpness.json in the directory of each run. Records of other
    settings or checkpoints stay in it."""


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
    for one in measured(places, settings, display):
        found.append(one)
        try:
            keep(one, file := written[Path(one["path"])], display)
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


def table(settings: Measuring, records: Mapping[str, Record]) -> list[list[str]]:
    """Return a row of cells for each record."""
    rows = []
    for name, one in records.items():
        found = [one["numbers"].get(column) for column in columns(settings)]
        cells = [quantity(n["value"], n["error"]) if n else MISSING for n in found]
        rows.append([name, *cells])
    return rows


if __name__ == "__main__":
    sys.exit(main())
