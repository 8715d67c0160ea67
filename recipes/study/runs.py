"""Load trained runs for analysis, and give them short names that differ."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

import samfn
from recipes.data import augment
from recipes.data.sources import Say
from recipes.errors import ConfigError
from recipes.roles import Options, at_least, require, setting
from recipes.settings.config import Config
from recipes.settings.saved import CONFIG_FILE, run_of
from recipes.terminal.console import Display
from recipes.train.build import generator
from recipes.train.checkpoints import reopen
from recipes.train.directory import RunDirectory
from recipes.train.recorded import best_by
from recipes.train.running import name
from samfn.loss import LossFn
from samfn.storage import files
from samfn.tree import Params

Item = TypeVar("Item")
BEFORE = "results.json"  # what older versions called the data of every study


@dataclass(frozen=True, kw_only=True)
class Inspection(Options):
    """Which runs, which of their checkpoints, and which images."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, of which the best epoch counts, or checkpoints of runs."""
    last: bool = False
    """Last checkpoint of a directory, in place of the best."""
    images: int = setting(1000, at_least(1))
    """Number of images that the loss is the mean of. Runs on the same data have the same
    images."""
    split: Literal["train", "test"] = "train"
    """Images of the training set, with the labels trained on, or of the test set."""
    seed: int = 0
    """Seed of all random directions, and of the choice of images."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ... auto takes a GPU if there is one."""

    @property
    def kind(self) -> str:
        """The split in words."""
        return {"train": "training", "test": "test"}[self.split]


class Solution(NamedTuple):
    """Weights that a run has learned, and the images of their loss."""

    name: str
    """In pictures; different for each of the runs."""
    path: Path
    config: Config
    epoch: int
    params: Params
    buffers: Params
    loss_fn: LossFn
    images: Tensor
    """Normalised, NCHW."""
    labels: Tensor
    checkpoint: Path = Path()
    """The file that was read."""

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return the images and labels in batches of at most this size."""
        parts = torch.split(self.images, size), torch.split(self.labels, size)
        return list(zip(*parts, strict=True))


def validate(settings: Inspection, least: int = 1) -> None:
    """Raise unless every value is in its range, and there are enough runs, different ones.

    Raises:
        ConfigError: names what was expected and what came.
    """
    require([*settings.ranges(), *settings.relations()], vars(settings))
    if len(settings.runs) < least:
        number = {1: "one run", 2: "two runs"}[least]
        found = len(settings.runs) or "none"
        raise ConfigError(f"expected at least {number}, got {found}")
    paths = [real(path) for path in settings.runs]
    if twice := [path for path in settings.runs if paths.count(real(path)) > 1]:
        raise ConfigError(f"expected different runs, got {twice[0]} twice")


def among(paths: Iterable[Path], display: Display) -> tuple[Path, ...]:
    """Return the paths without directories that hold no run, as a pattern finds them.

    Reports lie beside the runs, so that runs/* finds them, too.
    """
    found = []
    for path in paths:
        if os.path.isdir(path) and not _may_hold(path / CONFIG_FILE):
            display.warn(f"{path} is no run: it holds no {CONFIG_FILE}; left out")
        else:
            found.append(path)
    return tuple(found)


def _may_hold(file: Path) -> bool:
    """Return whether a file is there, or its directory may not be looked into."""
    try:
        file.lstat()
    except PermissionError:  # Who reads it tells that.
        return True
    except OSError:
        return False
    return True


def real(path: Path) -> Path:
    """Return a path without links, as `Path.resolve`, which a loop of them makes raise."""
    return Path(os.path.realpath(path))


def read(path: Path, settings: Inspection, display: Display) -> Solution:
    """Read what a run has learned, and choose its images.

    Raises:
        ConfigError: there is no run, no checkpoint that is whole, or no such device.
        DataError: the data are not there any more.
    """
    task, state, epoch = reopen(path, settings.device, display, last=settings.last)
    task.model.eval()
    images, labels = task.test[1:]
    if settings.split == "train":
        images, labels = task.train_images, task.train_labels
    source = generator(settings.seed, "images", settings.split)
    chosen = torch.randperm(len(labels), generator=source)[: settings.images]
    chosen = chosen.to(task.device)
    inputs = augment.normalise(images[chosen], task.mean, task.std)
    return Solution(
        name=name(task.config),
        path=path,
        config=task.config,
        epoch=epoch,
        params=state.params,
        buffers=state.buffers,
        loss_fn=samfn.supervised(task.model, F.cross_entropy),
        images=inputs.contiguous(memory_format=torch.channels_last),
        labels=labels[chosen],
        # The best one may be another by now, where the run still goes on.
        checkpoint=path
        if path.is_file()
        else RunDirectory(path).checkpoints().directory
        / f"step_{int(state.step):09d}.safetensors",
    )


def checkpoint_of(path: Path, config: Config, *, last: bool) -> Path | None:
    """Return the checkpoint that `read` takes if it is whole, or None if there is none."""
    if path.is_file():
        return path
    checkpoints = RunDirectory(path).checkpoints()
    newest = checkpoints.paths()[-1:]
    # Where all are damaged there is no best, and whoever reads one is told.
    found = newest if last else checkpoints.best(best_by(config)) or newest
    return found[0] if found else None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with files.open_regular(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def named(solutions: Sequence[Solution]) -> list[Solution]:
    """Give the solutions the shortest names that differ."""
    names = labels([(s.path, s.config, f"epoch {s.epoch}") for s in solutions])
    return [s._replace(name=n) for s, n in zip(solutions, names, strict=True)]


def labels(runs: Sequence[tuple[Path, Config, str]]) -> list[str]:
    """Return the shortest names that differ.

    Args:
        runs: path, settings, and which of its checkpoints is meant.
    """
    return distinct(
        runs,
        lambda run: name(run[1]),
        lambda run: f"{name(run[1])}, seed {run[1].seed}",
        lambda run: real(run_of(run[0])).name,
        lambda run: f"{real(run_of(run[0])).name}, {run[2]}",
        lambda run: str(run[0]),
    )


def distinct(items: Sequence[Item], *ways: Callable[[Item], str]) -> list[str]:
    """Name the items in the first way that tells all of them apart, or else the last."""
    names: list[str] = []
    for way in ways:
        names = [way(item) for item in items]
        if len({*names}) == len(names):
            break
    return names


def make_directory(output: Path) -> None:
    """Make the directory of a report, unless it is there.

    Raises:
        ConfigError: it is that of a run, or cannot be made.
    """
    if os.path.lexists(output / CONFIG_FILE):
        text = "--output: expected a directory for reports, got that of a run,"
        raise ConfigError(f"{text} {output}")
    try:
        files.make_directory(output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from error


def make_way(output: Path, names: Sequence[str], program: str, warn: Say) -> None:
    """Set aside what a report would replace, unless it is an older report's.

    Args:
        output: directory of both.
        names: of the report's files; the first holds its data, and says who wrote it.
        program: that reports.
        warn: is told.

    Raises:
        OSError: a file cannot be renamed.
    """
    if _wrote(program, output / names[0]):
        return
    more = [BEFORE] * _wrote(program, output / BEFORE)
    for path in (output / file for file in [*names, *more]):
        if os.path.lexists(path) and not path.is_dir():
            aside = files.put_aside(path, "superseded")
            warn(f"{path} of before is {aside.name} now")


def _wrote(program: str, file: Path) -> bool:
    """Return whether a file is what `write_json` writes of a report of a program."""
    begins = f'{{\n "command": "{program}'.encode()
    try:
        with files.open_regular(file) as opened:
            return opened.read(len(begins)) == begins
    except OSError:
        return False


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write numbers, texts, lists and mappings of them to a JSON file.

    Lists of numbers are one line. JSON has no NaN and no infinity: they are the texts
    "nan", "inf" and "-inf", which `float` and `numpy.array(..., dtype=float)` read.

    Raises:
        OSError: the file cannot be written; it is what it was.
    """
    text = json.dumps(numbers(found), indent=1, default=str, allow_nan=False)
    # No text of JSON has a line break in it.
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda row: re.sub(r"\s*\n\s*", " ", row[0]), text)
    with files.replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def numbers(value: Any) -> Any:
    """Return tensors as lists, and what JSON has no number for as text."""
    if isinstance(value, Tensor):
        return numbers(value.tolist())
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, float):
        # Losses are of float32, which has no more digits.
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value
