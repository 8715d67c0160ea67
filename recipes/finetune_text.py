"""Fine-tune a causal language model with low-rank adapters (LoRA) and SAM.

    python -m recipes.finetune_text                     # offline: a tiny one, on code
    python -m recipes.finetune_text --rho 0             # the same with plain AdamW
    python -m recipes.finetune_text --perturb noise     # Flat-LoRA, one gradient a step
    python -m recipes.finetune_text --model my-model --text notes.txt --sam-last 0.3

The tiny model reads bytes, and is trained from scratch first, on the English that comes
with Python. A run leaves a directory with its settings, metrics, picture, checkpoints and
adapters; the same command with its --output goes on where it was ended.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes import plots
from recipes.models import language
from recipes.roles import require
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.terminal.legible import quoted
from recipes.terminal.signals import Signals
from recipes.text.report import describe, summarise
from recipes.text.settings import Settings, name, opened
from recipes.text.task import assemble
from recipes.text.training import export, recorded_of, resumes, train
from recipes.train.running import writing
from samfn.training.loop import Training

PROGRAM = "python -m recipes.finetune_text"


def main(args: Sequence[str] | None = None) -> int:
    """Fine-tune; return the exit code."""
    about: dict[str, Any] = {"prog": PROGRAM, "description": __doc__}
    return cli.run(
        lambda display, signals: tune(
            cli.parsed(Settings, args=args, **about), display, signals
        )
    )


def tune(settings: Settings, display: Display, signals: Signals) -> int:
    """Train, from the start or from where a run stopped, and leave a run behind."""
    require(settings.ranges(), vars(settings))
    language.require_packages()
    with opened(settings) as run, writing():
        task, state = assemble(settings, run, display)
        kept, training = run.checkpoints(display.warn), Training(state)
        if resumes(task, kept, training):
            display.say(f"going on after {training.step} of {task.steps} steps")
        rows = recorded_of(run, kept, settings.epochs, display)
        run.rewrite([row for row in rows if row["epoch"] <= training.epoch])
        display.facts("samfn", describe(task))
        finished = train(task, training, run, kept, display, signals)
        # Somebody may have edited them while it trained.
        rows = recorded_of(run, kept, settings.epochs, display)
        if rows:
            plots.curves(rows, run.curves, f"{Path(settings.model).name}, {name(settings)}")
        if not finished:
            display.say(
                f"stopped; {PROGRAM} --output {quoted(run.path)} goes on, with the"
                " same settings"
            )
            return 128 + (signals.stop or 0)
        export(task, training, run)
        display.facts("done", summarise(task, run, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
