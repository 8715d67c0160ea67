"""A run from where it stopped to its last epoch."""

import contextlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import samfn
from recipes.errors import ConfigError
from recipes.models import language
from recipes.terminal.console import Display
from recipes.terminal.signals import Signals
from recipes.text.settings import ADAPTER, begun
from recipes.text.task import Task, batch_of, digest
from recipes.train import recorded
from recipes.train.build import generator, seed
from recipes.train.callbacks import Interrupts
from recipes.train.directory import Row, RunDirectory, parsed
from samfn.storage import tensorfile
from samfn.training import callbacks, loop
from samfn.training.loop import Epoch, Event, Step, Training

# In `Training.memory`: what an epoch that is interrupted had, and of which text.
METER, TEXT = "meter", "text"
BEGUN, MODEL = "settings", "model"  # there, too: what a checkpoint says of its run


def resumes(task: Task, kept: samfn.Checkpoints, training: Training) -> bool:
    """Go on where the newest checkpoint stands that is whole, if there is one.

    Raises:
        ConfigError: it is of another run: of other settings, another model or other tokens,
            as of a file that has changed, Python's own modules, or the tokenizer.
    """
    try:
        found = kept.latest(training.state)
        if found is None:
            return False
        fresh, now = training.state, callbacks.from_metadata(found.state, found.metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--output: a checkpoint is not of this run: {error}") from error
    place, epochs, batches = found.path, task.settings.epochs, task.steps_per_epoch
    if now.step != now.epoch * batches + now.batch or not 0 <= now.epoch <= epochs:
        raise ConfigError(f"{place} is not of this run: it has taken {now.step:,} steps")
    if now.memory.get(BEGUN, own := begun(task.settings)) != own:
        text = f"expected settings {own}, got {now.memory[BEGUN]}"
        raise ConfigError(f"{place} is not of this run: {text}")
    if now.memory.get(TEXT, own := digest(task.data)) != own:
        raise ConfigError(
            "--text: the run was begun with other tokens: expected those of the text as it"
            " was then; begin another with another --output"
        )
    before, after = ({**state.params, **state.buffers} for state in (fresh, now.state))
    still = (name for name in before if "lora_" not in name)
    moved = [name for name in still if not torch.equal(before[name], after[name])]
    if now.memory.get(MODEL, own := language.described(task.model)) != own:
        moved = ["its config.json"]
    if moved:
        raise ConfigError(
            f"--model: the run was begun with another model: {moved[0]} differs from that"
            f" in {place}; begin another with another --output"
        )
    vars(training).update(vars(now))
    return True


def recorded_of(
    run: RunDirectory, kept: samfn.Checkpoints, last: int, display: Display
) -> list[Row]:
    """Return the epochs of a run; those that checkpoints know are what these say."""
    known = {}
    for path in kept.paths():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            row = parsed(tensorfile.verified_texts(path)["row"])
            if is_epoch(row, last):
                known[row["epoch"]] = row
    try:
        return recorded.held_against(
            run, known, lambda row: is_epoch(row, last), display.warn
        )
    except OSError as error:
        raise ConfigError(f"cannot read {run.metrics}: {error.strerror}") from error


def is_epoch(row: Row, last: int) -> bool:
    """Return whether a line of the metrics has what an epoch up to `last` has."""
    losses = {"train_loss", "test_loss"}  # They may be NaN.
    return losses <= row.keys() and recorded.is_whole(
        row, last, ("steps", "peak_mebibytes")
    )


def train(
    task: Task,
    training: Training,
    run: RunDirectory,
    kept: samfn.Checkpoints,
    display: Display,
    signals: Signals,
) -> bool:
    """Train to the last epoch; return whether training reached its end."""
    settings, interrupts, meter = task.settings, Interrupts(signals), Meter()
    training.memory |= {TEXT: digest(task.data), BEGUN: begun(settings)}
    training.memory[MODEL] = language.described(task.model)

    def batches(training: Training) -> list[dict[str, Tensor]]:
        source = generator(settings.seed, "order", training.epoch)
        order = torch.randperm(len(task.data.train), generator=source)
        rows = order[: task.steps_per_epoch * settings.batch_size]
        parts = torch.split(task.data.train[rows], settings.batch_size)
        return [batch_of(part) for part in parts[training.batch :]]

    def update(state: Any, batch: Any, **dials: float) -> Any:
        torch.manual_seed(seed(settings.seed, "step", training.step))
        return task.update(state, batch, **dials)

    def record(event: Event) -> None:
        if isinstance(event, Epoch):
            row = event.training.row
            run.append(row)
            display.say(
                f"epoch {row['epoch']}/{settings.epochs}: training loss"
                f" {row['train_loss']:.4f}, test loss {row['test_loss']:.4f}, token"
                f" accuracy {row['test_accuracy']:.2f} %, {row['seconds']:.1f} s"
            )

    with (
        signals.deferred(),
        display.counting(task.steps, "fine-tuning", training.step) as advance,
    ):
        loop.run(
            training,
            batches=batches,
            update=update,
            rho=lambda t: task.rho(t.step),
            lr=lambda t: task.lr(t.step),
            epochs=settings.epochs,
            evaluate=lambda t: meter.row() | evaluate(task, t.state),
            callbacks=[
                meter,
                callbacks.finite(),
                lambda event: advance() if isinstance(event, Step) else None,
                record,
                interrupts.between_steps,
                callbacks.saving(kept, score="test_accuracy"),
                interrupts.after_epoch,
            ],
        )
    return training.epoch >= settings.epochs


class Meter:
    """Measures the steps of an epoch, from its beginning or from where it goes on."""

    def __call__(self, event: Event) -> None:
        """Begin with an epoch, and add up its steps."""
        match event:
            case loop.Start(training):
                kept = training.memory.get(METER) if training.batch else None
                self._losses: list[Tensor] = [*kept["losses"]] if kept else []
                earlier = float(kept["seconds"]) if kept else 0.0
                self._started = time.perf_counter() - earlier
                training.memory[METER] = self._kept
            case Step(_, _, metrics):
                self._losses.append(metrics.loss)

    def _kept(self) -> dict[str, Tensor]:
        seconds = torch.tensor(time.perf_counter() - self._started, dtype=torch.float64)
        return {"losses": torch.stack(self._losses), "seconds": seconds}

    def row(self) -> dict[str, float]:
        """Return mean loss, time, and the most memory that the process took, in MiB."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "train_loss": float(torch.stack(self._losses).mean()),
            "seconds": time.perf_counter() - self._started,
            "steps": len(self._losses),
            "peak_mebibytes": memory / (2**20 if sys.platform == "darwin" else 2**10),
        }


def evaluate(task: Task, state: samfn.TrainState) -> dict[str, float]:
    """Return the mean loss of a token in the test set, in nats, and the accuracy, in %."""
    parts = map(batch_of, torch.split(task.data.test, 4 * task.settings.batch_size))
    task.model.eval()
    try:
        found = loop.evaluate(
            state.params,
            state.buffers,
            parts,
            loss_fn=task.loss_fn,
            measures={"accuracy": token_accuracy},
        )
    finally:
        task.model.train()
    return {f"test_{what}": value for what, value in found.items()}


def token_accuracy(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return for each sequence the share of tokens that were foretold, in percent."""
    found: Tensor = outputs.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    return 100.0 * found.float().mean(1)


def export(task: Task, training: Training, run: RunDirectory) -> None:
    """Write the model, and its adapters as `peft.PeftModel.from_pretrained` reads them."""
    state = training.state
    samfn.load(task.model, state.params, state.buffers)
    samfn.export_weights(run.weights, task.model, state.params, state.buffers)
    language.save(task.model, run.path / ADAPTER)
