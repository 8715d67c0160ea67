"""Make every fault happen, many times, and report what came of it.

    python -m bench.faults                       # all rows, with all trials; 40 minutes
    python -m bench.faults --only F1 F2          # some
    python -m bench.faults --soak 3600           # anything, for so many seconds
    python -m bench.faults --report bench/results/faults.md

Rows are those of the table in bench/faults/README.md. Some are loops of this package, the
others tests.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import measure
from bench.faults.rows import ROWS, Row
from bench.faults.soak import soak
from bench.faults.trial import Outcome
from recipes.terminal import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make faults happen, and report what came of it."""

    only: tuple[str, ...] = ()
    """Rows, as F1; none are all."""
    soak: float | None = None
    """Seconds of faults of any kind, which are not among the rows."""
    share: float = 1.0
    """Factor of the number of trials."""
    report: Path | None = None
    """Markdown file to write."""


def main(options: Options) -> int:
    """Run the trials; return 1 if anything failed."""
    torch.set_num_threads(1)
    lines: list[dict[str, str]] = []
    failed = False
    if unknown := set(options.only) - {row.name for row in ROWS}:
        raise SystemExit(f"--only: expected rows as F1, got {', '.join(sorted(unknown))}")
    if options.soak is not None:
        rows = [Row("soak", "anything, for a long time", soak, round(options.soak))]
    else:
        rows = [row for row in ROWS if not options.only or row.name in options.only]
    for row in rows:
        trials = row.trials if options.soak else max(1, round(options.share * row.trials))
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome: Outcome = row.run(trials, Path(folder))
        seconds = time.perf_counter() - started
        problems = list(outcome.failures)
        if outcome.landed != outcome.trials or not outcome.trials:
            problems.append(f"only {outcome.landed} of {outcome.trials} faults happened")
        failed |= bool(problems)
        lines.append(
            {
                "row": row.name,
                "fault": row.fault,
                "trials": f"{outcome.trials:,}",
                "failures": str(len(problems)),
                "seconds": f"{seconds:.0f}",
                "notes": outcome.notes,
            }
        )
        print(" | ".join(lines[-1].values()), flush=True)
        for problem in problems[:20]:
            print(f"    {problem}", flush=True)
    if options.report is not None:
        options.report.write_text(report(lines), encoding="utf-8")
    return int(failed)


def report(lines: list[dict[str, str]]) -> str:
    """Return the report as Markdown."""
    about = """A failure is a checkpoint damaged or lost, a run that ended in another state
than the same run without faults, an exit code or message other than
recipes/README.md says, or a trial in which the fault did not happen at all."""
    parts = [about, measure.table(lines, tuple(lines[0]))]
    return measure.page("Faults, and what samfn did", parts, "bench.faults")


if __name__ == "__main__":
    sys.exit(main(cli.parsed(Options, prog="python -m bench.faults", description=__doc__)))
