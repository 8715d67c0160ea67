"""Callbacks around the steps of a run, each with one duty.

They are told of the events of `samfn.training.loop`, in the order of `around`.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import samfn
from recipes.errors import ConfigError, DivergedError
from recipes.terminal.console import Display, Live
from recipes.terminal.signals import Signals
from recipes.train import loop, selection
from recipes.train.batches import CHUNK, StopError, augmented
from recipes.train.build import Task
from recipes.train.checkpoints import Keeper, model_of, ranks
from recipes.train.directory import Row, RunDirectory
from recipes.train.layers import WHAT, LayerMeter, alarms
from recipes.train.recorded import best_by, column
from samfn import distributed
from samfn.distributed import Agreement
from samfn.training import callbacks
from samfn.training.loop import Callback, Epoch, Evaluation, Event, Start, Step, Training
from samfn.training.loop import right as is_right

# In `Training.memory`: what the meters of an epoch hold that is interrupted, and the
# gradients of the layers in the epoch before.
METER, LAYERS, GRADIENTS = "meter", "layers", "layer_gradients"
COMPARED = 100  # steps from one comparison of the ranks' states to the next


def around(
    task: Task,
    training: Training,
    run: RunDirectory,
    keeper: Keeper,
    display: Display,
    live: Live,
    interrupts: "Interrupts",
) -> list[Callback]:
    """Return the callbacks of a run, in the order in which they are told.

    Those that change the state, the memory or the row come before those that write it. The
    row is written before its checkpoint: a run that is killed between them takes the epoch
    again.

    Raises:
        ConfigError: the run goes on from a checkpoint that keeps what none of them wrote.
    """
    _require_own_memory(task, training)
    config, meter = task.config, Meter(task)
    by = column(config, task.chosen_by.name)  # of the average, if there is one
    score = {"score": f"{task.chosen_by.name}_accuracy", best_by(config): by}
    found: list[Callback] = []
    if config.average.lookahead is not None:
        found.append(_lookahead(task))
    if config.average.ema_decay is not None:
        start = round(config.average.ema_start * task.steps_per_epoch)
        found.append(callbacks.ema(config.average.ema_decay, start=start))
    if config.average.ema_copy is not None:
        found.append(callbacks.copy_ema(config.average.ema_copy))
    if config.stopping.patience is not None:
        found.append(callbacks.early_stopping(by, config.stopping.patience))
    found.append(meter)
    if config.recording.monitor:
        layers = LayerMeter(len(training.state.params), task.device)
        found.append(partial(monitor, layers, display))
    look = callbacks.finite(config.stopping.max_skipped + 1, every=CHUNK)
    found += [compare_ranks, partial(require_finite, task, meter, look)]
    found.append(partial(evaluate, task, interrupts))
    if config.selection.select != "all":
        found.append(partial(scan, task, interrupts))
    return [
        *found,
        partial(record, run, display),
        interrupts.between_steps,
        callbacks.saving(keeper, score=score, every=config.recording.save_steps),
        partial(show, task, live, meter),
        interrupts.after_epoch,
    ]


def _lookahead(task: Task) -> Callback:
    """Return Lookahead with airbench's decay, which grows: base^every (t / T)^3."""
    how, steps = task.config.average, task.config.epochs * task.steps_per_epoch
    base = (how.lookahead or 0.0) ** how.lookahead_every

    def decay(step: int) -> float:
        return base * (step / steps) ** 3

    return callbacks.lookahead(decay, every=how.lookahead_every, last=steps)


def _require_own_memory(task: Task, training: Training) -> None:
    """Raise unless the run remembers what these callbacks can go on with.

    Who can write a checkpoint can write anything into it, under the right SHA-256.
    """
    images, params = len(task.train_labels), len(training.state.params)
    shapes = {
        LAYERS: (params + 1, len(WHAT) + 1),
        GRADIENTS: (params,),
        selection.COUNTS: (images,),
        selection.SCORES: (images,),
    }
    memory = training.memory
    own = {n: getattr(memory.get(n), "shape", None) == shape for n, shape in shapes.items()}
    own |= {METER: _is_metered(memory.get(METER)), callbacks.PATIENCE: _is_patient(memory)}
    if wrong := [name for name, fits in own.items() if name in memory and not fits]:
        raise ConfigError(f"the checkpoint keeps no {wrong[0]} that fits this run")


def _is_metered(kept: Any) -> bool:
    sums = kept.get("sums") if isinstance(kept, dict) else None
    return (
        isinstance(sums, list)
        and len(sums) == len(Meter.NAMES) + 1
        and all(_is_number(value) for value in (*sums, kept.get("seconds")))
    )


def _is_patient(memory: Mapping[str, Any]) -> bool:
    match memory.get(callbacks.PATIENCE):
        case [best, int(waited)]:
            return waited >= 0 and (best is None or _is_number(best))
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Meter:
    """Measures the steps of an epoch, by sums kept on the device until they are read."""

    NAMES = ("loss", "accuracy", "grad_norm", "perturbation_norm", "sharpness")

    def __init__(self, task: Task) -> None:
        self._task = task
        self.begin({})

    def __call__(self, event: Event) -> None:
        """Measure the steps, and add what came of it to the epoch's row."""
        memory = event.training.memory
        match event:
            case Start():
                self.begin(memory.get(METER, {}))
                memory[METER] = self.kept
            case Step(_, batch, metrics):
                self.add(metrics, batch[1])
            case Evaluation(training, row):
                row |= self.row(training)
            case Epoch():
                del memory[METER]

    def begin(self, kept: Mapping[str, Any]) -> None:
        """Begin an epoch, or go on with one that was interrupted, of which `kept` told."""
        zeros = (0.0,) * (len(self.NAMES) + 1)
        self.sums = torch.tensor(kept.get("sums", zeros), device=self._task.device)
        self._rows = 1  # Sums that were kept are the same on all ranks.
        self._started: float = time.perf_counter() - kept.get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """The time that the epoch took so far."""
        return time.perf_counter() - self._started

    def add(self, metrics: samfn.Metrics, labels: Tensor) -> None:
        """Add one step; one that was skipped counts for nothing.

        Where labels are shares of several classes, the largest share is the right one.
        """
        if labels.ndim == 2:
            labels = labels.argmax(1)
        outputs = metrics.outputs  # Of a part of the batch, for some methods.
        self._rows = len(labels)
        accuracy = 100 * is_right(outputs, labels[: len(outputs)]).float().mean()
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
        """Return what goes into a checkpoint, on all ranks. This waits for a GPU."""
        self.share()
        return {"sums": self.sums.tolist(), "seconds": self.seconds}

    def row(self, training: Training) -> Row:
        """Return what is known of an epoch whose steps are all taken."""
        task, batches = self._task, training.batches
        self.share()
        means, steps = self.read()
        seconds = self.seconds
        last = loop.schedule_place(task, training, back=1)
        row: Row = {"lr": task.lr(last), "rho": task.rho(last)}
        row |= {f"train_{name}": means.pop(name) for name in ("loss", "accuracy")}
        row |= means | {"skipped_steps": batches - steps, "seconds": seconds}
        row["images_per_second"] = batches * task.config.batch_size / seconds
        return row if task.sharing is None else row | {"m": ranks(task)["m"]}


def monitor(layers: LayerMeter, display: Display, event: Event) -> None:
    """Measure every layer, and warn where a gradient vanishes or explodes."""
    memory, params = event.training.memory, event.training.state.params
    match event:
        case Start():
            layers.sums = memory.setdefault(LAYERS, torch.zeros_like(layers.sums))
        case Step(_, _, metrics):
            layers.add(metrics)
        case Evaluation(_, row):
            row |= layers.row(params)
        case Epoch(training):
            del memory[LAYERS]
            now, before = layers.gradient(), memory.get(GRADIENTS)
            memory[GRADIENTS] = now
            if found := [str(alarm) for alarm in alarms(params, now, before)]:
                more = [f"{len(found) - 3} more"] if len(found) > 3 else []
                listed = "; ".join(found[:3] + more)
                display.warn(f"epoch {training.epoch}: {listed}")


def compare_ranks(event: Event) -> None:
    """Raise where the ranks have not the same state any more."""
    if isinstance(event, Step) and event.training.step % COMPARED == 0:
        distributed.require_alike(event.training.state)


def require_finite(task: Task, meter: Meter, look: Callback, event: Event) -> None:
    """Raise where `look` finds too many steps in a row skipped, or a whole epoch is."""
    training = event.training
    try:
        look(event)
    except samfn.NonFiniteError as error:
        where = _where(task, training, 1, event.batch) if isinstance(event, Step) else ""
        raise DivergedError(f"{where}{error}") from error
    last = isinstance(event, Step) and training.batch == training.batches
    if last and not meter.read()[1]:
        images = selection.chosen(task, training)
        batch = next(augmented(task, training.epoch, 0, images))
        raise DivergedError(
            f"{_where(task, training, training.batch, batch)}none of the {training.batch}"
            f" steps of epoch {training.epoch + 1} had a finite loss and gradient: try a"
            " lower --lr or --rho, or --warmup-epochs"
        )


def _where(task: Task, training: Training, back: int, batch: Any) -> str:
    """Return which step, pass and tensor was not finite, to begin a sentence with.

    It was the first of the last `back` steps, all of them skipped, and was on `batch`.
    """
    position = training.step - back
    loop.draw_anew(task, position)
    then = torch.full_like(training.state.step, position + 1)
    found = task.find_nonfinite(training.state._replace(step=then), batch)
    return f"step {position + 1}, {found}: " if found else ""


def evaluate(task: Task, interrupts: "Interrupts", event: Event) -> None:
    """Add loss and accuracy of the weights, and of their average, to an epoch's row."""
    if not isinstance(event, Evaluation):
        return
    training, row = event
    states = {"": whole(training.state)}
    if task.config.average.ema_decay is not None:
        states["ema_"] = whole(model_of(task, training))
    try:
        for split in {task.chosen_by.name: task.chosen_by, "test": task.test}.values():
            for prefix, state in states.items():
                loss, accuracy = loop.evaluate(task, state, split, interrupts.amid)
                name = f"{prefix}{split.name}"
                row |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
    except StopError:
        training.stop = "signal"


def whole(state: samfn.TrainState) -> samfn.TrainState:
    """Return a state whose parameters are whole on every rank, its memory as it is."""
    return state._replace(params=distributed.gather(state.params))


def scan(task: Task, interrupts: "Interrupts", event: Event) -> None:
    """Look at all images where it is time for that, so that some can be selected."""
    if not isinstance(event, Evaluation) or event.training.stop:
        return
    training, row = event
    row |= {"trained_images": len(selection.chosen(task, training)), "scan_seconds": 0.0}
    if not selection.is_due(task.config, training.epoch):
        return
    started = time.perf_counter()
    average = task.config.selection.select_with == "average"
    state = whole(model_of(task, training) if average else training.state)
    rho, stopping = row["rho"], interrupts.amid
    try:
        with loop.evaluating(task.model):
            found = selection.scan(task, training.memory, state, rho, stopping)
        training.memory |= found
    except StopError:
        training.stop = "signal"
    row["scan_seconds"] = time.perf_counter() - started


def record(run: RunDirectory, display: Display, event: Event) -> None:
    """Write an epoch's row; training is worth more than its log."""
    if not isinstance(event, Epoch):
        return
    row = event.training.row
    try:
        run.append(row)
    except OSError as error:
        display.warn(f"{run.metrics} lacks epoch {row['epoch']} for now: {error}")
    run.log(row)


def show(task: Task, live: Live, meter: Meter, event: Event) -> None:
    """Show how far an epoch is, and its line when it is finished."""
    training = event.training
    match event:
        case Step() if live.due():
            done = training.batch * task.steps_per_epoch // training.batches
            rate = training.batch * task.config.batch_size / meter.seconds
            live.step(training.epoch, done, meter.read()[0]["loss"], rate)
        case Epoch():
            live.epoch(training.row)


class Interrupts:
    """Requests of signals, which all ranks meet after the same step."""

    def __init__(self, signals: Signals) -> None:
        self._signals, self._agreement = signals, Agreement(2)

    def between_steps(self, event: Event) -> None:
        """Have the run saved, or stopped, after a step."""
        if isinstance(event, Step):
            asked = int(self._signals.take_save()), self._signals.stop or 0
            save, stop = self._agreement.later(*asked)
            event.training.save |= bool(save)
            if stop:
                event.training.stop = "signal"

    def after_epoch(self, event: Event) -> None:
        """Have the run stopped after an epoch; its checkpoint is written then."""
        if isinstance(event, Epoch) and self.to_stop():
            event.training.stop = "signal"

    def to_stop(self) -> bool:
        """Return whether a signal asked any rank to stop; waits for all of them."""
        _, stop = self._agreement.now(0, self._signals.stop or 0)
        if stop:  # Another may have come while this one waited; it will be asked next.
            self._signals.stop = stop
        return stop > 0

    def amid(self) -> bool:
        """Return whether to stop amid an evaluation, on which ranks would have to agree."""
        return self._signals.stop is not None and distributed.size() == 1
