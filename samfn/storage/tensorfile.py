"""Named tensors and texts in one verified safetensors file: the one that knows safetensors.

The format neither syncs nor checks what it holds. This writes whole files, and beside the
other texts a SHA-256 of the manifest: all names, dtypes, shapes and texts, and the SHA-256
of each tensor's bytes. Anything that reads safetensors reads these files.
"""

import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from samfn.storage import files

DIGEST = "samfn.sha256"
UNKNOWN = "0" * 64  # stands where the digest comes to stand
UNSIGNED = f"holds no {DIGEST}: it was not written by samfn"
DAMAGED = "is damaged: its content is not that of the SHA-256 in it"
METADATA = "__metadata__"  # the format's name for texts
MAX_HEADER = 8 * 2**20  # bytes
MAX_TENSORS = 10_000
THREADS = min(4, os.cpu_count() or 1)  # beside the disk, hashing needs no more
CHUNK = 2**20  # bytes, which a processor's cache holds
NAMED = 5  # tensors that a message names at most
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class CorruptError(ValueError):
    """A file is not what was written."""


def write(
    path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> dict[str, str]:
    """Write a file whole, or leave what is there; hashes are made while it is written.

    Args:
        path: where to; its directory exists.
        tensors: on any device, of any strides.
        texts: by names other than `DIGEST`.

    Returns:
        The SHA-256 of each tensor's bytes.

    Raises:
        ValueError: more tensors, or more of names and texts, than `read` takes; or a name
            or text that UTF-8 does not hold.
        TypeError: a dtype that safetensors does not hold, or a tensor that is sparse,
            nested or without values; says which.
        OSError: it could not be written; says what was needed and what was free.
    """
    _require_dense(tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _require_readable(tensors, texts, size)
    plain = _separate(tensors)
    try:
        with (
            files.replacing(path, size) as temporary,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            hashing = pool.map(sha256, plain.values())
            save_file(plain, temporary, {**texts, DIGEST: UNKNOWN})
            files.sync(temporary)  # The disk works while the last hashes are made.
            hashes = dict(zip(plain, hashing, strict=True))
            _fill_in(temporary, _digest(plain, hashes.values(), texts))
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"cannot write {path}, {size:,} bytes: {error}") from error
    return hashes


def read(
    path: Path, like: Mapping[str, Tensor] | None = None, *, foreign: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors, into memory of their own, and texts; both are what was written.

    The file is read and not mapped, since a mapped file that shrinks kills the process:
    in threads, and each piece is hashed while the processor's cache holds it.

    Args:
        path: a file that `write` wrote.
        like: by name, gives strides and device of tensors of its dtype and shape; others
            come contiguous, on the CPU.
        foreign: take files of others too, which hold no SHA-256 to verify them by.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptError: it is damaged, or was not written by `write`.
        OSError: it cannot be read, is no regular file, or is larger than the memory.
    """
    with files.open_regular(path) as file:
        texts, places = _contents(path, file)
        expected = texts.pop(DIGEST, None)
        if expected is None and not foreign:
            raise CorruptError(f"{path} {UNSIGNED}")
        scratch = _Scratch(
            max((place.layout.nbytes for place in places.values()), default=0)
        )

        def read_one(name: str) -> tuple[Tensor, str]:
            layout, start = places[name]
            wanted = (like or {}).get(name)
            if wanted is not None and _kind(wanted) == _kind(layout):
                made = torch.empty_like(wanted)
            else:
                made = torch.empty_like(layout, device="cpu")
            if made.is_contiguous() and made.device.type == "cpu":
                return made, _fill(made, file.fileno(), start, path)
            plain = scratch.memory[: layout.nbytes].view(layout.dtype).view(layout.shape)
            found = _fill(plain, file.fileno(), start, path)
            return made.copy_(plain), found

        with ThreadPoolExecutor(THREADS) as pool:
            read_all = dict(zip(places, pool.map(read_one, places), strict=True))
    tensors = {name: tensor for name, (tensor, _) in read_all.items()}
    found = _digest(tensors, (sha for _, sha in read_all.values()), texts)
    if expected is not None and found != expected:
        raise CorruptError(f"{path} {DAMAGED}")
    return tensors, texts


def read_texts(path: Path) -> dict[str, str]:
    """Return the texts alone, unverified, and the digest with them.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptError: there is no header, one that safetensors does not allow, or one of a
            file of another size.
        OSError: as `read`.
    """
    with files.open_regular(path) as file:
        return _contents(path, file)[0]


def verified_texts(path: Path) -> dict[str, str]:
    """Return the texts alone, verified as by `read`, without room for any tensor.

    Raises as `read`.
    """
    with files.open_regular(path) as file:
        texts, places = _contents(path, file)
        expected = texts.pop(DIGEST, None)
        if expected is None:
            raise CorruptError(f"{path} {UNSIGNED}")
        with ThreadPoolExecutor(THREADS) as pool:
            hashes = pool.map(lambda p: _sha256_in(file.fileno(), p, path), places.values())
            found = _digest({name: p.layout for name, p in places.items()}, hashes, texts)
    if found != expected:
        raise CorruptError(f"{path} {DAMAGED}")
    return texts


@contextmanager
def opened(path: Path) -> Iterator[Callable[[str, Tensor, str], Tensor]]:
    """Open a file of which only some tensors are wanted, each verified by itself.

    Yields:
        (name, a tensor of its dtype and shape, SHA-256 of its bytes) -> the tensor, on the
        CPU; raises CorruptError if the file holds another or none. Threads may call it.

    Raises as `read_texts`.
    """
    with files.open_regular(path) as file:
        _, places = _contents(path, file)

        def read_one(name: str, like: Tensor, expected: str) -> Tensor:
            place = places.get(name)
            if place is None or _kind(place.layout) != _kind(like):
                raise CorruptError(f"{path} does not hold {name} as it was written")
            made = torch.empty_like(place.layout, device="cpu")
            if _fill(made, file.fileno(), place.start, path) != expected:
                raise CorruptError(f"{path} does not hold {name} as it was written")
            return made

        yield read_one


class _Scratch(threading.local):
    """Memory of each thread's own, for what is not laid out as in the file."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)


class _Place(NamedTuple):
    layout: Tensor  # without memory
    start: int  # in the file, in bytes


def _contents(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, _Place]]:
    """Return the texts, and where each tensor is, if the file is as large as they say."""
    header, start = _header(path, file)
    size = os.fstat(file.fileno()).st_size
    return _texts(path, header), _places(path, header, start, size)


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a file, not believed yet, and where the tensors begin."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= MAX_HEADER:
        raise CorruptError(
            f"{path} is no safetensors file: expected a header of 2 to {MAX_HEADER:,}"
            f" bytes, got {length:,}"
        )
    content = file.read(length)
    if _counted(content) > MAX_TENSORS:  # Before it takes memory and time.
        raise CorruptError(f"{path} names more than {MAX_TENSORS:,} tensors")
    try:
        header = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CorruptError(f"{path} has a header that safetensors does not allow")
    return header, 8 + length


def _texts(path: Path, header: Mapping[str, Any]) -> dict[str, str]:
    texts = header.get(METADATA, {})
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise CorruptError(f"{path} has a header that safetensors does not allow")
    return dict(texts)


def _places(
    path: Path, header: Mapping[str, Any], start: int, size: int
) -> dict[str, _Place]:
    """Return where each tensor is, if they fill the file, none over another."""
    places, here = {}, 0
    try:
        spans = {name: header[name]["data_offsets"] for name in header.keys() - {METADATA}}
        for name in sorted(spans, key=spans.__getitem__):
            dtype, shape = DTYPES[header[name]["dtype"]], header[name]["shape"]
            layout = torch.empty(shape, dtype=dtype, device="meta")
            places[name] = _Place(layout, start + here)
            if spans[name] != [here, here + layout.nbytes]:
                raise ValueError(f"{name} is at {spans[name]}, not at {here}")
            here += layout.nbytes
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptError(f"{path} has a damaged header: {error!r}") from error
    if size != start + here:
        raise CorruptError(
            f"{path} is damaged: expected {start + here:,} bytes, got {size:,}"
        )
    if here > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        reason = f"holds {here:,} bytes, more than the memory of this machine, {memory:,}"
        raise OSError(errno.ENOMEM, reason, os.fspath(path))
    return places


def _counted(header: bytes) -> int:
    """Return how many tensors a header names, or a few more."""
    return header.count(b'"dtype"')


def _require_dense(tensors: Mapping[str, Tensor]) -> None:
    held = set(DTYPES.values())
    if wrong := [
        f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in held
    ]:
        raise TypeError(f"expected dtypes that safetensors holds, got {_listed(wrong)}")
    for kind, is_wrong in (
        ("nested", lambda tensor: tensor.is_nested),
        ("sparse", lambda tensor: tensor.layout is not torch.strided),
        ("meta", lambda tensor: tensor.is_meta),
    ):
        if wrong := [name for name, tensor in tensors.items() if is_wrong(tensor)]:
            raise TypeError(f"expected dense tensors, got {kind} ones: {_listed(wrong)}")


def _require_readable(
    tensors: Mapping[str, Tensor], texts: Mapping[str, str], size: int
) -> None:
    """Raise if `read` would not take the header of a file."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"expected at most {MAX_TENSORS:,} tensors, got {len(tensors):,}")
    if METADATA in tensors:
        raise ValueError(f"the format has its own use for the name {METADATA!r}")
    header = {METADATA: {**texts, DIGEST: UNKNOWN}} | {
        # Places that are not known yet, but no longer.
        name: {"dtype": "F8_E4M3FNUZ", "shape": [*t.shape], "data_offsets": [size, size]}
        for name, t in tensors.items()
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 40) : error.end]
        raise ValueError(f"expected text that UTF-8 holds, got {part!r}") from error
    if _counted(content) > MAX_TENSORS:
        raise ValueError(f'{MAX_TENSORS:,} tensors are too many with one called "dtype"')
    if len(content) + 8 > MAX_HEADER:
        largest = max([*tensors, *texts], key=lambda name: len(name + texts.get(name, "")))
        raise ValueError(
            f"expected names and texts of at most {MAX_HEADER:,} bytes, got"
            f" {len(content):,}; the largest is {largest[:80]!r}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _fill(tensor: Tensor, file: int, start: int, path: Path) -> str:
    """Read a contiguous tensor from a place in a file, and return its SHA-256."""
    content, found = _bytes(tensor), hashlib.sha256()
    while content:
        count = os.preadv(file, [content[:CHUNK]], start)
        if not count:
            raise CorruptError(f"{path} is damaged: it ended while it was read")
        found.update(content[:count])
        content, start = content[count:], start + count
    return found.hexdigest()


def _sha256_in(file: int, place: _Place, path: Path) -> str:
    """Return the SHA-256 of a place in a file."""
    found, start, left = hashlib.sha256(), place.start, place.layout.nbytes
    chunk = memoryview(bytearray(min(CHUNK, left)))
    while left:
        count = os.preadv(file, [chunk[:left]], start)
        if not count:
            raise CorruptError(f"{path} is damaged: it ended while it was read")
        found.update(chunk[:count])
        start, left = start + count, left - count
    return found.hexdigest()


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
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of the bytes of a contiguous tensor on the CPU, as 64 digits."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
