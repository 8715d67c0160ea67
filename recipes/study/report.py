"""One report of any runs: tables, remarks, a picture, and the files that hold them."""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from recipes import plots
from recipes.settings import method_expression
from recipes.settings.config import Config, plain_values
from recipes.study.groups import (
    MISSING,
    Group,
    Spread,
    Value,
    best,
    differing,
    last,
    levelled,
    listed,
    percent,
    plain,
    quantity,
    seconds,
    taken,
    versions_of,
)
from recipes.study.runs import write_json
from recipes.terminal.console import Display
from recipes.terminal.hardware import hardware
from recipes.terminal.legible import quoted
from recipes.train.directory import Row
from recipes.train.recorded import Recorded, chosen_by
from samfn.storage import files

PASSES = "gradient passes over the training set"
Axis = Callable[[Recorded], list[float]]
"""A run -> the place of each epoch."""
Table = tuple[list[str], list[list[str]]]
"""Columns, and rows of cells."""


class Page(NamedTuple):
    """Tables, remarks and a picture of runs."""

    title: str
    groups: Sequence[Group]
    parts: Mapping[str, tuple[str, Table]]
    """Tables by their headings, each with what is to be known before it. A single one
    stands without its heading."""
    draw: Callable[[Path], bool]
    """Draws to a file; returns whether there was anything to draw."""
    remarks: Sequence[str] = ()
    """Warnings to a reader of the tables."""
    notes: Sequence["Note"] = ()
    """Rows that cannot be compared."""


class Column(NamedTuple):
    """A column of a table with a row for each group."""

    head: str
    cell: Callable[[Group, Group], str]
    """Group, and that of the first row -> text."""
    value: Value | None = None
    """A number of each run, if it is one."""


def measured(spread: Spread) -> str:
    """Return a number to the digits that its deviation leaves."""
    return quantity(spread.mean, spread.deviation)


def numeric(head: str, value: Value, text: Callable[[Spread], str] = measured) -> Column:
    """Return the column of a number, its mean and deviation over the runs of a group."""

    def cell(group: Group, first: Group) -> str:
        spread = group.spread(value)
        return MISSING if spread is None else text(spread)

    return Column(head, cell, value)


def gradients(run: Recorded) -> float | None:
    """Return the gradients of a batch that a step took, on average, if that is known."""
    count, share = method_expression.gradients(run.config.method), run.share_perturbed
    if share is None or (count is None and share > 0):
        return None
    return 1 + ((count or 1.0) - 1) * share


def passes(run: Recorded) -> list[float] | None:
    """Return the gradients of each training image after each epoch, if that is known."""
    count = method_expression.gradients(run.config.method)
    if count is None and any(run.perturbed):
        return None
    more, parts = (count or 1.0) - 1, zip(run.steps, run.perturbed, strict=True)
    each = [steps * (1 + more * share) for steps, share in parts]
    return [done / run.steps_per_epoch for done in accumulate(each)]


def _usual(number: Callable[[Row], float]) -> Value:
    """Return what gives the median of a number over the epochs of a run.

    Where epochs are not alike, as some have SAM, a scan or fewer images, it is the mean.
    """

    def value(run: Recorded) -> float | None:
        alike = len({*run.perturbed}) == 1 and run.config.selection.select == "all"
        of = statistics.median if alike else statistics.mean
        return of([*map(number, run.rows)]) if run.rows else None

    return value


EXPLAINED = {
    "accuracy": "Test accuracy, mean ± standard deviation of the runs of a row; the best"
    " epoch is chosen by the set that the last column names. p is that of a t-test of the"
    " last epoch against the first row, paired by seeds, two-sided. Loss and accuracy of"
    " training are those of the last epoch, with its augmentation and wrong labels.",
    "cost": "Of training and scans, without evaluation: median over the epochs of a run, or"
    " mean where they are not alike, as SAM begins late or images are selected.",
    "settings": "Those that differ, but for the seed.",
}


class Note(NamedTuple):
    """A row that cannot be compared with the first."""

    table: str
    """Accuracy, cost or sharpness."""
    name: str
    """Name of the row."""
    text: str


def task(config: Config) -> str:
    """Return what all runs have in common, for titles."""
    text = f"{config.data}, {config.model}, {config.epochs} epochs"
    if config.images.label_noise:
        text += f", {100 * config.images.label_noise:g} % wrong labels"
    return text


def judge(config: Config) -> str:
    """Return the set that chooses epochs, and the best of several runs."""
    if chosen_by(config) == "test":
        return "the test set itself, which flatters"
    return "the validation set" + " with wrong labels" * config.images.noisy_validation


def about(groups: Sequence[Group]) -> str:
    """Return what the numbers of a table are, in a sentence."""
    seeds = {run.config.seed for group in groups for run in group.runs}
    spreads = f", mean ± standard deviation of {len(seeds)} seeds" * (len(seeds) > 1)
    split = chosen_by(groups[0].config)
    return (
        f"Test accuracy in percent{spreads}; the best epoch is chosen by the {split} set."
    )


def seeds(group: Group) -> str:
    """Return the number of runs and their seeds, and how many diverged."""
    found = ", ".join(str(run.config.seed) for run in group.runs)
    lost = f"; {len(group.diverged)} diverged" if group.diverged else ""
    return f"{len(group.runs)}: seed{'s' * (len(group.runs) > 1)} {found}{lost}"


def epochs(group: Group) -> str:
    """Return how far the runs are."""
    asked = group.config.epochs
    done = sorted({run.done for run in group.runs})
    if done == [asked]:
        return str(asked)
    return f"{' to '.join(map(str, dict.fromkeys((done[0], done[-1]))))} of {asked}"


def ratio(group: Group, first: Group) -> str:
    """Return how many times as long as in the first row an epoch takes."""
    one, base = (found.spread(_usual(taken)) for found in (group, first))
    return f"{one.mean / base.mean:.2f}" if one and base and base.mean else MISSING


def paired(group: Group, first: Group) -> str:
    """Return p of the difference of last epochs from the first row, over common seeds.

    There is none of fewer than two seeds, nor where all differ by the same.
    """
    one, base = (
        {
            run.config.seed: value
            for run in found.counted
            if (value := last(run)) is not None
        }
        for found in (group, first)
    )
    common = one.keys() & base.keys()
    differences = [levelled(one[seed] - base[seed]) for seed in common]
    if group is first or len({*differences}) < 2:
        return MISSING
    # It is slow to import, and a report is written once.
    from scipy.stats import ttest_1samp

    p = float(ttest_1samp(differences, 0.0).pvalue)
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _at_end(name: str) -> Value:
    """Return what gives a number of the last epoch of a run."""
    return lambda run: run.rows[-1].get(name) if run.rows else None


Tables = Mapping[str, Mapping[str, Column]]
"""Columns by their names in the data file, of each table by its heading."""
TABLES: Tables = {
    "accuracy": {
        "runs": Column("runs", lambda group, _: seeds(group)),
        "epochs": Column("epochs", lambda group, _: epochs(group)),
        "last": numeric("last epoch, %", last, percent),
        "best": numeric("best epoch, %", best, percent),
        "p": Column("p", paired),
        "train_loss": numeric("training loss", _at_end("train_loss")),
        "train_accuracy": numeric("training, %", _at_end("train_accuracy")),
        "chosen_by": Column("chosen by", lambda group, _: chosen_by(group.config)),
    },
    "cost": {
        "seconds": numeric("s/epoch", _usual(taken)),
        "images_per_second": numeric("images/s", _usual(itemgetter("images_per_second"))),
        "gradients": numeric("gradients/step", gradients),
        "ratio": Column("s/epoch against the first", ratio),
    },
}


def side_by_side(
    groups: Sequence[Group],
    tables: Tables,
    title: str = "",
    explained: Mapping[str, str] = EXPLAINED,
    split: str = "train",
) -> Page:
    """Return the page that holds groups against each other.

    Args:
        groups: the rows.
        tables: their columns.
        title: of page and picture; empty is "Runs compared", and what they were trained on.
        explained: what is to be known of each table.
        split: that the loss is of in the table of sharpness.
    """
    notes = notes_of(groups, tables, split)
    parts = {
        heading: (
            explained[heading],
            _table(groups, columns, {n.name for n in notes if n.table == heading}),
        )
        for heading, columns in tables.items()
    }
    if differ := differing([group.runs[0] for group in groups]):
        rows = [
            ["setting", *(group.name for group in groups)],
            *([key, *map(plain, values)] for key, values in differ.items()),
        ]
        if len(groups) > len(plots.COLOURS):  # Columns would be too many.
            rows = [[*row] for row in zip(*rows, strict=True)]
        parts["settings"] = explained["settings"], (rows[0], rows[1:])
    remarks = remarks_of(groups, notes)
    tasks = sorted({f"{group.config.data}, {group.config.model}" for group in groups})
    picture = partial(draw, groups, title or "; ".join(tasks), times="cost" in tables)
    return Page(title or "Runs compared", groups, parts, picture, remarks, notes)


def _table(
    groups: Sequence[Group], columns: Mapping[str, Column], marked: Collection[str]
) -> Table:
    rows = [
        [
            group.name + " *" * (group.name in marked),
            *(column.cell(group, groups[0]) for column in columns.values()),
        ]
        for group in groups
    ]
    return ["", *(column.head for column in columns.values())], rows


def notes_of(groups: Sequence[Group], tables: Tables, split: str) -> list[Note]:
    """Return what of the other rows cannot be compared with the first."""
    base = groups[0].runs
    return [
        Note(table, group.name, text)
        for group in groups[1:]
        for table, text in unlike(base, group.runs, split)
        if table in tables
    ]


def unlike(
    base: Sequence[Recorded], row: Sequence[Recorded], split: str
) -> list[tuple[str, str]]:
    """Return the tables in which the runs of two rows cannot be compared, and why."""
    one, other = base[0], row[0]  # In all but their machines, runs of a row are alike.
    a, b = one.config, other.config
    data = (a.data, a.images.image_size) != (b.data, b.images.image_size)
    data = data or bool(one.data and other.data and one.data != other.data)
    network = (a.model, a.network.layout) != (b.model, b.network.layout)
    labels = any(
        getattr(a.images, name) != getattr(b.images, name)
        for name in ("label_noise", "validation", "noisy_validation")
    )
    machine = elsewhere(base, row)
    return [
        (table, text)
        for table, holds, text in (
            ("accuracy", data, "other images or classes"),
            ("cost", bool(machine), f"trained with {machine}"),
            ("sharpness", data, "the loss is of other images"),
            ("sharpness", network, "weights of another network have another scale"),
            (
                "sharpness",
                labels and split == "train",
                "the loss is of other labels or images",
            ),
        )
        if holds
    ]


def elsewhere(base: Sequence[Recorded], row: Sequence[Recorded]) -> str:
    """Return in what versions and hardware of runs differ from those of a row."""
    one, other = versions_of(base), versions_of(row)
    names = [name for name in one if name in other and {*one[name]} != {*other[name]}]
    texts = [f"{n} {_joined(other[n])}, not {_joined(one[n])}" for n in names]
    a, b = base[0].config.device, row[0].config.device
    return "; ".join(texts) or (f"--device {b}, not {a}" if a != b else "")


def mixture(runs: Sequence[Recorded]) -> str:
    """Return versions and hardware that are not the same of runs, or of parts of one."""
    found = versions_of(runs).items()
    return "; ".join(f"{name} {_joined(each)}" for name, each in found if len(each) > 1)


def _joined(values: Sequence[str]) -> str:
    return " and ".join(values)


def remarks_of(groups: Sequence[Group], notes: Sequence[Note]) -> list[str]:
    """Return what is odd about rows and runs."""
    found = [
        f"* {note.name}, {note.table}: not comparable with {groups[0].name}: {note.text}"
        for note in notes
    ]
    for group in groups:
        counts = Counter(run.config.seed for run in group.runs)
        if again := [str(seed) for seed, count in counts.items() if count > 1]:
            text = f"{group.name}: seed {', '.join(again)} is there more than once"
            found.append(f"{text}, so that ± is less than that of chance")
        if several := mixture(group.runs):
            text = f"{group.name}: trained with {several}"
            found.append(f"{text}; so its seconds are not of one machine")
        for run in group.runs:
            if why := group.diverged.get(run.path):
                found.append(f"{run.path} diverged, and is in no mean: {why}")
            elif not run.ended:
                found.append(f"{run.path}: {run.done} of {run.config.epochs} epochs")
            if run.earlier:
                text = f"{run.path}: a part was trained with {listed(run.earlier)}"
                found.append(f"{text}; so it is a row of its own")
            if len(run.m) > 1:
                text = f"a perturbation was found on m = {' then '.join(run.m)} images"
                found.append(f"{run.path}: {text}; so it is a row of its own")
    return found


def draw(groups: Sequence[Group], title: str, path: Path, *, times: bool) -> bool:
    """Draw the curves of all runs that did not diverge; return whether there is one.

    With `times`, they are drawn against seconds, too.
    """
    shown = {g.name: [run for run in g.counted if run.rows] for g in groups}
    axes = axes_of([run for runs in shown.values() for run in runs], times)
    curves = {n: [curve(run, axes) for run in runs] for n, runs in shown.items() if runs}
    if curves:
        plots.side_by_side(curves, path, title)
    return bool(curves)


def rank(groups: Sequence[Group], title: str, path: Path) -> bool:
    """Draw last and best epoch, where curves would be too many."""
    shown = [group for group in groups if group.values(last)]
    if shown:
        ends, tops = (
            {group.name: group.values(value) for group in shown} for value in (last, best)
        )
        plots.ranking(ends, tops, path, title)
    return bool(shown)


def axes_of(runs: Sequence[Recorded], times: bool) -> dict[str, Axis]:
    """Return what curves of runs are drawn against."""
    axes: dict[str, Axis] = {"epoch": _epochs}
    counted = [passes(run) for run in runs]
    # Epochs of one gradient a step would be drawn twice.
    if None not in counted and counted != [*map(_epochs, runs)]:
        axes[PASSES] = lambda run: passes(run) or []
    if times:
        axes["seconds of training"] = lambda run: [*accumulate(map(taken, run.rows))]
    return axes


def _epochs(run: Recorded) -> list[float]:
    return [float(row["epoch"]) for row in run.rows]


def curve(run: Recorded, axes: Mapping[str, Axis]) -> plots.Curve:
    """Return loss and accuracy of a run against all that it is drawn against."""
    x = {name: places(run) for name, places in axes.items()}
    y = {
        "training loss": [row["train_loss"] for row in run.rows],
        "test accuracy (%)": [row[run.test] for row in run.rows],
    }
    return plots.Curve(x, y)


def _row(group: Group, tables: Tables, records: Mapping[Path, Any]) -> dict[str, Any]:
    found = {
        name: group.spread(column.value)
        for columns in tables.values()
        for name, column in columns.items()
        if column.value
    }
    runs = [
        {
            "path": str(run.path),
            "seed": run.config.seed,
            "epochs": run.done,
            "ended": run.ended,
            "diverged": group.diverged.get(run.path),
            "last": last(run) if run in group.counted else None,
            "best": best(run) if run in group.counted else None,
            "best_epoch": run.best and run.best["epoch"],
            "seconds": seconds(run),
            "versions": dict(run.versions),
            "before": run.before,
            "m": run.m,
            "earlier": run.earlier,
            "data": run.data,
            "sharpness": records.get(run.path),
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


def versions(device: str) -> dict[str, str]:
    """Return when and with what a report was made."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def called(program: str, args: Sequence[str]) -> str:
    """Return a command as it is typed, an arm a line."""
    words = ((" \\\n    " if arg == "--arm" else " ") + quoted(arg) for arg in args)
    return program + "".join(words)


def write(
    page: Page,
    command: str,
    device: str,
    output: Path,
    stem: str,
    *,
    tables: Tables = TABLES,
    records: Mapping[Path, Any] = MappingProxyType({}),
    **more: Any,
) -> dict[str, str]:
    """Write data, picture and report; return where they are.

    Args:
        page: what is said.
        command: that makes the report again.
        device: that it is made on.
        output: directory of the files.
        stem: name of data, picture and report.
        tables: whose numbers are data.
        records: what was measured of runs beside, by their paths.
        more: what the data file holds beside.

    Raises:
        OSError: one cannot be written; it is what it was.
    """
    known = {
        "command": command,
        **versions(device),
        "rows": [_row(group, tables, records) for group in page.groups],
        "settings": differing([group.runs[0] for group in page.groups]),
        "not_comparable": [note._asdict() for note in page.notes],
    }
    write_json(output / f"{stem}.json", known | more)
    drawn = page.draw(output / f"{stem}.png")
    with files.replacing(output / f"{stem}.md") as temporary:
        text = document(page, f"{stem}.png" if drawn else None, known)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    names = {"report": f"{stem}.md"} | ({"picture": f"{stem}.png"} if drawn else {})
    names |= {"data": f"{stem}.json"}
    return {k: str(output / name) for k, name in names.items()}


def files_of(stem: str) -> list[str]:
    """Return the names of the files that `write` writes."""
    return [f"{stem}.{ending}" for ending in ("json", "png", "md")]


def show(page: Page, display: Display) -> None:
    """Print tables and remarks."""
    for _, table in page.parts.values():
        display.table(*table)
    for remark in page.remarks:
        display.say(remark)


def document(page: Page, picture: str | None, known: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    title = printable(page.title)
    parts = [f"# {title}", f"![{title}]({picture})" if picture else ""]
    for heading, (text, table) in page.parts.items():
        parts += [f"## {heading.capitalize()}" if len(page.parts) > 1 else ""]
        parts += [text, markdown(table)]
    if page.remarks:
        said = (_in_a_cell(remark.removeprefix("* ")) for remark in page.remarks)
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in said)]
    parts += [
        f"{known['date']}, {known['hardware']}, torch {known['torch']},"
        f" Python {known['python']}. Trained with: {trained_with(page.groups)}.",
        "```\n" + "\n".join(map(printable, known["command"].split("\n"))) + "\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_in_a_cell, line))} |" for line in lines)


def _in_a_cell(text: str) -> str:
    return printable(" ".join(text.split())).replace("|", r"\|")


def printable(text: str) -> str:
    """Return text in one line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def trained_with(groups: Sequence[Group]) -> str:
    """Return the versions and devices that the runs tell of."""
    texts = dict.fromkeys(
        f"torch {machine['torch']} on {machine['device']}"
        for group in groups
        for run in group.runs
        for machine in run.machines
        if {"torch", "device"} <= machine.keys()
    )
    return printable(", ".join(texts)) or "unknown"
