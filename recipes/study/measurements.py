"""What was measured of runs: JSON beside them, that is known by what it is of.

A record says of which checkpoint it is, by its SHA-256, and with which settings; it has a
checksum, and counts only as it was written.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recipes.errors import ConfigError
from recipes.settings.config import Config, of_roles, plain_values
from recipes.settings.saved import run_of
from recipes.study.measures import Measuring, Number
from recipes.study.runs import Solution, checkpoint_of, digest, numbers, write_json
from recipes.terminal.console import Display
from recipes.train.directory import parsed
from samfn.storage import files

DATA = "sharpness.json"
VERSION = 2  # of what the numbers mean; those of another one are measured anew
# Settings that change no number: the checkpoint is known by its content, and the
# device only rounds.
NOT_MEASURED = {"runs", "last", "device"}
LEAST = {"loss": 0.0, "noise": 0.0}  # of numbers that have a bound
Record = dict[str, Any]
"""Measurements of one run, as JSON holds them."""


def require_writable(file: Path) -> None:
    """Raise if it is plain that a file cannot be written, before hours are spent on it.

    Raises:
        ConfigError: it is a directory, or its directory is not there or read-only.
    """
    if file.is_dir():
        raise ConfigError(f"--output: expected a file, got the directory {file}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        text = f"--output: {file.parent} is no directory that can be written"
        raise ConfigError(text)


def require_records(file: Path) -> None:
    """Raise if a file is there that somebody named, and that holds something else."""
    try:
        _measurements(file)
    except UNREADABLE as error:
        text = f"--output: expected a new file, or one of records, got {file}"
        raise ConfigError(text) from error


def record(
    solution: Solution,
    sha256: str,
    settings: Measuring,
    found: Mapping[str, Number],
    left_out: Mapping[str, str],
    seconds: float,
) -> Record:
    """Return what the data file says of a run."""
    made: Record = numbers(
        {
            "version": VERSION,
            "path": str(solution.path),
            "checkpoint": solution.checkpoint.name,
            "sha256": sha256,
            "epoch": solution.epoch,
            "images": len(solution.labels),
            "settings": asked(settings),
            "config": trained(solution.config),
            "numbers": {name: number._asdict() for name, number in found.items()},
            "left_out": left_out,
            "seconds": seconds,
            "device": str(solution.labels.device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
    )
    return made | {"checksum": checksum(made)}


def checksum(record: Record) -> str:
    """Return the SHA-256 of what a record says, but for that of the record itself."""
    said = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def asked(settings: Measuring) -> dict[str, Any]:
    """Return the settings that decide on the numbers."""
    names = {field.name for field in dataclasses.fields(Measuring)} - NOT_MEASURED
    return {name: getattr(settings, name) for name in sorted(names)}


def trained(config: Config) -> dict[str, Any]:
    """Return the settings of a run that decide on its network, weights and images."""
    return of_roles(plain_values(config))


def file_of(path: Path, output: Path | None = None) -> Path:
    """Return where the records of a run are kept."""
    return output or run_of(path) / DATA


def keep(record: Record, file: Path, display: Display) -> None:
    """Write a record to a file, beside those of other settings and checkpoints.

    A file that holds no records, as one of another program, is renamed and not replaced.

    Raises:
        OSError: the file cannot be written; it is what it was.
    """
    same = ("path", *IDENTITY)
    lock = file.with_name(f".{file.name}.lock")
    with files.locked(lock, str(file), wait=True, tell=display.warn):
        try:
            before = _measurements(file)
        except UNREADABLE:
            before, aside = [], files.put_aside(file, "corrupt")
            display.warn(f"{file} held no records; kept as {aside.name}")
        others = [
            one
            for one in before
            # Older versions wrote no checksum; what they measured is kept, not believed.
            if (is_whole(one) or "checksum" not in one)
            and any(one.get(key) != record[key] for key in same)
        ]
        write_json(file, {"measurements": [*others, record]})


IDENTITY = ("version", "sha256", "settings", "config")
UNREADABLE = (OSError, ValueError, TypeError, LookupError, RecursionError)


def known(
    path: Path, config: Config, settings: Measuring, display: Display
) -> Record | None:
    """Return the record of a run that was measured so before, if nothing has changed."""
    checkpoint = checkpoint_of(path, config, last=settings.last)
    records = kept(file_of(path), display)
    if checkpoint is None or not records:
        return None
    values = numbers([asked(settings), trained(config)])
    wanted = dict(zip(IDENTITY, [VERSION, digest(checkpoint), *values], strict=True))
    for one in records:
        if all(one[key] == value for key, value in wanted.items()):
            return one
    return None


def kept(file: Path, display: Display) -> list[Record]:
    """Return the records in a file; those that are damaged or were edited are none."""
    found = measurements(file, display)
    whole = [one for one in found if is_whole(one)]
    if odd := len(found) - len(whole):
        text = f"{odd} of {len(found)} records are not as they were written"
        display.warn(f"{file}: {text}, and are measured anew where they are asked for")
    return whole


def measurements(file: Path, display: Display) -> list[Record]:
    """Return the records in a file as they are there; one that cannot be read has none."""
    try:
        return _measurements(file)
    except UNREADABLE as error:
        display.warn(f"{file} cannot be read, and is measured anew: {error}")
        return []


def _measurements(file: Path) -> list[Record]:
    """Return the records in a file, of which there are none where it is not there."""
    try:
        found = parsed(files.read_text(file))["measurements"]
    except FileNotFoundError:
        return []
    return [one if isinstance(one, dict) else {} for one in found]


def is_whole(record: Record) -> bool:
    """Return whether a record is as it was written, of numbers that can be measured."""
    try:
        return (
            record["checksum"] == checksum(record)
            and all(key in record for key in ("path", "epoch", "images", *IDENTITY))
            and all(
                math.isfinite(float(number["value"]))
                and float(number["value"]) >= LEAST.get(name, -math.inf)
                and 0 <= float(number["cost"]) < math.inf
                and not float(number["error"] or 0) < 0  # NaN, where one group is all
                for name, number in record["numbers"].items()
            )
            and isinstance(record.get("left_out", {}), dict)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
