"""The training loop of the recipe: batches in, steps taken, epochs recorded.

All randomness is a function of the seed and the position, so that a run that stopped
anywhere goes on exactly as if it had not.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import samfn
from recipes import augment
from recipes.console import Display, Live
from recipes.keeping import Keeper, Progress
from recipes.rundir import Row, RunDirectory
from recipes.signals import Signals
from recipes.task import Split, Task, generator, seed

EVAL_BATCH = 500  # images; large enough to be fast, small enough for a laptop
CHUNK = 16  # batches that are augmented at once, since each call costs as much as one does


class DivergedError(Exception):
    """Too many steps had a loss or gradient that was not finite."""


def step(
    task: Task, state: samfn.TrainState, position: int, batch: tuple[Tensor, Tensor]
) -> tuple[samfn.TrainState, samfn.Metrics]:
    """Take one step; `position` counts the steps of the whole run."""
    torch.manual_seed(seed(task.config.seed, "dropout", position))
    return task.update(state, batch, rho=task.config.rho, lr=task.lr(position))


def batches(
    task: Task, epoch: int, start: int = 0
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Yield the epoch's batches from number `start` on: number, (images, labels)."""
    config, rows = task.config, order(task, epoch)
    for first in range(start - start % CHUNK, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        source = generator(config.seed, "augmentation", epoch, first, device=task.device)
        images = augment.random_crop_flip(
            task.train_images[chunk.flatten()],
            source,
            padding=config.crop_padding,
            flip=config.flip,
        )
        images = augment.normalise(images, task.mean, task.std)
        if config.cutout:
            images = augment.cutout(images, source, size=config.cutout, probability=0.5)
        parts = torch.split(images, config.batch_size), task.train_labels[chunk]
        for index, batch in enumerate(zip(*parts, strict=True), first):
            if index >= start:
                yield index, batch


def prepare(
    task: Task, state: samfn.TrainState, progress: Progress, display: Display
) -> None:
    """Compile the step, where it is to be, by a step whose result is dropped."""
    if task.config.compile == "yes" and progress.epoch < task.config.epochs:
        _, batch = next(batches(task, progress.epoch))
        with display.waiting("compiling the training step"):
            step(task, state, 0, batch)


def order(task: Task, epoch: int) -> Tensor:
    """Return the indices of the epoch's images, one row a batch."""
    size = task.config.batch_size
    source = generator(task.config.seed, "order", epoch)
    shuffled = torch.randperm(len(task.train_labels), generator=source)
    return shuffled[: task.steps_per_epoch * size].view(-1, size).to(task.device)


class StopError(Exception):
    """An evaluation was asked to end early."""


@torch.no_grad()
def evaluate(
    task: Task,
    state: samfn.TrainState,
    split: Split,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy, in percent, on all images of a split.

    Raises:
        StopError: `stopping`, which is asked before each batch, said so.
    """
    loss = torch.zeros((), device=task.device)
    correct = torch.zeros((), device=task.device, dtype=torch.int64)
    with _evaluating(task.model):
        parts = (torch.split(tensor, EVAL_BATCH) for tensor in split[1:])
        for images, labels in zip(*parts, strict=True):
            if stopping():
                raise StopError
            inputs = augment.normalise(images, task.mean, task.std)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            mean, aux = task.eval_fn(state.params, state.buffers, (inputs, labels))
            loss += mean * len(labels)
            correct += (aux.outputs.argmax(1) == labels).sum()
    total = len(split.labels)
    return loss.item() / total, 100 * correct.item() / total


class Meter:
    """Sums over the steps of an epoch, kept on the device until they are read."""

    NAMES = ("loss", "accuracy", "grad_norm", "perturbation_norm", "sharpness")

    def __init__(self, device: torch.device, sums: tuple[float, ...]) -> None:
        start = sums or (0.0,) * (len(self.NAMES) + 1)
        self.sums = torch.tensor(start, device=device)

    def add(self, metrics: samfn.Metrics, labels: Tensor) -> None:
        """Add one step; one that was skipped counts for nothing."""
        found = metrics.outputs.argmax(1)  # Of a part of the batch, for some methods.
        accuracy = 100 * (found == labels[: len(found)]).float().mean()
        values = (
            metrics.loss,
            accuracy,
            metrics.grad_norm,
            metrics.perturbation_norm,
            metrics.perturbed_loss - metrics.loss,
            torch.ones_like(metrics.loss),
        )
        row = torch.stack([value.float() for value in values])
        self.sums += torch.where(metrics.finite, row, 0.0)

    def read(self) -> tuple[dict[str, float], int]:
        """Return the means, and how many steps they are of. This waits for a GPU."""
        *sums, steps = self.sums.tolist()
        means = [total / max(steps, 1) for total in sums]
        return dict(zip(self.NAMES, means, strict=True)), int(steps)


def train(
    task: Task,
    state: samfn.TrainState,
    progress: Progress,
    run: RunDirectory,
    keeper: Keeper,
    display: Display,
    signals: Signals,
) -> bool:
    """Train to the last epoch, and record each in the run directory.

    Returns:
        Whether training reached its end; if not, a signal stopped it, and the last
        checkpoint holds the step after which it did.

    Raises:
        CheckpointWriteError: a checkpoint cannot be written. The one before is whole.
        DivergedError: no step of an epoch was finite, or more steps in a row than allowed
            were not. The last checkpoint is older.
        NonFiniteError: the weights are not finite. The last checkpoint is older.
    """
    config = task.config
    prepare(task, state, progress, display)
    with (
        signals.deferred(),
        display.training(config.epochs, task.steps_per_epoch, int(state.step)) as live,
    ):
        while progress.epoch < config.epochs:
            state, progress, meter = _train_epoch(
                task, state, progress, keeper, live, signals
            )
            row = _record(task, state, progress, meter, signals)
            if row is None:
                keeper.save(state, progress)
                return False
            accuracy = row[f"{task.chosen_by.name}_accuracy"]
            progress = Progress(epoch=progress.epoch + 1)
            _append(run, row, display)
            # In this order: a run that is killed between the two takes the epoch again.
            keeper.save(state, progress, accuracy)
            live.epoch(row)
            if signals.stop is not None and progress.epoch < config.epochs:
                return False
    return True


def _train_epoch(
    task: Task,
    state: samfn.TrainState,
    progress: Progress,
    keeper: Keeper,
    live: Live,
    signals: Signals,
) -> tuple[samfn.TrainState, Progress, Meter]:
    """Train to the end of an epoch, or until a signal asks to stop."""
    started = time.perf_counter() - progress.seconds
    meter = Meter(task.device, progress.sums)
    position = progress.epoch * task.steps_per_epoch
    every = task.config.save_steps

    def here(done: int) -> Progress:
        return progress._replace(
            batch=done,
            sums=tuple(meter.sums.tolist()),
            seconds=time.perf_counter() - started,
        )

    done, worst = progress.batch, state.skipped_in_a_row.clone()
    for index, batch in batches(task, progress.epoch, progress.batch):
        state, metrics = step(task, state, position + index, batch)
        meter.add(metrics, batch[1])
        worst = torch.maximum(worst, state.skipped_in_a_row)
        done = index + 1
        last = done == task.steps_per_epoch
        if done % CHUNK == 0 or last:  # A GPU waits for it.
            _require_finite(task, state, worst, position + index, batch)
        if live.due():
            rate = done * task.config.batch_size / (time.perf_counter() - started)
            live.step(progress.epoch, done, meter.read()[0]["loss"], rate)
        # Where an epoch ends, the checkpoint comes after its evaluation.
        due = every is not None and (position + done) % every == 0 and not last
        if signals.take_save() or due:
            keeper.save(state, here(done))
        if signals.stop is not None:
            break
    _, finite = meter.read()
    if not finite and done == task.steps_per_epoch:
        raise DivergedError(
            f"none of the {done} steps of epoch {progress.epoch + 1} had a finite loss and"
            " gradient: try a lower --lr or --rho, or --warmup-epochs"
        )
    return state, here(done), meter


def _require_finite(
    task: Task,
    state: samfn.TrainState,
    worst: Tensor,
    position: int,
    batch: tuple[Tensor, Tensor],
) -> None:
    """Raise if more steps in a row than allowed were skipped, `worst` at most."""
    allowed = task.config.max_skipped
    try:
        samfn.require_finite(state._replace(skipped_in_a_row=worst), in_a_row=allowed + 1)
    except samfn.NonFiniteError as error:
        torch.manual_seed(seed(task.config.seed, "dropout", position))
        found = task.find_nonfinite(state, batch)
        where = f"step {position + 1}, {found}: " if found else ""
        raise DivergedError(f"{where}{error}") from error


def _append(run: RunDirectory, row: Row, display: Display) -> None:
    """Write a row; training is worth more than its log."""
    try:
        run.append(row)
    except OSError as error:
        display.warn(f"{run.metrics} lacks epoch {row['epoch']} for now: {error}")


def _record(
    task: Task,
    state: samfn.TrainState,
    progress: Progress,
    meter: Meter,
    signals: Signals,
) -> Row | None:
    """Evaluate, and gather what is known of an epoch; None if it is not at its end."""
    means, steps = meter.read()
    row: Row = {"epoch": progress.epoch + 1, "step": int(state.step)}
    row |= {"lr": task.lr(int(state.step) - 1), "rho": task.config.rho}
    row |= {f"train_{name}": means.pop(name) for name in ("loss", "accuracy")}
    row |= means
    if progress.batch < task.steps_per_epoch:
        return None
    for split in {task.chosen_by.name: task.chosen_by, "test": task.test}.values():
        try:
            found = evaluate(task, state, split, lambda: signals.stop is not None)
        except StopError:
            return None
        row |= {f"{split.name}_loss": found[0], f"{split.name}_accuracy": found[1]}
    row["skipped_steps"] = task.steps_per_epoch - steps
    row["seconds"] = progress.seconds
    row["images_per_second"] = (
        task.steps_per_epoch * task.config.batch_size / progress.seconds
    )
    return row


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
