"""Train with wrong labels, with several methods and seeds: who learns them by heart?

    python -m recipes.label_noise -- --data digits
    python -m recipes.label_noise --noise 0 0.4 --methods sgd "every(sam, 5) 1"

What follows a lone -- are flags of recipes.cifar_wrn, for all runs. The same command goes
on where it was ended, and one with more noise, methods or seeds adds these. The defaults
are for the digits; for other data, `recipes.sweep -- --label-noise 0.4` finds good rhos.

Source:
    Foret et al., 2021, arXiv:2010.01412, table 4: CIFAR-10 with 20, 40, 60 and 80 % noise.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tyro

from recipes import plots
from recipes.errors import ConfigError
from recipes.settings import method_expression
from recipes.settings.config import Config
from recipes.study import grid, reports
from recipes.study.grid import Result
from recipes.study.reports import Table, by_label, number, series_of, summary
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.terminal.signals import Signals

PROGRAM = "python -m recipes.label_noise"
REPORT, PICTURE = "label_noise.md", "label_noise.png"
SGD = "sgd"


@dataclass(frozen=True)
class Settings:
    """Train with wrong labels. What follows a lone -- are flags of recipes.cifar_wrn."""

    noise: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Shares of the training labels that are wrong, 0 to 1."""
    # As tuned on the digits; bench/results/methods_digits_2026-11-21.md has more of them.
    methods: tuple[str, ...] = ("sgd", "sam 0.2", "asam 2", "momentum_sam 3")
    """sgd, or a method as --method of the recipe has it, a space, and its rho."""
    seeds: int = 3
    """Runs of each, with seeds from the recipe's --seed on."""
    output: Path = Path("runs/label-noise")
    """Directory of all runs, tables and pictures. What it holds of this study is not run
    again."""


class Trained(NamedTuple):
    """A method and its rho."""

    label: str
    method: str
    rho: float


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, and report; return the exit code."""
    given = sys.argv[1:] if args is None else args
    own, flags = grid.split(given)

    def body(display: Display, signals: Signals) -> int:
        settings = tyro.cli(Settings, prog=PROGRAM, args=own, description=__doc__)
        validate(settings)
        config = grid.common(flags, {"rho", "method", "label_noise"}, display.say)
        cells = grid.plan(arms(settings, config), settings.seeds, settings.output)
        write = partial(report, settings, reports.called(PROGRAM, given))
        results = grid.run(cells, settings.output, display, signals, write)
        display.table(*table(settings, results))
        display.facts("label noise", reports.files_in(settings.output, REPORT, PICTURE))
        return 0

    return cli.run(body, grid.LEFT)


def validate(settings: Settings) -> None:
    """Raise unless every value is in its range.

    Raises:
        ConfigError: names the flag, what was expected and what came.
    """
    for share in settings.noise:
        if not 0 <= share <= 1:
            raise ConfigError(f"--noise: expected shares from 0 to 1, got {share}")
    labels = [read(text).label for text in settings.methods]
    for name, values in (("noise", settings.noise), ("methods", labels)):
        if len({*values}) < len(values) or not values:
            raise ConfigError(f"--{name}: expected different ones, got {[*values]}")


def read(text: str) -> Trained:
    """Return what "sgd", or a method and its rho, means.

    Raises:
        ConfigError: it means nothing.
    """
    if text.strip() == SGD:
        return Trained("SGD", "sam", 0.0)
    method, _, last = text.strip().rpartition(" ")
    try:
        rho = float(last)
    except ValueError:
        rho = 0.0
    if not 0 < rho < float("inf"):
        raise ConfigError(
            f'--methods: expected sgd, or a method and a rho above 0 as "sam 0.2",'
            f" got {text!r}"
        )
    try:
        method_expression.parse(method, steps=1, norm_layers=())
    except ValueError as error:
        raise ConfigError(f"--methods: {error}") from error
    return Trained(f"{method.strip()}, rho {number(rho)}", method.strip(), rho)


def arms(settings: Settings, config: Config) -> dict[str, Config]:
    """Return the settings of all arms by label."""
    return {
        label(one, share): replace(
            config, method=one.method, rho=one.rho, label_noise=share
        )
        for share in settings.noise
        for one in map(read, settings.methods)
    }


def label(one: Trained, share: float) -> str:
    """Return what an arm is called."""
    return f"{one.label}, noise {number(share)}"


def report(settings: Settings, command: str, results: Sequence[Result]) -> None:
    """Write data, picture and table of what has ended."""
    config = results[0].cell.config
    title = f"Wrong labels: {reports.task(replace(config, label_noise=0.0))}"
    text = (
        f"{reports.about(results)} Columns are the share of training labels that are wrong."
    )
    reports.write_data(settings.output, results, command)
    draw(settings, results, title)
    found = table(settings, results)
    page = reports.document(title, PICTURE, text, found, config.device, command)
    reports.write(settings.output / REPORT, page)


def table(settings: Settings, results: Sequence[Result]) -> Table:
    """Return two rows for each method, last and best epoch, with a cell for each noise."""
    runs, shares = by_label(results), sorted(settings.noise)
    columns = ["method", "epoch", *(f"{number(100 * share)} %" for share in shares)]
    rows = [
        [one.label, name, *(summary(runs[label(one, share)], value) for share in shares)]
        for one in map(read, settings.methods)
        for name, value in (("last", Result.last), ("best", Result.best))
    ]
    return columns, rows


def draw(settings: Settings, results: Sequence[Result], title: str) -> None:
    """Draw accuracy against noise."""
    runs = by_label(results)
    series = {
        one.label: series_of({share: runs[label(one, share)] for share in settings.noise})
        for one in map(read, settings.methods)
    }
    plots.label_noise(series, settings.output / PICTURE, title)


if __name__ == "__main__":
    sys.exit(main())
