"""Put runs of recipes.cifar_wrn side by side: curves, accuracy, cost and sharpness.

    python -m recipes.compare runs/SGD runs/SAM
    python -m recipes.compare runs/* --no-sharpness       # at once, from what runs recorded
    python -m recipes.compare runs/digits-* --output report

Runs that differ in nothing but the seed are one row: mean ± standard deviation of a sample.
What sharpness.json in a run's directory holds of the same checkpoint is not measured again.
"""

import math
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from recipes import errors, plots, sharpness
from recipes.errors import ConfigError
from recipes.settings import method_expression
from recipes.settings.config import (
    FREE_ON_RESUME,
    PER_CALL,
    Config,
    choose_device,
    plain_values,
)
from recipes.sharpness import MISSING, Measuring, Record, quantity
from recipes.study.reports import versions
from recipes.study.runs import (
    among,
    checkpoint_of,
    distinct,
    labels,
    real,
    require_runs,
    write_json,
)
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.train import recorded
from recipes.train.recorded import Recorded as Run
from recipes.train.recorded import chosen_by
from recipes.train.running import name
from samfn.storage import files

PROGRAM = "python -m recipes.compare"
REPORT, PICTURE, DATA = "compare.md", "compare.png", "compare.json"
PASSES = "gradient passes over the training set"
# Settings that runs of one row may differ in.
ALIKE = (PER_CALL | FREE_ON_RESUME | {"seed"}) - {"device"}
NAMED = {"method", "rho", "rho_schedule", "rho_final"}  # what `name` says


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """Put runs side by side: curves, accuracy, cost and sharpness."""

    sharpness: bool = True
    """Also measure how sharp the minima are, where sharpness.json in a run's directory
    does not say it."""
    output: Path | None = None
    """Directory of the report; what it holds of another call is replaced. None is compare,
    beside the first run."""


class Group(NamedTuple):
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[Run]

    @property
    def config(self) -> Config:
        """Settings of all runs, but for the seed."""
        return self.runs[0].config


class Note(NamedTuple):
    """What cannot be compared with the first row."""

    table: str
    """Of which table: accuracy, cost or sharpness."""
    name: str
    """Of which row."""
    text: str


def main(args: Sequence[str] | None = None) -> int:
    """Compare; return the exit code."""
    given = sys.argv[1:] if args is None else args
    return cli.run(
        lambda display, _: compare(
            tyro.cli(Settings, prog=PROGRAM, args=given),
            shlex.join(["python", "-m", "recipes.compare", *given]),
            display,
        )
    )


def compare(settings: Settings, called: str, display: Display) -> int:
    """Read, measure, write the report, and show what it says."""
    settings = replace(settings, runs=among(settings.runs, display))
    require_runs(settings, 2)
    sharpness.validate(settings)
    if files_given := [path for path in settings.runs if path.is_file()]:
        raise ConfigError(f"expected directories of runs, got the file {files_given[0]}")
    output = settings.output or real(settings.runs[0]).parent / "compare"
    try:
        files.make_directory(output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from error
    groups = grouped([read(path, display) for path in settings.runs])
    records = measure(groups, settings, display) if settings.sharpness else {}
    report = Report(settings, called, groups, records)
    try:
        write_json(output / DATA, report.data())
        drawn = draw(output / PICTURE, groups)
        with files.replacing(output / REPORT) as temporary:
            text = report.markdown(PICTURE if drawn else None)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        display.fail(f"cannot write {output}: {error}")
        return errors.NOT_WRITTEN
    for columns, rows in report.tables().values():
        display.table(columns, rows)
    for note in report.remarks():
        display.say(note)
    facts = {"report": str(output / REPORT), "data": str(output / DATA)}
    display.facts("compared", facts | ({"picture": str(output / PICTURE)} if drawn else {}))
    return 0


def read(path: Path, display: Display) -> Run:
    """Read what a run recorded; what of it is damaged is told and left out.

    Raises:
        ConfigError: as `recorded.read`.
    """
    run = recorded.read(path, display.warn)
    if not run.rows:
        display.warn(f"{path} has no epoch recorded")
    return run


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return the runs in rows, each where its first is, with names that differ."""
    keys = [repr(settings_of(run)) for run in runs]
    known: dict[str, set[str]] = {key: set() for key in keys}
    for key, run in zip(keys, runs, strict=True):
        known[key] |= {run.data} if run.data else set()
    rows: dict[tuple[str, str], list[Run]] = {}
    for key, run in zip(keys, runs, strict=True):
        # A run without a checkpoint does not say what images it saw.
        only = next(iter(known[key])) if len(known[key]) == 1 else ""
        rows.setdefault((key, run.data or only), []).append(run)
    firsts = [row[0] for row in rows.values()]
    differ = differing(firsts)

    def told_apart(run: Run) -> str:
        place = firsts.index(run)
        parts = [f"{k} {plain(v[place])}" for k, v in differ.items() if k not in NAMED]
        return ", ".join([name(run.config), *parts]) if len(parts) < 3 else ""

    names = distinct(
        firsts,
        lambda run: name(run.config),
        told_apart,
        lambda run: real(run.path).name,
        lambda run: str(run.path),
    )
    return [Group(n, row) for n, row in zip(names, rows.values(), strict=True)]


def settings_of(run: Run) -> dict[str, Any]:
    """Return the settings that decide on a run beside the seed."""
    values = plain_values(run.config)
    return {key: values[key] for key in sorted(values.keys() - ALIKE)}


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return settings that differ between runs, with their values, and images that do."""
    all_values = [settings_of(run) for run in runs]
    columns = {key: [values[key] for values in all_values] for key in all_values[0]}
    found = {
        key: values
        for key, values in columns.items()
        if any(value != values[0] for value in values)
    }
    if len({run.data for run in runs} - {None}) > 1:
        found["images"] = [run.data and run.data[:12] for run in runs]
    return found


def measure(
    groups: Sequence[Group], settings: Settings, display: Display
) -> dict[Path, Record]:
    """Return how sharp each run ended, as it is known or else measured."""
    runs = [run for group in groups for run in group.runs]
    names = labels([(run.path, run.config, "") for run in runs])
    found, missing = {}, {}
    for shown, run in zip(names, runs, strict=True):
        record = sharpness.known(run.path, run.config, settings, display)
        if record is not None:
            found[run.path] = record
            sharpness.tell_left_out(shown, record, display)
        elif checkpoint_of(run.path, run.config, last=settings.last) is not None:
            missing[shown] = run.path
    if found:
        display.say(f"sharpness of {len(found)} of {len(runs)} runs is known already")
    for record in sharpness.measured(missing, settings, display, lenient=True):
        path = Path(record["path"])
        found[path] = record
        try:
            sharpness.keep(record, sharpness.file_of(path), display)
        except OSError as error:
            display.warn(f"cannot write {sharpness.file_of(path)}: {error}")
    return found


# What is known of a run, by the name and the heading of its column.
Value = Callable[[Run], float | None]
ACCURACY: dict[str, tuple[str, Value]] = {
    "last": ("last epoch, %", lambda run: run.rows[-1][run.test] if run.rows else None),
    "best": ("best epoch, %", lambda run: run.best[run.test] if run.best else None),
    "train_loss": (
        "training loss",
        lambda run: run.rows[-1]["train_loss"] if run.rows else None,
    ),
}
COST: dict[str, tuple[str, Value]] = {
    "seconds": ("s/epoch", lambda run: median(run, "seconds")),
    "images_per_second": ("images/s", lambda run: median(run, "images_per_second")),
    "gradients": ("gradients/step", lambda run: gradients(run.config)),
}


def median(run: Run, column: str) -> float | None:
    """Return the median over the epochs of a run."""
    return statistics.median(row[column] for row in run.rows) if run.rows else None


def gradients(config: Config) -> float | None:
    """Return the gradients of a batch that a step takes, if the method says it."""
    return 1.0 if config.rho == 0 else method_expression.gradients(config.method)


class Spread(NamedTuple):
    """Mean and standard deviation over the runs of a row."""

    mean: float
    deviation: float | None
    """Of a sample; None is that of a single run."""
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """Return the spread of what is known, or None if nothing is."""
        known = [float(value) for value in values if value is not None]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.mean(known), deviation, known)


class Report(NamedTuple):
    """What is said of runs, in tables, in Markdown and as JSON."""

    settings: Settings
    called: str
    groups: list[Group]
    records: dict[Path, Record]

    def spread(self, group: Group, value: Value) -> Spread | None:
        """Return mean and deviation of a value over the runs of a row."""
        return Spread.of([value(run) for run in group.runs])

    def sharpness(self, column: str) -> Value:
        """Return what looks a number up that was measured."""

        def value(run: Run) -> float | None:
            number = self.records.get(run.path, {"numbers": {}})["numbers"].get(column)
            known = number and math.isfinite(float(number["value"]))
            return float(number["value"]) if known else None

        return value

    def values(self) -> dict[str, dict[str, tuple[str, Value]]]:
        """Return all columns by their tables."""
        found = {"accuracy": ACCURACY, "cost": COST}
        if self.records:
            found["sharpness"] = {
                key: (text, self.sharpness(key))
                for key, text in sharpness.columns(self.settings).items()
            }
        return found

    def data(self) -> dict[str, Any]:
        """Return all that is known, as JSON holds it."""
        return {
            "command": self.called,
            **versions(str(choose_device("auto"))),
            "rows": [self.record(group) for group in self.groups],
            "settings": differing([group.runs[0] for group in self.groups]),
            "measured": sharpness.asked(self.settings) if self.settings.sharpness else None,
            "not_comparable": [note._asdict() for note in self.notes()],
        }

    def record(self, group: Group) -> dict[str, Any]:
        """Return what the data file says of a row."""
        found = {
            column: self.spread(group, value)
            for columns in self.values().values()
            for column, (_, value) in columns.items()
        }
        runs = [
            {
                "path": str(run.path),
                "seed": run.config.seed,
                "epochs": run.done,
                "ended": run.ended,
                "best_epoch": run.best and run.best["epoch"],
                "versions": dict(run.versions),
                "data": run.data,
                "sharpness": self.records.get(run.path),
                "metrics": run.rows,
            }
            for run in group.runs
        ]
        return {
            "name": group.name,
            "chosen_by": chosen_by(group.config),
            "numbers": {key: spread and spread._asdict() for key, spread in found.items()},
            "config": plain_values(group.config),
            "runs": runs,
        }

    def notes(self) -> list[Note]:
        """Return what of the other rows cannot be compared with the first."""
        (base, *_), found = self.groups[0].runs, []
        for group in self.groups[1:]:
            for table, text in unlike(base, group.runs[0], self.settings):
                if table != "sharpness" or self.records:
                    found.append(Note(table, group.name, text))
        return found

    def remarks(self) -> list[str]:
        """Return what a reader of the tables must know."""
        first = self.groups[0].name
        found = [
            f"* {note.name}, {note.table}: not comparable with {first}: {note.text}"
            for note in self.notes()
        ]
        for group in self.groups:
            counts = Counter(run.config.seed for run in group.runs)
            if again := [str(seed) for seed, count in counts.items() if count > 1]:
                text = f"{group.name}: seed {', '.join(again)} is there more than once"
                found.append(f"{text}, so that ± is less than that of chance")
            found += [
                f"{run.path}: {run.done} of {run.config.epochs} epochs"
                for run in group.runs
                if not run.ended
            ]
            measured = sum(run.path in self.records for run in group.runs)
            if self.settings.sharpness and measured < len(group.runs):
                text = f"{group.name}: sharpness of {measured} of {len(group.runs)} runs"
                found.append(f"{text}; the others have no checkpoint that can be read")
        return found

    def tables(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        """Return heads and rows of all tables, by their titles."""
        first, values = self.groups[0], self.values()
        against = f"s/epoch against {first.name}"
        heads = {title: [text for text, _ in c.values()] for title, c in values.items()}
        found = {
            "accuracy": (
                ["", "runs", "epochs", *heads["accuracy"], "chosen by"],
                [
                    [seeds(g), epochs(g), *self.cells("accuracy", g), chosen_by(g.config)]
                    for g in self.groups
                ],
            ),
            "cost": (
                ["", *heads["cost"], against],
                [[*self.cells("cost", g), self.ratio(g, first)] for g in self.groups],
            ),
        }
        if self.records:
            rows = [self.cells("sharpness", group) for group in self.groups]
            found["sharpness"] = (["", *heads["sharpness"]], rows)
        marked = {(note.table, note.name) for note in self.notes()}
        for title, (_, rows) in found.items():
            for group, row in zip(self.groups, rows, strict=True):
                row.insert(0, group.name + " *" * ((title, group.name) in marked))
        if differ := differing([group.runs[0] for group in self.groups]):
            rows = [[key, *map(plain, values)] for key, values in differ.items()]
            found["settings"] = (["setting", *(group.name for group in self.groups)], rows)
        return found

    def cells(self, title: str, group: Group) -> list[str]:
        """Return mean and deviation of all columns of a table."""
        return [
            written(column, self.spread(group, value))
            for column, (_, value) in self.values()[title].items()
        ]

    def ratio(self, group: Group, first: Group) -> str:
        """Return how many times as long as in the first row an epoch takes."""
        spreads = [self.spread(g, COST["seconds"][1]) for g in (group, first)]
        one, base = (spread.mean if spread else 0.0 for spread in spreads)
        return f"{one / base:.2f}" if one and base else MISSING

    def markdown(self, picture: str | None) -> str:
        """Return the report."""
        lines = ["# Runs compared", ""]
        if picture:
            lines += [f"![Training loss and test accuracy]({picture})", ""]
        for title, (columns, rows) in self.tables().items():
            lines += [f"## {title.capitalize()}", "", EXPLAINED[title], ""]
            rule = ["---"] * len(columns)
            lines += [f"| {' | '.join(map(cell, row))} |" for row in (columns, rule, *rows)]
            lines += [""]
            if title == "sharpness":
                terms = sharpness.legend(self.settings).items()
                lines += [f"- {term}: {text}" for term, text in terms if term != "±"]
                lines += [f"- {self.settings.images:,} {self.settings.kind} images", ""]
        remarks = [f"- {cell(remark.removeprefix('* '))}" for remark in self.remarks()]
        if remarks:
            lines += ["## To be known", "", *remarks, ""]
        here = versions(str(choose_device("auto")))
        lines += [
            f"{here['date']}, {here['hardware']}, torch {here['torch']},"
            f" Python {here['python']}. Trained with: {trained_with(self.groups)}.",
            "",
            f"    {printable(self.called)}",
            "",
        ]
        return "\n".join(lines)


EXPLAINED = {
    "accuracy": "Of the test set, mean ± standard deviation of the runs of a row; the best"
    " epoch is that of the set it was chosen by.",
    "cost": "Median over the epochs of a run, of training without evaluation.",
    "sharpness": "Of the best epochs, or those that the command asks for; ± as above.",
    "settings": "Those that differ, but for the seed.",
}


def unlike(one: Run, other: Run, settings: Settings) -> list[tuple[str, str]]:
    """Return the tables in which two runs cannot be compared, and why."""
    a, b = one.config, other.config
    data = (a.data, a.image_size) != (b.data, b.image_size)
    data = data or bool(one.data and other.data and one.data != other.data)
    network = (a.model, a.layout) != (b.model, b.layout)
    labels = (a.label_noise, a.validation) != (b.label_noise, b.validation)
    machine = a.device != b.device or bool(
        one.versions and other.versions and one.versions != other.versions
    )
    return [
        (table, text)
        for table, holds, text in (
            ("accuracy", data, "other images or classes"),
            ("cost", machine, "trained on another device, or by another torch"),
            ("sharpness", data, "the loss is of other images"),
            ("sharpness", network, "weights of another network have another scale"),
            (
                "sharpness",
                labels and settings.split == "train",
                "the loss is of other labels or images",
            ),
        )
        if holds
    ]


def seeds(group: Group) -> str:
    """Return the number of runs and their seeds."""
    found = ", ".join(str(run.config.seed) for run in group.runs)
    return f"{len(group.runs)}: seed{'s' * (len(group.runs) > 1)} {found}"


def epochs(group: Group) -> str:
    """Return how far the runs are."""
    asked = group.config.epochs
    done = sorted({run.done for run in group.runs})
    if done == [asked]:
        return str(asked)
    return f"{' to '.join(map(str, dict.fromkeys((done[0], done[-1]))))} of {asked}"


def written(column: str, spread: Spread | None) -> str:
    """Return mean and deviation as text."""
    if spread is None:
        return MISSING
    if column in ("last", "best"):
        deviation = "" if spread.deviation is None else f" ± {spread.deviation:.2f}"
        return f"{spread.mean:.2f}{deviation}"
    return quantity(spread.mean, spread.deviation)


def plain(value: Any) -> str:
    """Return the value of a setting as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell(text: str) -> str:
    """Return text that Markdown shows in one cell of a table."""
    return printable(text).replace("|", "\\|")


def printable(text: str) -> str:
    """Return text in one line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def trained_with(groups: Sequence[Group]) -> str:
    """Return the versions and devices that the runs tell of."""
    texts = dict.fromkeys(
        f"torch {run.versions['torch']} on {run.versions['device']}"
        for group in groups
        for run in group.runs
        if {"torch", "device"} <= run.versions.keys()
    )
    return printable(", ".join(texts)) or "unknown"


def draw(path: Path, groups: Sequence[Group]) -> bool:
    """Draw the curves of all runs; return whether there is one."""
    counted = [gradients(group.config) for group in groups]
    curves: dict[str, list[plots.Curve]] = {}
    for group in groups:
        for run in (run for run in group.runs if run.rows):
            at = [float(row["epoch"]) for row in run.rows]
            x = {"epoch": at}
            # Epochs of one gradient a step would be drawn twice.
            if None not in counted and {*counted} != {1.0}:
                per_step = gradients(group.config) or 0.0
                x["gradient passes over the training set"] = [
                    epoch * per_step for epoch in at
                ]
            x["seconds of training"] = [*accumulate(row["seconds"] for row in run.rows)]
            y = {
                "training loss": [row["train_loss"] for row in run.rows],
                "test accuracy (%)": [row[run.test] for row in run.rows],
            }
            curves.setdefault(group.name, []).append(plots.Curve(x, y))
    if curves:
        tasks = sorted({f"{group.config.data}, {group.config.model}" for group in groups})
        plots.side_by_side(curves, path, "; ".join(tasks))
    return bool(curves)


if __name__ == "__main__":
    sys.exit(main())
