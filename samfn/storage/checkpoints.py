"""The checkpoints of one run: which are whole, which are good, and which stay."""

import json
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samfn import distributed, tree
from samfn.step import NonFiniteError, TrainState
from samfn.storage import files, parts, tensorfile
from samfn.storage.checkpoint import (
    CheckpointCorruptError,
    CheckpointWriteError,
    begin,
    calling,
    decides,
    is_cut,
    restore,
    verified_texts,
)
from samfn.support import checks

SCORE = "score"
SUFFIX = ".safetensors"
NAME = re.compile(rf"step_([0-9]+)({SUFFIX}|{parts.SUFFIX})")
GOING_ON = ", going on with the one before"
Scores = dict[Path, dict[str, float]]  # of checkpoints, by their names
Signature = tuple[tuple[int, ...], ...]


class Found(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    state: TrainState
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a directory: the last few, and the best few.

    They are called step_<number>.safetensors, and nothing else there counts. Only one
    process may write there; `samfn.held(directory)` sees to that.

    Of states with DTensors they are directories, called step_<number>.sharded. All ranks
    call `save`, `wait`, `latest` and `best_whole` then; the first decides what is read and
    deleted, and it alone holds the directory.

    Args:
        directory: the first `save` makes it, and deletes what killed processes left half
            written in it. It stays this one when the process goes to another.
        keep_last: how many of the newest stay, at least 2, so that one is there even
            while the newest is written or turns out to be damaged.
        keep_best: how many of those with the highest score stay besides, for each name
            of a score.
        background: whether `save` returns as soon as it has copied the state to the CPU.
            The next `save`, or `wait`, waits for the rest, and raises what went wrong; if
            there is none before the process ends, `warn` is told of it.
        warn: is told in one line what was set aside, and why.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        background: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        checks.require_count("keep_last", keep_last, least=2)
        checks.require_count("keep_best", keep_best, least=0)
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_best, self._warn = keep_last, keep_best, warn
        self._swept = False
        self._background, self._group = background, None
        self._unfinished: Callable[[], None] | None = None
        self._owner = os.getpid()  # of what is not finished
        self._verified: dict[Path, tuple[Signature, dict[str, float]]] = {}

    def paths(self) -> list[Path]:
        """Return the checkpoints that are there, by step; none where there is no directory.

        Raises:
            OSError: there is one that cannot be read, a file, or a link that leads nowhere.
        """
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            if self.directory.is_symlink():
                raise
            return []
        named = (self.directory / name for name in names if NAME.fullmatch(name))
        return sorted(named, key=lambda path: (_step(path), path.name))

    def save(
        self,
        state: TrainState,
        *,
        score: float | Mapping[str, float] | None = None,
        **metadata: Any,
    ) -> Path:
        """Write a checkpoint, and delete those that are neither new nor good any more.

        What is deleted is decided by what others hold as it was written: one that is
        damaged is renamed to `*.corrupt`, with a warning, and neither counts nor goes. One
        of that name that is there already stays, and the new one has a number.

        Args:
            state: names the file by its step; one of the same step is replaced.
            score: what the best are chosen by, the higher the better; several by their
                names, as that of the weights and that of their average. One that is not
                finite comes after all others.
            metadata: as for `samfn.save`.

        Raises:
            CheckpointWriteError: it cannot be written; the ones before are untouched.
            TypeError: it is no state, or a score no number; and as `samfn.save`.
            ValueError: its step is no whole number of at least 0, which a file could be
                named by; and as `samfn.save`.
            NonFiniteError: a parameter or buffer is not finite, which no training
                recovers from; the ones before are untouched.
        """
        self.wait()
        cut = is_cut(state, metadata)
        call, first = calling(cut), decides(cut)
        suffix = parts.SUFFIX if cut else SUFFIX
        path = self.directory / f"step_{_step_of(state):09d}{suffix}"

        def prepare() -> None:
            _require_finite(state)
            if score is not None:
                metadata[SCORE] = _required(score)
            if first and not self._swept:
                self._prepare()

        call(prepare)
        finish = begin(
            path, state, metadata, self._make_group if self._background else None
        )

        # Ranks would wait for each other, and some have ended.
        alone = self._background and not cut
        untold = partial(_tell, os.getpid(), finish, self._warn)
        told = weakref.finalize(self, untold) if alone else None

        def finish_and_tidy() -> None:
            try:
                finish()
            finally:
                if told is not None:
                    told.detach()
            call(lambda: self._tidy(path, metadata.get(SCORE)) if first else None)

        self._unfinished, self._owner = finish_and_tidy, os.getpid()
        if not self._background:
            self.wait()
        return path

    def wait(self) -> None:
        """Wait until what is written in the background is there; raises as `save`.

        A process that was forked meanwhile does not wait: its parent writes that.
        """
        finish, self._unfinished = self._unfinished, None
        if finish is None or os.getpid() != self._owner:
            return
        try:
            finish()
        except BaseException as error:
            if self._background and not isinstance(error, Exception):
                self._unfinished = finish  # As on Ctrl-C: it is still written.
            raise

    def _make_group(self) -> Any:
        """Return the process group for writing in the background."""
        if self._group is None:
            from samfn.storage import sharded

            self._group = sharded.new_group()
        return self._group

    def _tidy(self, path: Path, score: Any) -> None:
        """Delete what is neither new nor good any more now that there is another."""
        known = {old: _inode(seen) for old, (seen, _) in self._verified.items()}
        self._remember(path, score)
        found = self._all_scores(self._put_aside)
        for old in sorted(found.keys() - {path}):
            if known and known.get(old) != _inode(self._verified[old][0]):
                self._warn(
                    f"{old} was written by somebody else since the last save; what is"
                    " resumed goes on from the newest: `samfn.held` keeps others out"
                )
        later = max(found, key=_step, default=path)
        if not known and _step(later) > _step(path):
            self._warn(
                f"{later} is of a later step than {path.name}, and is what is resumed:"
                f" drop_after({_step(path)}) sets it aside"
            )
        # A file may have the step of a directory.
        other = {old for old in found if old != path and _step(old) == _step(path)}
        kept = {old: scores for old, scores in found.items() if old not in other}
        for old in found.keys() - {path, *self._wanted(kept)}:
            try:
                files.discard(old)
            except OSError as error:
                self._warn(f"cannot delete {old}: {error}")

    def best(self, by: str = SCORE) -> list[Path]:
        """Return those with the highest scores, the best first; of equals, the older.

        One that is damaged does not count, nor does one that is still written in the
        background: call `wait` before.

        Args:
            by: name of the score; it has none where it was given as a number.
        """
        return _ranked(self._all_scores(), by)[: self._keep_best]

    def best_whole(self, like: TrainState, by: str = SCORE) -> Found | None:
        """Read the best checkpoint that is whole, or None if none has such a score.

        Raises and warns as `latest`.
        """
        return self._first_whole(lambda: _ranked(self._claimed_scores(), by), like)

    def latest(self, like: TrainState) -> Found | None:
        """Read the newest checkpoint that is whole, or None if there is none.

        One that is damaged is renamed to `*.corrupt`, with a warning, and the one before it
        read.

        Raises:
            CheckpointFormatError, ValueError: as `restore`; that is no damage.
        """
        return self._first_whole(lambda: [*reversed(self.paths())], like)

    def _claimed_scores(self) -> Scores:
        """Return the scores that checkpoints claim to have; nothing is verified."""
        found: Scores = {}
        for path in self.paths():
            try:
                found[path] = _scores(tensorfile.read_texts(parts.index_of(path)))
            except tensorfile.CorruptError as error:
                self._put_aside(path, error, GOING_ON)
            except OSError:
                continue  # It has no score; `latest` tells.
        return found

    def _wanted(self, found: Scores) -> set[Path]:
        """Return the last ones, and the best by each score."""
        last = sorted(found, key=lambda path: (_step(path), path.name))[-self._keep_last :]
        names = {name for scores in found.values() for name in scores}
        best = [_ranked(found, name)[: self._keep_best] for name in names]
        return {*last, *(path for paths in best for path in paths)}

    def _all_scores(
        self, damaged: Callable[[Path, Exception], None] = lambda path, error: None
    ) -> Scores:
        """Return the scores of those that are whole; `damaged` is told of the others.

        What was written or verified before, and is the same file since, is not read again.
        """
        found: Scores = {}
        paths = self.paths()
        # What is gone is forgotten, or a long training would remember all of its steps.
        self._verified = {p: self._verified[p] for p in paths if p in self._verified}
        for path in paths:
            try:
                signature = _signature(path)
                known, scores = self._verified.get(path, ((), {}))
                if known != signature:
                    scores = _scores(verified_texts(path))
                    self._verified[path] = (signature, scores)
                found[path] = scores
            except tensorfile.CorruptError as error:
                damaged(path, error)
            except FileNotFoundError:
                pass  # Somebody deleted it.
            except OSError as error:
                self._warn(f"cannot read {path}, which stays: {error}")
        return found

    def _first_whole(
        self, choose: Callable[[], list[Path]], like: TrainState
    ) -> Found | None:
        self.wait()
        cut = is_cut(like)
        first = decides(cut)
        paths = calling(cut)(lambda: choose() if first else [])
        for path in distributed.from_first(paths) if cut else paths:
            try:
                state, metadata = restore(path, like)
            except CheckpointCorruptError as error:
                if first:
                    self._put_aside(path, error, GOING_ON)
                continue
            if first and (step := int(state.step)) != _step(path):
                # Somebody renamed or copied it.
                self._warn(f"{path} is of step {step}, whatever its name says")
            return Found(path, state, metadata)
        return None

    def _put_aside(self, path: Path, error: Exception, then: str = "") -> None:
        try:
            kept = f"kept as {files.put_aside(path, 'corrupt').name}"
        except OSError as failed:  # In a read-only directory, say.
            kept = f"it cannot be renamed, {failed.strerror}, and stays"
        self._warn(f"{error}; {kept}{then}")

    def _remember(self, path: Path, score: Any) -> None:
        """Know what was just written without reading it."""
        try:
            signature = _signature(path)
        except FileNotFoundError as error:
            raise CheckpointWriteError(
                f"another process writes to {self.directory} too, and deleted {path.name};"
                " `samfn.held` keeps others out"
            ) from error
        self._verified[path] = (signature, _scores({SCORE: json.dumps(score)}))

    def _prepare(self) -> None:
        try:
            files.make_directory(self.directory)
        except OSError as error:
            raise CheckpointWriteError(f"cannot make {self.directory}: {error}") from error
        files.sweep(self.directory)
        self._swept = True

    def drop_after(self, step: int) -> None:
        """Rename to `*.superseded` what is newer than a step that a run goes on from.

        Raises:
            CheckpointWriteError: one cannot be renamed.
        """
        for path in self.paths():
            if _step(path) > step:
                try:
                    files.put_aside(path, "superseded")
                except OSError as error:
                    raise CheckpointWriteError(f"cannot rename {path}: {error}") from error


def _require_finite(state: TrainState) -> None:
    for name, leaf in {**state.params, **state.buffers}.items():
        tensor: Any = leaf
        if tree.is_sharded(leaf):
            tensor = tensor.to_local()
        dense = tensor.layout is torch.strided  # The file refuses others by name.
        if dense and tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(f"{name} is not finite after {int(state.step)} steps")


def _tell(owner: int, finish: Callable[[], None], warn: Callable[[str], None]) -> None:
    """Tell what went wrong with a checkpoint that nobody waited for."""
    try:
        if os.getpid() == owner:
            finish()
    except Exception as error:
        warn(str(error))


def _step_of(state: TrainState) -> int:
    """Return the step of a state, which a file is named by, or raise."""
    found: Any
    if not isinstance(state, TrainState):
        raise TypeError(f"expected a training state, got a {type(state).__name__}")
    try:
        found = torch.as_tensor(state.step).item()
    except (RuntimeError, TypeError, ValueError):  # Of several numbers, or none.
        found = state.step
    if not isinstance(found, int) or found < 0:
        raise ValueError(f"expected a whole step of at least 0, got {found}")
    return found


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _signature(path: Path) -> Signature:
    """Return what changes when somebody writes to a file, or to those of a directory."""
    return tuple(
        (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for found in (file.stat() for file in (path, *sorted(path.glob("*"))))
    )


def _inode(signature: Signature) -> int:
    """Return what changes when a file is replaced, but not when it is touched."""
    return signature[0][0]


def _required(score: Any) -> Any:
    """Return scores as JSON holds them, or raise if one is no number."""
    if isinstance(score, Mapping):
        return {name: _number(name, value) for name, value in score.items()}
    return _number(SCORE, score)


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}")
    return value if isinstance(value, int | float) else float(value)  # NumPy's


def _scores(texts: Mapping[str, str]) -> dict[str, float]:
    try:  # No float holds every integer.
        found = json.loads(texts.get(SCORE, "{}"), parse_int=float)
    except (ValueError, RecursionError):
        return {}
    named = found if isinstance(found, dict) else {SCORE: found}
    return {name: score for name, score in named.items() if isinstance(score, float)}


def _ranked(found: Scores, by: str) -> list[Path]:
    def place(path: Path) -> tuple[bool, float]:
        score = found[path][by]
        return (False, -score) if math.isfinite(score) else (True, 0.0)

    scored = [path for path, scores in found.items() if by in scores]
    return sorted(sorted(scored, key=_step), key=place)
