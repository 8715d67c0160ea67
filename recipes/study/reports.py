"""What a study found, in words and numbers: means, tables, a report, a data file."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.plots import Series
from recipes.settings.config import PER_CALL, Config, plain_values
from recipes.study.grid import Result
from recipes.terminal.hardware import hardware
from recipes.terminal.legible import quoted
from recipes.train.recorded import chosen_by
from samfn.storage import files

DATA = "results.json"
Table = tuple[list[str], list[list[str]]]
"""Columns, and rows of cells."""


def number(value: float) -> str:
    """Return a number in as few digits as tell it from all others."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return what came of each arm, in the order of the arms."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.cell.label, []).append(result)
    return found


def ended(results: Sequence[Result]) -> list[Result]:
    """Return the runs that did not diverge."""
    return [result for result in results if result.diverged is None]


def spread(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation as text; of one value, the value."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def summary(results: Sequence[Result], value: Callable[[Result], float]) -> str:
    """Return mean and spread over the runs that did not diverge, and how many did."""
    values = [value(result) for result in ended(results)]
    if len(values) == len(results):
        return spread(values) if values else "not run"
    count = f"{len(results) - len(values)} of {len(results)} diverged"
    return f"{spread(values)} ({count})" if values else count


def series_of(runs: Mapping[float, Sequence[Result]]) -> Series:
    """Return the accuracies of runs that did not diverge, for pictures."""
    return Series(
        last={where: [run.last() for run in ended(found)] for where, found in runs.items()},
        best={where: [run.best() for run in ended(found)] for where, found in runs.items()},
    )


def about(results: Sequence[Result]) -> str:
    """Return what the numbers of a table are, in a sentence."""
    seeds = {result.cell.config.seed for result in results}
    spreads = f", mean ± standard deviation of {len(seeds)} seeds" * (len(seeds) > 1)
    split = chosen_by(results[0].cell.config)
    return (
        f"Test accuracy in percent{spreads}; the best epoch is chosen by the {split} set."
    )


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_in_a_cell, line))} |" for line in lines)


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def document(
    title: str, picture: str, text: str, table: Table, device: str, command: str
) -> str:
    """Return a report as Markdown.

    Args:
        title: of the report.
        picture: file name of its picture.
        text: what is to be known before the table.
        table: of the results.
        device: that was computed on.
        command: that makes the report again.
    """
    made = versions(device)
    return f"""# {title}

![{title}]({picture})

{text}

{markdown(table)}

{made["date"]}, {made["hardware"]}, torch {made["torch"]}, Python {made["python"]}.

```
{command}
```
"""


def versions(device: str) -> dict[str, str]:
    """Return when and with what a report was made."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(results: Sequence[Result], command: str) -> dict[str, Any]:
    """Return what the data file says: settings of all runs once, and what each had."""
    settings = [plain_values(result.cell.config) for result in results]
    varied = {
        name
        for name in settings[0].keys() - PER_CALL
        if any(values[name] != settings[0][name] for values in settings)
    }
    alike = {
        name: value for name, value in settings[0].items() if name not in varied | PER_CALL
    }
    runs = [
        {
            "label": result.cell.label,
            "settings": {name: values[name] for name in sorted(varied)},
            "directory": result.cell.path.name,
            "epochs": len(result.rows),
            "last": None if result.diverged else result.last(),
            "best": None if result.diverged else result.best(),
            "best_epoch": None if result.diverged else result.best_row()["epoch"],
            "best_chosen_by": chosen_by(result.cell.config),
            "seconds": result.seconds(),
            "diverged": result.diverged,
        }
        for result, values in zip(results, settings, strict=True)
    ]
    made = versions(results[0].cell.config.device)
    return {"command": command} | made | {"settings": alike, "runs": runs}


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_data(output: Path, results: Sequence[Result], command: str) -> None:
    """Write `results.json`."""
    text = json.dumps(record(results, command), indent=1)
    write(output / DATA, text + "\n")


def task(config: Config) -> str:
    """Return what all runs have in common, for titles."""
    text = f"{config.data}, {config.model}, {config.epochs} epochs"
    if config.label_noise:
        text += f", {100 * config.label_noise:g} % wrong labels"
    return text


def files_in(output: Path, page: str, picture: str) -> dict[str, str]:
    """Return what the closing summary says of files."""
    return {
        "report": str(output / page),
        "picture": str(output / picture),
        "data": str(output / DATA),
    }


def called(program: str, args: Sequence[str]) -> str:
    """Return a command as it is typed."""
    return " ".join((program, *map(quoted, args)))
