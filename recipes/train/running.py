"""A run from its settings to its summary: train, evaluate the best, or try one step."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import samfn
from recipes import errors
from recipes.errors import ConfigError
from recipes.settings.command_line import PROGRAM
from recipes.settings.config import Config, validate
from recipes.settings.groups import DTYPES
from recipes.settings.presets import FAST
from recipes.settings.resolve import configure
from recipes.settings.saved import CONFIG_FILE, run_of
from recipes.terminal import cli
from recipes.terminal.console import Display, duration
from recipes.terminal.hardware import emulated, lacks_memory
from recipes.terminal.legible import quoted
from recipes.terminal.signals import Signals
from recipes.train import recorded, selection
from recipes.train.batches import augmented
from recipes.train.build import Read, Task, assemble, first_perturbed, placed, read_data
from recipes.train.callbacks import Interrupts, around
from recipes.train.checkpoints import (
    Keeper,
    begun,
    mean_of_best,
    model_of,
    normalisation,
    ranks,
    restore_best,
    resume,
)
from recipes.train.directory import Row, RunDirectory, Unwritten, reserved
from recipes.train.length import predicted
from recipes.train.loggers import logged
from recipes.train.loop import evaluate, fit, prepare, step
from recipes.train.pretrained import begin
from recipes.train.recorded import Recorded
from samfn import distributed
from samfn.storage import files
from samfn.training.loop import Training

# How the optimizers are called in sentences.
BASES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "muon": "Muon"}


def start(args: Sequence[str] | None, program: str = PROGRAM, *, base: str = "auto") -> int:
    """Do what a command that trains is there for; return its exit code.

    Args:
        args: its flags; None takes those that it was called with.
        program: the command in its help, and in the lines that say how to go on.
        base: the preset where none is named.
    """

    def body(display: Display, signals: Signals) -> int:
        config = configure(args, display.say, program=program, base=base)
        kind: Any = torch.device(config.device).type
        timeout = config.ranks.timeout
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(distributed.ranks(timeout=timeout, kind=kind))
            except ValueError as error:
                raise ConfigError(f"torchrun --nproc-per-node: {error}") from error
            # Before any rank writes, all have read what there is.
            config = distributed.from_first(config)
            return run(config, display, signals, program=program)

    return cli.run(body, ranks=True)


def run(
    config: Config,
    display: Display,
    signals: Signals,
    read: Read = read_data,
    program: str = PROGRAM,
) -> int:
    """Load the data by `read`, then train, evaluate or try, as the configuration says.

    `program` is the command in the lines that say how to go on.
    """
    dataset = read(config, display.track, display.warn)
    try:
        task, state = assemble(config, dataset)
        if config.preset in ("small", "small-wrn"):
            display.say(
                "This is a small preset, made for a CPU: it shows that everything works,"
                " not what SAM reaches. --preset airbench94, davda54 and foret2021 are the"
                " real ones."
            )
        display.facts("samfn", length(task, state) | describe(task))
        if config.call.dry_run:
            return try_out(task, state, display)
        if config.call.eval_only:
            return evaluate_best(task, state, display)
        return train_and_report(task, state, display, signals, program)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        parts = f"accumulated({config.method}, {config.batch_size // 2})"
        display.fail(
            f"out of memory with --batch-size {config.batch_size}{cli.peak()}: try a"
            f' smaller one, or --method "{parts}";'
            " checkpoints are whole, and a resumed run needs the batch size it began with"
        )
        return errors.OUT_OF_MEMORY


def try_out(task: Task, state: samfn.TrainState, display: Display) -> int:
    """Take one step."""
    state = placed(task, begin(task, state, display))
    prepare(task, Training(state), display)
    _, metrics = step(task, state, 0, next(augmented(task, 0)))
    display.say(f"dry run: one step taken, loss {metrics.loss:.4f}, no run written")
    return 0


def evaluate_best(task: Task, state: samfn.TrainState, display: Display) -> int:
    """Evaluate the best checkpoint of the run, or the checkpoint, that --resume names."""
    assert task.config.resume is not None  # `validate` saw to it.
    directory = RunDirectory(run_of(task.config.resume))
    path = task.config.resume
    recorded.require_one_run(path)
    training = restore_best(task, path, directory, state, display)
    loss, accuracy = evaluate(task, model_of(task, training), task.test)
    what = f"{path.name}, after" if path.is_file() else "best"
    display.say(
        f"{what} epoch {training.epoch}: test accuracy {accuracy:.2f} %, loss {loss:.4f}"
    )
    return 0


def train_and_report(
    task: Task, state: samfn.TrainState, display: Display, signals: Signals, program: str
) -> int:
    """Train, from the start or from where a run stopped, and leave a run behind."""
    with _opened(task, state, display) as (directory, training), writing():
        started = time.perf_counter()
        count = task.config.average.average_best or 1
        checkpoints = directory.checkpoints(display.warn, keep_best=count)
        keeper = Keeper(task, checkpoints, display.warn)
        first = distributed.rank() == distributed.FIRST
        log = logged(directory, task.config, display.warn)
        with log if first else contextlib.nullcontext():
            finished = train(task, training, directory, keeper, display, signals)
        seconds = time.perf_counter() - started
        if not first:
            return 0 if finished else 128 + (signals.stop or signal.SIGINT)
        where = quoted(directory.path)
        _draw(task, directory, display)
        if keeper.missing is not None:
            raise keeper.missing
        if not finished:
            display.say(f"stopped; {program} --resume {where} goes on where this ended")
            return 128 + (signals.stop or signal.SIGINT)
        best = _export(task, directory, state, display)
        facts = summarise(task, directory, best, seconds, program)
        if task.config.average.average_best is not None:
            facts |= _average(task, directory, checkpoints, state, display)
        display.facts("done", facts)
    return 0


def train(
    task: Task,
    training: Training,
    run: RunDirectory,
    keeper: Keeper,
    display: Display,
    signals: Signals,
) -> bool:
    """Train to the last epoch, and record each in the run directory.

    Returns:
        Whether training reached its end, or lost its patience; if not, a signal stopped
        it, and the last checkpoint holds the step after which it did.

    Raises:
        CheckpointWriteError, DivergedError, NonFiniteError: a checkpoint cannot be written,
            steps are not finite, or weights. The last checkpoint is older, and whole.
    """
    epochs, interrupts = task.config.epochs, Interrupts(signals)
    prepare(task, training, display)
    with (
        signals.deferred(),
        display.training(epochs, task.steps_per_epoch, training.step) as live,
    ):
        fit(task, training, around(task, training, run, keeper, display, live, interrupts))
        stopped = interrupts.to_stop()
    if training.stop and not stopped:
        display.say(training.stop)
    return training.epoch >= epochs or not stopped


@contextlib.contextmanager
def _opened(
    task: Task, state: samfn.TrainState, display: Display
) -> Iterator[tuple[RunDirectory, Training]]:
    """Hold the directory of a new run or of one that goes on; yield where it stands.

    The first rank alone holds it and writes.
    """
    config, first = task.config, distributed.rank() == distributed.FIRST
    if config.resume is None:
        training = begun(task, state, display)
        if not first:
            yield Unwritten(config.output or new_name(config)), training
            return
        path = config.output or reserved(new_name(config))
        with RunDirectory.create(path, config) as directory:
            yield directory, training
        return
    if not first:
        directory = Unwritten(run_of(config.resume))
        yield directory, resume(task, config.resume, directory, state, display)
        return
    directory = RunDirectory(run_of(config.resume))
    with directory.held():
        training = resume(task, config.resume, directory, state, display)
        checkpoints = recorded.checkpoints_of(directory, display.warn)
        rows = recorded.epochs_of(directory, config, checkpoints, display.warn)
        with writing():
            directory.rewrite([row for row in rows if row["epoch"] <= training.epoch])
            directory.write_config(config)
        display.say(f"resuming after {training.epoch} epochs and {training.batch} steps")
        yield directory, training


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn what the system says into the error that ends a run with `NOT_WRITTEN`."""
    try:
        yield
    except samfn.CheckpointWriteError:
        raise
    except OSError as error:
        raise samfn.CheckpointWriteError(f"cannot write: {error}") from error


def _rows(task: Task, directory: RunDirectory) -> list[Row]:
    """Return the epochs that were recorded, without what somebody else has made of them."""
    try:
        rows = directory.rows()
    except OSError:  # Who writes an epoch has told of it.
        return []
    return [row for row in rows if recorded.is_whole(row, task.config.epochs)]


def _draw(task: Task, directory: RunDirectory, display: Display) -> None:
    from recipes import plots  # It takes a fifth of what all imports do.

    rows, config = _rows(task, directory), task.config
    if not rows:
        return
    title = f"{config.data}, {config.model}, {name(config)}"
    try:
        plots.curves(rows, directory.curves, title)
        if watched := [row for row in rows if "layers" in row]:
            plots.layers(watched, directory.layers, title)
    except OSError as error:
        display.warn(f"cannot draw into {directory.path}: {error}")


def _export(
    task: Task, directory: RunDirectory, like: samfn.TrainState, display: Display
) -> Row:
    """Write the best epoch's model for those who have no samfn; return what it was."""
    try:
        best = restore_best(task, directory.path, directory, like, display, alone=True)
    except ConfigError as error:  # It was whole when it was written.
        text = f"no best checkpoint is left to export: {error}; who goes on trains it again"
        raise samfn.CheckpointWriteError(text) from error
    state = model_of(task, best)
    _write_weights(directory.weights, task, state)
    if task.config.recording.export:
        inputs = task.test.images[:2].float().to(memory_format=torch.channels_last)
        trained = task.model, state.params, state.buffers
        samfn.export_program(directory.program, *trained, inputs)
    else:
        _supersede(directory.program, "--export", display)
    if task.config.average.average_best is None:
        _supersede(directory.average, "--average-best", display)
    return best.row


def _write_weights(path: Path, task: Task, state: samfn.TrainState) -> None:
    """Write a model, with what must be known of its inputs and its outputs to use it."""
    about = {"normalisation": normalisation(task), "classes": task.classes}
    texts = {name: json.dumps(value) for name, value in about.items()}
    samfn.export_weights(path, task.model, state.params, state.buffers, metadata=texts)


def _supersede(path: Path, wanted: str, display: Display) -> None:
    """Set aside what would stand beside a model of which it is not."""
    if os.path.lexists(path):
        aside = files.put_aside(path, "superseded")
        display.warn(f"without {wanted}: {path} of before is {aside.name} now")


def _average(
    task: Task,
    directory: RunDirectory,
    checkpoints: samfn.Checkpoints,
    like: samfn.TrainState,
    display: Display,
) -> dict[str, str]:
    """Write the average of the best epochs' models; return what is said of it."""
    try:
        state, epochs = mean_of_best(task, checkpoints, like)
    except (OSError, ValueError, ConfigError) as error:  # They were whole when written.
        raise samfn.CheckpointWriteError(f"cannot average: {error}") from error
    _tell_lacking(task, directory, epochs, display)
    _write_weights(directory.average, task, state)
    loss, accuracy = evaluate(task, state, task.test, alone=True)
    listed = ", ".join(map(str, sorted(epochs)))
    text = f"test accuracy {accuracy:.2f} %, loss {loss:.4f}, of epochs {listed}"
    return {"average": text, "its model": str(directory.average)}


def _tell_lacking(
    task: Task, directory: RunDirectory, averaged: Sequence[int], display: Display
) -> None:
    """Warn unless the epochs that are averaged are the best, and as many as are wanted."""
    count = task.config.average.average_best or 0
    by = recorded.column(task.config, recorded.chosen_by(task.config))
    rows = [row for row in _rows(task, directory) if by in row]
    best = sorted(rows, key=lambda row: (-row[by], row["epoch"]))[:count]
    left = {row["epoch"] for row in best} & {*averaged}
    if len(left) < count:
        display.warn(
            f"--average-best {count}: only {len(left)} of the {count} best epochs have a"
            f" checkpoint; the average is of {len(averaged)} epochs"
        )


def name(config: Config) -> str:
    """Return how the training algorithm is called in titles."""
    if config.rho == 0:
        return BASES[config.descent.optimizer]
    text = f"{config.method}, rho {config.rho:g}"
    if config.perturbation.rho_schedule != "constant":
        text += f" to {config.perturbation.rho_final:g} {config.perturbation.rho_schedule}"
    if config.perturbation.sam_last < 1:
        text += f" in the last {config.perturbation.sam_last:.0%}"
    return text


def perturbed(task: Task, taken: int | None = None) -> str:
    """Return in which steps the weights are perturbed, if not in all or none; else ""."""
    if task.config.rho == 0 or task.config.perturbation.sam_last == 1:
        return ""
    planned = task.config.epochs * task.steps_per_epoch
    return late(first_perturbed(task), planned, taken)


def _perturbed(task: Task, directory: RunDirectory, rows: list[Row]) -> str:
    """Return the same of a run that has ended, maybe before, after these epochs."""
    config = task.config
    earlier = recorded.earlier(directory.path, config)
    run = Recorded(directory.path, config, rows, True, None, {}, earlier=earlier)
    share = run.share_perturbed
    # Schedules count whole epochs, also where some of them have fewer steps.
    as_planned = not earlier and config.selection.select == "all"
    if as_planned or share is None:
        return perturbed(task, rows[-1]["step"] if rows else None)
    if share == 1 or (share == 0 and config.rho == 0):
        return ""
    return f"in {share:.0%} of the steps, by the rho of each epoch"


def late(start: int, planned: int, taken: int | None = None) -> str:
    """Return from which step on the weights are perturbed, in what share of the steps.

    Args:
        start: the first step that perturbs them.
        planned: steps of the whole run.
        taken: steps of a run that has ended, maybe before; None is all of them.
    """
    steps = planned if taken is None else taken
    if start >= steps:
        return f"in none of {steps:,} steps, as the run ended before step {start + 1:,}"
    share = (steps - start) / steps
    return f"from step {start + 1:,} of {steps:,} on, {share:.0%} of the steps"


def new_name(config: Config) -> Path:
    """Return a new directory below runs/, named for what is run and when."""
    method = config.descent.optimizer if config.rho == 0 else config.method
    method = "-".join(re.findall(r"[\w.]+", method))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parts = (stamp, config.data, config.model, method, f"seed{config.seed}")
    return Path("runs") / "-".join(parts)


def length(task: Task, state: samfn.TrainState) -> dict[str, str]:
    """Return how long a run takes, where that can be said before it begins.

    A GPU is not timed, and digits take seconds.
    """
    config = task.config
    begins = config.resume is None and config.data != "digits"
    if not begins or task.device.type != "cpu":
        return {}
    return {"time": f"about {duration(predicted(task, state))}"}


def describe(task: Task) -> dict[str, str]:
    """Return what the banner says of a run."""
    config, base = task.config, BASES[task.config.descent.optimizer]
    how, noise = config.selection, config.images.label_noise
    counts = [parameter.numel() for parameter in task.model.parameters()]
    size = f"{sum(counts):,} parameters"
    if config.network.freeze:
        trained = [p.numel() for p in task.model.parameters() if p.requires_grad]
        size += f", of which the last layer's {sum(trained):,} train"
    height, width = task.train_images.shape[2:]
    facts = {
        "data": f"{config.data}, {len(task.train_labels):,} training and"
        f" {len(task.test.labels):,} test images, {width}x{height}",
        "model": f"{config.model}, {size}",
        "method": name(config) + (f": {when}" if (when := perturbed(task)) else ""),
        "training": f"{config.epochs} epochs of {task.steps_per_epoch} steps, batch"
        f" {config.batch_size}, {base}, lr {config.lr:g} {config.learning_rate.schedule},"
        f" preset {config.preset}",
        "device": f"{task.device}, {_precision(task)}, torch {torch.__version__}",
        "compiled": task.compiling,
    }
    if task.sharing is not None:
        found = ranks(task)
        facts["ranks"] = (
            f"{found['ranks']}, placement {found['placement']}: a perturbation for each"
            f" m = {found['m']:g} of {config.batch_size} images"
        )
    if how.select != "all":
        facts["images"] = f"{how.select}, a scan every {how.select_every} epochs"
    if noise:
        facts["label noise"] = f"{noise:.0%} of the training labels are wrong"
    return facts


def _precision(task: Task) -> str:
    """Return the precision, and why it is not bf16 in a preset that would take that."""
    precision, bf16 = task.config.arithmetic.precision, DTYPES["bf16"]
    lacks = precision == "float32" and emulated(bf16, task.device)
    if task.config.preset in FAST and lacks:
        return f"{precision} as this CPU has no instructions for bf16"
    return precision


def summarise(
    task: Task, directory: RunDirectory, best: Row, seconds: float, program: str
) -> dict[str, str]:
    """Return what the closing summary says of a run.

    `best` is the epoch of the model that it leaves, or empty where an older version wrote
    the checkpoint.
    """
    config = task.config
    by = recorded.column(config, recorded.chosen_by(config))
    of = "" if config.average.ema_decay is None else " of the average"
    test = recorded.column(config, "test")
    rows = [row for row in _rows(task, directory) or [best] if {by, test} <= row.keys()]
    if not rows:  # Someone took the log away.
        return {"files": str(directory.path), "model": str(directory.weights)}
    best = best if {by, test} <= best.keys() else max(rows, key=lambda row: row[by])
    where, again = quoted(directory.path), quoted(directory.path / CONFIG_FILE)
    counted = [row for row in rows if "step" in row]
    spared = (
        {"skipped": selection.summarise(task, counted)}
        if config.selection.select != "all"
        else {}
    )
    when = {"perturbed": text} if (text := _perturbed(task, directory, counted)) else {}
    return {
        "last epoch": f"test accuracy{of} {rows[-1][test]:.2f} %",
        "best epoch": f"test accuracy{of} {best[test]:.2f} % in epoch"
        f" {best['epoch']}, chosen by the {task.chosen_by.name} set",
        "time": f"{seconds:.1f} s, {rows[-1]['images_per_second']:,.0f} images/s",
        **when,
        **spared,
        "files": str(directory.path),
        "model": str(directory.weights),
        "picture": str(directory.curves),
        **_counterpart(config, f"{program} --config {again}"),
        "evaluate": f"{program} --eval-only --resume {where}",
    }


def _counterpart(config: Config, again: str) -> dict[str, str]:
    """Return the command of the same run with SAM or without, unless it would be refused.

    `again` is that of this run.
    """
    plain = f"plain {BASES[config.descent.optimizer]}"
    rho, what = (0.0, plain) if config.rho else (0.05, "SAM")
    try:
        validate(config.replace(rho=rho))
    except ConfigError:
        return {}
    return {f"try {what}": f"{again} --rho {rho:g}"}
