"""Images as uint8 tensors, whatever they came from: CIFAR, a folder, or digits.

Shapes: N images, C channels, H x W pixels.
"""

import contextlib
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from recipes.data import cifar, digits, folders, pictures
from recipes.data.download import DownloadError
from recipes.data.folders import SPLITS, Samples
from recipes.errors import DataError
from recipes.roles import BELOW_1, Group, Range, Role, Rule, at_least, setting
from recipes.terminal.hardware import lacks_memory
from samfn.storage import files, tensorfile

CACHE_FORMAT = 3  # to be raised when what is cached changes
# What reading a cache raises that somebody else has touched.
CACHE_ERRORS = (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
Source = Literal["cifar10", "cifar100", "folder", "digits"]
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""(items, how many, what is being done) -> the same items, with progress shown."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Images(Group, role=Role.FIXED):
    """The images, and what is done to them and their labels once."""

    image_size: int | None = setting(None, at_least(4, " pixels"))
    """Pixels to which the shorter side of a folder's images is resized; what the longer one
    has beside the middle is cut off. None keeps them as they are; finetune takes what
    torchvision's weights of the network were trained on."""
    label_noise: float = setting(0.0, Range(lambda share: 0 <= share <= 1, "0 to 1"))
    """Share of the training labels that are replaced by another class, 0 to 1."""
    validation: float = setting(0.0, BELOW_1)
    """Share of the training set held out to choose the best epoch by, 0 to below 1. With 0
    the best epoch is chosen by the test set."""
    noisy_validation: bool = False
    """Wrong labels among those held out, too, with label noise, as where nobody knows the
    right ones; otherwise they stay clean."""
    views: Literal[1, 2, 6] = setting(1, role=Role.RESULT)
    """Views of an image that its evaluation takes the mean outputs of: itself; with its
    mirror image; with both of them shifted by a pixel along the diagonal, too. The model
    that a run leaves takes one."""
    allow_modified_data: bool = setting(False, role=Role.FREE)
    """Use of CIFAR's files even if they are not the published ones."""

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread."""
        yield from super().unread()
        holds = self.validation > 0 or not self.noisy_validation
        yield "noisy_validation", holds, "--validation above 0 with it"


class Dataset(NamedTuple):
    """A training and a test set."""

    train_images: Tensor
    """NCHW, uint8."""
    train_labels: Tensor
    """N, int64."""
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Remarks about how images were read, a line each."""


def choose_source(
    data: str,
    data_dir: Path | None,
    check: Callable[[Source], object] = lambda source: None,
) -> tuple[Source, str]:
    """Decide where images come from, and say why in one line.

    Downloads CIFAR-10 where "auto" finds no images and a network. Nothing is read.

    Args:
        data: a `Source`, or "auto".
        data_dir: class folders, or where CIFAR lies or is downloaded to.
        check: is called with a source before it is downloaded, and may raise.

    Raises:
        DataError: `data_dir` was given, and holds nothing that can be read.
    """
    match data:
        case "folder":
            return "folder", f"images in the class folders of {root_of(data_dir)}"
        case "digits":
            return "digits", "scikit-learn's handwritten digits"
        case "cifar10" | "cifar100":
            return data, f"{data} in {root_of(data_dir)}"
        case "auto":
            try:
                root = root_of(data_dir)
            except DataError as error:
                return "digits", f"{error}: training on scikit-learn's handwritten digits"
            return _found(root, data_dir is not None, check)
    raise DataError(f"data must be auto, cifar10, cifar100, folder or digits, got {data!r}")


def _found(
    root: Path, must_be_there: bool, check: Callable[[Source], object]
) -> tuple[Source, str]:
    if folders.are_in(root):
        return "folder", f"images in the class folders of {root}"
    if cifar.is_there("cifar10", root):
        return "cifar10", f"CIFAR-10 in {root}"
    if must_be_there:
        raise DataError(
            f"{root} holds neither train/<class>/* and test/<class>/* images nor"
            f" {cifar.FORMS['cifar10'].archive}; to download it there, add --data cifar10"
        )
    why = "no network"
    if is_reachable(cifar.SERVER):
        check("cifar10")
        try:
            _require_there("cifar10", root)
            return "cifar10", f"CIFAR-10 in {root}"
        except DataError as error:
            why = f"no download ({error})"
    return "digits", (
        f"no CIFAR-10 in {root} and {why}: training on scikit-learn's handwritten digits"
    )


def _require_there(source: Source, root: Path, warn: Say = warnings.warn) -> None:
    """Download CIFAR if need be; of several processes, one."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with files.held(root, wait=True, tell=warn):
            if not cifar.is_there(source, root):
                cifar.fetch(source, root)
    except (OSError, DownloadError) as error:
        raise DataError(f"cannot read or download {source} in {root}: {error}") from error


def load(
    source: Source,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    modified: bool = False,
    track: Track = lambda items, total, text: items,
    warn: Say = warnings.warn,
) -> Dataset:
    """Load a data set; a folder's images from their cache, if they were read before.

    If several processes want the same at once, one reads or downloads it.

    Args:
        source: as `choose_source` gives it.
        data_dir: as for `choose_source`.
        image_size: pixels to which the shorter side of a folder's images is resized; a
            square from the middle is kept. None keeps their size, which must then be one
            for all.
        modified: take CIFAR even if its files are not the published ones.
        track: shows progress.
        warn: is told of files that are left out, of images that are not read as they are,
            of a cache that was damaged, and of one that cannot be written.

    Raises:
        DataError: nothing to read there, no network, or images that do not fit.
    """
    if source == "digits":
        return Dataset(*digits.read(), digits.CLASSES)
    root = root_of(data_dir)
    if source == "folder":
        try:
            found = folders.look_through(root)
            for line in folders.left_out(root, found):
                warn(line)
            samples = folders.samples(root, found)
        except (OSError, folders.FolderError) as error:
            raise DataError(str(error)) from error
        folder = {"reading": pictures.READING, "endings": pictures.endings()}
        folder |= {"image_size": image_size, "files": folders.digest(root, found)}
        read = partial(read_folder, root, samples, image_size, track)
        dataset = _cached(root, folder, read, warn, samples)
        for line in dataset.notes:
            warn(line)
        return dataset
    return read_cifar(source, root, modified, warn)


def user_cache() -> Path:
    """Return the directory for what can be made or downloaded again.

    Raises:
        DataError: there is no home, as for a user of a container who has no name.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise DataError("no home directory: expected HOME or XDG_CACHE_HOME") from error
    return Path(base) / "samfn"


def root_of(data_dir: Path | None) -> Path:
    """Return the absolute directory of the data: the user's cache if none is given.

    Raises:
        DataError: none is given, and there is no home.
    """
    return (data_dir or user_cache()).resolve()


def is_reachable(url: str, seconds: float = 3.0) -> bool:
    """Return whether a server answers at `url`, through a proxy if one is set."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True  # An answer, if not the one that was hoped for.
    except (OSError, http.client.HTTPException):
        return False
    return True


def read_cifar(
    source: Source, root: Path, modified: bool = False, warn: Say = warnings.warn
) -> Dataset:
    """Read CIFAR-10 or CIFAR-100, downloading it if need be; see `recipes.data.cifar`.

    No cache stands for its files: it could hold other labels than they do, and a second is
    all that it would spare.
    """
    if not cifar.is_there(source, root):
        _require_there(source, root, warn)
    try:
        train, test, classes = cifar.read(source, root, modified=modified)
    except (OSError, cifar.CifarError) as error:
        raise DataError(f"cannot read or download {source} in {root}: {error}") from error
    return Dataset(*train, *test, classes)


def read_folder(
    root: Path, samples: Samples, image_size: int | None, track: Track
) -> Dataset:
    """Read the images of `train/<class>/*` and `test/<class>/*` below `root`."""
    remarked: Remarked = {}

    def tensors(split: str) -> tuple[Tensor, Tensor]:
        paths, labels = zip(*samples.of[split], strict=True)
        tracked = track(paths, len(paths), f"reading {split} images")
        return _stack(tracked, image_size, remarked), torch.tensor(labels)

    train, test = map(tensors, SPLITS)
    _require_one_size(train[0], test[0])
    _require_depth(remarked)
    notes = _notes(root, remarked, len(train[0]) + len(test[0]))
    return Dataset(*train, *test, samples.classes, notes)


Remarked = dict[pictures.Remark, list[str]]
"""Paths of the images of which a remark was made."""


def _require_depth(remarked: Remarked) -> None:
    """Raise if all images of 16 bits are all but black, as those of a 12-bit camera."""
    deep = remarked.get("deep", [])
    if deep and {*deep} <= {*remarked.get("dim", [])}:
        raise DataError(
            f"{deep[0]}, and each other image of 16 bits, uses at most a sixteenth of their"
            " range, and would be all but black; expected images that use it: multiply them"
        )


def _notes(root: Path, remarked: Remarked, count: int) -> tuple[str, ...]:
    return tuple(
        f"{text}: {len(remarked[remark]):,} of {count:,}, the first"
        f" {Path(remarked[remark][0]).relative_to(root)}"
        for remark, text in pictures.REMARKS.items()
        if remark in remarked
    )


def fingerprint(dataset: Dataset) -> str:
    """Return a digest of all images, labels and class names."""
    digest = hashlib.sha256(repr(dataset.classes).encode())
    for tensor in dataset[:4]:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def corrupt_labels(
    labels: Tensor, classes: int, fraction: float, generator: torch.Generator
) -> Tensor:
    """Replace a fraction of the labels, each by another class, all equally likely.

    Args:
        labels: N, int64, on the CPU.
        classes: K, at least 2.
        fraction: in [0, 1]; round(fraction * N) labels become wrong.
        generator: chooses which labels, and what they become.
    """
    chosen = torch.randperm(len(labels), generator=generator)
    chosen = chosen[: round(fraction * len(labels))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy


def hold_out(
    dataset: Dataset, fraction: float, generator: torch.Generator
) -> tuple[Dataset, Tensor, Tensor]:
    """Take a random fraction of the training set away for validation.

    Returns:
        The data set without it, and the images and labels of the validation set.

    Raises:
        DataError: one of the two sets would be empty.
    """
    order = torch.randperm(len(dataset.train_labels), generator=generator)
    count = round(fraction * len(order))
    if not 0 < count < len(order):
        raise DataError(
            f"--validation: {fraction} of {len(order)} images is {count}, and both sets"
            " need at least one"
        )
    held, kept = order[:count], order[count:]
    images, labels = dataset.train_images, dataset.train_labels
    smaller = dataset._replace(train_images=images[kept], train_labels=labels[kept])
    return smaller, images[held], labels[held]


def statistics(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, of pixels in [0, 1]; C each.

    Counting the 256 values is exact, and needs no copy of the images in float.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images_NCHW.cpu().unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256) / channel.numel()
        mean = (share * values).sum()
        means.append(mean)
        stds.append((share * (values - mean) ** 2).sum().sqrt())
    return torch.stack(means).float(), torch.stack(stds).float()


def _cached(
    root: Path,
    key: dict[str, Any],
    read: Callable[[], Dataset],
    warn: Say,
    samples: Samples,
) -> Dataset:
    """Return what `read` returns, from `root`'s cache where it was kept under `key`.

    Classes and labels of a cache are to be those of the `samples` that it was made of.
    """
    text = json.dumps(key | {"format": CACHE_FORMAT}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = root / f"samfn-{name}.safetensors"
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.held(root, wait=True, tell=warn))
        except OSError:  # In a read-only directory every run reads the data again.
            return _read_cache(path, text, samples, warn) or read()
        files.sweep(root)
        cached = _read_cache(path, text, samples, warn)
        if cached is not None:
            return cached
        dataset = read()
        tensors = dict(zip(Dataset._fields[:4], dataset[:4], strict=True))
        try:
            texts = {key: json.dumps(getattr(dataset, key)) for key in ("classes", "notes")}
            tensorfile.write(path, tensors, texts | {"key": text})
        except OSError as error:
            warn(f"the next run reads the data again: {error}")
        return dataset


def _read_cache(path: Path, key: str, samples: Samples, warn: Say) -> Dataset | None:
    if not path.exists():
        return None
    try:
        tensors, texts = tensorfile.read(path)
        if texts.get("key", key) != key:  # Older files have none, and no notes.
            raise ValueError(f"{path} was made of other files, or read otherwise")
        notes = tuple(json.loads(texts.get("notes", "[]")))
        dataset = Dataset(
            **tensors, classes=tuple(json.loads(texts["classes"])), notes=notes
        )
        _require_whole(path, dataset)
        if not _agree(samples, dataset):
            raise ValueError(f"{path} has other labels than the folders")
        return dataset
    except CACHE_ERRORS as error:
        warn(f"reading the data again: {error}")
        return None


def _agree(samples: Samples, dataset: Dataset) -> bool:
    labels = dict(zip(SPLITS, (dataset.train_labels, dataset.test_labels), strict=True))
    return dataset.classes == samples.classes and all(
        labels[split].tolist() == [label for _, label in samples.of[split]]
        for split in SPLITS
    )


def _require_whole(path: Path, dataset: Dataset) -> None:
    """Raise unless a cache holds images, and a label of a class for each of them."""
    for images, labels in ((dataset[0], dataset[1]), (dataset[2], dataset[3])):
        holds = images.dtype is torch.uint8 and images.ndim == 4 and images.numel() > 0
        holds &= labels.dtype is torch.int64 and labels.shape == images.shape[:1]
        if not holds or not 0 <= labels.min() <= labels.max() < len(dataset.classes):
            raise ValueError(f"{path} holds no images with labels")
    if not all(isinstance(text, str) for text in (*dataset.classes, *dataset.notes)):
        raise ValueError(f"{path} holds no names of classes")


def _stack(paths: Iterable[Path], image_size: int | None, remarked: Remarked) -> Tensor:
    """Return the images of files, and add what is remarked of them.

    Raises:
        DataError: names the image that cannot be read, or is of another size.
        MemoryError: says what there was not enough for.
    """
    images: list[Tensor] = []
    for path in paths:
        try:
            image, remarks = pictures.read(path, image_size)
        except Exception as error:  # Decoders raise anything at damaged files.
            if lacks_memory(error):
                raise MemoryError(f"reading the image {path}") from error
            reason = getattr(error, "strerror", None) or str(error) or repr(error)
            raise DataError(f"cannot read the image {path}: {reason}") from error
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{path} is {_size(image)}, the images before it {_size(images[0])};"
                " --image-size N resizes them all"
            )
        images.append(image)
        for remark in remarks:
            remarked.setdefault(remark, []).append(str(path))
    try:
        return torch.stack(images)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        text = f"keeping {len(images):,} images of {_size(images[0])}"
        raise MemoryError(text) from error


def _require_one_size(train: Tensor, test: Tensor) -> None:
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"training images are {_size(train)}, test images {_size(test)};"
            " --image-size N resizes them all"
        )


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
