"""Runs in groups that differ in the seed alone: which they are, and their numbers.

A number of a group is the mean over its runs, with the standard deviation of a sample.
Runs that diverged are counted, and are in no mean.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.plots import Series
from recipes.roles import EXACT
from recipes.settings.config import Config, of_roles, plain_values
from recipes.study.runs import distinct, real
from recipes.train.directory import Row
from recipes.train.recorded import Recorded, chosen_by, column
from recipes.train.running import name

MISSING = "-"
NAMED = {"method", "rho", "rho_schedule", "rho_final", "sam_last"}  # what `name` says

Value = Callable[[Recorded], float | None]
"""A number of a run, or None where it has none."""


class Spread(NamedTuple):
    """Mean and standard deviation over the runs of a group."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; None for a single run."""
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Return the spread of values, or None if there are none."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), deviation, [*values])


class Group(NamedTuple):
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[Recorded]
    diverged: Mapping[Path, str]
    """Why, by the directories of those that did."""

    @property
    def config(self) -> Config:
        """Settings of all runs, but for the seed."""
        return self.runs[0].config

    @property
    def counted(self) -> list[Recorded]:
        """Runs that did not diverge."""
        return [run for run in self.runs if run.path not in self.diverged]

    def values(self, value: Value) -> list[float]:
        """Return a number of each run that did not diverge and has one."""
        return [float(v) for v in map(value, self.counted) if v is not None]

    def spread(self, value: Value) -> Spread | None:
        """Return mean and deviation of a number, or None if no run has one."""
        return Spread.of(self.values(value))


def group_of(label: str, runs: Sequence[Recorded]) -> Group:
    """Return runs as a group, with why some of them diverged."""
    diverged = {run.path: run.diverged for run in runs if run.diverged is not None}
    return Group(label, [*runs], diverged)


def last(run: Recorded) -> float | None:
    """Return the test accuracy of the last epoch, in percent."""
    return float(run.rows[-1][run.test]) if run.rows else None


def best(run: Recorded) -> float | None:
    """Return the test accuracy of the epoch that is kept, in percent."""
    return float(run.best[run.test]) if run.best else None


def chosen(run: Recorded) -> float | None:
    """Return the accuracy that this epoch was chosen by, in percent."""
    by = column(run.config, chosen_by(run.config))
    return float(run.best[by]) if run.best else None


def best_of(groups: Sequence[Group]) -> Group | None:
    """Return the group whose best epochs have the best mean, by what chose them.

    A group with a run that diverged is none; among equal ones, it is the first.
    """
    scores = [
        (levelled(spread.mean), -place, group)
        for place, group in enumerate(groups)
        if not group.diverged and (spread := group.spread(chosen))
    ]
    return max(scores, default=(0.0, 0, None))[2]


def levelled(value: float, size: float = 100.0) -> float:
    """Return a number to the twelfth digit of `size`, as a share of it.

    So what is equal on paper is equal: the sums, means and differences of numbers as large
    as `size` differ in the sixteenth, by the order of rounding.
    """
    return round(value / size, 12)


def seconds(run: Recorded) -> float:
    """Return the time of all epochs, without evaluation."""
    return sum(map(taken, run.rows))


def taken(row: Row) -> float:
    """Return the seconds of an epoch and of the scan of all images that ended it."""
    return float(row.get("seconds", 0.0) + row.get("scan_seconds", 0.0))


def percent(spread: Spread) -> str:
    """Return an accuracy as text."""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.2f}"
    return f"{spread.mean:.2f}{deviation}"


def summary(group: Group, value: Value) -> str:
    """Return an accuracy of a group, and how many of its runs diverged."""
    spread, lost = group.spread(value), len(group.diverged)
    count = f"{lost} of {len(group.runs)} diverged" if lost else MISSING
    if spread is None:
        return count
    return f"{percent(spread)} ({count})" if lost else percent(spread)


def number(value: float) -> str:
    """Return a number in as few digits as tell it from all others."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def quantity(value: float | str, error: float | str | None = None) -> str:
    """Return a number, to the digits that its error leaves, as text."""
    value, error = float(value), float("nan" if error is None else error)
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
    digits = 1 - math.floor(math.log10(error))  # two digits of the error
    if not -3 < digits < 6:
        return f"{value:.3g} ± {error:.1g}"
    return f"{value:,.{max(digits, 0)}f} ± {error:,.{max(digits, 0)}f}"


def arranged(
    groups: Sequence[Group], name: Callable[[Config], str], place: Callable[[Config], float]
) -> dict[str, dict[float, Group]]:
    """Return groups by a name, and then by a number, ascending."""
    found: dict[str, dict[float, Group]] = {}
    for group in sorted(groups, key=lambda group: place(group.config)):
        found.setdefault(name(group.config), {})[place(group.config)] = group
    order = dict.fromkeys(name(group.config) for group in groups)
    return {one: found[one] for one in order}


def series_of(groups: Mapping[float, Group]) -> Series:
    """Return the accuracies of runs that did not diverge, for pictures."""
    return Series(
        last={where: group.values(last) for where, group in groups.items()},
        best={where: group.values(best) for where, group in groups.items()},
    )


def grouped(runs: Sequence[Recorded]) -> list[Group]:
    """Return the groups of any runs, each where its first is, with names that differ."""
    keys = [repr((settings_of(run), run.mixed and run.path)) for run in runs]
    known: dict[str, set[str]] = {key: set() for key in keys}
    for key, run in zip(keys, runs, strict=True):
        known[key] |= {run.data} if run.data else set()
    rows: dict[tuple[str, str], list[Recorded]] = {}
    for key, run in zip(keys, runs, strict=True):
        # A run without a checkpoint does not say what images it saw.
        only = next(iter(known[key])) if len(known[key]) == 1 else ""
        rows.setdefault((key, run.data or only), []).append(run)
    names = names_of([row[0] for row in rows.values()])
    return [group_of(label, row) for label, row in zip(names, rows.values(), strict=True)]


def names_of(runs: Sequence[Recorded]) -> list[str]:
    """Return the shortest names that differ: method, settings, directory or path."""
    differ = differing(runs)

    def told_apart(run: Recorded) -> str:
        place = runs.index(run)
        parts = [f"{k} {plain(v[place])}" for k, v in differ.items() if k not in NAMED]
        return ", ".join([name(run.config), *parts]) if len(parts) < 3 else ""

    return distinct(
        runs,
        lambda run: name(run.config),
        told_apart,
        lambda run: real(run.path).name,
        lambda run: str(run.path),
    )


def plain(value: Any) -> str:
    """Return the value of a setting as text."""
    return number(value) if isinstance(value, float) else str(value)


def listed(earlier: Sequence[Mapping[str, Any]]) -> str:
    """Return settings that a run had one after the other as text."""
    texts = (", ".join(f"{n} {plain(v)}" for n, v in one.items()) for one in earlier)
    return "; ".join(dict.fromkeys(texts))


def settings_of(run: Recorded) -> dict[str, Any]:
    """Return the settings that decide on a run, and on what it costs, beside the seed.

    One of them is m, how many images a perturbation was found on, which the ranks decide.
    """
    values = of_roles(plain_values(run.config), EXACT) | {"device": run.config.device}
    if run.weights is not None:
        values["weights"] = f"{values['weights']} {run.weights[:12]}"
    whole = run.m == [f"{run.config.batch_size:g}"]
    values["m"] = "the batch" if whole else " then ".join(run.m)
    return {key: values[key] for key in sorted(values.keys() - {"seed"})}


def versions_of(runs: Sequence[Recorded]) -> dict[str, list[str]]:
    """Return versions and hardware of all parts of runs by name, each value once."""
    found: dict[str, list[str]] = {}
    for machine in (machine for run in runs for machine in run.machines):
        for what, value in machine.items():
            values = found.setdefault(what, [])
            values += [value] * (bool(value) and value not in values)
    return found


def differing(runs: Sequence[Recorded]) -> dict[str, list[Any]]:
    """Return settings that differ between runs, with their values.

    Beside them, images that do, and the settings that a part of a run had.
    """
    all_values = [settings_of(run) for run in runs]
    columns = {key: [values[key] for values in all_values] for key in all_values[0]}
    found = {
        key: values
        for key, values in columns.items()
        if any(value != values[0] for value in values)
    }
    if len({run.data for run in runs} - {None}) > 1:
        found["images"] = [run.data and run.data[:12] for run in runs]
    before = [listed(run.earlier) or "the same" for run in runs]
    if len({*before}) > 1:
        found["earlier"] = before
    return found
