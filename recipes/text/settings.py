"""The settings of a run, and the directory that holds them."""

import contextlib
import json
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from recipes.errors import ConfigError
from recipes.roles import ABOVE_0, ABOVE_0_TO_1, FROM_0, Options, Range, at_least, setting
from recipes.settings.saved import AS_TOML
from recipes.terminal.legible import SURROGATES, quoted
from recipes.train.directory import RunDirectory, reserved, vacate
from samfn.storage import files

SETTINGS, ADAPTER = "config.toml", "adapter"
TINY = "tiny"


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


def begun(settings: Settings) -> str:
    """Return the settings that a run goes on with, as one text."""
    return json.dumps(plain(settings) | {"output": ""}, sort_keys=True)


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[RunDirectory]:
    """Hold the directory of a new run, or of one that goes on with the same settings.

    One that was made for it, and that nothing was written to, is removed at the end.

    Raises:
        ConfigError: it holds something else, or a run of other settings.
        InUseError: another process holds it.
    """
    is_new = settings.output is None or not os.path.exists(settings.output)
    run = RunDirectory(settings.output or reserved(new_name(settings)))
    values = plain(settings)
    if SURROGATES.search(str(run.path)):
        text = f"expected a name in UTF-8, as safetensors does, got {quoted(run.path)}"
        raise ConfigError(f"--output: {text}")
    try:
        files.make_directory(run.path)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {run.path}: {error}") from error
    with run.held(), contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(vacate, run.path)
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
