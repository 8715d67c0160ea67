"""The directory that a run leaves behind: settings, metrics, checkpoints, picture."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import samfn
from recipes.config import AS_TOML, CONFIG_FILE, Config, ConfigError, to_toml
from samfn import files

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
        if path.exists() and (before := path.read_text(**AS_TOML)) != text:
            older = len(list(self.path.glob(f"{CONFIG_FILE}.*"))) + 1
            # A copy first, so that there are settings whenever the process is killed.
            with files.replacing(path.with_name(f"{CONFIG_FILE}.{older}")) as temporary:
                temporary.write_text(before, **AS_TOML)
        with files.replacing(path) as temporary:
            temporary.write_text(text, **AS_TOML)

    def append(self, row: Row) -> None:
        """Add an epoch to the metrics.

        Raises:
            OSError: it cannot be written; it will be with the next one.
        """
        self._unwritten.append(row)
        lines = "".join(f"{json.dumps(row)}\n" for row in self._unwritten)
        with self.metrics.open("ab+", buffering=0) as file:
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
        """Return the epochs recorded so far; a line that is cut off or damaged is none."""
        rows: list[Row] = []
        exists = self.metrics.exists()
        text = self.metrics.read_text(errors="replace") if exists else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("epoch"), int):
                    rows.append(row)
        return rows + self._unwritten

    def rewind(self, epochs: int) -> None:
        """Drop what was recorded after the first `epochs` epochs."""
        kept = [row for row in self.rows() if row["epoch"] <= epochs]
        with files.replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def _require_new(self) -> None:
        """Raise if there is more than a run leaves that was killed while it began."""
        files.sweep(self.path)
        found = [p.name for p in self.path.iterdir() if p.name != files.LOCK]
        if found:
            raise ConfigError(
                f"--output: expected a new or empty directory, got {self.path}, which"
                f" holds {found[0]}; --resume goes on with a run"
            )


class Unwritten(RunDirectory):
    """A run's directory as those ranks have it that leave writing to the first."""

    def write_config(self, config: Config) -> None:
        """Write nothing."""

    def append(self, row: Row) -> None:
        """Write nothing."""

    def rewind(self, epochs: int) -> None:
        """Write nothing."""
