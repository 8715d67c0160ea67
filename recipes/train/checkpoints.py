"""Checkpoints of a run, written and read: what it needs to go on."""

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import samfn
from recipes.errors import ConfigError
from recipes.settings.config import plain_values
from recipes.settings.resolve import choose_device, require_same_settings
from recipes.settings.saved import of_run, run_of
from recipes.terminal.console import Display
from recipes.train import recorded
from recipes.train.batches import augmented
from recipes.train.build import Task, assemble, placed, read_data
from recipes.train.directory import RunDirectory
from recipes.train.pretrained import begin, digest
from recipes.train.recorded import best_by
from samfn import distributed
from samfn.training import callbacks
from samfn.training.loop import Training


class Keeper:
    """Writes the checkpoints of a run, and remembers whether the last one is missing."""

    def __init__(
        self, task: Task, checkpoints: samfn.Checkpoints, warn: Callable[[str], None]
    ) -> None:
        self.missing: samfn.CheckpointWriteError | None = None
        self._task, self._checkpoints, self._warn = task, checkpoints, warn

    def save(self, state: samfn.TrainState, **about: Any) -> None:
        """Write a checkpoint, with what it needs to say of its run; warn, or raise.

        What ranks keep parts of is put together by the first, so that any number of them,
        and any placement, goes on from it.
        """
        task, first = self._task, distributed.rank() == distributed.FIRST
        if task.mesh is not None:
            state, about = distributed.gather((state, about), "cpu" if first else "meta")
            if not first:
                return
        about |= {
            "config": plain_values(task.config),
            "normalisation": normalisation(task),
            "data": task.fingerprint,
            "versions": versions(task),
            "ranks": ranks(task),
        }
        try:
            self._checkpoints.save(state, **about)
            self.missing = None
        except samfn.CheckpointWriteError as error:
            if task.config.stopping.on_write_error == "stop":
                raise
            self.missing = error
            self._warn(str(error))


def normalisation(task: Task) -> dict[str, list[float]]:
    """Return what the network's inputs are normalised by: (image / 255 - mean) / std."""
    return {"mean": task.mean.tolist(), "std": task.std.tolist()}


def begun(task: Task, whole: samfn.TrainState, display: Display) -> Training:
    """Return a run at its beginning, which remembers of which file its weights are."""
    training = Training(placed(task, begin(task, whole, display)))
    if (known := digest(task.config)) is not None:
        training.memory[recorded.WEIGHTS] = known
    return training


def ranks(task: Task) -> dict[str, Any]:
    """Return how the perturbation was found: on how many images, by which ranks."""
    batch, count = task.config.batch_size, distributed.size()
    if task.sharing is None:
        return {"placement": "one process", "ranks": 1, "m": batch}
    m = batch * task.sharing / count
    return {"placement": task.config.ranks.placement, "ranks": count, "m": m}


def versions(task: Task) -> dict[str, str]:
    """Return what a run's bits depend on beside its settings."""
    cuda = task.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(task.device) if cuda else task.device.type,
        "processor": platform.machine(),
        "threads": "" if cuda else str(torch.get_num_threads()),
        "ranks": str(distributed.size()),
    }


def resume(
    task: Task, path: Path, run: RunDirectory, like: samfn.TrainState, display: Display
) -> Training:
    """Read the checkpoint that a run goes on from.

    Args:
        task: what the run trains.
        path: the run's directory, whose newest checkpoint counts, and from its start if
            there is none; or one checkpoint, which then must be whole.
        run: the run; held.
        like: a state of the run, whole.
        display: is told of damaged checkpoints and of other versions.

    Raises:
        ConfigError: the checkpoint is damaged, or belongs to another network or to other
            data, or the run has begun more epochs than it is to have.
        CheckpointWriteError: the settings that it had cannot be kept.
    """
    checkpoints, kept = run.checkpoints(display.warn), placed(task, like)
    try:
        found = _named(path, kept) or callbacks.agreed(checkpoints.latest, kept)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--resume: {error}") from error
    if found is None:
        display.say(f"{run.path} holds no checkpoint: starting from the beginning")
        return begun(task, like, display)
    training, metadata = _require_fitting(task, found), found.metadata
    require_same_settings(metadata["config"], task.config)
    epochs = training.epoch + (training.batch > 0)
    if epochs > task.config.epochs:
        text = f"expected at least {epochs}, which the run has begun, got"
        raise ConfigError(f"--epochs: {text} {task.config.epochs}")
    if distributed.rank() == distributed.FIRST:
        checkpoints.drop_after(training.step)
        # Whoever changed them by hand and said so has checkpoints of both.
        if not recorded.is_own(metadata["config"], run.path):
            try:
                run.keep_settings(metadata["config"])
            except OSError as error:
                raise samfn.CheckpointWriteError(f"cannot write: {error}") from error
    first = training.memory.get(recorded.WEIGHTS)
    if first is not None and digest(task.config) not in (first, None):
        text = f"{task.config.network.weights} is another file than the run began with"
        display.warn(f"--weights: {text}: going on with what came of that one")
    now, then = versions(task), metadata["versions"]
    for name, before in then.items():
        if now.get(name) != before:
            text = f"{name} was {before}, is now {now.get(name)}"
            display.warn(f"{text}: going on, but not bit for bit")
    m, before = ranks(task)["m"], metadata.get("ranks", {}).get("m", task.config.batch_size)
    part, known = then | {"m": f"{before:g}"}, training.memory.get(recorded.BEFORE, [])
    if part != now | {"m": f"{m:g}"} and part not in known:
        training.memory[recorded.BEFORE] = [*known, part]
    if m != before:
        text = f"a perturbation was found on m = {before:g} images, is now on {m:g}"
        display.warn(f"{text}: another objective; --placement and the ranks decide on m")
    return training


def restore_best(
    task: Task,
    path: Path,
    run: RunDirectory,
    like: samfn.TrainState,
    display: Display,
    *,
    alone: bool = False,
) -> Training:
    """Read the checkpoint of the best epoch, or the one that `path` is.

    All ranks do so together, unless this one is `alone`.

    Raises:
        ConfigError: there is none that is whole, or it belongs to another network or to
            other data.
    """
    best = partial(run.checkpoints(display.warn).best_whole, by=best_by(task.config))
    agreed = best if alone else partial(callbacks.agreed, best)
    return _read(task, path, like, agreed)


def reopen(
    path: Path, device: str, display: Display, *, last: bool = False
) -> tuple[Task, samfn.TrainState, int]:
    """Put together again what a run trained, and read what came of it.

    Args:
        path: the run's directory, whose best epoch counts, or one of its checkpoints.
        device: where to compute, as in `Config`, whatever the run did.
        display: is told of damaged checkpoints, and shows how far reading is.
        last: of a directory, read the newest checkpoint and not the best.

    Returns:
        The task, the state as `model_of` gives it, and the epochs that led to it.

    Raises:
        ConfigError: there is no run, no checkpoint that is whole, or no such device; the
            data are others, or a checkpoint is of another run.
        DataError: the data are not there any more.
    """
    config = of_run(path).replace(device=str(choose_device(device)), compile="no")
    recorded.require_one_run(path)
    task, like = assemble(config, read_data(config, display.track, display.warn))
    checkpoints = RunDirectory(run_of(path)).checkpoints(display.warn)
    best = partial(checkpoints.best_whole, by=best_by(task.config))
    training = _read(task, path, like, checkpoints.latest if last else best)
    return task, model_of(task, training), training.epoch


def _read(
    task: Task,
    path: Path,
    like: samfn.TrainState,
    whole: Callable[[samfn.TrainState], samfn.Found | None],
) -> Training:
    """Read the checkpoint that `path` is, or that `whole` chooses."""
    try:
        found = _named(path, like) or whole(like)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if found is None:
        raise ConfigError(f"{path} holds no checkpoint of a whole epoch")
    return _require_fitting(task, found)


def model_of(task: Task, training: Training) -> samfn.TrainState:
    """Return the state with the weights and statistics that are the run's result."""
    if task.config.average.ema_decay is None:
        return training.state
    params, buffers = callbacks.ema_of(training)
    return training.state._replace(params=params, buffers=buffers)


def mean_of_best(
    task: Task, checkpoints: samfn.Checkpoints, like: samfn.TrainState
) -> tuple[samfn.TrainState, list[int]]:
    """Return the mean of the best epochs' weights, and these epochs.

    The statistics of BatchNorm are taken anew, on an epoch of training images.

    Raises:
        CheckpointCorruptError: one of them is damaged.
    """
    models, epochs = [], []
    for path in checkpoints.best(best_by(task.config)):
        training = _require_fitting(task, samfn.Found(path, *samfn.restore(path, like)))
        models.append(model_of(task, training))
        epochs.append(training.epoch)
    params, buffers = (
        samfn.mean_of(getattr(model, what) for model in models)
        for what in ("params", "buffers")
    )
    buffers = samfn.reestimated(task.model, params, buffers, augmented(task, 0, whole=True))
    return like._replace(params=params, buffers=buffers), epochs


def _named(path: Path, like: samfn.TrainState) -> samfn.Found | None:
    """Read a checkpoint, if `path` is one and no directory."""
    return samfn.Found(path, *samfn.restore(path, like)) if path.is_file() else None


def _require_fitting(task: Task, found: samfn.Found) -> Training:
    """Return where a run stands, if the checkpoint is one of this recipe and data.

    Who can write a checkpoint can write anything into it, under the right SHA-256.
    """
    said = recorded.facts(found.path, found.metadata)
    training = callbacks.from_metadata(found.state, found.metadata)
    if (step := found.metadata["progress"]["step"]) != training.step:
        text = f"it says {step:,} steps, and its state has taken {training.step:,}"
        raise ConfigError(f"{found.path} is none of this recipe's: {text}")
    if said.data != task.fingerprint:
        raise ConfigError(f"{found.path} was trained on other images or labels")
    try:
        callbacks.require_average(training)
    except ValueError as error:
        raise ConfigError(f"{found.path}: {error}") from error
    return training
