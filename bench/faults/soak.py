"""For a long time, anything may happen."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

import samfn
from bench.faults.trial import (
    Outcome,
    Process,
    again,
    damaged,
    finish,
    recipe,
    reference,
    result,
    start,
)

FAULTS = ("kill", "terminate", "interrupt", "save", "disk full", "rot", "nothing")
WARM_UP = 0.2  # share of the time after which memory may grow no more
SAMPLES = 500
LONG = 600.0  # seconds in which every fault has its turn


def keep_saving(directory: str, seconds: float) -> None:
    """Train, save and restore in one process; write what memory and files it holds."""
    torch.set_num_threads(1)
    optimizer = samfn.sgd()
    state = samfn.init({"w": torch.randn(2**16)}, {}, optimizer=optimizer)
    checkpoints = samfn.Checkpoints(directory)
    samples: list[tuple[float, int, int]] = []
    saves = 0
    started = time.monotonic()
    parent = multiprocessing.parent_process()
    while (now := time.monotonic() - started) < seconds:
        if parent is not None and not parent.is_alive():
            return  # Somebody killed the soak.
        for _ in range(20):
            state, _ = samfn.sam_update(
                state,
                torch.randn(2**16),
                loss_fn=_loss,
                optimizer=optimizer,
                lr=0.1,
            )
        checkpoints.save(state, score=float(state.step), note="soak")
        found = checkpoints.latest(state)
        assert found is not None
        assert torch.equal(found.state.params["w"], state.params["w"])
        saves += 1
        # Seldom, since what is kept of the samples is memory as well.
        if now > seconds * (len(samples) + 1) / SAMPLES:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append((now, pages, len(os.listdir("/proc/self/fd"))))
        time.sleep(0.05)
    Path(directory, "samples.json").write_text(json.dumps([saves, samples]))


def _loss(params: samfn.tree.Params, buffers: samfn.tree.Params, batch: Any) -> Any:
    return (params["w"] - batch).square().mean()


def soak(seconds: float, root: Path) -> Outcome:
    """Runs meet random faults for so long, while one process saves all the time."""
    expected, chance = reference(), random.Random(0)
    whole = _seconds_of_a_run(root)
    saver = start(keep_saving, str(root / "saver"), seconds)
    deadline = time.monotonic() + seconds
    failures: list[str] = []
    happened = dict.fromkeys(FAULTS, 0)
    runs = 0
    while time.monotonic() < deadline:
        run, log = root / f"run{runs}", root / f"run{runs}.log"
        runs += 1
        code, rotten = -1, set[str]()
        while code != 0:
            process = start(recipe, again(run), str(log))
            process.join(chance.uniform(0.0, whole))
            fault = chance.choice(FAULTS)
            struck = _strike(fault, process, run, chance, rotten)
            happened[fault] += struck
            code = finish(process)
            allowed = {"kill": -9, "terminate": 143, "interrupt": 130, "disk full": 5}
            allowed["rot"] = 5  # Of the only whole epoch, just before it is exported.
            if code not in (0, allowed.get(fault, 0)):
                failures.append(f"{fault}: exit code {code}: {log.read_text()[-300:]}")
                break
            if fault == "rot" and struck:
                code = -1  # A further process is to put aside what rots.
            # What rotted stays until a process looks at it.
            found = set(damaged(run / "checkpoints"))
            if found - rotten:
                failures.append(f"{fault}: {found - rotten}")
            rotten &= found
        if code == 0 and result(run) != expected:
            failures.append(f"run {runs}: ended elsewhere")
        shutil.rmtree(run, ignore_errors=True)
        log.unlink()
    if code := finish(saver, 60):
        failures.append(f"the process that saves ended with {code}")
    saves, samples = json.loads((root / "saver" / "samples.json").read_text())
    warm = [sample for sample in samples if sample[0] > WARM_UP * seconds]
    tenth = max(1, len(warm) // 10)
    parts = warm[:tenth], warm[-tenth:]
    begin, end = (sum(pages for _, pages, _ in part) / len(part) for part in parts)
    growth, handles = end / begin - 1, {count for _, _, count in warm}
    failures += never(happened, seconds)
    if growth > 0.01 or len(handles) != 1:
        failures.append(f"memory grew by {growth:.2%}, file descriptors {handles}")
    counts = ", ".join(f"{count} {fault}" for fault, count in happened.items())
    notes = (
        f"{seconds / 60:.0f} min, {runs} runs: {counts}; {saves:,} saves in one"
        f" process, memory {growth:+.2%} after warm-up, {max(handles)} file descriptors"
    )
    total = sum(happened.values())
    return Outcome(total, total, tuple(failures), notes)


def never(happened: dict[str, int], seconds: float) -> list[str]:
    """Return what to say of faults that had their time, and did not happen."""
    absent = [fault for fault, count in happened.items() if not count]
    return [f"{fault} never happened" for fault in absent if seconds > LONG]


def _seconds_of_a_run(root: Path) -> float:
    """Return how long a run takes that nothing happens to."""
    started = time.monotonic()
    assert finish(start(recipe, again(root / "whole"), str(root / "whole.log"))) == 0
    return time.monotonic() - started


def _strike(
    fault: str, process: Process, run: Path, chance: random.Random, rotten: set[str]
) -> bool:
    """Make a fault happen to a process, or to its files; return whether it did."""
    alive = bool(process.is_alive())
    number = {
        "kill": signal.SIGKILL,
        "terminate": signal.SIGTERM,
        "interrupt": signal.SIGINT,
        "save": signal.SIGUSR1,
    }.get(fault)
    try:
        if number is not None:
            os.kill(process.pid, number)
        elif fault == "disk full":
            limit = chance.randrange(1, 2**20)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    except ProcessLookupError:
        return False  # It ended just now.
    if fault == "rot":
        paths = samfn.Checkpoints(run / "checkpoints").paths()
        if paths:
            content = bytearray(paths[-1].read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            paths[-1].write_bytes(content)
            rotten.add(paths[-1].name)
        return bool(paths)
    return alive
