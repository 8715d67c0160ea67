"""Training as the recipe does it: what `samfn.training.loop` calls, and its callbacks.

All randomness is a function of the seed and the position, so that a run that stopped
anywhere goes on exactly as if it had not.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import samfn
from recipes.errors import DivergedError
from recipes.terminal.console import Display, Live
from recipes.terminal.signals import Signals
from recipes.train import selection
from recipes.train.batches import CHUNK, StopError, augmented, clean, own
from recipes.train.build import Split, Task, seed
from recipes.train.checkpoints import Keeper, model_of, ranks
from recipes.train.compiling import keep_compiled
from recipes.train.directory import Row, RunDirectory
from recipes.train.layers import LayerMeter, alarms
from samfn import distributed
from samfn.distributed import Agreement
from samfn.training import callbacks, loop
from samfn.training.loop import Callback, Epoch, Event, Step, Training

# In `Training.memory`: what the meters of an epoch hold that a signal interrupted, and
# the gradients of the layers in the epoch before.
METER, LAYERS, GRADIENTS = "meter", "layers", "layer_gradients"


COMPARED = 100  # steps from one comparison of the ranks' states to the next


def step(
    task: Task,
    state: samfn.TrainState,
    position: int,
    batch: tuple[Tensor, Tensor],
    place: int | None = None,
) -> tuple[samfn.TrainState, samfn.Metrics]:
    """Take one step.

    Args:
        task: what is trained.
        state: before the step.
        position: steps that the run has taken before.
        batch: (images, labels).
        place: where in the schedules it is, which count epochs of all images; None is
            `position`.
    """
    place = position if place is None else place
    _draw_anew(task, position)
    return task.update(state, batch, rho=task.rho(place), lr=task.lr(place))


def _draw_anew(task: Task, position: int) -> None:
    """Seed what a step draws, as for dropout; each rank draws for its own images."""
    rank = distributed.rank()
    torch.manual_seed(seed(task.config.seed, "dropout", position, *[rank] * (rank > 0)))


def prepare(task: Task, training: Training, display: Display) -> None:
    """Compile the step, where it is to be, by a step whose result is dropped."""
    if task.config.compile == "yes" and training.epoch < task.config.epochs:
        batch = next(augmented(task, training.epoch))
        keep_compiled(display.warn)
        with display.waiting("compiling the training step"):
            step(task, training.state, 0, batch)


def evaluate(
    task: Task,
    state: samfn.TrainState,
    split: Split,
    stopping: Callable[[], bool] = lambda: False,
    *,
    alone: bool = False,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy, in percent, on all images of a split.

    Each rank looks at its own images, unless this one is `alone` in asking.

    Raises:
        StopError: `stopping`, which is asked before each batch, said so.
    """
    rows = slice(None) if alone else own(len(split.labels))
    labels = split.labels[rows]
    parts = clean(task, split.images[rows], labels, stopping)
    measures = {"accuracy": loop.accuracy}
    with _evaluating(task.model):
        found = loop.evaluate(
            state.params, state.buffers, parts, loss_fn=task.eval_fn, measures=measures
        )
    if not alone:
        found = distributed.mean(found, weight=len(labels))
    return found["loss"], found["accuracy"]


class Meter:
    """Sums over the steps of an epoch, kept on the device until they are read.

    Args:
        device: where the steps are taken.
        kept: what `kept` gave where the epoch was interrupted.
    """

    NAMES = ("loss", "accuracy", "grad_norm", "perturbation_norm", "sharpness")

    def __init__(self, device: torch.device, kept: Mapping[str, Any] | None = None) -> None:
        start = (kept or {}).get("sums") or (0.0,) * (len(self.NAMES) + 1)
        self.sums = torch.tensor(start, device=device)
        self._rows = 0
        self._started: float = time.perf_counter() - (kept or {}).get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """The time that the epoch took so far."""
        return time.perf_counter() - self._started

    def add(self, metrics: samfn.Metrics, labels: Tensor) -> None:
        """Add one step; one that was skipped counts for nothing.

        Of labels that are shares of several classes, the largest share is the right one.
        """
        if labels.ndim == 2:
            labels = labels.argmax(1)
        outputs = metrics.outputs  # Of a part of the batch, for some methods.
        self._rows = len(labels)
        accuracy = 100 * loop.right(outputs, labels[: len(outputs)]).float().mean()
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

    def share(self) -> None:
        """Average over ranks what each knows of its own images alone, the accuracy."""
        place = self.NAMES.index("accuracy")
        found = {"accuracy": float(self.sums[place])}
        self.sums[place] = distributed.mean(found, self._rows)["accuracy"]

    def kept(self) -> dict[str, Any]:
        """Return what goes into a checkpoint. This waits for a GPU."""
        return {"sums": self.sums.tolist(), "seconds": self.seconds}


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
        CheckpointWriteError: a checkpoint cannot be written. The one before is whole.
        DivergedError: no step of an epoch was finite, or more steps in a row than allowed
            were not. The last checkpoint is older.
        NonFiniteError: the weights are not finite. The last checkpoint is older.
    """
    epochs = task.config.epochs
    prepare(task, training, display)
    with (
        signals.deferred(),
        display.training(epochs, task.steps_per_epoch, training.step) as live,
    ):
        watch = _Watch(task, run, keeper, display, live, signals)
        try:
            loop.run(
                training,
                batches=watch.batches,
                update=watch.update,
                epochs=epochs,
                evaluate=watch.evaluate,
                callbacks=[*_callbacks(task), watch],
            )
        except StopError:
            training.stop = "signal"
        stopped = watch.asked_to_stop()
        if training.stop and training.batch:
            watch.save()
    if training.stop and not stopped:
        display.say(training.stop)
    return training.epoch >= epochs or not stopped


def _callbacks(task: Task) -> list[Callback]:
    """Return what keeps something in the checkpoint, and so comes before it is written."""
    config, found = task.config, []
    if config.ema_decay is not None:
        start = round(config.ema_start * task.steps_per_epoch)
        found.append(callbacks.ema(config.ema_decay, start=start))
    if config.ema_copy is not None:
        found.append(callbacks.copy_ema(config.ema_copy))
    if config.patience is not None:
        found.append(callbacks.early_stopping(chosen(task), config.patience))
    return found


def chosen(task: Task) -> str:
    """Return the column of a row that the best epoch is chosen by."""
    average = "ema_" if task.config.ema_decay is not None else ""
    return f"{average}{task.chosen_by.name}_accuracy"


class _Watch:
    """What happens around the steps and epochs of a run."""

    def __init__(
        self,
        task: Task,
        run: RunDirectory,
        keeper: Keeper,
        display: Display,
        live: Live,
        signals: Signals,
    ) -> None:
        self._task, self._run, self._keeper = task, run, keeper
        self._display, self._live, self._signals = display, live, signals
        self._agreement = Agreement(2)

    def batches(self, training: Training) -> Iterator[tuple[Tensor, Tensor]]:
        """Begin an epoch, or what is left of it."""
        task = self._task
        self._training = training
        self._meter = Meter(task.device, training.memory.pop(METER, None))
        if task.config.monitor:
            parameters = len(training.state.params)
            kept = training.memory.pop(LAYERS, None)
            self._layers = LayerMeter(parameters, task.device, kept)
        self._worst = training.state.skipped_in_a_row.clone()
        among = selection.chosen(task, training)
        self._images = len(task.train_labels) if among is None else len(among)
        self._steps = self._images // task.config.batch_size
        yield from augmented(task, training.epoch, training.batch, among)

    def update(
        self, state: samfn.TrainState, batch: tuple[Tensor, Tensor]
    ) -> tuple[samfn.TrainState, samfn.Metrics]:
        """Take a step."""
        training = self._training
        place = self._place(training.batch)
        return step(self._task, state, training.step, batch, place)

    def __call__(self, event: Event) -> None:
        match event:
            case Step(training, batch, metrics):
                self._step(training, batch, metrics)
            case Epoch(training):
                self._epoch(training)

    def save(self) -> None:
        """Write a checkpoint in the middle of an epoch."""
        memory = self._training.memory
        self._meter.share()
        memory[METER] = self._meter.kept()
        if self._task.config.monitor:
            memory[LAYERS] = self._layers.sums
        self._keeper.save(self._training)
        memory.pop(METER), memory.pop(LAYERS, None)  # The next epoch begins with nothing.

    def evaluate(self, training: Training) -> Row:
        """Gather what is known of an epoch at its end."""
        task = self._task
        self._meter.share()
        means, steps = self._meter.read()
        seconds = self._meter.seconds
        last = self._place(self._steps - 1)
        row: Row = {"lr": task.lr(last), "rho": task.rho(last)}
        row |= {f"train_{name}": means.pop(name) for name in ("loss", "accuracy")}
        row |= means
        states = {"": training.state}
        if task.config.ema_decay is not None:
            states["ema_"] = model_of(task, training)
        for split in {task.chosen_by.name: task.chosen_by, "test": task.test}.values():
            for prefix, state in states.items():
                found = evaluate(task, state, split, self._stopping)
                name = f"{prefix}{split.name}"
                row |= {f"{name}_loss": found[0], f"{name}_accuracy": found[1]}
        row["skipped_steps"] = self._steps - steps
        row["seconds"] = seconds
        row["images_per_second"] = self._steps * task.config.batch_size / seconds
        if task.sharing is not None:
            row["m"] = ranks(task)["m"]
        if task.config.monitor:
            row |= self._layers.row(training.state.params)
        if task.config.select != "all":
            row |= {"trained_images": self._images, "scan_seconds": self._scan(row["rho"])}
        return row

    def _scan(self, rho: float) -> float:
        """Look at all images, where it is time for that; return the seconds it took."""
        task, training = self._task, self._training
        if not selection.is_due(task.config, training.epoch):
            return 0.0
        started = time.perf_counter()
        average = task.config.select_with == "average"
        state = model_of(task, training) if average else training.state
        with _evaluating(task.model):
            found = selection.scan(task, training.memory, state, rho, self._stopping)
        training.memory |= found
        return time.perf_counter() - started

    def _place(self, batch: int) -> int:
        """Return where in the schedules a batch of the epoch is."""
        whole = self._task.steps_per_epoch
        return self._training.epoch * whole + batch * whole // self._steps

    def _stopping(self) -> bool:
        # Ranks that evaluate would have to agree before each batch.
        return self._signals.stop is not None and distributed.size() == 1

    def asked_to_stop(self) -> bool:
        """Return whether a signal asked any rank to stop; waits for all of them."""
        _, stop = self._agreement.now(0, self._signals.stop or 0)
        if stop:  # Another may have come while this one waited; it will be asked next.
            self._signals.stop = stop
        return stop > 0

    def _step(
        self, training: Training, batch: tuple[Tensor, Tensor], metrics: samfn.Metrics
    ) -> None:
        task, done = self._task, training.batch
        self._meter.add(metrics, batch[1])
        if metrics.layers is not None:
            self._layers.add(metrics)
        self._worst = torch.maximum(self._worst, training.state.skipped_in_a_row)
        last = done == self._steps
        if training.step % COMPARED == 0:
            distributed.require_alike(training.state)
        if done % CHUNK == 0 or last:  # A GPU waits for it.
            _require_finite(task, training, self._worst, batch)
        if last:
            self._require_some_finite(training)
        if self._live.due():
            rate = done * task.config.batch_size / self._meter.seconds
            loss = self._meter.read()[0]["loss"]
            place = self._place(done)
            self._live.step(training.epoch, place % task.steps_per_epoch, loss, rate)
        # Where an epoch ends, the checkpoint comes after its evaluation.
        every = task.config.save_steps
        due = every is not None and training.step % every == 0 and not last
        asked = int(self._signals.take_save()), self._signals.stop or 0
        save, stop = self._agreement.later(*asked)
        if save or due:
            self.save()
        if stop:
            training.stop = "signal"

    def _epoch(self, training: Training) -> None:
        row = training.row
        if self._task.config.monitor:
            self._tell_alarms(training)
        _append(self._run, row, self._display)
        # In this order: a run that is killed between the two takes the epoch again.
        chosen_by = f"{self._task.chosen_by.name}_accuracy"
        scores = {
            name: row[f"{prefix}{chosen_by}"]
            for name, prefix in (("score", ""), ("ema", "ema_"))
            if f"{prefix}{chosen_by}" in row
        }
        self._keeper.save(training, scores)
        self._live.epoch(row)
        if self.asked_to_stop():
            training.stop = "signal"

    def _tell_alarms(self, training: Training) -> None:
        """Say which layers' gradients vanish or explode; remember what they were."""
        now = self._layers.gradient()
        before = training.memory.get(GRADIENTS)
        found = [str(alarm) for alarm in alarms(training.state.params, now, before)]
        training.memory[GRADIENTS] = now
        more = [f"{len(found) - 3} more"] if len(found) > 3 else []
        if found:
            listed = "; ".join(found[:3] + more)
            self._display.warn(f"epoch {training.epoch}: {listed}")

    def _require_some_finite(self, training: Training) -> None:
        if self._meter.read()[1]:
            return
        task, among = self._task, selection.chosen(self._task, training)
        batch = next(augmented(task, training.epoch, 0, among))
        where = _where(task, training.state, training.step - training.batch, batch)
        raise DivergedError(
            f"{where}none of the {training.batch} steps of epoch {training.epoch + 1} had a"
            " finite loss and gradient: try a lower --lr or --rho, or --warmup-epochs"
        )


def _require_finite(
    task: Task, training: Training, worst: Tensor, batch: tuple[Tensor, Tensor]
) -> None:
    """Raise if more steps in a row than allowed were skipped, `worst` at most."""
    allowed, state = task.config.max_skipped, training.state
    try:
        samfn.require_finite(state._replace(skipped_in_a_row=worst), in_a_row=allowed + 1)
    except samfn.NonFiniteError as error:
        where = _where(task, state, training.step - 1, batch)
        raise DivergedError(f"{where}{error}") from error


def _where(
    task: Task, state: samfn.TrainState, position: int, batch: tuple[Tensor, Tensor]
) -> str:
    """Return the step, pass and tensor that was not finite, to begin a sentence with.

    Args:
        task: what is trained.
        state: after steps that were all skipped since `position`.
        position: steps that the run had taken before the one in question.
        batch: of that one.
    """
    _draw_anew(task, position)
    then = state._replace(step=torch.full_like(state.step, position + 1))
    found = task.find_nonfinite(then, batch)
    return f"step {position + 1}, {found}: " if found else ""


def _append(run: RunDirectory, row: Row, display: Display) -> None:
    """Write a row; training is worth more than its log."""
    try:
        run.append(row)
    except OSError as error:
        display.warn(f"{run.metrics} lacks epoch {row['epoch']} for now: {error}")
    run.log(row)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # Of those that are frozen, none trains.
            module.training = mode
