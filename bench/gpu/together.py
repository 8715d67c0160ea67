"""Cases in processes of their own: they compile side by side, and measure in turns."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import samfn
from bench.gpu.report import finished


def run_together(path: Path, wanted: Sequence[str], seconds: float, end: float) -> None:
    """Run cases in processes of their own, which measure one after another.

    Args:
        path: of the file of all rows.
        wanted: names of the cases; those that are in the file are not run again.
        seconds: after which measuring begins, though some may not be compiled yet.
        end: of the monotonic clock, when those that are not finished are ended.
    """
    left = [name for name in wanted if name not in finished(path)]
    threads = str(max(1, (os.cpu_count() or 1) // max(1, len(left))))
    variables = {"TORCHINDUCTOR_COMPILE_THREADS": threads} | os.environ
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as turns:
        own = ["--output", str(path.parent), "--turns", turns]
        own += ["--smoke"] * path.name.startswith("smoke")
        started = {
            name: subprocess.Popen(
                [sys.executable, "-m", "bench.gpu", "--case", name, *own], env=variables
            )
            for name in left
        }

        def compiling() -> bool:
            return any(
                child.poll() is None and not _waiting(Path(turns), name).exists()
                for name, child in started.items()
            )

        try:
            while compiling() and time.monotonic() < min(begun + seconds, end):
                time.sleep(0.1)
            Path(turns, "go").touch()
            for child in started.values():
                child.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for child in started.values():
                child.kill()
                child.wait()


@contextmanager
def turn(turns: Path, name: str) -> Iterator[None]:
    """Wait until all have compiled, and until no other case measures."""
    _waiting(turns, name).touch()
    while not (turns / "go").exists():
        time.sleep(0.05)
    with ExitStack() as turn_of_this_one:
        while True:
            with suppress(samfn.InUseError):
                turn_of_this_one.enter_context(samfn.held(turns))
                break
            time.sleep(0.05)
        yield


def _waiting(turns: Path, name: str) -> Path:
    return turns / f"{name} waits"
