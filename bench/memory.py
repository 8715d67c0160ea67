"""How much memory a step takes at its peak, beside every peer.

    python -m bench.memory --case wrn-16-2:128:float32

Each candidate runs in a process of its own. On a GPU it is what PyTorch allocated at the
peak; on a CPU (Linux) what the process grew by while it took three steps, after three more.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import measure
from bench.candidates import DTYPES, samfn_runners
from bench.networks import build
from bench.peers import peers

CASES = ("wrn-16-2:128:float32",)
COLUMNS = ("candidate", "peak MiB", "of samfn")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK:BATCH:PRECISION; once for each case."""
    output: Path | None = None
    """File that the JSON lines are appended to."""
    only: str | None = None
    """Measure this candidate in this process, and print the bytes."""


def main(options: Options) -> None:
    """Measure all candidates of all cases, or the one that is asked for."""
    for case in options.case or CASES:
        name, batch, precision = case.split(":")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network, dtype = build(name, int(batch), device), DTYPES[precision]
        made = {
            name: make
            for sam in (True, False)
            for name, make in (
                samfn_runners(network, dtype, sam=sam) | peers(network, dtype, sam=sam)
            ).items()
        }
        if options.only is not None:
            print(json.dumps(peak(made[options.only])))
            continue
        rows: list[dict[str, Any]] = [
            {"candidate": name, "peak MiB": apart(case, name) / 2**20} for name in made
        ]
        ours = next(r["peak MiB"] for r in rows if r["candidate"] == "samfn compiled")
        for row in rows:
            row["of samfn"] = row["peak MiB"] / ours
            measure.emit({"case": case} | measure.environment() | row, options.output)
        print(f"\n{case}\n\n{measure.table(rows, COLUMNS)}\n", flush=True)


def apart(case: str, name: str) -> float:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__]
    command += ["--case", case, "--only", name]
    # glibc then gives every larger block back at once, so that a peak is one step's own.
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        command, env=variables, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(run.stdout.split()[-1])


def peak(make: Any) -> int:
    """Return the bytes that a step needs at its peak."""
    runner = make()
    for _ in range(3):
        runner.step()
    return measure.peak_memory(runner.step)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
