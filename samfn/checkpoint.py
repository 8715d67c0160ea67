"""Checkpoints: a training state and what belongs to it, to a file and back.

A checkpoint is one safetensors file. Tensors are named by their place in the state, as
"params/conv.weight"; metadata is JSON in the header, and tensors among it are named
"metadata/<key>". `tensorfile` writes it whole and verifies it at every read.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from samfn import border, files, tensorfile
from samfn.update import NonFiniteError, TrainState

FORMAT = "2"  # the newest, and the only one that was ever released
RESERVED = "samfn."
FORMAT_KEY = f"{RESERVED}format"
METADATA = "metadata"
SCORE = "score"


class CheckpointError(Exception):
    """A checkpoint cannot be written or read."""


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint could not be written; the one before is untouched."""


class CheckpointCorruptError(CheckpointError, ValueError):
    """A file is no checkpoint, or not as it was written."""


class CheckpointFormatError(CheckpointError, ValueError):
    """A checkpoint was written in a format that this version does not know."""


def save(path: str | os.PathLike[str], state: TrainState, **metadata: Any) -> None:
    """Write a state and its metadata to one safetensors file, or leave the old file.

    The file appears whole or not at all, and holds a SHA-256 of its content, which
    `restore` verifies. Nothing else of the program is in it: where random numbers come
    from PyTorch's own generators, give `random=samfn.random_state()` along.

    Args:
        path: where to; its directory exists.
        state: any training state.
        metadata: whatever JSON holds, tensors, and mappings of names to tensors; given
            back by `restore`.

    Raises:
        CheckpointWriteError: the file cannot be written, as on a full disk; an OSError.
        TypeError: JSON does not hold the metadata.
        ValueError: a name of the metadata begins with "samfn.", or there are more
            tensors than `restore` takes.
    """
    tensors = _flatten(state)
    texts = {FORMAT_KEY: FORMAT}
    if reserved := [key for key in metadata if key.startswith(RESERVED)]:
        raise ValueError(f"metadata must not be called {RESERVED}*, got {reserved}")
    for key, value in metadata.items():
        if _holds_tensors(value):
            tensors |= _flatten(value, f"{METADATA}/{key}")
        else:
            texts[key] = json.dumps(value)
    try:
        tensorfile.write(Path(path), tensors, texts)
    except OSError as error:
        raise CheckpointWriteError(str(error)) from error


def restore(
    path: str | os.PathLike[str], like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Read a state back, with its metadata.

    Args:
        path: a file that `save` wrote.
        like: a state of the same structure, as `init` makes it; gives names, shapes,
            dtypes, devices and memory formats, not values.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointCorruptError: it is damaged, or no checkpoint; a ValueError.
        CheckpointFormatError: it was written by a newer version; a ValueError.
        ValueError: it holds other names, shapes or dtypes than `like`; says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    expected = _flatten(like)
    try:
        tensors, texts = tensorfile.read(path, expected)
    except tensorfile.CorruptError as error:
        raise CheckpointCorruptError(str(error)) from error
    if (found := texts.pop(FORMAT_KEY, None)) != FORMAT:
        raise CheckpointFormatError(
            f"{path} has checkpoint format {found}, this samfn reads format {FORMAT}"
        )
    try:
        metadata: dict[str, Any] = {key: json.loads(t) for key, t in texts.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} has damaged metadata: {error}") from error
    for name in [name for name in tensors if name.startswith(f"{METADATA}/")]:
        _, key, *rest = name.split("/", 2)
        if rest:
            metadata.setdefault(key, {})[rest[0]] = tensors.pop(name)
        else:
            metadata[key] = tensors.pop(name)
    border.require_same_layout(expected, tensors, names=f"the state and {path}")
    return _rebuild(like, tensors, ""), metadata


class Found(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    state: TrainState
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a directory: the last few, and the best few.

    Only one process may write there; `samfn.held(directory)` sees to that.

    Args:
        directory: the first `save` makes it, and deletes what killed processes left half
            written in it.
        keep_last: how many of the newest stay, at least 2, so that one is there even
            while the newest is written or turns out to be damaged.
        keep_best: how many of those with the highest score stay besides, for each name
            of a score.
        warn: is told in one line what was set aside, and why.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        border.require_count("keep_last", keep_last, least=2)
        self.directory = Path(directory)
        self._keep_last, self._keep_best, self._warn = keep_last, keep_best, warn
        self._swept = False

    def paths(self) -> list[Path]:
        """Return the checkpoints that are there, by step."""
        return sorted(self.directory.glob("step_*.safetensors"))

    def save(
        self,
        state: TrainState,
        *,
        score: float | Mapping[str, float] | None = None,
        **metadata: Any,
    ) -> Path:
        """Write a checkpoint, and delete those that are neither new nor good any more.

        Args:
            state: names the file by its step; one of the same step is replaced.
            score: what the best are chosen by, the higher the better; several by their
                names, as that of the weights and that of their average.
            metadata: as for `samfn.save`.

        Raises:
            CheckpointWriteError: it cannot be written; the ones before are untouched.
            NonFiniteError: a parameter or buffer is not finite, which no training
                recovers from; the ones before are untouched.
        """
        _require_finite(state)
        if not self._swept:
            self._prepare()
        path = self.directory / f"step_{int(state.step):09d}.safetensors"
        if score is not None:
            metadata[SCORE] = dict(score) if isinstance(score, Mapping) else score
        save(path, state, **metadata)
        for old in set(self.paths()) - self._wanted():
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"cannot delete {old}: {error}")
        return path

    def best(self, by: str = SCORE) -> list[Path]:
        """Return those with the highest scores, the best first; of equals, the older.

        Args:
            by: name of the score; it has none where it was given as a number.
        """
        return self._ranked(by)[: self._keep_best]

    def best_whole(self, like: TrainState, by: str = SCORE) -> Found | None:
        """Read the best checkpoint that is whole, or None if none has such a score.

        Raises and warns as `latest`.
        """
        return self._first_whole(self._ranked(by), like)

    def latest(self, like: TrainState) -> Found | None:
        """Read the newest checkpoint that is whole, or None if there is none.

        One that is damaged is renamed to *.corrupt, with a warning, and the one before it
        read.

        Raises:
            CheckpointFormatError, ValueError: as `restore`; that is no damage.
        """
        return self._first_whole(reversed(self.paths()), like)

    def _wanted(self) -> set[Path]:
        """Return the last ones, and the best by each score."""
        paths = self.paths()
        names = {name for path in paths for name in _scores(path)}
        return {*paths[-self._keep_last :], *(p for name in names for p in self.best(name))}

    def _ranked(self, by: str) -> list[Path]:
        found = {path: _scores(path) for path in self.paths()}
        scored = {path: scores[by] for path, scores in found.items() if by in scores}
        return sorted(scored, key=lambda path: -scored[path])

    def _first_whole(self, paths: Iterable[Path], like: TrainState) -> Found | None:
        for path in paths:
            try:
                return Found(path, *restore(path, like))
            except CheckpointCorruptError as error:
                aside = path.with_name(f"{path.name}.corrupt")
                path.rename(aside)
                self._warn(f"{error}; kept as {aside.name}, going on with the one before")
        return None

    def _prepare(self) -> None:
        try:
            files.make_directory(self.directory)
        except OSError as error:
            raise CheckpointWriteError(f"cannot make {self.directory}: {error}") from error
        files.sweep(self.directory)
        self._swept = True

    def drop_after(self, step: int) -> None:
        """Rename to *.superseded what is newer than a step that a run goes on from."""
        for path in self.paths():
            if int(path.stem.removeprefix("step_")) > step:
                path.rename(path.with_name(f"{path.name}.superseded"))


def _require_finite(state: TrainState) -> None:
    for name, tensor in {**state.params, **state.buffers}.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(f"{name} is not finite after {int(state.step)} steps")


def _scores(path: Path) -> dict[str, float]:
    try:
        text = tensorfile.read_texts(path).get(SCORE, "{}")
        found = json.loads(text, parse_int=float)  # No float holds every integer.
    except (OSError, ValueError, RecursionError):
        return {}  # Whoever reads all of it is told.
    named = found if isinstance(found, dict) else {SCORE: found}
    return {
        name: float(score)
        for name, score in named.items()
        if isinstance(score, int | float) and math.isfinite(score)
    }


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping) and value:
        return all(isinstance(item, Tensor) for item in value.values())
    return isinstance(value, Tensor)


def _flatten(node: Any, place: str = "") -> dict[str, Tensor]:
    """Name every tensor of a nested state by the path that leads to it."""
    if isinstance(node, Tensor):
        return {place: node}
    flat: dict[str, Tensor] = {}
    for key, child in _children(node).items():
        flat |= _flatten(child, f"{place}/{key}" if place else key)
    return flat


def _rebuild(like: Any, tensors: dict[str, Tensor], place: str) -> Any:
    if isinstance(like, Tensor):
        return tensors[place]
    children = {
        key: _rebuild(child, tensors, f"{place}/{key}" if place else key)
        for key, child in _children(like).items()
    }
    return TrainState(**children) if isinstance(like, TrainState) else children


def _children(node: Any) -> Mapping[str, Any]:
    return node._asdict() if isinstance(node, TrainState) else node
