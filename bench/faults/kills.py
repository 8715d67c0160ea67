"""F1, F2: the process is killed, at any moment and at each step of a save."""

import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import samfn
from bench.faults.trial import (
    Outcome,
    again,
    damaged,
    finish,
    recipe,
    reference,
    result,
    start,
    steps_taken,
    wrap,
)

# As Python's audit events call them.
WATCHED = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir"}
WATCHED |= {"shutil.rmtree", "tempfile.mkdtemp", "os.scandir"}


def at_any_moment(trials: int, root: Path) -> Outcome:
    """F1: kill runs at random times, go on each time, and compare where they end."""
    expected, chance = reference(), random.Random(0)
    failures: list[str] = []
    landed = runs = lost = 0
    while landed < trials:
        run = root / f"run{runs}"
        log = root / f"run{runs}.log"
        runs += 1
        while True:
            process = start(recipe, again(run), str(log))
            process.join(chance.uniform(0.0, 4.0))
            process.kill()
            code = finish(process)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                failures.append(f"{run.name}: exit code {code}")
                break
            landed += 1
            checkpoints = samfn.Checkpoints(run / "checkpoints").paths()
            failures += [f"{run.name}: {name}" for name in damaged(run / "checkpoints")]
            newest = int(checkpoints[-1].stem[5:]) if checkpoints else 0
            lost = max(lost, steps_taken(log) - newest)
        if code == 0 and result(run) != expected:
            failures.append(f"{run.name}: ended elsewhere")
        shutil.rmtree(run)
    if lost > 1:
        failures.append(f"{lost} steps were lost, and one may be")
    notes = f"{runs} runs, {lost} step lost at most"
    return Outcome(landed, landed, tuple(failures), notes)


def state(step: int) -> samfn.TrainState:
    """Return a state that depends on `step`, of one megabyte."""
    values = torch.arange(2**18, dtype=torch.float32) + step
    made = samfn.init({"w": values}, {}, optimizer=samfn.sgd(0.0))
    return made._replace(step=torch.tensor(step))


def save_and_die(directory: str, kill: Callable[[], None]) -> None:
    """Save steps 1 to 3, and be killed while 4 is saved."""
    checkpoints = samfn.Checkpoints(directory)
    for step in (1, 2, 3):
        checkpoints.save(state(step), score=-step)  # The first is the best, and stays.
    kill()
    checkpoints.save(state(4), score=-4.0)


class AtEvent:
    """Kill the process before the n-th thing that a save asks of the system."""

    def __init__(self, number: int, count: str) -> None:
        self.left, self.count = number, count

    def __call__(self) -> None:
        """Arm it."""
        self.log = os.open(self.count, os.O_WRONLY | os.O_APPEND)
        sys.addaudithook(lambda name, args: self.event(name) if name in WATCHED else None)

        def fsync(real: Callable[..., Any], handle: int) -> None:
            self.event("before fsync")
            real(handle)
            self.event("after fsync")

        wrap(os, "fsync", fsync)

    def event(self, name: str) -> None:
        """Count one, and kill if it is the one."""
        self.left -= 1
        os.write(self.log, f"{name}\n".encode())
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class AtByte:
    """Kill the process where it writes so many bytes of a file."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None:
        """Arm it."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def in_a_save(trials: int, root: Path) -> Outcome:
    """F2: kill a save before each call of the system, and after so many bytes."""
    chance = random.Random(0)
    size, events = 2**20, _events(root)
    points: list[Any] = [*range(1, events + 1)]
    points += [chance.randrange(1, size) for _ in range(max(1, len(points) // 4))]
    failures: list[str] = []
    landed = newer = 0
    for trial in range(trials):
        point, directory = points[trial % len(points)], root / f"trial{trial}"
        kill = AtByte(point) if point > events else AtEvent(point, str(root / "count"))
        code = finish(start(save_and_die, str(directory), kill))
        landed += code in (-signal.SIGKILL, -signal.SIGXFSZ)
        step, problems = _look(directory)
        newer += step == 4
        failures += [f"killed at {point}: {problem}" for problem in problems]
        shutil.rmtree(directory)
    notes = f"{len(points)} points; the new state was there after {newer}, else the old"
    return Outcome(trials, landed, tuple(failures), notes)


def _events(root: Path) -> int:
    """Count the events of a save that nothing happens to."""
    (root / "count").write_text("")
    code = finish(start(save_and_die, str(root / "twin"), AtEvent(0, str(root / "count"))))
    step, problems = _look(root / "twin")
    assert (code, step, problems) == (0, 4, [])
    return len((root / "count").read_text().splitlines())


def _look(directory: Path) -> tuple[int, list[str]]:
    """Return the newest state's step, and what is wrong, also after one save more."""
    problems = damaged(directory)
    checkpoints = samfn.Checkpoints(directory)
    found = checkpoints.latest(state(0))
    step = int(found.state.step) if found else 0
    if step not in (3, 4):
        problems.append(f"step {step} is the newest")
    elif not torch.equal(found.state.params["w"], state(step).params["w"]):  # type: ignore[union-attr]
        problems.append(f"step {step} holds something else")
    if not (directory / "step_000000001.safetensors").exists():
        problems.append("the best is gone")
    checkpoints.save(state(5))
    if left := [path.name for path in directory.glob(".samfn-*")]:
        problems.append(f"left behind: {left}")
    return step, problems
