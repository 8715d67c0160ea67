"""Loggers beside metrics.jsonl: what other tools show of a run, as it goes on.

Each writes into the run's directory alone, without account or network. Each is a view of
metrics.jsonl: where a run goes on, the epochs that it keeps are logged anew, so that none
is missing or there twice, whatever a logger had written when the run was killed.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from recipes.settings.config import Config, plain_values
from recipes.terminal.legible import legible
from recipes.train.directory import Row, RunDirectory

PROJECT = "samfn"
SHOWN = ("train_loss", "test_loss", "test_accuracy")  # beside settings, in tables of runs

Settings = Mapping[str, Any]


class Logger(Protocol):
    """A listener to epochs, made with the run's directory and its settings."""

    def log(self, row: Row) -> None:
        """Write the numeric columns of a row, at its step."""

    def close(self) -> None:
        """Write what is not written yet, and end."""


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        _require_text(path)
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # Of earlier files, readers drop all from this step on.
        self._writer = SummaryWriter(path / "tensorboard", purge_step=0)
        plain = {
            name: value if type(value) in (int, float, str) else str(value)
            for name, value in settings.items()
            if value is not None
        }
        for summary in hparams(plain, dict.fromkeys(SHOWN, 0.0)):
            self._writer.file_writer.add_summary(summary)

    def log(self, row: Row) -> None:
        """Write the numeric columns of a row, at its step."""
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class WandB:
    """An offline run in `wandb/`, for `wandb sync`.

    An offline run cannot be gone on with: of two with one id, `wandb sync` takes the later
    instead of the earlier. So the later one holds all epochs, and the id stays.

    Source:
        github.com/wandb/wandb, issues 3841 and 5865.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        _require_text(path)
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ["WANDB_CACHE_DIR"] = str(path.resolve())
        import wandb

        before = sorted(path.glob("wandb/offline-run-*-*"))
        _remove(path / "wandb", "offline-run-*", "latest-run", "debug*.log", "logs")
        self._run = wandb.init(
            project=PROJECT,
            id=before[-1].name.split("-", 3)[3] if before else None,
            name=_name(path),
            dir=path,
            config=dict(settings),
            settings=wandb.Settings(
                mode="offline",
                reinit="create_new",  # Another run of this process may be open still.
                silent=True,
                console="off",
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def log(self, row: Row) -> None:
        """Write the numeric columns of a row, at its step."""
        # Without the commit, a row would wait for the next one.
        self._run.log(_scalars(row), step=row["step"], commit=True)

    def close(self) -> None:
        """End the offline run."""
        self._run.finish()


class Trackio:
    """A project of one run in `trackio/`, for `TRACKIO_DIR=... trackio show`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        directory = path.resolve() / "trackio"
        # What a user has set may name a server, on which trackio would log instead.
        for name in [name for name in os.environ if name.startswith("TRACKIO_")]:
            del os.environ[name]
        os.environ["TRACKIO_DIR"] = str(directory)
        os.environ["HF_HUB_OFFLINE"] = "1"  # Else it asks there whose the user's token is.
        import trackio

        if directory != trackio.TRACKIO_DIR:
            raise RuntimeError(f"this process writes to {trackio.TRACKIO_DIR} already")
        _remove(directory, f"{PROJECT}.*")
        self._trackio = trackio
        with _silence():
            trackio.init(
                project=PROJECT,
                name=_name(path),
                config=dict(settings),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, row: Row) -> None:
        """Write the numeric columns of a row, at its step."""
        self._trackio.log(_scalars(row), step=row["step"])

    def close(self) -> None:
        """Wait until all is written."""
        with _silence():
            self._trackio.finish()


MAKERS: dict[str, Callable[[Path, Settings], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Loggers:
    """Several loggers as one, which never raises: who fails is named, and dropped.

    Args:
        names: of loggers in `MAKERS`.
        path: the run's directory.
        settings: of the run, by name.
        rows: the epochs that the run has already.
        warn: is given one line about each logger that fails.
    """

    def __init__(
        self,
        names: Iterable[str],
        path: Path,
        settings: Settings,
        rows: Sequence[Row],
        warn: Callable[[str], None],
    ) -> None:
        self._loggers: dict[str, Logger] = {}
        self._warn = warn
        for name in dict.fromkeys(names):
            with self._dropping(name):
                _require_own(path / name)
                self._loggers[name] = MAKERS[name](path, settings)
                for row in rows:
                    self._loggers[name].log(row)

    def log(self, row: Row) -> None:
        """Tell each logger of an epoch."""
        for name, logger in [*self._loggers.items()]:
            with self._dropping(name):
                logger.log(row)

    def close(self) -> None:
        """Let each logger end."""
        for name, logger in [*self._loggers.items()]:
            with self._dropping(name):
                logger.close()

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Whatever it is: training is worth more than its log.
            self._loggers.pop(name, None)
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                self._warn(f"--log {name} is left out: it is not installed")
                return
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"--log {name} failed, and the run goes on without it: {text}")


@contextlib.contextmanager
def logged(
    run: RunDirectory, config: Config, warn: Callable[[str], None]
) -> Iterator[None]:
    """Let the loggers that the settings name know of each epoch of a run.

    Args:
        run: the run; held.
        config: its settings.
        warn: is given one line about each logger that fails.
    """
    rows = [row for row in run.rows() if isinstance(row.get("step"), int)]
    settings = {
        name: legible(value, "utf-8") if isinstance(value, str) else value
        for name, value in plain_values(config).items()
    }
    loggers = Loggers(config.recording.log, run.path, settings, rows, warn)
    run.log = loggers.log
    try:
        yield
    finally:
        loggers.close()


def _scalars(row: Row) -> dict[str, float]:
    """Return the numbers of a row, those within named by the way to them: a/b/c."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": x for inner, x in _scalars(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    found.pop("step", None)
    return found


def _remove(directory: Path, *patterns: str) -> None:
    """Remove what a logger wrote before, and nothing that somebody else put there."""
    for found in [path for pattern in patterns for path in directory.glob(pattern)]:
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def _require_own(place: Path) -> None:
    """Raise if what has the name of a logger's directory is none, or one elsewhere."""
    if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
        kind = "a link" if place.is_symlink() else "something else"
        raise ValueError(f"expected a directory in that of the run, got {kind}: {place}")


def _require_text(path: Path) -> None:
    """Raise for a logger that writes below no name that is not UTF-8."""
    if legible(str(path.resolve()), "utf-8") != str(path.resolve()):
        raise ValueError("it needs a directory whose name is text in this locale")


def _name(path: Path) -> str:
    return legible(path.resolve().name, "utf-8")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
