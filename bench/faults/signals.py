"""F9: signals, in every phase of a run."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.faults.trial import (
    EPOCHS,
    Outcome,
    again,
    finish,
    recipe,
    reference,
    result,
    start,
    wrap,
)
from recipes.settings.saved import CONFIG_FILE
from recipes.train import build, loop, running
from samfn.storage import tensorfile

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ("step", "evaluation", "data", "compilation", "save", "twice")


class During:
    """Send this process a signal when it comes to a phase for the n-th time."""

    def __init__(self, phase: str, number: int, call: int, log: str) -> None:
        self.phase, self.number, self.left, self.log = phase, number, call, log

    def __call__(self) -> None:
        """Arm it."""
        match self.phase:
            case "step" | "twice":
                self.before(loop, "step")
            case "evaluation":
                self.inside_evaluation()
            case "data":
                self.before(build, "load")
            case "compilation":
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
                self.inside_compilation()
            case "save":
                self.before(tensorfile, "save_file")

    def send(self) -> None:
        """Send it, twice if that is the phase, and leave a mark."""
        Path(f"{self.log}.sent").touch()
        for _ in range(2 if self.phase == "twice" else 1):
            os.kill(os.getpid(), self.number)

    def count(self) -> None:
        """Count one call, and send it at the n-th."""
        self.left -= 1
        if self.left == 0:
            self.send()

    def before(self, module: Any, name: str) -> None:
        """Count the calls of a function."""

        def called(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
            self.count()
            return real(*args, **options)

        wrap(module, name, called)

    def inside_evaluation(self) -> None:
        """Count the batches that are evaluated."""

        def evaluate(real: Callable[..., Any], task: Any, *rest: Any) -> Any:
            def views_fn(*args: Any) -> Any:
                self.count()
                return task.views_fn(*args)

            return real(task._replace(views_fn=views_fn), *rest)

        wrap(loop, "evaluate", evaluate)

    def inside_compilation(self) -> None:
        """Send it a second after compiling began, if that goes on so long."""
        compiling = threading.Event()

        def send() -> None:
            if compiling.is_set():
                self.send()

        def prepare(real: Callable[..., Any], *args: Any) -> None:
            compiling.set()
            timer = threading.Timer(1, send)
            timer.start()
            try:
                real(*args)
            finally:
                compiling.clear()
                timer.cancel()

        wrap(running, "prepare", prepare)


def in_every_phase(trials: int, root: Path) -> Outcome:
    """F9: send SIGTERM, SIGINT or SIGUSR1 in every phase, then go on to the end."""
    expected = reference()  # The twin: no signal, and exit code 0.
    failures: list[str] = []
    landed = 0
    for trial in range(trials):
        phase = PHASES[trial % len(PHASES)]
        number = SIGNALS[(trial // len(PHASES) + trial) % len(SIGNALS)]
        run, log = root / f"run{trial}", root / f"run{trial}.log"
        compiles = ["--compile", "yes"] if phase == "compilation" else []
        call = 1 if phase in ("evaluation", "data", "save") else 1 + trial % 20
        hook = During(phase, number, call, str(log))
        code = finish(start(recipe, [*again(run, EPOCHS), *compiles], str(log), hook))
        landed += Path(f"{log}.sent").exists()
        what = f"{signal.Signals(number).name} in {phase} {call}"
        wanted = 0 if number == signal.SIGUSR1 else 128 + number
        if code != wanted:
            failures.append(f"{what}: exit code {code}, expected {wanted}")
        if "Traceback" in log.read_text():
            failures.append(f"{what}: a traceback")
        taken = list((run / "checkpoints").glob("*"))
        if phase in ("data", "compilation") and code != 0 and taken:
            failures.append(f"{what}: saved before a step was taken")
        if phase == "compilation" and code != 0 and (run / CONFIG_FILE).exists():
            compiles = ["--compile", "no", "--resume-override"]
        if code != 0 and finish(start(recipe, [*again(run, EPOCHS), *compiles], str(log))):
            failures.append(f"{what}: it does not go on: {log.read_text()[-300:]}")
        elif (code != 0 or phase != "compilation") and result(run) != expected:
            failures.append(f"{what}: ended elsewhere")
        shutil.rmtree(run)
    return Outcome(trials, landed, tuple(failures), f"{len(PHASES)} phases, 3 signals")
