"""The directory that a run leaves behind: settings, metrics, checkpoints, picture."""

import json
import os
from pathlib import Path
from typing import Any

from recipes.config import CONFIG_FILE, Config, ConfigError, write_toml

Row = dict[str, Any]  # one epoch of metrics.jsonl


class RunDirectory:
    """Paths of a run, and what is read from and written to them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunDirectory":
        """Make a new directory, and write the settings into it.

        Raises:
            ConfigError: the directory holds files already, or cannot be made.
        """
        run = cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"--output: expected a new or empty directory, got {path}, which is"
                " neither; --resume goes on with a run"
            )
        try:
            run.checkpoint("last").parent.mkdir(parents=True)
            write_toml(config, path / CONFIG_FILE)
        except OSError as error:
            raise ConfigError(f"--output: cannot write {path}: {error}") from error
        return run

    def checkpoint(self, name: str) -> Path:
        """Return the path of a checkpoint: "last" or "best"."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def append(self, row: Row) -> None:
        """Add an epoch to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[Row]:
        """Return the epochs recorded so far; a line that was cut off is none."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, epochs: int) -> None:
        """Drop what was recorded after the first `epochs` epochs."""
        kept = [row for row in self.rows() if row["epoch"] <= epochs]
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.metrics)
