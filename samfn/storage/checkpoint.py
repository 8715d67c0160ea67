"""A checkpoint: a training state and what belongs to it, to a file and back.

It is one safetensors file: `encoding` says what is in it, and `tensorfile` writes it whole
and verifies it at every read. Of a state of DTensors, it is a directory with one file for
each rank: see `parts` and `sharded`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn import distributed, tree
from samfn.step import TrainState
from samfn.storage import parts, tensorfile
from samfn.storage.encoding import (
    FORMAT,
    FORMAT_KEY,
    LONG_KEY,
    METADATA,
    RESERVED,
    encoded,
    flatten,
    holds_tensors,
    put,
    rebuilt,
)
from samfn.support import checks

PARTS = f"{RESERVED}parts"


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
    begin(Path(path), state, metadata)()


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
    path, expected = Path(path), flatten(like)
    call = calling(is_cut(like))
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
    return rebuilt(like, tensors), metadata


def is_cut(state: Any, metadata: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether there are DTensors among the tensors."""
    held = [value for value in metadata.values() if holds_tensors(value)]
    return tree.any_sharded(pytree.tree_leaves((state, held)))


def calling(cut: bool) -> Callable[[Callable[[], Any]], Any]:
    """Return what calls a function: on all ranks together, if the state is cut."""
    return distributed.together if cut else lambda function: function()


def decides(cut: bool) -> bool:
    """Return whether this rank decides what happens to files."""
    return not cut or distributed.rank() == distributed.FIRST


def begin(
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
    call = calling(is_cut(state, metadata))
    tensors, texts = call(lambda: encoded(state, metadata))
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
        put(json.dumps(parts.listed(index)), PARTS, whole, texts)
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


def verified_texts(path: Path) -> dict[str, str]:
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
