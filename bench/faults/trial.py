"""Outcomes of all fault trials, and processes that may be killed."""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # Optimizers import it at their first step, which takes seconds.

import samfn
from recipes.cifar_wrn import main
from recipes.settings.saved import CONFIG_FILE
from recipes.train import loop
from recipes.train.directory import RunDirectory
from samfn.storage import tensorfile

# Twenty-two steps of a tenth of a second.
EPOCHS = "--data digits --model wrn-10-1 --epochs 2 --batch-size 128 --compile no"
RECIPE = EPOCHS + " --save-steps 1"


class Outcome(NamedTuple):
    """Outcome of many trials of one fault."""

    trials: int
    landed: int
    """Trials in which the fault really happened."""
    failures: tuple[str, ...]
    """Failures, one line each."""
    notes: str = ""
    """Other measurements."""


Process = Any
Hook = Callable[[], None]


def start(target: Callable[..., None], *args: Any) -> Process:
    """Start `target` in a process of its own, forked from one that has all modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.faults.trial", "bench.faults.shards"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def finish(process: Process, seconds: float = 300) -> int:
    """Wait for a process and return its exit code; -N if signal N killed it."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"a process did not end within {seconds} s")
    code = process.exitcode
    process.close()
    return int(code)


def recipe(args: list[str], log: str, hook: Hook | None = None) -> None:
    """Be a run of the recipe: one thread, output into `log`, steps counted in `log`.steps.

    Args:
        args: flags.
        log: path of a text file that is added to.
        hook: is called before the run, to arm a fault.
    """
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    counter = os.open(f"{log}.steps", os.O_WRONLY | os.O_CREAT)

    def step(real: Callable[..., Any], *given: Any) -> Any:
        state, metrics = real(*given)
        os.pwrite(counter, f"{int(state.step):9d}".encode(), 0)
        return state, metrics

    wrap(loop, "step", step)
    if hook is not None:
        hook()
    sys.exit(main(args))


def wrap(module: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by one that gives `around` the function and its arguments."""
    setattr(module, name, functools.partial(around, getattr(module, name)))


def again(run: Path, flags: str = RECIPE) -> list[str]:
    """Return the flags that begin a run, or go on with one that was begun."""
    begun = (run / CONFIG_FILE).exists()
    return ["--resume", str(run)] if begun else [*flags.split(), "--output", str(run)]


def steps_taken(log: Path) -> int:
    """Return how many steps the last process with this log had taken."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(Path(f"{log}.steps").read_text())
    return 0


def result(run: Path) -> str:
    """Return a digest of all that a run came to: its last and best state, and metrics."""
    checkpoints = RunDirectory(run).checkpoints()
    digest = hashlib.sha256()
    for path in (checkpoints.paths()[-1], checkpoints.best()[0]):
        tensors, _ = tensorfile.read(path)
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    for row in RunDirectory(run).rows():
        for name in ("seconds", "images_per_second"):
            row.pop(name)
        digest.update(repr(row).encode())
    return digest.hexdigest()


def damaged(directory: Path) -> list[str]:
    """Return the names of checkpoints that cannot be read."""
    found = []
    for path in samfn.Checkpoints(directory).paths():
        try:
            tensorfile.read(path)
        except tensorfile.CorruptError:
            found.append(path.name)
    return found


@functools.cache
def reference() -> str:
    """Return the result of a run that nothing happens to, once it proved repeatable."""
    with tempfile.TemporaryDirectory() as folder:
        return _repeatable(Path(folder))


def _repeatable(root: Path) -> str:
    found = []
    for name in ("reference", "twin"):
        process = start(recipe, again(root / name), str(root / f"{name}.log"))
        assert finish(process) == 0, (root / f"{name}.log").read_text()
        found.append(result(root / name))
    assert found[0] == found[1], "two runs without faults differ"
    other = [*RECIPE.split(), "--seed", "1", "--output", str(root / "other")]
    assert finish(start(recipe, other, str(root / "other.log"))) == 0
    assert result(root / "other") != found[0], "runs of different seeds are alike"
    return found[0]
