"""Fine-tune a causal language model with low-rank adapters (LoRA) and SAM.

    python -m recipes.finetune_text                     # offline: a tiny one, on code
    python -m recipes.finetune_text --rho 0             # the same with plain AdamW
    python -m recipes.finetune_text --perturb noise     # Flat-LoRA, one gradient a step
    python -m recipes.finetune_text --model my-model --text notes.txt --sam-last 0.3

The tiny model reads bytes, and is trained from scratch first, on the English that comes
with Python. A run leaves a directory with its settings, metrics, picture, checkpoints and
adapters; the same command with its --output goes on where it was ended.
"""

import contextlib
import hashlib
import json
import resource
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w
import torch
from torch import Tensor

import samfn
from recipes import plots
from recipes.data import text
from recipes.data.text import Sequences
from recipes.errors import ConfigError
from recipes.models import language
from recipes.roles import (
    ABOVE_0,
    ABOVE_0_TO_1,
    FROM_0,
    Options,
    Range,
    at_least,
    require,
    setting,
)
from recipes.settings.saved import AS_TOML
from recipes.terminal import cli
from recipes.terminal.console import Display
from recipes.terminal.legible import SURROGATES, quoted
from recipes.terminal.signals import Signals
from recipes.train import recorded
from recipes.train.build import generator, seed
from recipes.train.callbacks import Interrupts
from recipes.train.directory import Row, RunDirectory, parsed, reserved
from recipes.train.running import late, writing
from samfn import schedules
from samfn.loss import Loss
from samfn.storage import files, tensorfile
from samfn.training import callbacks, loop
from samfn.training.loop import Epoch, Event, Step, Training

PROGRAM = "python -m recipes.finetune_text"
SETTINGS, ADAPTER, BASE = "config.toml", "adapter", "base"
TINY = "tiny"
# In `Training.memory`: what an epoch that is interrupted had, and of which text.
METER, TEXT = "meter", "text"
BEGUN, MODEL = "settings", "model"  # there, too: what a checkpoint says of its run


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Fine-tune a causal language model with adapters and sharpness-aware minimisation."""

    text: Path | None = None
    """Text in UTF-8; its last tenth is for the test. None is the source code of some of
    Python's modules."""
    model: str = TINY
    """Causal language model: a directory that transformers reads, or a name on its hub.
    tiny is trained from scratch."""
    perturb: Literal["adapters", "merged", "noise"] = "adapters"
    """Weights that are perturbed: adapters, by SAM; merged, by SAM on the weights that the
    adapters are added to; noise, the same weights at random, as Flat-LoRA, whose rho rises
    from 0."""
    rho: float = setting(0.05, FROM_0)
    """Radius of the perturbation; of noise, relative to the rows of the weights. 0 is plain
    AdamW."""
    sam_last: float = setting(1.0, ABOVE_0_TO_1)
    """Share of the steps, the last, that perturb the weights."""
    rank: int = setting(8, Range(lambda rank: 1 <= rank <= 10_000, "1 to 10000"))
    """Rank of the adapters."""
    epochs: int = setting(6, at_least(1))
    """Times that each sequence is trained on."""
    batch_size: int = setting(8, at_least(1))
    """Sequences in a batch."""
    length: int = setting(128, at_least(2))
    """Tokens in a sequence."""
    sequences: int | None = setting(96, at_least(1))
    """Sequences to train on, from the beginning of the text. None is all."""
    lr: float = setting(2e-3, ABOVE_0)
    """Learning rate at the start; it falls to 0 by half a cosine."""
    seed: int = 0
    """Seed of the adapters, the order and the noise."""
    output: Path | None = None
    """Directory of the run. One that holds a run of these settings goes on. None is a new
    one below runs/."""


class Task(NamedTuple):
    """Everything that a run needs and that no step changes."""

    settings: Settings
    model: Any
    """As peft adapts it."""
    data: Sequences
    loss_fn: Loss
    update: loop.Update
    rho: schedules.Schedule
    lr: schedules.Schedule
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.epochs * self.steps_per_epoch


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
        training.memory |= {TEXT: digest(task.data), BEGUN: begun(settings)}
        training.memory[MODEL] = language.described(task.model)
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


def begun(settings: Settings) -> str:
    """Return the settings that a run goes on with, as one text."""
    return json.dumps(plain(settings) | {"output": ""}, sort_keys=True)


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


def digest(data: Sequences) -> str:
    """Return what tells the tokens of sequences from others."""
    found = hashlib.sha256()
    for part in data:
        found.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[RunDirectory]:
    """Hold the directory of a new run, or of one that goes on with the same settings.

    Raises:
        ConfigError: it holds something else, or a run of other settings.
        InUseError: another process holds it.
    """
    run = RunDirectory(settings.output or reserved(new_name(settings)))
    values = plain(settings)
    if SURROGATES.search(str(run.path)):
        text = f"expected a name in UTF-8, as safetensors does, got {quoted(run.path)}"
        raise ConfigError(f"--output: {text}")
    try:
        files.make_directory(run.path)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {run.path}: {error}") from error
    with run.held():
        file = run.path / SETTINGS
        if file.exists():
            before = settings_in(file)
            names = sorted({*before, *values} - {"output"})
            changed = [
                f"{n} was {before.get(n)}, is now {values.get(n)}"
                for n in names
                if before.get(n) != values.get(n)
            ]
            if changed:
                listed = "; ".join(changed)
                raise ConfigError(f"--output: {run.path} holds a run of others: {listed}")
        elif found := [p.name for p in run.path.iterdir() if p.name != files.LOCK]:
            raise ConfigError(
                "--output: expected a new or empty directory, or that of such a run, got"
                f" {run.path}, which holds {found[0]}"
            )
        yield run


def occupy(run: RunDirectory, settings: Settings) -> None:
    """Write the settings of a new run: from then on the directory is that of no other."""
    file = run.path / SETTINGS
    if not file.exists():
        with files.replacing(file) as temporary:
            temporary.write_text(tomli_w.dumps(plain(settings)), **AS_TOML)


def new_name(settings: Settings) -> Path:
    """Return a new directory below runs/, named for what is run and when."""
    method = "adamw" if settings.rho == 0 else settings.perturb
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stamp}-text-{method}-seed{settings.seed}"


def settings_in(file: Path) -> dict[str, Any]:
    """Return the settings that a run was begun with.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return tomllib.loads(files.read_text(file, AS_TOML["errors"]))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--output: {file} has no settings of a run: {error}") from error


def plain(settings: Settings) -> dict[str, Any]:
    """Return the settings as TOML holds them; those that are None are absent."""
    values = {n: str(v) if isinstance(v, Path) else v for n, v in vars(settings).items()}
    return {name: value for name, value in values.items() if value is not None}


def assemble(
    settings: Settings, run: RunDirectory, display: Display
) -> tuple[Task, samfn.TrainState]:
    """Make of settings all that training needs; train the tiny model, if it is that.

    The settings are written when nothing that was asked for can be refused any more.
    """
    is_tiny = settings.model == TINY
    tokenize = text.Bytes() if is_tiny else language.tokenizer(settings.model)
    content = text.source_code() if settings.text is None else text.read(settings.text)
    data = text.sequences(content, tokenize, settings.length, most=settings.sequences)
    steps_per_epoch = len(data.train) // settings.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--batch-size: expected at most the {len(data.train)} sequences, got"
            f" {settings.batch_size}"
        )
    base = settings.model
    if is_tiny:
        language.require_readable(language.tiny(), *data)
        occupy(run, settings)
        base = str(from_scratch(run, display))
    torch.manual_seed(seed(settings.seed, "adapters"))
    original = language.load(base)
    language.require_readable(original, *data)
    model, pairs, scale = language.adapted(original, settings.rank)
    optimizer, method = samfn.adamw(weight_decay=0.0), samfn.sam()
    steps = settings.epochs * steps_per_epoch
    rho = schedules.constant(settings.rho)
    if settings.perturb == "merged":
        for weight, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or weight in pairs)
        method = samfn.on_parameters(method, [*pairs])
        optimizer = samfn.grouped(optimizer, ([*pairs], language.STILL))
    elif settings.perturb == "noise":
        method = language.merged_noise(pairs, scale, language.transposed(model, pairs))
        rho = schedules.cosine(0.0, steps, settings.rho)
    if settings.sam_last < 1:
        rho = schedules.tail(rho, steps, settings.sam_last)
    loss_fn = samfn.supervised(model.train())
    given: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "method": method}
    state = samfn.init(*samfn.split(model), optimizer=optimizer, method=method)
    update, lr = partial(samfn.sam_update, **given), schedules.cosine(settings.lr, steps)
    occupy(run, settings)
    return Task(settings, model, data, loss_fn, update, rho, lr, steps_per_epoch), state


def from_scratch(run: RunDirectory, display: Display) -> Path:
    """Train the tiny model, unless the run has it already; return its directory."""
    path = run.path / BASE
    if path.exists():
        return path
    torch.manual_seed(seed("tiny"))
    model = language.tiny()
    data = text.sequences(text.english(), text.Bytes(), language.LENGTH).train
    loss_fn, optimizer = samfn.supervised(model), samfn.adamw(weight_decay=0.01)
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    lr = schedules.warmup(schedules.cosine(language.LR, language.STEPS), 20)
    source = generator("tiny", "order")
    with display.counting(language.STEPS, "training the tiny model") as advance:
        for step in range(language.STEPS):
            rows = torch.randint(len(data), (language.BATCH,), generator=source)
            state, metrics = samfn.sam_update(
                state,
                batch_of(data[rows]),
                loss_fn=loss_fn,
                optimizer=optimizer,
                rho=0.0,
                lr=lr(step),
            )
            advance()
    display.say(f"the tiny model, trained from scratch on English: loss {metrics.loss:.3f}")
    samfn.load(model, state.params, state.buffers)
    language.save(model, path)
    return path


def batch_of(sequences: Tensor) -> dict[str, Tensor]:
    """Return a batch as models of transformers take it, which shift the labels."""
    return {"input_ids": sequences, "labels": sequences}


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


def name(settings: Settings) -> str:
    """Return how the training algorithm is called in titles."""
    if settings.rho == 0:
        return "AdamW"
    what = {
        "adapters": "SAM on the adapters",
        "merged": "SAM on the merged weights",
        "noise": "noise on the merged weights",
    }[settings.perturb]
    last = f", in the last {settings.sam_last:.0%}" if settings.sam_last < 1 else ""
    return f"{what}, rho {settings.rho:g}{last}"


def perturbed(task: Task) -> str:
    """Return in which steps the weights are perturbed, if not in all or none; else ""."""
    settings = task.settings
    if settings.rho == 0 or settings.sam_last == 1:
        return ""
    return late(schedules.tail_start(task.steps, settings.sam_last), task.steps)


def describe(task: Task) -> dict[str, str]:
    """Return what the banner says of a run."""
    settings, data = task.settings, task.data
    counts = {True: 0, False: 0}
    for parameter_name, parameter in task.model.named_parameters():
        counts["lora_" in parameter_name] += parameter.numel()
    return {
        "text": f"{'source code of Python' if settings.text is None else settings.text},"
        f" {len(data.train):,} sequences of {settings.length} tokens to train on,"
        f" {len(data.test):,} to test on",
        "model": f"{settings.model}, {counts[False]:,} parameters and adapters of rank"
        f" {settings.rank} with {counts[True]:,}",
        "method": name(settings) + (f": {when}" if (when := perturbed(task)) else ""),
        "training": f"{settings.epochs} epochs of {task.steps_per_epoch} steps, batch"
        f" {settings.batch_size}, AdamW, lr {settings.lr:g}",
    }


def summarise(task: Task, run: RunDirectory, rows: Sequence[Row]) -> dict[str, str]:
    """Return what the closing summary says of a run and its epochs."""
    last, best = rows[-1], min(rows, key=lambda row: row["test_loss"])
    each = sum(row["seconds"] for row in rows) / max(1, sum(row["steps"] for row in rows))
    when = {"perturbed": said} if (said := perturbed(task)) else {}
    return {
        "last epoch": f"test loss {last['test_loss']:.4f}, token accuracy"
        f" {last['test_accuracy']:.2f} %",
        "lowest loss": f"test loss {best['test_loss']:.4f} in epoch {best['epoch']}",
        **when,
        "cost": f"{1000 * each:.0f} ms a step, {last['peak_mebibytes']:,.0f} MiB at most",
        "files": str(run.path),
        "adapters": str(run.path / ADAPTER),
        "picture": str(run.curves),
    }


if __name__ == "__main__":
    sys.exit(main())
