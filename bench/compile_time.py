"""How long compiling takes, in fresh processes: with an empty cache, and with a full one.

    python -m bench.compile_time --case wrn-16-2:64:float32

Measured is the first call of a step less a later one: tracing, compiling and, with a full
cache, loading. "one gradient" is what a single pass would cost. Prints one JSON line for
each candidate and a table for each case.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench import measure
from bench.candidates import DTYPES, Gradient, Samfn, compiled, started
from bench.networks import Network, build
from bench.peers import RHO, Overwriting

CASES = ("mlp:16:float32", "wrn-10-1 8x8:16:float32", "wrn-16-2:64:float32")
COLUMNS = ("candidate", "cold s", "warm s", "of one gradient", "warm of cold")


@dataclass(frozen=True)
class Options:
    """What is compiled."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK:BATCH:PRECISION; once for each case. None is three of them."""
    output: Path | None = None
    """File that the JSON lines are appended to."""
    only: str | None = None
    """Compile this candidate in this process, and print the seconds."""


def main(options: Options) -> None:
    """Compile all candidates of all cases, or the one that is asked for."""
    for case in options.case or CASES:
        if options.only is not None:
            print(json.dumps(compile_here(case, options.only)))
            continue
        rows = [compile_apart(case, name) for name in makers(load(case), None)]
        single = rows[0]["cold s"]
        for row in rows:
            row["of one gradient"] = row["cold s"] / single
            measure.emit({"case": case} | measure.environment() | row, options.output)
        print(f"\n{case}\n\n{measure.table(rows, COLUMNS)}\n", flush=True)


def load(case: str) -> Network:
    """Return the network of a case."""
    name, batch, _ = case.split(":")
    return build(name, int(batch))


def makers(network: Network, dtype: Any) -> dict[str, Callable[[], Any]]:
    """Return what is compiled, by name."""

    def ours(rho: float = RHO, **settings: Any) -> Callable[[], Any]:
        return lambda: Samfn(network, dtype, rho, compiled(**settings))

    return {
        "one gradient": lambda: Gradient(network, dtype),
        "samfn compiled": ours(),
        "samfn whole": ours(plan="whole"),
        "samfn gradient": ours(plan="gradient"),
        "samfn SGD compiled": ours(0.0),
        "overwriting compiled model": lambda: Overwriting(
            network, dtype, tuned=True, compiled=True
        ),
    }


def compile_here(case: str, name: str) -> float:
    """Return the seconds that compiling takes in this process."""
    dtype = DTYPES[case.split(":")[2]]
    runner, first = started(makers(load(case), dtype)[name])
    return first - measure.interleaved({name: runner.step}, seconds=0, rounds=1)[name][0]


def compile_apart(case: str, name: str) -> dict[str, Any]:
    """Compile twice in processes of their own that share an empty cache."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__]
    command += ["--case", case, "--only", name]
    with tempfile.TemporaryDirectory() as cache:
        variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        cold, warm = (
            float(
                subprocess.run(
                    command, env=variables, check=True, stdout=subprocess.PIPE, text=True
                ).stdout.split()[-1]
            )
            for _ in range(2)
        )
    return {
        "candidate": name,
        "cold s": cold,
        "warm s": warm,
        "warm of cold": warm / cold,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
