"""Train with several methods at several rho, with several seeds; find the best rho.

    python -m recipes.sweep --output runs/sweep -- --data digits --epochs 20
    python -m recipes.sweep --rhos 0 0.1 1 --methods sam "asam(0.01)" -- --validation 0.1

What follows the lone -- are flags of recipes.cifar_wrn, for all runs. A rho of 0 is SGD,
and is run once for all methods. The same command goes on where it was ended, and one with
more rhos, methods or seeds adds these.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

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
from recipes.train import running
from recipes.train.recorded import chosen_by

PROGRAM = "python -m recipes.sweep"
REPORT, PICTURE = "sweep.md", "sweep.png"
BY = {"validation": "the validation set", "test": "the test set itself, which flatters"}


@dataclass(frozen=True)
class Settings:
    """Train at several rho. What follows a lone -- are flags of recipes.cifar_wrn."""

    # The grid of Foret et al., 2021, arXiv:2010.01412, table 6.
    rhos: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    """Radii of the perturbation. 0 is the plain optimizer."""
    methods: tuple[str, ...] = ("sam",)
    """As --method of the recipe has them."""
    seeds: int = 3
    """Runs of each, with seeds from the recipe's --seed on."""
    output: Path = Path("runs/sweep")
    """Directory of all runs, tables and pictures. What it holds of this sweep is not run
    again."""


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, and report; return the exit code."""
    given = sys.argv[1:] if args is None else args
    own, flags = grid.split(given)

    def body(display: Display, signals: Signals) -> int:
        settings = tyro.cli(Settings, prog=PROGRAM, args=own, description=__doc__)
        validate(settings)
        config = grid.common(flags, {"rho", "method"}, display.say)
        cells = grid.plan(arms(settings, config), settings.seeds, settings.output)
        write = partial(report, settings, reports.called(PROGRAM, given))
        results = grid.run(cells, settings.output, display, signals, write)
        display.table(*table(results))
        display.facts("sweep", summarise(settings, results))
        return 0

    return cli.run(body, grid.LEFT)


def validate(settings: Settings) -> None:
    """Raise unless every value is in its range.

    Raises:
        ConfigError: names the flag, what was expected and what came.
    """
    for rho in settings.rhos:
        if not 0 <= rho < float("inf"):
            raise ConfigError(f"--rhos: expected finite numbers of at least 0, got {rho}")
    if not any(settings.rhos):
        raise ConfigError(f"--rhos: expected one above 0, got {settings.rhos}")
    for name in ("rhos", "methods"):
        values = getattr(settings, name)
        if len({*values}) < len(values) or not values:
            raise ConfigError(f"--{name}: expected different ones, got {[*values]}")
    for method in settings.methods:
        try:
            method_expression.parse(method, steps=1, norm_layers=())
        except ValueError as error:
            raise ConfigError(f"--methods: {error}") from error


def arms(settings: Settings, config: Config) -> dict[str, Config]:
    """Return the settings of all arms by label: rho 0 first, if it is asked for."""
    plain = replace(config, method="sam", rho=0.0)
    return ({running.name(plain): plain} if 0 in settings.rhos else {}) | {
        label(method, rho): replace(config, method=method, rho=rho)
        for method in settings.methods
        for rho in radii(settings)
    }


def radii(settings: Settings) -> list[float]:
    """Return those that are above 0, ascending."""
    return sorted(rho for rho in settings.rhos if rho > 0)


def label(method: str, rho: float) -> str:
    """Return what an arm is called."""
    return f"{method}, rho {number(rho)}"


def report(settings: Settings, command: str, results: Sequence[Result]) -> None:
    """Write data, picture and table of what has ended."""
    config = results[0].cell.config
    title = f"Accuracy by ρ: {reports.task(config)}"
    best_rhos = "; ".join(map(" ".join, found(settings, results).items()))
    by = BY[chosen_by(config)]
    text = f"{reports.about(results)} The best ρ, by {by}: {best_rhos}."
    reports.write_data(settings.output, results, command)
    draw(settings, results, title)
    page = reports.document(title, PICTURE, text, table(results), config.device, command)
    reports.write(settings.output / REPORT, page)


def table(results: Sequence[Result]) -> Table:
    """Return a row for each arm."""
    validated = bool(results[0].cell.config.validation)
    columns = ["method", "ρ", "last epoch", "best epoch"] + ["validation"] * validated
    rows = []
    for runs in by_label(results).values():
        config = runs[0].cell.config
        cells = [config.method if config.rho else running.name(config), number(config.rho)]
        cells += [summary(runs, Result.last), summary(runs, Result.best)]
        rows.append(cells + [summary(runs, Result.chosen)] * validated)
    return columns, rows


def found(settings: Settings, results: Sequence[Result]) -> dict[str, str]:
    """Return the best rho of each method, and how well it does, in words."""
    runs, chosen = by_label(results), best(settings, results)
    return {
        method: f"{number(rho)} ({summary(runs[label(method, rho)], Result.best)} %)"
        for method, rho in chosen.items()
    } | {method: "none" for method in settings.methods if method not in chosen}


def best(settings: Settings, results: Sequence[Result]) -> dict[str, float]:
    """Return the best rho by method: by the best epoch, on the split that chose it.

    A rho at which a run diverged is none; of equal ones, it is the smallest.
    """
    runs, chosen = by_label(results), {}
    for method in settings.methods:
        scores = {
            rho: mean(run.chosen() for run in runs[label(method, rho)])
            for rho in radii(settings)
            if not any(run.diverged for run in runs[label(method, rho)])
        }
        if scores:
            chosen[method] = max(scores, key=lambda rho: scores[rho])
    return chosen


def draw(settings: Settings, results: Sequence[Result], title: str) -> None:
    """Draw accuracy against rho."""
    runs = by_label(results)
    series = {
        method: series_of({rho: runs[label(method, rho)] for rho in radii(settings)})
        for method in settings.methods
    }
    plain = next((found for found in runs.values() if not found[0].cell.config.rho), None)
    base = series_of({0.0: plain}) if plain else None
    plots.sweep(series, base, settings.output / PICTURE, title)


def summarise(settings: Settings, results: Sequence[Result]) -> dict[str, str]:
    """Return what the closing summary says."""
    split = BY[chosen_by(results[0].cell.config)]
    facts = {
        f"best rho of {method}": f"{text}, by {split}"
        for method, text in found(settings, results).items()
    }
    return facts | reports.files_in(settings.output, REPORT, PICTURE)


if __name__ == "__main__":
    sys.exit(main())
