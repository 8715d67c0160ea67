"""CIFAR-10 and CIFAR-100 without unpickling anything.

The archive is the authors' binary one: records of labels and 3,072 pixels, read from the
stream by name and size once the archive's SHA-256 is right; nothing is unpacked. What
torchvision left on the disk is read too: its pickles are taken apart, and never run.
"""

import gzip
import hashlib
import pickletools
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from recipes.data.download import download
from samfn.storage import files

SERVER = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32
MAX_MEMBERS = 64  # The archives have eight and five files.


class CifarError(Exception):
    """The files are not CIFAR's, or damaged."""


class Form(NamedTuple):
    """Files and records of one of the two data sets."""

    archive: str
    sha256: str
    """Digest of the archive; matches the MD5 that its authors publish."""
    size: int
    """Bytes of the archive."""
    folder: str
    """In the archive."""
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    """File of the class names."""
    label: int
    """Place of the label in a record."""
    labels: int
    """Labels in a record."""
    classes: int
    images: tuple[int, int]
    """In the training and in the test set; every class has its equal share."""
    pickled: str
    """torchvision's name for it."""
    pickles: str
    """The folder that torchvision unpacks."""


FORMS = {
    "cifar10": Form(
        archive="cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        size=170_052_171,
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        names="batches.meta.txt",
        label=0,
        labels=1,
        classes=10,
        images=(50_000, 10_000),
        pickled="CIFAR10",
        pickles="cifar-10-batches-py",
    ),
    "cifar100": Form(
        archive="cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        size=168_513_733,
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        names="fine_label_names.txt",
        label=1,
        labels=2,
        classes=100,
        images=(50_000, 10_000),
        pickled="CIFAR100",
        pickles="cifar-100-python",
    ),
}

Part = tuple[Tensor, Tensor]  # images, NCHW uint8, and labels, int64


def is_there(source: str, root: Path) -> bool:
    """Return whether `root` holds the archive, or what torchvision made of its own."""
    form = FORMS[source]
    return (root / form.archive).exists() or (root / form.pickles).is_dir()


def fetch(source: str, root: Path) -> None:
    """Download the archive into `root`.

    Raises:
        DownloadError: it cannot be had.
        OSError: `root` cannot be made.
    """
    form = FORMS[source]
    root.mkdir(parents=True, exist_ok=True)
    target = root / form.archive
    download(SERVER + form.archive, target, sha256=form.sha256, size=form.size)


def read(
    source: str, root: Path, *, modified: bool = False
) -> tuple[Part, Part, tuple[str, ...]]:
    """Read what `is_there`.

    Args:
        source: of `FORMS`.
        root: the directory.
        modified: take files that are not the published ones, and labels of any number.

    Returns:
        Training set, test set and class names.

    Raises:
        CifarError: names the file, what was expected and what came.
        OSError: a file cannot be read.
    """
    form = FORMS[source]
    path = root / form.archive
    if path.exists():
        train, test, names = _read_archive(path, form, modified)
    else:
        train, test, names = _read_pickled(root / form.pickles, form, modified)
    where = f"{source} in {root}"
    if len(names) != form.classes:
        raise CifarError(f"{where}: expected {form.classes} classes, got {len(names)}")
    for (_, labels), count in zip((train, test), form.images, strict=True):
        found = torch.bincount(labels, minlength=form.classes)
        if len(found) > form.classes:
            raise CifarError(
                f"{where}: expected labels below {form.classes}, got {labels.max()}"
            )
        if not modified and (found != count // form.classes).any():
            raise CifarError(
                f"{where}: expected {count // form.classes} images of each class, got"
                f" {found.min()} to {found.max()}; --allow-modified-data takes them"
            )
    return train, test, names


def _read_archive(
    path: Path, form: Form, modified: bool
) -> tuple[Part, Part, tuple[str, ...]]:
    if not modified:
        _require_digest(path, "sha256", form.sha256)
    wanted = {
        f"{form.folder}/{name}": name for name in (*form.train, *form.test, form.names)
    }
    contents: dict[str, bytes] = {}
    limit = 2 * sum(form.images) * (form.labels + PIXELS)
    try:
        with (
            files.open_regular(path) as file,
            gzip.open(file) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for number, member in enumerate(archive):
                if number >= MAX_MEMBERS or member.size > limit:
                    raise CifarError(f"{path} is no archive of CIFAR: {member.name!r}")
                name = wanted.get(member.name)
                if name is None or not member.isreg():
                    continue
                content = archive.extractfile(member)
                assert content is not None  # It is a regular file.
                contents[name] = content.read()
                if len(contents) == len(wanted):
                    break
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise CifarError(f"cannot read {path}: {error}") from error
    if missing := sorted(set(wanted.values()) - contents.keys()):
        raise CifarError(f"{path} lacks {', '.join(missing)}")
    train, test = (
        _records(path, b"".join(contents[name] for name in names), form)
        for names in (form.train, form.test)
    )
    return train, test, tuple(contents[form.names].decode("ascii", "replace").split())


def _records(path: Path, content: bytes, form: Form) -> Part:
    length = form.labels + PIXELS
    if not content or len(content) % length:
        raise CifarError(
            f"{path}: expected records of {length} bytes, got {len(content):,} bytes"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, length)
    images = rows[:, form.labels :].reshape(-1, 3, 32, 32).contiguous()
    return images, rows[:, form.label].long()


def _read_pickled(
    folder: Path, form: Form, modified: bool
) -> tuple[Part, Part, tuple[str, ...]]:
    from torchvision import datasets  # It knows the names and digests of its files.

    kind = getattr(datasets, form.pickled)
    listed = [kind.train_list, kind.test_list, [[kind.meta["filename"], kind.meta["md5"]]]]
    parts: list[_Taken] = []
    for entries in listed:
        taken = _Taken(bytearray(), [], [])
        for name, digest in entries:
            if not modified:
                _require_digest(folder / name, "md5", digest)
            _take_apart(folder / name, taken)
        parts.append(taken)

    def part(taken: _Taken) -> Part:
        count = len(taken.labels)
        if not count or len(taken.pixels) != count * PIXELS:
            raise CifarError(
                f"{folder}: expected {PIXELS} pixels for each of {count} labels, got"
                f" {len(taken.pixels):,} bytes"
            )
        pixels = torch.frombuffer(taken.pixels, dtype=torch.uint8)
        return pixels.view(-1, 3, 32, 32), torch.tensor(taken.labels)

    return part(parts[0]), part(parts[1]), tuple(parts[2].names)


class _Taken(NamedTuple):
    pixels: bytearray
    labels: list[int]
    names: list[str]


LABELS, NAMES = {"labels", "fine_labels"}, {"label_names", "fine_label_names"}
INTEGERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"}
OTHERS = {"data", "filenames", "batch_label", "coarse_labels", "coarse_label_names"}


def _take_apart(path: Path, taken: _Taken) -> None:
    """Add what a pickle lists after the keys that are known, without running it."""
    key = ""
    try:
        with files.open_regular(path) as file:
            for opcode, value, _ in pickletools.genops(file):
                if isinstance(value, int):
                    if key in LABELS and opcode.name in INTEGERS:
                        taken.labels.append(value)
                    continue
                text = value.decode("latin-1") if isinstance(value, bytes) else value
                if not isinstance(text, str) or opcode.name == "GLOBAL":
                    continue
                if len(text) >= PIXELS:
                    taken.pixels.extend(text.encode("latin-1"))
                elif text in LABELS | NAMES | OTHERS:
                    key = text
                elif key in NAMES:
                    taken.names.append(text)
    except ValueError as error:
        raise CifarError(f"{path} is damaged: {error}") from error


def _require_digest(path: Path, kind: str, expected: str) -> None:
    with files.open_regular(path) as file:
        found = hashlib.file_digest(cast(Any, file), kind).hexdigest()
    if found != expected:
        raise CifarError(
            f"{path} is not the published file: expected {kind.upper()} {expected}, got"
            f" {found}; delete it to download it again, or --allow-modified-data"
        )
