"""The cases, by name, and what runs those that are missing."""

import gc
import json
import time
from collections.abc import Collection
from pathlib import Path

import torch

from bench import measure
from bench.gpu import checks, speed
from bench.gpu.report import finished
from bench.gpu.setup import Case, Setup


def cases(setup: Setup) -> dict[str, Case]:
    """Return the cases, the most wanted ones first."""
    named: dict[str, Case] = {
        "peak": speed.peak,
        "convolutions": speed.convolutions,
        "checks": checks.checks,
        "methods": checks.methods,
        "one rank": checks.one_rank,
        "data path": speed.data_path,
    }
    return named | speed.networks(setup) | {"designs": speed.designs}


def run_cases(setup: Setup, path: Path, end: float, wanted: Collection[str]) -> None:
    """Run those that are wanted and not in the file yet, as far as there is time."""
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # Peers share the code of their modules.
    done = finished(path)
    for name, case in cases(setup).items():
        if name in done or name not in wanted or time.monotonic() > end:
            continue
        started_at = time.perf_counter()
        try:
            rows = case(setup)
        except Exception as error:  # One case's failure is a finding, not the end.
            rows = [{"failed": f"{type(error).__name__}: {str(error)[:500]}"}]
        seconds = round(time.perf_counter() - started_at, 1)
        about = measure.environment() | {"case": name, "case_seconds": seconds}
        # At once, so that an interruption leaves a case whole or not there.
        lines = [json.dumps(about | row) for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        print("\n".join(lines), flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
