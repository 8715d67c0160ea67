"""F20, F21: many processes want the same directory, or the same data, at once."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.faults.trial import (
    RECIPE,
    Outcome,
    again,
    damaged,
    finish,
    recipe,
    result,
    start,
    wrap,
)
from recipes.data import sources
from recipes.data.folders import SPLITS

PROCESSES = 8
IN_USE = "is in use by process"


def one_directory(trials: int, root: Path) -> Outcome:
    """F20: eight runs start in one directory; one runs, and is killed; another goes on."""
    whole = root / "whole"
    assert finish(start(recipe, again(whole), str(root / "whole.log"))) == 0
    expected = result(whole)  # The twin: a run that has its directory to itself.
    failures: list[str] = []
    landed = 0
    for trial in range(trials):
        run = root / f"run{trial}"
        logs = [root / f"run{trial}-{i}.log" for i in range(PROCESSES)]
        flags = [*RECIPE.split(), "--output", str(run)]
        processes = [start(recipe, flags, str(log)) for log in logs]
        _wait_until_one_is_left(processes)
        alive = [i for i, process in enumerate(processes) if process.is_alive()]
        pids = [processes[i].pid for i in alive]
        for i in alive:
            _wait_for_step(logs[i])
            processes[i].kill()
        codes = [finish(process) for process in processes]
        told = sum(IN_USE in log.read_text() for log in logs)
        landed += codes.count(-signal.SIGKILL) == 1 and told == PROCESSES - 1
        if sorted(codes) != [-signal.SIGKILL, *[2] * (PROCESSES - 1)]:
            failures.append(f"trial {trial}: exit codes {codes}")
        texts = [log.read_text() for log in logs]
        named = sum(any(f"process {pid}" in text for pid in pids) for text in texts)
        if named != PROCESSES - 1:
            failures.append(f"trial {trial}: {named} name the process that runs")
        failures += [f"trial {trial}: {name}" for name in damaged(run / "checkpoints")]
        if finish(start(recipe, again(run), str(logs[0]))) or result(run) != expected:
            failures.append(f"trial {trial}: the run does not go on as it should")
    return Outcome(trials, landed, tuple(failures), f"{PROCESSES} processes each")


def _wait_until_one_is_left(processes: list[Any]) -> None:
    deadline = time.monotonic() + 120
    while sum(process.is_alive() for process in processes) > 1:
        if time.monotonic() > deadline:
            return  # The exit codes will tell.
        time.sleep(0.05)


def _wait_for_step(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not Path(f"{log}.steps").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def read_data(root: str, log: str) -> None:
    """Load a folder of images, and note whether it was read and what came of it."""
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def read_folder(real: Callable[..., Any], *args: Any) -> Any:
        os.write(handle, b"read\n")
        time.sleep(0.3)  # The others shall come while it reads.
        return real(*args)

    wrap(sources, "read_folder", read_folder)
    found = sources.fingerprint(sources.load("folder", Path(root)))
    os.write(handle, f"loaded {found}\n".encode())


def one_data_set(trials: int, root: Path) -> Outcome:
    """F21: eight processes want data that nobody has read yet."""
    failures: list[str] = []
    landed = 0
    chance = random.Random(0)
    for trial in range(trials):
        images, log = root / f"images{trial}", root / f"data{trial}.log"
        for split in SPLITS:
            for name in ("cat", "dog"):
                folder = images / split / name
                folder.mkdir(parents=True)
                colour = (chance.randrange(256), 0, 0)
                Image.new("RGB", (8, 8), colour).save(folder / "0.png")
        args = str(images), str(log)
        codes = [finish(p) for p in [start(read_data, *args) for _ in range(PROCESSES)]]
        lines = log.read_text().splitlines()
        landed += lines.count("read") >= 1
        loaded = [line for line in lines if line != "read"]
        if codes != [0] * PROCESSES or lines.count("read") != 1:
            failures.append(f"trial {trial}: {codes}, read {lines.count('read')} times")
        if len(loaded) != PROCESSES or len(set(loaded)) != 1:
            failures.append(f"trial {trial}: loaded {set(loaded)}")
        if len(list(images.glob("*.safetensors"))) != 1:
            failures.append(f"trial {trial}: {[path.name for path in images.iterdir()]}")
    return Outcome(trials, landed, tuple(failures), f"{PROCESSES} processes each")
