"""Named tensors and texts in one verified safetensors file: the one that knows safetensors.

The format neither syncs nor checks what it holds. This writes whole files, and beside the
other texts a SHA-256 of the manifest: all names, dtypes, shapes and texts, and the SHA-256
of each tensor's bytes. Anything that reads safetensors reads these files.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from samfn import files

DIGEST = "samfn.sha256"
UNKNOWN = "0" * 64  # stands where the digest comes to stand
MAX_HEADER = 8 * 2**20  # bytes
MAX_TENSORS = 10_000
THREADS = min(4, os.cpu_count() or 1)  # beside the disk, hashing needs no more


class CorruptError(ValueError):
    """A file is not what was written."""


def write(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a file whole, or leave what is there; hashes are made while it is written.

    Args:
        path: where to; its directory exists.
        tensors: on any device, of any strides.
        texts: by names other than `DIGEST`.

    Raises:
        ValueError: more tensors than any reader takes.
        OSError: it could not be written; says what was needed and what was free.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"expected at most {MAX_TENSORS:,} tensors, got {len(tensors):,}")
    plain = _separate(tensors)
    size = sum(tensor.nbytes for tensor in plain.values())
    try:
        with (
            files.replacing(path, size) as temporary,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            hashes = pool.map(sha256, plain.values())
            save_file(plain, temporary, {**texts, DIGEST: UNKNOWN})
            files.sync(temporary)  # The disk works while the last hashes are made.
            _fill_in(temporary, _digest(plain, hashes, texts))
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"cannot write {path}, {size:,} bytes: {error}") from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors, into memory of their own, and texts; both are what was written.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptError: it is damaged, or was not written by `write`.
        OSError: it cannot be read.
    """
    try:
        # Read at once and not mapped: a mapped file that shrinks kills the process, and
        # safe_open maps it for a moment whatever its backend.
        content = path.read_bytes()
        texts, tensors = _texts(path, content), load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptError(f"{path} is damaged: {error}") from error
    expected = texts.pop(DIGEST, None)
    if expected is None:
        raise CorruptError(f"{path} holds no {DIGEST}: it was not written by samfn")
    with ThreadPoolExecutor(THREADS) as pool:
        found = _digest(tensors, pool.map(sha256, tensors.values()), texts)
    if found != expected:
        raise CorruptError(
            f"{path} is damaged: its content is not that of the SHA-256 in it"
        )
    return tensors, texts


def read_texts(path: Path) -> dict[str, str]:
    """Return the texts alone, unverified, and the digest with them.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptError: there is no header, or one that safetensors does not allow.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        return _texts(path, head + file.read(min(length, MAX_HEADER)))


def _texts(path: Path, start: bytes) -> dict[str, str]:
    """Return the texts of a file that begins so, if its header is one that is allowed."""
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not 2 <= length <= MAX_HEADER:
        raise CorruptError(
            f"{path} is no safetensors file: expected a header of 2 to {MAX_HEADER:,}"
            f" bytes, got {length:,}"
        )
    content = start[8 : 8 + length]
    if content.count(b'"dtype"') > MAX_TENSORS:  # Before it takes memory and time.
        raise CorruptError(f"{path} names more than {MAX_TENSORS:,} tensors")
    try:
        header = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} has a damaged header: {error}") from error
    texts = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise CorruptError(f"{path} has a header that safetensors does not allow")
    return texts


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous, on the CPU, and none sharing memory with another."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of the bytes of a contiguous tensor on the CPU, as 64 digits."""
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def _digest(
    tensors: Mapping[str, Tensor], hashes: Iterable[str], texts: Mapping[str, str]
) -> str:
    manifest = {
        name: [str(tensor.dtype), [*tensor.shape], found]
        for (name, tensor), found in zip(tensors.items(), hashes, strict=True)
    }
    text = json.dumps([manifest, dict(texts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fill_in(path: Path, digest: str) -> None:
    marker = f'"{DIGEST}":"'.encode()  # quotes in names and texts are escaped
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        place = file.read(length).index(marker + UNKNOWN.encode())
        file.seek(8 + place + len(marker))
        file.write(digest.encode())
