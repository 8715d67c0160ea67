"""Checkpoints: a training state and what belongs to it, to a file and back.

A checkpoint is one safetensors file. Tensors are named by their place in the state, as
"params/conv.weight"; metadata is JSON in the header, and tensors among it are named
"metadata/<key>"; JSON that is too long for a header is the bytes of "samfn.json/<key>".
`tensorfile` writes it whole and verifies it at every read. Of a state of DTensors, it is
a directory with one file for each rank: see `parts` and `sharded`.
"""

import json
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import checks, distributed, tree
from samfn.step import NonFiniteError, TrainState
from samfn.storage import files, parts, tensorfile

FORMAT = "2"  # the newest, and the only one that was ever released
RESERVED = "samfn."
FORMAT_KEY = f"{RESERVED}format"
METADATA = "metadata"
SCORE = "score"
PARTS = f"{RESERVED}parts"
SUFFIX = ".safetensors"
NAME = re.compile(rf"step_([0-9]+)({SUFFIX}|{parts.SUFFIX})")
LONG = 2**16  # characters of JSON, above which it is a tensor: headers have an end
LONG_KEY = f"{RESERVED}json"
GOING_ON = ", going on with the one before"
DEEPEST = 100  # levels of JSON; readers have about ten times as many


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

    If there are DTensors among the tensors, all ranks call it, and it is a directory with
    one file for each rank, of which the same is true. Plain tensors and other metadata are
    those of the first rank then.

    Args:
        path: where to; its directory exists.
        state: any training state.
        metadata: whatever JSON holds, tensors, and mappings of names to tensors; given
            back by `restore`.

    Raises:
        CheckpointWriteError: the file cannot be written, as on a full disk; an OSError.
        TypeError: JSON does not hold the metadata, or the file a tensor, as a sparse one;
            or the state has something else in it. Says where.
        ValueError: a name of the metadata begins with "samfn."; two names are one when
            they are written, as 1 and "1"; there is more than `restore` takes; or the
            placement of a DTensor is a sum that was not added up.
    """
    _begin(Path(path), state, metadata)()


def restore(
    path: str | os.PathLike[str], like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Read a state back, with its metadata.

    The number of ranks that wrote it need not be that of those that read it, nor their
    mesh. All ranks call it if there are DTensors in `like`, and each reads its own parts.

    Args:
        path: what `save` wrote.
        like: a state of the same structure, as `init` makes it; gives names, shapes,
            dtypes, devices and memory formats, and how DTensors are cut, not values.
            Tensors among metadata are cut as the parameter of their name, "conv.weight"
            or "params/conv.weight", and shape is, and otherwise whole, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointCorruptError: it is damaged, or no checkpoint; a ValueError.
        CheckpointFormatError: it was written by a newer version; a ValueError.
        ValueError: it holds other names, shapes or dtypes than `like`; says which.
    """
    path, expected = Path(path), _flatten(like)
    call = _calling(_is_cut(like))
    tensors, metadata, index = call(lambda: _read(path, expected))
    found = {**tensors, **{name: whole.layout for name, whole in index.items()}}
    beside = {name: found.pop(name) for name in [*found] if name.startswith(f"{METADATA}/")}
    checks.require_same_layout(expected, found, names=f"the state and {path}")
    wanted = expected | {n: _as_cut(n, leaf, expected) for n, leaf in beside.items()}
    cut = {
        name: leaf
        for name, leaf in wanted.items()
        if name in index or tree.is_sharded(leaf)
    }
    if cut:
        from samfn.storage import sharded  # takes seconds

        directory = parts.index_of(path).parent

        def load() -> dict[str, Tensor]:
            with _reading(path):
                return sharded.load(directory, tensors, index, cut)

        tensors |= call(load)
    for name in beside:
        _, key, *rest = name.split("/", 2)
        if rest:
            metadata.setdefault(key, {})[rest[0]] = tensors.pop(name)
        else:
            metadata[key] = tensors.pop(name)
    return _rebuild(like, tensors), metadata


def _is_cut(state: Any, metadata: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether there are DTensors among the tensors."""
    held = [value for value in metadata.values() if _holds_tensors(value)]
    return tree.any_sharded(pytree.tree_leaves((state, held)))


def _calling(cut: bool) -> Callable[[Callable[[], Any]], Any]:
    """Return what calls a function: on all ranks together, if the state is cut."""
    return distributed.together if cut else lambda function: function()


def _decides(cut: bool) -> bool:
    """Return whether this rank decides what happens to files."""
    return not cut or distributed.rank() == distributed.FIRST


def _begin(
    path: Path,
    state: TrainState,
    metadata: Mapping[str, Any],
    background: Callable[[], Any] | None = None,
) -> Callable[[], None]:
    """Begin to write a checkpoint.

    Args:
        path: as for `save`, and so are state and metadata.
        state: may change afterwards.
        metadata: likewise.
        background: makes the process group for writing there; None writes at once.

    Returns:
        Waits for the end, and raises what went wrong.
    """
    call = _calling(_is_cut(state, metadata))
    tensors, texts = call(lambda: _encoded(state, metadata))
    cut = {name: leaf for name, leaf in tensors.items() if tree.is_sharded(leaf)}
    whole = {name: leaf for name, leaf in tensors.items() if name not in cut}
    if background:
        whole = {
            name: torch.empty_like(leaf, device="cpu").copy_(leaf)
            for name, leaf in whole.items()
        }
    if not cut:
        write = partial(tensorfile.write, path, whole, texts)
        return partial(_finish, "", _in_thread(write) if background else write)
    from samfn.storage import sharded  # takes seconds

    def write_index(file: Path, index: parts.Index) -> None:
        _put(json.dumps(parts.listed(index)), PARTS, whole, texts)
        tensorfile.write(file, whole, texts)

    finish = sharded.begin(path, cut, write_index, background() if background else None)
    return partial(_finish, f"cannot write {path}: ", finish)


def _finish(place: str, write: Callable[[], Any]) -> None:
    try:
        write()
    except OSError as error:
        raise CheckpointWriteError(f"{place}{error}") from error


def _in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Begin to call a function; return what waits for its end."""
    pool = ThreadPoolExecutor(1)
    begun = pool.submit(function)
    pool.shutdown(wait=False)
    return begun.result


def _encoded(
    state: TrainState, metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and texts that are a state and its metadata."""
    tensors = _flatten(state)
    texts = {FORMAT_KEY: FORMAT}
    if reserved := [key for key in metadata if key.startswith(RESERVED)]:
        raise ValueError(f"metadata must not be called {RESERVED}*, got {reserved}")
    for key, value in metadata.items():
        if _holds_tensors(value):
            if "/" in key:
                raise ValueError(f"metadata of tensors must have no / in its name: {key!r}")
            tensors |= tree.named(value, f"{METADATA}/{key}")
        else:
            _put(_to_json(value, key), key, tensors, texts)
    for name, leaf in tensors.items():
        if any(placement.is_partial() for placement in getattr(leaf, "placements", ())):
            raise ValueError(f"expected DTensors that are whole or cut, {name} is a sum")
    return tensors, texts


def _put(text: str, key: str, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Add a text to those of a file, or to its tensors if it is long."""
    if len(text) > LONG:
        content = bytearray(text.encode())
        tensors[f"{LONG_KEY}/{key}"] = torch.frombuffer(content, dtype=torch.uint8)
    else:
        texts[key] = text


def _read(
    path: Path, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, parts.Parts]]:
    """Return whole tensors, metadata without tensors, and where the others are."""
    with _reading(path):
        plain = {n: leaf for n, leaf in expected.items() if not tree.is_sharded(leaf)}
        tensors, texts = tensorfile.read(parts.index_of(path), plain)
    if (found := texts.pop(FORMAT_KEY, None)) != FORMAT:
        raise CheckpointFormatError(
            f"{path} has checkpoint format {found}, this samfn reads format {FORMAT}"
        )
    try:
        for name in [name for name in tensors if name.startswith(f"{LONG_KEY}/")]:
            long = tensors.pop(name).numpy().tobytes()
            texts[name.removeprefix(f"{LONG_KEY}/")] = long.decode()
        metadata: dict[str, Any] = {key: json.loads(t) for key, t in texts.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} has damaged metadata: {error}") from error
    with _reading(path):
        return tensors, metadata, parts.parsed(path, metadata.pop(PARTS, {}))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading raises into the errors of checkpoints."""
    try:
        yield
    except tensorfile.CorruptError as error:
        raise CheckpointCorruptError(str(error)) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no checkpoint at {path}") from error
    except OSError as error:
        if parts.index_of(path).is_file():
            raise
        raise CheckpointCorruptError(f"{path} is no checkpoint: {error}") from error


def _verified_texts(path: Path) -> dict[str, str]:
    """Return the texts of a checkpoint of which every file was verified."""
    index = parts.index_of(path)
    if index == path:
        return tensorfile.verified_texts(path)
    tensors, texts = tensorfile.read(index)
    long = tensors.get(f"{LONG_KEY}/{PARTS}")
    text = texts.get(PARTS, "{}") if long is None else long.numpy().tobytes()
    parts.verify(path, parts.parsed(path, json.loads(text)))
    return texts


def _as_cut(name: str, leaf: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
    """Return how a tensor among metadata is to come, for what names and shapes it has."""
    named = name.split("/", 2)[-1]
    param = expected.get(f"params/{named}", expected.get(named))
    if param is not None and tree.is_sharded(param) and param.shape == leaf.shape:
        return torch.empty_like(param, dtype=leaf.dtype)
    return torch.empty_like(leaf, device="cpu") if leaf.is_meta else leaf


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
        cut = _is_cut(state, metadata)
        call, first = _calling(cut), _decides(cut)
        suffix = parts.SUFFIX if cut else SUFFIX
        path = self.directory / f"step_{_step_of(state):09d}{suffix}"

        def prepare() -> None:
            _require_finite(state)
            if score is not None:
                metadata[SCORE] = _required(score)
            if first and not self._swept:
                self._prepare()

        call(prepare)
        finish = _begin(
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
                    scores = _scores(_verified_texts(path))
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
        cut = _is_cut(like)
        first = _decides(cut)
        paths = _calling(cut)(lambda: choose() if first else [])
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


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping) and value:
        return all(isinstance(item, Tensor) for item in value.values())
    return isinstance(value, Tensor)


def _to_json(value: Any, key: str) -> str:
    """Return what `restore` reads back as it was, or raise."""
    _require_json(value, f"metadata {key}", DEEPEST)
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata {key}: {error}") from error


def _require_json(value: Any, place: str, levels: int) -> None:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{place} is a tensor: those among metadata stand alone, or in a mapping that"
            " holds nothing else"
        )
    if not levels:
        raise ValueError(f"{place[:80]}... is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        names = [key if isinstance(key, str) else json.dumps(key) for key in value]
        if len({*names}) < len(names):
            raise ValueError(f"{place} has two names that JSON makes one: {[*value]}")
    nested = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list | tuple) else nested:
        if isinstance(item, dict | list | tuple | Tensor):
            _require_json(item, f"{place}/{key}", levels - 1)


def _flatten(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, TrainState | Mapping):
        raise TypeError(f"expected a training state, got a {type(state).__name__}")
    return tree.named(state._asdict() if isinstance(state, TrainState) else state)


def _rebuild(like: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Return nested mappings, or a state, with other tensors, named as by `_flatten`."""
    if isinstance(like, Tensor):
        return tensors[place]
    if isinstance(like, TrainState):
        return TrainState(**_rebuild(like._asdict(), tensors))
    return {
        key: _rebuild(child, tensors, f"{place}/{key}" if place else str(key))
        for key, child in like.items()
    }
