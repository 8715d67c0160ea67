"""Put runs of recipes.cifar_wrn side by side: curves, accuracy, cost and sharpness.

    python -m recipes.compare runs/SGD runs/SAM
    python -m recipes.compare runs/* --no-sharpness       # at once, from what runs recorded
    python -m recipes.compare runs/digits-* --output report

Runs that differ in nothing but the seed are one row: mean ± standard deviation of a sample.
What differs may be m, which ranks decide: on how many images a perturbation is found.
Sharpness that sharpness.json in a run's directory holds is not measured again.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes import errors, plots, sharpness
from recipes.errors import ConfigError
from recipes.settings.resolve import choose_device
from recipes.study import correlation, measurements, measures, report
from recipes.study.correlation import Pairs, Ranks
from recipes.study.groups import Group, Value, best, grouped, last
from recipes.study.measurements import Record
from recipes.study.measures import Measuring
from recipes.study.report import EXPLAINED, TABLES, Page, Tables, numeric
from recipes.study.runs import (
    among,
    checkpoint_of,
    labels,
    make_directory,
    make_way,
    real,
    validate,
)
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.train import recorded
from recipes.train.recorded import Recorded

PROGRAM = "python -m recipes.compare"
NAME = "compare"  # of all files but one
HEADING, PICTURE = "rank correlation", "correlation.png"


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """Put runs side by side: curves, accuracy, cost and sharpness."""

    sharpness: bool = True
    """Measurement of sharpness, unless sharpness.json in a run's directory has it."""
    output: Path | None = None
    """Directory of the report, in place of that of another call. None is compare, beside
    the first run."""


def main(args: Sequence[str] | None = None) -> int:
    """Compare; return the exit code."""
    given = sys.argv[1:] if args is None else args
    return cli.run(
        lambda display, _: compare(
            cli.parsed(Settings, prog=PROGRAM, args=given),
            report.called(PROGRAM, given),
            display,
        ),
        left="the sharpness that was measured of whole runs is kept",
    )


def compare(settings: Settings, command: str, display: Display) -> int:
    """Read, measure, write the report, and show what it says."""
    settings = replace(settings, runs=among(settings.runs, display))
    validate(settings, 2)
    if files_given := [path for path in settings.runs if path.is_file()]:
        raise ConfigError(f"expected directories of runs, got the file {files_given[0]}")
    if settings.sharpness:
        choose_device(settings.device)  # Or each run would be said not to be readable.
    output = settings.output or real(settings.runs[0]).parent / NAME
    make_directory(output)
    groups = grouped([read(path, display) for path in settings.runs])
    records = measure(groups, settings, display) if settings.sharpness else {}
    tables = tables_of(settings, records)
    page = page_of(settings, groups, tables, records)
    points = points_of(settings, page, tables, records)
    ranks = {name: correlation.ranks(rows.values()) for name, rows in points.items()}
    page = with_ranks(page, tables, ranks)
    try:
        made = [*report.files_of(NAME), PICTURE]
        make_way(output, made, PROGRAM, display.warn)
        if HEADING in page.parts:
            heads = {tables["sharpness"][name].head: rows for name, rows in points.items()}
            title = f"{'last' if settings.last else 'best'} epochs"
            plots.correlation(heads, output / PICTURE, title)
        written = report.write(
            page,
            command,
            str(choose_device("auto")),
            output,
            NAME,
            tables=tables,
            records=records,
            measured=measurements.asked(settings) if settings.sharpness else None,
            correlation=correlation.plain(ranks),
        )
    except OSError as error:
        display.fail(f"cannot write {output}: {error}")
        return errors.NOT_WRITTEN
    report.show(page, display)
    display.facts("compared", written)
    return 0


def read(path: Path, display: Display) -> Recorded:
    """Read what a run recorded; what of it is damaged is told and left out.

    Raises:
        ConfigError: as `recorded.read`.
    """
    run = recorded.read(path, display.warn)
    if not run.rows:
        display.warn(f"{path} has no epoch recorded")
    return run


def measure(
    groups: Sequence[Group], settings: Settings, display: Display
) -> dict[Path, Record]:
    """Return how sharp each run ended, as it is known or else measured."""
    runs = [run for group in groups for run in group.runs]
    names = labels([(run.path, run.config, "") for run in runs])
    found, missing = {}, {}
    for shown, run in zip(names, runs, strict=True):
        record = measurements.known(run.path, run.config, settings, display)
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
            measurements.keep(record, measurements.file_of(path), display)
        except OSError as error:
            display.warn(f"cannot write {measurements.file_of(path)}: {error}")
    return found


def tables_of(settings: Settings, records: dict[Path, Record]) -> Tables:
    """Return the columns of all tables, with what was measured."""

    def value(name: str) -> Value:
        def measured(run: Recorded) -> float | None:
            number = records.get(run.path, {"numbers": {}})["numbers"].get(name)
            known = number and math.isfinite(float(number["value"]))
            return float(number["value"]) if known else None

        return measured

    columns = measures.columns(settings).items()
    measured = {name: numeric(head, value(name)) for name, head in columns}
    return {**TABLES, **({"sharpness": measured} if records else {})}


def page_of(
    settings: Settings, groups: Sequence[Group], tables: Tables, records: dict[Path, Record]
) -> Page:
    """Return what is said of the runs, and of what was measured."""
    terms = measures.legend(settings).items()
    lines = [f"- {term}: {text}" for term, text in terms if term != "±"]
    lines += [f"- {settings.images:,} {settings.kind} images"]
    about = "The best epochs, or those that the command asks for; ± as above.\n\n"
    explained = {**EXPLAINED, "sharpness": about + "\n".join(lines)}
    page = report.side_by_side(groups, tables, explained=explained, split=settings.split)
    remarks = [*page.remarks]
    for group in groups if settings.sharpness else ():
        measured = sum(run.path in records for run in group.runs)
        if measured < len(group.runs):
            text = f"{group.name}: sharpness of {measured} of {len(group.runs)} runs"
            remarks.append(f"{text}; the others have no checkpoint that can be read")
        remarks += [told for run in group.runs if (told := apart(settings, run, records))]
    return page._replace(remarks=remarks)


def apart(settings: Settings, run: Recorded, records: dict[Path, Record]) -> str | None:
    """Return how sharpness and accuracy of a run are of two epochs, or None if of one.

    A run may go on while others are measured, and its best checkpoint may be damaged.
    """
    if run.path not in records or not run.rows:
        return None
    which, row = ("last", run.rows[-1]) if settings.last else ("best", run.best)
    measured, epoch = records[run.path]["epoch"], row and row["epoch"]
    if measured == epoch:
        return None
    text = f"{run.path}: sharpness is of epoch {measured}, and the {which} one is {epoch}"
    return f"{text}, so that it is in no rank correlation"


def points_of(
    settings: Settings, page: Page, tables: Tables, records: dict[Path, Record]
) -> dict[str, dict[str, Pairs]]:
    """Return each measure with test accuracy, of the runs of rows that can be compared."""

    def accuracy(run: Recorded) -> float | None:
        value = last if settings.last else best
        return None if apart(settings, run, records) else value(run)

    marked = {note.name for note in page.notes if note.table in ("accuracy", "sharpness")}
    groups = [group for group in page.groups if group.name not in marked]
    return {
        name: {g.name: correlation.pairs(g, column.value, accuracy) for g in groups}
        for name, column in tables.get("sharpness", {}).items()
        if column.value
    }


def with_ranks(page: Page, tables: Tables, ranks: dict[str, Ranks]) -> Page:
    """Return a page that has the table of ranks, if runs are enough for one."""
    heads = {tables["sharpness"][name].head: each for name, each in ranks.items()}
    table = correlation.table(heads)
    if not table[1]:
        return page
    text = f"{correlation.EXPLAINED}\n\n![{HEADING.capitalize()}]({PICTURE})"
    return page._replace(parts={**page.parts, HEADING: (text, table)})


if __name__ == "__main__":
    sys.exit(main())
