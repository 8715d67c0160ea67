r"""Compare settings of the recipe at equal epochs, over several seeds.

    python -m bench.compare NAME --arm "SGD: --rho 0" --arm "SAM: --rho 0.05" \
        -- --data digits --epochs 20

What follows the lone -- goes to every arm.
Runs every arm with every seed below runs/NAME/, as `recipes.study.grid` does, and writes a
dated report and picture to bench/results/. Runs that are finished are not run again.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from bench.measure import RESULTS
from recipes import plots
from recipes.errors import ConfigError
from recipes.settings.config import Config
from recipes.study import grid, reports
from recipes.study.grid import Result
from recipes.study.reports import Table, by_label, summary
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.terminal.signals import Signals


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    name: Annotated[str, tyro.conf.Positional]
    """Of the report, as label_noise."""
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A label, a colon, and flags of the recipe; once for each arm."""
    seeds: int = 3
    """Runs of each arm."""
    title: str = ""
    """Of the picture and the report."""
    times: bool = True
    """Report the seconds of an epoch; not where runs shared the machine."""


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the report; return the exit code."""
    own, flags = grid.split(sys.argv[1:] if args is None else args)

    def body(display: Display, signals: Signals) -> int:
        comparison = tyro.cli(Comparison, prog="python -m bench.compare", args=own)
        output = Path("runs", comparison.name)
        cells = grid.plan(arms(comparison, flags), comparison.seeds, output)
        write = partial(report, comparison, flags)
        results = grid.run(cells, output, display, signals, write)
        display.table(*table(comparison, results))
        display.say(f"report: {stem(comparison).with_suffix('.md')}")
        return 0

    return cli.run(body, grid.LEFT)


def arms(comparison: Comparison, flags: Sequence[str]) -> dict[str, Config]:
    """Return the settings of all arms by label."""
    found = {}
    for text in comparison.arm:
        label, colon, own = text.partition(":")
        if not colon or label.strip() in found:
            raise ConfigError(f"--arm: expected a new 'label: flags', got {text!r}")
        found[label.strip()] = grid.common([*flags, *shlex.split(own)])
    if not found:
        raise ConfigError("--arm: expected at least one, got none")
    return found


def stem(comparison: Comparison) -> Path:
    """Return the path of the report of today, without its suffix."""
    return RESULTS / f"{comparison.name}_{time.strftime('%Y-%m-%d')}"


def report(comparison: Comparison, flags: Sequence[str], results: Sequence[Result]) -> None:
    """Write report and picture."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, title = stem(comparison), comparison.title or comparison.name
    draw(results, path.with_suffix(".png"), title)
    text = reports.about(results)
    if comparison.times:
        text += " Seconds are the median of all training epochs, without evaluation."
    page = reports.document(
        title,
        f"{path.name}.png",
        text,
        table(comparison, results),
        results[0].cell.config.device,
        typed(comparison, flags),
    )
    reports.write(path.with_suffix(".md"), page)


def table(comparison: Comparison, results: Sequence[Result]) -> Table:
    """Return a row for each arm."""
    columns, runs = ["", "last epoch", "best epoch"], by_label(results)
    rows = [
        [label, summary(found, Result.last), summary(found, Result.best)]
        for label, found in runs.items()
    ]
    if comparison.times:
        times = [epoch_seconds(found) for found in runs.values()]
        columns += ["s/epoch", f"against {next(iter(runs))}"]
        for cells, seconds in zip(rows, times, strict=True):
            cells += [f"{seconds:.2f}", f"{seconds / times[0]:.2f}"]
    return columns, rows


def epoch_seconds(results: Sequence[Result]) -> float:
    """Return the median time of a training epoch; NaN where none was finished."""
    times = [row["seconds"] for result in results for row in result.rows]
    return statistics.median(times) if times else float("nan")


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw curves, or points where curves would be too many or end at different epochs."""
    runs = {k: found for k, v in by_label(results).items() if (found := reports.ended(v))}
    lengths = {len(result.rows) for found in runs.values() for result in found}
    if len(runs) <= len(plots.COLOURS) and len(lengths) == 1:
        series = {
            label: [[result.tested(row) for row in result.rows] for result in found]
            for label, found in runs.items()
        }
        plots.comparison(series, path, title)
    else:
        last, best = (
            {label: [value(result) for result in found] for label, found in runs.items()}
            for value in (Result.last, Result.best)
        )
        plots.ranking(last, best, path, title)


def typed(comparison: Comparison, flags: Sequence[str]) -> str:
    """Return the command, an arm a line."""
    lines = [f"python -m bench.compare {comparison.name} --seeds {comparison.seeds}"]
    lines += [f"--title {shlex.quote(comparison.title)}"] if comparison.title else []
    lines += ["--no-times"] * (not comparison.times)
    lines += [f"--arm {shlex.quote(arm)}" for arm in comparison.arm]
    lines += [f"-- {shlex.join(flags)}"] if flags else []
    return " \\\n    ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
