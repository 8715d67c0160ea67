r"""How long a step takes, beside every peer.

    python -m bench.step_time --case mlp:16:float32 --case wrn-16-2:64:bf16

A case is a network of `bench/networks.py`, a batch size and a precision. All candidates are
made in one process, checked to train alike, and then timed in turns. Prints one JSON line
for each candidate and a table for each case; with --output, the lines go to a file too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import measure
from bench.candidates import DTYPES, Candidate, candidates
from bench.networks import build
from recipes.terminal.hardware import emulated


@dataclass(frozen=True)
class Options:
    """What is timed, and for how long."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK:BATCH:PRECISION; once for each case. None is seven of them, or those in
    float32 on a CPU that has no instructions for bf16."""
    seconds: float = 20.0
    """Time spent on each case, after everything is compiled."""
    designs: bool = False
    """Compare the designs of the compiled step instead of the peers."""
    output: Path | None = None
    """File that the JSON lines are appended to."""


CASES = (
    "mlp:16:float32",
    "transformer:16:float32",
    "wrn-10-1 8x8:16:float32",
    "wrn-16-2:64:float32",
    "wrn-16-2:64:bf16",
    "wrn-16-2:128:float32",
    "wrn-16-2:128:bf16",
)
COLUMNS = (
    "candidate",
    "ms",
    "q20",
    "q80",
    "images/s",
    "of peak",
    "of samfn",
    "kernels",
    "apart",
    "first s",
)


def main(options: Options) -> None:
    """Time all cases."""
    torch._dynamo.config.recompile_limit = 64  # Peers share the code of their modules.
    for case in options.case or default_cases():
        name, batch, precision = case.split(":")
        rows = run(name, int(batch), precision, options)
        for row in rows:
            measure.emit({"case": case} | measure.environment() | row, options.output)
        print(f"\n{case}\n\n{measure.table(rows, COLUMNS)}\n", flush=True)


def default_cases() -> list[str]:
    """Return the cases but those that this machine emulates; say which are left out."""
    left_out = [case for case in CASES if emulated(DTYPES[case.split(":")[2]])]
    if left_out:
        print(
            f"bf16 is emulated on this CPU; left out: {', '.join(left_out)}; --case takes"
            " them all the same"
        )
    return [case for case in CASES if case not in left_out]


def run(name: str, batch: int, precision: str, options: Options) -> list[dict[str, Any]]:
    """Time one case; return a row for each candidate."""
    network = build(name, batch)
    flops = measure.forward_operations(network.model, network.inputs)
    dtype = DTYPES[precision] or torch.float32
    peak = measure.peak_flops(dtype, "cpu", options.seconds)
    found = candidates(network, precision, designs=options.designs)
    times = measure.interleaved(
        {c.name: c.runner.step for c in found}, seconds=options.seconds
    )
    ours = measure.quantiles(times["samfn compiled"])["median"]
    return [row(c, times[c.name], batch, flops, peak, ours) for c in found]


def row(
    candidate: Candidate,
    times: list[float],
    batch: int,
    flops: float,
    peak: float,
    ours: float,
) -> dict[str, Any]:
    """Return what is reported of a candidate."""
    seen = measure.quantiles(times)
    passes = 3 if "SGD" in candidate.name else 6  # A backward pass is two forward ones.
    return {
        "candidate": candidate.name,
        "ms": 1e3 * seen["median"],
        "q20": 1e3 * seen["q20"],
        "q80": 1e3 * seen["q80"],
        "images/s": batch / seen["median"],
        "of peak": passes * flops / seen["median"] / peak,
        "of samfn": seen["median"] / ours,
        "kernels": measure.kernels(candidate.runner.step),
        "apart": candidate.apart,
        "first s": candidate.first_call_seconds,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
