"""Everything that a GPU must show, in one command: limits, correctness, speed, memory.

    python -m bench.gpu                 # one GPU
    python -m bench.gpu --together 240  # in five minutes, where there are 16 cores
    python -m bench.gpu --smoke         # the same code at toy size, on a CPU; in float32
                                        # where the CPU has no instructions for bf16

Needs only torch, einops, safetensors and numpy; pytorch_optimizer is compared with where it
is installed. Every finished case is a line of a JSON file, and is not run again: start it
again after an interruption, or when the time was too short. At the end, a table of targets
and a dated report in bench/results/.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from bench import measure
from bench.gpu.cases import cases, run_cases
from bench.gpu.report import finished, read, report
from bench.gpu.setup import GPU, SMOKE
from bench.gpu.together import run_together, turn


def main() -> None:
    """Run the cases that are not finished, and report on all that are."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no case after")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="directory of the JSON lines"
    )
    parser.add_argument(
        "--report", type=Path, default=measure.RESULTS, help="directory of the report"
    )
    parser.add_argument(
        "--case", action="append", default=[], help="this case alone; may be repeated"
    )
    parser.add_argument(
        "--together",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="compile all cases side by side, and measure when all are compiled or that"
        " time is over; takes a core and 5 GB of memory for each",
    )
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup = SMOKE if options.smoke else GPU
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a GPU and found none; --smoke runs on a CPU")
    if unknown := {*options.case} - {*cases(setup)}:
        raise SystemExit(f"--case: expected one of {[*cases(setup)]}, got {unknown}")
    wanted = [name for name in cases(setup) if name in options.case or not options.case]
    path = options.output / ("smoke.jsonl" if options.smoke else "gpu.jsonl")
    end = time.monotonic() + 60 * options.minutes
    if options.turns is not None:
        setup = setup._replace(turn=partial(turn, options.turns, wanted[0]))
        run_cases(setup, path, end, wanted)
        return
    if options.together:
        run_together(path, wanted, options.together, end)
    else:
        run_cases(setup, path, end, wanted)
    text = report(read(path), setup)
    print(text)
    options.report.mkdir(parents=True, exist_ok=True)
    name = f"{'smoke' if options.smoke else 'gpu'}_{time.strftime('%Y-%m-%d')}.md"
    (options.report / name).write_text(text, encoding="utf-8")
    if left := [name for name in wanted if name not in finished(path)]:
        print(f"not run yet, start again to go on: {', '.join(left)}")


if __name__ == "__main__":
    main()
