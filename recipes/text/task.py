"""What a run needs and no step changes: text, model, loss and step."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import samfn
from recipes.data import text
from recipes.data.text import Sequences
from recipes.errors import ConfigError
from recipes.models import language
from recipes.terminal.console import Display
from recipes.text.settings import TINY, Settings, occupy
from recipes.train.build import generator, seed
from recipes.train.directory import RunDirectory
from samfn import schedules
from samfn.loss import Loss
from samfn.training import loop

BASE = "base"


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


def digest(data: Sequences) -> str:
    """Return what tells the tokens of sequences from others."""
    found = hashlib.sha256()
    for part in data:
        found.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
    return found.hexdigest()


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
