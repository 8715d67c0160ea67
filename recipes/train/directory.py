"""The directory that a run leaves behind: settings, metrics, checkpoints, picture."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import samfn
from recipes.errors import ConfigError
from recipes.settings.config import Config
from recipes.settings.saved import AS_TOML, CONFIG_FILE, plain_toml, to_toml
from samfn.storage import files

Row = dict[str, Any]  # one epoch of metrics.jsonl
CHECKPOINTS = "checkpoints"


class RunDirectory:
    """Paths of a run, and what is read from and written to them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.weights = path / "model.safetensors"
        self.program = path / "model.pt2"
        self.average = path / "average.safetensors"
        self.layers = path / "layers.png"
        self.log: Callable[[Row], None] = lambda row: None
        """Is told of each epoch, beside the metrics."""
        self._unwritten: list[Row] = []

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, config: Config) -> Iterator["RunDirectory"]:
        """Make a new directory, write the settings into it, and hold it.

        Raises:
            ConfigError: the directory holds files already, or cannot be made.
            InUseError: another run holds it.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--output: expected a directory, got the file {path}")
        with contextlib.ExitStack() as stack:
            try:
                files.make_directory(path)
                stack.enter_context(samfn.held(path))
                run._require_new()
                run.write_config(config)
            except samfn.InUseError:
                raise
            except OSError as error:
                raise ConfigError(f"--output: cannot write {path}: {error}") from error
            yield run

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold a directory that is there, to go on with its run.

        Raises:
            InUseError: another run holds it.
        """
        with samfn.held(self.path):
            files.sweep(self.path)
            yield

    def checkpoints(
        self, warn: Callable[[str], None] = warnings.warn, keep_best: int = 1
    ) -> samfn.Checkpoints:
        """Return the checkpoints, of which only who holds the directory may write any."""
        where = self.path / CHECKPOINTS
        return samfn.Checkpoints(where, keep_best=keep_best, warn=warn)

    def write_config(self, config: Config) -> None:
        """Write the settings; those of before, if they differ, are kept beside."""
        path, text = self.path / CONFIG_FILE, to_toml(config)
        if path.exists() and (before := files.read_text(path, AS_TOML["errors"])) != text:
            # A copy first, so that there are settings whenever the process is killed.
            self._keep_aside(before)
        with files.replacing(path) as temporary:
            temporary.write_text(text, **AS_TOML)

    def keep_settings(self, values: Mapping[str, Any]) -> None:
        """Keep settings that a part of the run had, as `plain_values` gives them."""
        self._keep_aside(plain_toml(values))

    def _keep_aside(self, text: str) -> None:
        with files.replacing(files.free_name(self.path / CONFIG_FILE)) as temporary:
            temporary.write_text(text, **AS_TOML)

    def older_settings(self) -> list[Path]:
        """Return the files of settings that the run had before it was given others."""
        found = self.path.glob(f"{CONFIG_FILE}.*")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def append(self, row: Row) -> None:
        """Add an epoch to the metrics.

        Raises:
            OSError: it cannot be written; it will be with the next one.
        """
        self._unwritten.append(row)
        files.require_held(self.path)
        lines = "".join(f"{json.dumps(row)}\n" for row in self._unwritten)
        with self.metrics.open("ab+", buffering=0) as file:
            files.require_regular(file)
            file.seek(0)
            complete = file.truncate(file.read().rfind(b"\n") + 1)  # no half line
            try:
                left = memoryview(lines.encode())
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(complete)
                raise
        self._unwritten.clear()

    def rows(self) -> list[Row]:
        """Return the epochs recorded so far, ascending, each as its last line says it.

        A line that is cut off or damaged is none.
        """
        rows = {row["epoch"]: row for row in self.lines() if row}
        return [rows[epoch] for epoch in sorted(rows)]

    def lines(self) -> list[Row | None]:
        """Return the epochs as they were recorded, and None for a line that is none."""
        try:
            text = files.read_text(self.metrics, errors="replace")
        except FileNotFoundError:
            text = ""
        return [*map(_row, text.splitlines()), *self._unwritten]

    def rewrite(self, rows: Sequence[Row]) -> None:
        """Let these be the epochs that are recorded.

        Where a run goes on from further back than one epoch, the file that had more is kept
        beside; the last one may lack its checkpoint, and is taken again.
        """
        if len(self.rows()) > len(rows) + 1:
            aside = self.metrics.with_name(f"{self.metrics.name}.superseded")
            with files.replacing(files.free_name(aside, aside)) as temporary:
                temporary.write_bytes(files.read_bytes(self.metrics))
        with files.replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _require_new(self) -> None:
        """Raise if there is more than a run leaves that was killed while it began."""
        files.sweep(self.path)
        found = [p.name for p in self.path.iterdir() if p.name != files.LOCK]
        if found:
            hint = "; --resume goes on with a run" * (CONFIG_FILE in found)
            raise ConfigError(
                f"--output: expected a new or empty directory, got {self.path}, which"
                f" holds {found[0]}{hint}"
            )


def reserved(path: Path) -> Path:
    """Make a new directory of this name, or, if there is one already, with -2, -3, ...

    So runs that nobody has named, and that begin in the same second, have one each.

    Raises:
        ConfigError: none can be made.
    """
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    try:
        files.make_directory(path.parent)
        for place in chain([path], numbered):
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                break
        files.sync(place.parent)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error}") from error
    return place


def vacate(path: Path) -> None:
    """Remove a directory of which nothing came: in it is nothing but the lock, if that."""
    with contextlib.suppress(OSError):
        if {file.name for file in path.iterdir()} <= {files.LOCK}:
            (path / files.LOCK).unlink(missing_ok=True)
            path.rmdir()


class Unwritten(RunDirectory):
    """A run's directory as those ranks have it that leave writing to the first."""

    def write_config(self, config: Config) -> None:
        """Write nothing."""

    def append(self, row: Row) -> None:
        """Write nothing."""

    def rewrite(self, rows: Sequence[Row]) -> None:
        """Write nothing."""


def _row(line: str) -> Row | None:
    """Return the epoch that a line is, or None if it is none."""
    try:
        row = parsed(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("epoch")) is int and row["epoch"] > 0
    return row if whole else None


def parsed(text: str) -> Any:
    """Return what JSON says; integers of more than 20 digits are floats, or infinite.

    Raises:
        ValueError, RecursionError: it is no JSON, or too deep.
    """

    def whole(digits: str) -> float:
        return int(digits) if len(digits) <= 20 else float(digits)

    return json.loads(text, parse_int=whole)
