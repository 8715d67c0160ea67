"""samfn on the networks that people use, each way held against a plain loop.

    python -m bench.zoo --report bench/results
    python -m bench.zoo --only habits transformers --no-compiled

A network whose line is in --output already is not tried again.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import measure
from bench.zoo import habits, networks
from bench.zoo.check import check
from bench.zoo.habits import Case
from recipes.terminal import cli

Group = Literal["habits", "torchvision", "timm", "transformers"]
WAYS = "eager", "compiled", "drop-in", "Hessian"
# A network takes minutes to compile; those that are, are one of each family.
COMPILED = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "vit_b_16",
]


@dataclass(frozen=True)
class Options:
    """Networks and ways to try."""

    only: list[Group] = field(default_factory=list)
    """Groups of networks; all of them by default."""
    name: str = ""
    """Only networks that have this in their name."""
    compiled: bool = True
    """Compile the small modules and one network of each family, too."""
    minutes: float = 20.0
    """Longest time for one network."""
    output: Path = Path("zoo.jsonl")
    """One line of JSON for each network; those that it has are not tried again."""
    report: Path | None = None
    """Directory for the table."""


def cases(options: Options) -> Iterator[Case]:
    """Yield the networks that are asked for."""
    groups: dict[str, Any] = {
        "habits": lambda: iter(habits.CASES),
        "transformers": networks.of_transformers,
        "timm": networks.of_timm,
        "torchvision": networks.of_torchvision,
    }
    for name, make in groups.items():
        if not options.only or name in options.only:
            yield from (case for case in make() if options.name in case.name)


def is_compiled(case: Case) -> bool:
    """Return whether a network is compiled, too."""
    if case.name.startswith("torchvision"):
        return case.name.split()[-1] in COMPILED
    return not case.name.startswith("timm") or "checkpointing" in case.name


def apart(case: Case, options: Options) -> dict[str, str]:
    """Try one network in a process of its own."""
    here = [sys.executable, "-m", "bench.zoo", "one", case.name]
    compiled = options.compiled and is_compiled(case)
    try:
        done = subprocess.run(
            [*here, str(int(compiled))],
            capture_output=True,
            text=True,
            timeout=60 * options.minutes,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"network": case.name, "eager": f"not finished in {options.minutes} minutes"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"network"')]
    if lines:
        row: dict[str, str] = json.loads(lines[-1])
        return row
    last = (done.stderr.strip() or "killed, as for memory").splitlines()[-1]
    return {"network": case.name, "eager": f"ended by {done.returncode}: {last}"}


def one(name: str, compiled: bool) -> None:
    """Try one network here, and print its row."""
    # Those that come later import packages of their own.
    case = next(case for case in cases(Options()) if case.name == name)
    print(json.dumps(check(case, compiled=compiled)), flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """Return the table, in Markdown; reasons stand below, once each."""
    reasons: dict[str, int] = {}
    lines = ["| network | " + " | ".join(WAYS) + " |", "| --- |" + " --- |" * len(WAYS)]
    for row in rows:
        cells = [row["network"]]
        for way in WAYS:
            told = row.get(way, "–")
            kind, _, reason = told.partition(": ")
            if reason:
                number = reasons.setdefault(reason, len(reasons) + 1)
                told = f"{kind} [{number}]"
            cells.append(told)
        lines.append("| " + " | ".join(cells) + " |")
    below = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *below])


def main(options: Options) -> None:
    """Try all that is asked for and not tried yet."""
    rows = []
    if options.output.exists():
        rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    known = {row["network"] for row in rows}
    asked = [*cases(options)]
    with contextlib.suppress(KeyboardInterrupt):  # The same command goes on.
        for case in asked:
            if case.name not in known:
                started = time.perf_counter()
                rows.append(apart(case, options))
                seconds = round(time.perf_counter() - started, 1)
                measure.emit(rows[-1] | {"seconds": seconds}, options.output)
    about = measure.environment()
    command = "python -m bench.zoo " + " ".join(sys.argv[1:])
    wrong = sum("WRONG" in str(row.values()) for row in rows)
    text = (
        f"# samfn on {len(rows)} of {len(asked)} networks and modules\n\n"
        f"{about['date']}, {about['device']}, torch {about['torch']}, Python"
        f" {about['python']}; `{command}`\n\n"
        f'Wrong: {wrong}. "exact" is equal to a plain loop that overwrites the weights,'
        " after three steps of SAM, to 1e-9 of the way in float64 and 5e-3 in float32, or"
        " compiled 1e-5 where a network of float64 computes parts in float32, or to ten"
        " times what the plain loop differs by if its norms are rounded otherwise, and for"
        " a graph all its operations, in"
        " weights, buffers, losses and outputs, with the same random numbers drawn, and the"
        " user's model and batch untouched to the bit; for the Hessian, to 1e-4 of a"
        ' difference of gradients. Behind the comma is what ran. "torch.func\'s masks":'
        " equal to the step by torch.func uncompiled, which draws a dropout mask by how a"
        " tensor lies in memory.\n\n"
    )
    print(text + table(rows))
    if options.report is not None:
        path = options.report / f"zoo_{about['date']}.md"
        path.write_text(text + table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        torch.set_num_threads(1)
        one(sys.argv[2], sys.argv[3] == "1")
    else:
        main(cli.parsed(Options, prog="python -m bench.zoo", description=__doc__))
