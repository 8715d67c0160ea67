"""Folders of images: which files they hold, what these show, and what is left out."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from recipes.data import pictures

SPLITS = ("train", "test")
# Folders that a reader may take for something that is read.
UNREAD = ("val", "valid", "validation")
# What systems leave beside the files of a user, as they do all that begins with a dot.
LITTER = ("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "$RECYCLE.BIN")


class FolderError(Exception):
    """The folders are not what is expected; says what was, and what came."""


class Samples(NamedTuple):
    """Images of folders, and what they show."""

    classes: tuple[str, ...]
    of: dict[str, list[tuple[Path, int]]]
    """By split, in order: files, and the places of their classes."""


def are_in(root: Path) -> bool:
    """Return whether there are folders for all splits."""
    return all((root / split).is_dir() for split in SPLITS)


class Found(NamedTuple):
    """The files below train and test."""

    images: dict[str, dict[str, list[Path]]]
    """By split and class."""
    loose: list[Path]
    """Images in no class folder."""
    others: list[Path]
    """Files whose names end otherwise."""
    hidden: list[Path]
    """Folders that were not looked into, and images that were not looked at."""
    lost: list[Path]
    """Links that lead nowhere, or to a folder that they are in."""


def look_through(root: Path) -> Found:
    """Look through the folders of images.

    Raises:
        OSError: a folder cannot be looked into.
    """
    found, ends = Found({}, [], [], [], []), pictures.endings()
    for split in SPLITS:
        classes = found.images.setdefault(split, {})
        for where, folders, names in os.walk(root / split, onerror=_fail, followlinks=True):
            here = Path(where)
            folders[:] = [n for n in folders if _is_kept(here / n, found, is_folder=True)]
            inside = here.relative_to(root / split).parts
            images = classes.setdefault(inside[0], []) if inside else found.loose
            for path in (here / name for name in names):
                is_image = path.name.lower().endswith(ends)
                if _is_kept(path, found, is_image=is_image):
                    (images if is_image else found.others).append(path)
    return found


def _fail(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # No such split.
        raise error


def _is_kept(
    path: Path, found: Found, *, is_folder: bool = False, is_image: bool = False
) -> bool:
    """Return whether what is at a path may count; if not, put it where it belongs."""
    if path.name.startswith(".") or path.name in LITTER:
        found.hidden.extend([path] * (is_folder or is_image))
        return False
    if not path.is_symlink():
        return True
    if is_folder:
        target = path.resolve()
        leads_on = not any(above.resolve().is_relative_to(target) for above in path.parents)
    else:
        leads_on = path.exists()
    found.lost.extend([path] * (not leads_on))
    return leads_on


def digest(root: Path, found: Found) -> str:
    """Return a digest of which files may count, by names, sizes, times and numbers.

    Archives and copies set the time of the content, so that files of one size may have the
    same: the time of the last change of any kind, and a file's number, tell them apart.
    """
    made = hashlib.sha256()
    classes = (paths for split in found.images.values() for paths in split.values())
    for path in sorted([*found.loose, *found.others, *chain.from_iterable(classes)]):
        status = path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        row = (str(path.relative_to(root)), status.st_size, status.st_ino, *times)
        made.update(repr(row).encode())
    return made.hexdigest()


def left_out(root: Path, found: Found) -> Iterator[str]:
    """Yield a line for each reason to leave files out that a reader may count on."""
    kinds = Counter(path.suffix.lower() or "no ending" for path in found.others)
    said = ", ".join(f"{count:,} of {kind}" for kind, count in kinds.most_common(5))
    more = ", ..." * (len(kinds) > 5)
    read = f"; read are {', '.join(pictures.endings())}"
    for why, what, paths, end in (
        ("their names end otherwise", f"files ({said}{more})", found.others, read),
        ("they are in no class folder", "of the images", found.loose, ""),
        ("they are hidden", "files and folders", found.hidden, ""),
        ("they lead nowhere, or back", "links", found.lost, ""),
    ):
        if paths:
            first = min(paths).relative_to(root)
            yield f"left out, as {why}: {len(paths):,} {what}, the first {first}{end}"
    for name in UNREAD:
        if (root / name).is_dir():
            yield (
                f"left out {root / name}: only train and test are read, and --validation"
                " holds images of train out"
            )


def samples(root: Path, found: Found) -> Samples:
    """Return the images of folders in order.

    Raises:
        FolderError: there are no classes, others in train than in test, one without images,
            or images that are in both.
    """
    if not are_in(root):
        raise FolderError(f"expected train/<class>/* and test/<class>/* images in {root}")
    train, test = ({*found.images[split]} for split in SPLITS)
    if train != test:
        differing = sorted(train ^ test)
        raise FolderError(f"{root}: classes not in both train and test: {differing}")
    if len(train) < 2:
        some = ", ".join(train) or "none"
        raise FolderError(f"{root}: expected at least two classes, got only {some}")
    classes, images = sorted(train), found.images
    for split, name in product(SPLITS, classes):
        if not images[split][name]:
            raise FolderError(f"{root}: expected images in {split}/{name}, got none")
    _require_apart(*(chain.from_iterable(images[split].values()) for split in SPLITS))
    return Samples(
        tuple(classes),
        {
            split: [
                (path, label)
                for label, name in enumerate(classes)
                for path in sorted(images[split][name], key=_by_folder)
            ]
            for split in SPLITS
        },
    )


def _by_folder(path: Path) -> tuple[str, str]:
    return str(path.parent), path.name


def _require_apart(train: Iterable[Path], test: Iterable[Path]) -> None:
    """Raise if a file is in both, by a link or under another name."""
    known = {_identity(path): path for path in train}
    both = [path for path in test if _identity(path) in known]
    if both:
        raise FolderError(
            f"expected other images in test than in train, got {len(both):,} that are in"
            f" both: {both[0]} is {known[_identity(both[0])]}"
        )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
