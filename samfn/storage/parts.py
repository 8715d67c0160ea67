"""How a checkpoint lies on the disk that several ranks wrote: parts, and an index of them.

    step_000000300.sharded/
      index.safetensors                 metadata, whole tensors, and where the parts are
      rank_00000-k3x9_1ab.safetensors   the parts that a rank wrote, one file for each
      rank_00001-k3x9_1ab.safetensors

The index is what one process would have written, without the tensors that are cut. Those
are listed in it with the SHA-256 of each part: the index vouches for all files, and who
needs some parts reads and verifies no others. A directory is renamed to its name when all
of it is on the disk. Over another checkpoint, files come beside those that are there, and
then the new index replaces the old one.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samfn.storage import files, tensorfile

INDEX = "index.safetensors"
SUFFIX = files.SHARDED
RANKS = "rank_*-*.safetensors"
FORGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Part(NamedTuple):
    """A part of a tensor, and where it is."""

    offsets: tuple[int, ...]
    layout: Tensor
    """Its dtype and shape; without memory."""
    file: str
    sha256: str


class Parts(NamedTuple):
    """All parts of a tensor."""

    layout: Tensor
    """Dtype and shape of the whole; without memory."""
    parts: list[Part]


Index = Mapping[str, Parts]


def index_of(path: Path) -> Path:
    """Return the file that says what a checkpoint holds: the index, or the only file.

    Raises:
        CorruptError: a directory of parts has no index.
    """
    index = path / INDEX
    if index.exists():
        return index
    if path.suffix == SUFFIX and path.is_dir():
        raise tensorfile.CorruptError(f"{index} is missing")
    return path


def publish(new: Path, path: Path) -> None:
    """Give a directory its name, or put what it holds in place of another checkpoint."""
    files.sync(new)
    if (path / INDEX).exists():
        before = [*path.glob(RANKS)]
        for file in new.glob(RANKS):
            os.rename(file, path / file.name)
        files.sync(path)
        os.replace(new / INDEX, path / INDEX)  # From here on it is the new one.
        files.sync(path)
        for file in before:
            file.unlink()
    else:
        os.rename(new, path)
    files.sync(path.parent)


def listed(index: Index) -> dict[str, Any]:
    """Return an index as JSON holds it."""
    names = {dtype: name for name, dtype in tensorfile.DTYPES.items()}
    return {
        name: {
            "dtype": names[whole.layout.dtype],
            "shape": [*whole.layout.shape],
            "parts": [
                [[*part.offsets], [*part.layout.shape], part.file, part.sha256]
                for part in whole.parts
            ],
        }
        for name, whole in index.items()
    }


def parsed(path: Path, found: Any) -> dict[str, Parts]:
    """Return an index that `listed` made.

    Raises:
        CorruptError: it is none, or parts are missing in it.
    """
    try:
        return {name: _parsed(name, entry) for name, entry in found.items()}
    except FORGED as error:
        raise tensorfile.CorruptError(f"{path} has a damaged index: {error!r}") from error


def _parsed(name: str, entry: Mapping[str, Any]) -> Parts:
    def layout(shape: list[int]) -> Tensor:
        return torch.empty(shape, dtype=tensorfile.DTYPES[entry["dtype"]], device="meta")

    whole, parts = layout(entry["shape"]), []
    for offsets, shape, file, sha256 in entry["parts"]:
        ends = [begin + length for begin, length in zip(offsets, shape, strict=True)]
        inside = zip(offsets, ends, whole.shape, strict=True)
        if not all(0 <= begin <= end <= most for begin, end, most in inside):
            raise ValueError(f"a part of {name} is outside of it")
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"a part of {name} is in {file!r}")
        parts.append(Part(tuple(offsets), layout(shape), file, sha256))
    if sum(math.prod(part.layout.shape) for part in parts) != whole.numel():
        raise ValueError(f"the parts of {name} are not the whole")
    return Parts(whole, parts)


def verify(directory: Path, index: Index) -> None:
    """Raise unless all files hold the parts that the index lists.

    Raises:
        CorruptError: one does not, or is missing.
        OSError: one cannot be read.
    """
    each = [(name, part) for name, whole in index.items() for part in whole.parts]
    read(directory, each, lambda name, part, tensor: None)


def read(
    directory: Path,
    wanted: Iterable[tuple[str, Part]],
    take: Callable[[str, Part, Tensor], None],
) -> None:
    """Read some parts, in threads, and hand over each as soon as it is verified.

    Raises as `verify`.
    """
    by_file: dict[str, list[tuple[str, Part]]] = {}
    for name, part in wanted:
        by_file.setdefault(part.file, []).append((name, part))
    for file, parts in by_file.items():
        _read_file(directory / file, parts, take)


def _read_file(
    path: Path,
    wanted: Iterable[tuple[str, Part]],
    take: Callable[[str, Part, Tensor], None],
) -> None:
    try:
        opening = tensorfile.opened(path)
        with opening as read_one, ThreadPoolExecutor(tensorfile.THREADS) as pool:

            def read_and_take(one: tuple[str, Part]) -> None:
                name, part = one
                take(name, part, read_one(name, part.layout, part.sha256))

            for _ in pool.map(read_and_take, wanted):
                pass
    except OSError as error:
        if path.is_file():
            raise
        raise tensorfile.CorruptError(f"{path} is missing: {error}") from error
