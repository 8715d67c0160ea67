"""Train a Wide ResNet with SAM on CIFAR-10, on your own images, or on digits.

    python -m recipes.cifar_wrn --rho 0.05                  # whatever this machine has
    python -m recipes.cifar_wrn --rho 0                     # the same with plain SGD
    python -m recipes.cifar_wrn --data digits --label-noise 0.4 --rho 0.2
    python -m recipes.cifar_wrn --data-dir my-images        # train/<class>/*, test/...
    python -m recipes.cifar_wrn --preset foret2021          # WRN-28-10, on a GPU

A run leaves a directory with its settings, metrics, picture and checkpoints.
"""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

import samfn
from recipes import plots
from recipes.compiling import keep_compiled
from recipes.config import CONFIG_FILE, PROGRAM, Config, ConfigError, parse
from recipes.console import Display
from recipes.data import DataError, Source, load
from recipes.rundir import RunDirectory
from recipes.task import Task, assemble
from recipes.training import (
    DivergedError,
    Progress,
    batches,
    evaluate,
    prepare,
    restore,
    step,
    train,
)

# Exit codes: 0 finished, 2 wrong input, 3 diverged, 130 interrupted.
WRONG_INPUT, DIVERGED, INTERRUPTED = 2, 3, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the recipe; return its exit code."""
    display = Display()
    keep_compiled()
    try:
        return run(parse(args, display.say), display)
    except (ConfigError, DataError, OSError) as error:
        display.fail(str(error))
        return WRONG_INPUT
    except DivergedError as error:
        display.fail(str(error))
        return DIVERGED
    except KeyboardInterrupt:
        display.fail("interrupted; nothing was saved since the last checkpoint")
        return INTERRUPTED


def run(config: Config, display: Display) -> int:
    """Load the data, then train, evaluate or try, as the configuration says."""
    dataset = load(
        cast(Source, config.data),
        config.data_dir,
        image_size=config.image_size,
        track=display.track,
    )
    task, state = assemble(config, dataset)
    if config.preset == "small":
        display.say(
            "This is a small preset, made for a CPU: it shows that everything works, not"
            " what SAM reaches. --preset davda54 and foret2021 are the real ones."
        )
    display.facts("samfn", describe(task))
    if config.dry_run:
        return try_out(task, state, display)
    if config.eval_only:
        return evaluate_best(task, state, display)
    return train_and_report(task, state, display)


def try_out(task: Task, state: samfn.TrainState, display: Display) -> int:
    """Take one step."""
    prepare(task, state, Progress(), display)
    _, metrics = step(task, state, 0, next(batches(task, 0))[1])
    display.say(f"dry run: one step taken, loss {metrics.loss:.4f}, no run written")
    return 0


def evaluate_best(task: Task, state: samfn.TrainState, display: Display) -> int:
    """Evaluate the best checkpoint of the run that --resume names."""
    assert task.config.resume is not None  # `validate` saw to it.
    state, progress = restore(task, RunDirectory(task.config.resume), "best", state)
    loss, accuracy = evaluate(task, state, task.test)
    display.say(
        f"best epoch {progress.epoch}: test accuracy {accuracy:.2f} %, loss {loss:.4f}"
    )
    return 0


def train_and_report(task: Task, state: samfn.TrainState, display: Display) -> int:
    """Train, from the start or from where a run stopped, and leave a run behind."""
    config, progress = task.config, Progress()
    if config.resume is not None:
        directory = RunDirectory(config.resume)
        state, progress = restore(task, directory, "last", state)
        directory.rewind(progress.epoch)
        display.say(f"resuming after {progress.epoch} epochs and {progress.batch} steps")
    else:
        directory = RunDirectory.create(config.output or new_name(config), config)
    started = time.perf_counter()
    finished = train(task, state, progress, directory, display)
    seconds = time.perf_counter() - started
    rows = directory.rows()
    if rows:
        title = f"{config.data}, {config.model}, {name(config)}"
        plots.curves(rows, directory.curves, title)
    where = shlex.quote(str(directory.path))
    if not finished:
        display.say(f"stopped; {PROGRAM} --resume {where} goes on where this ended")
        return INTERRUPTED
    display.facts("done", summarise(task, directory, seconds))
    return 0


def name(config: Config) -> str:
    """Return how the training algorithm is called in titles."""
    return "SGD" if config.rho == 0 else f"{config.method}, rho {config.rho:g}"


def new_name(config: Config) -> Path:
    """Return a new directory below runs/, named for what is run and when."""
    method = "sgd" if config.rho == 0 else config.method
    method = "-".join(re.findall(r"[\w.]+", method))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parts = (stamp, config.data, config.model, method, f"seed{config.seed}")
    return Path("runs") / "-".join(parts)


def describe(task: Task) -> dict[str, str]:
    """Return what the banner says of a run."""
    config = task.config
    count = sum(parameter.numel() for parameter in task.model.parameters())
    height, width = task.train_images.shape[2:]
    facts = {
        "data": f"{config.data}, {len(task.train_labels):,} training and"
        f" {len(task.test.labels):,} test images, {width}x{height}",
        "model": f"{config.model}, {count:,} parameters",
        "method": name(config),
        "training": f"{config.epochs} epochs of {task.steps_per_epoch} steps, batch"
        f" {config.batch_size}, lr {config.lr:g} {config.schedule}, preset {config.preset}",
        "device": f"{task.device}, {config.precision}, torch {torch.__version__}",
        "compiled": task.compiling,
    }
    if config.label_noise:
        facts["label noise"] = f"{config.label_noise:.0%} of the training labels are wrong"
    return facts


def summarise(task: Task, directory: RunDirectory, seconds: float) -> dict[str, str]:
    """Return what the closing summary says of a run."""
    rows, config = directory.rows(), task.config
    chosen_by = task.chosen_by.name
    best = max(rows, key=lambda row: row[f"{chosen_by}_accuracy"])
    other, compared = ("0", "plain SGD") if config.rho else ("0.05", "SAM")
    where = shlex.quote(str(directory.path))
    again = shlex.quote(str(directory.path / CONFIG_FILE))
    return {
        "last epoch": f"test accuracy {rows[-1]['test_accuracy']:.2f} %",
        "best epoch": f"test accuracy {best['test_accuracy']:.2f} % in epoch"
        f" {best['epoch']}, chosen by the {chosen_by} set",
        "time": f"{seconds:.1f} s, {rows[-1]['images_per_second']:,.0f} images/s",
        "files": str(directory.path),
        "picture": str(directory.curves),
        f"try {compared}": f"{PROGRAM} --config {again} --rho {other}",
        "evaluate": f"{PROGRAM} --eval-only --resume {where}",
    }


if __name__ == "__main__":
    sys.exit(main())
