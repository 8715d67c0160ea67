"""The batches that a run goes through: augmented to train on, or as they are."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from recipes.data import augment
from recipes.train.build import Task, generator, seed
from samfn import distributed
from samfn.training import sampling

EVAL_BATCH = 500  # images; large enough to be fast, small enough for a laptop
EVAL_VALUES = 2**23  # pixels times channels in a batch of larger images: 55 of 224x224
CHUNK = 16  # batches that are augmented at once, since each call costs as much as one does
CHUNK_VALUES = 2**25  # pixels times channels in them at most, if more than one batch


class StopError(Exception):
    """Going through images was asked to end early."""


def order(task: Task, epoch: int, among: Tensor | None = None) -> Tensor:
    """Return the indices of the epoch's images, one row a batch.

    Args:
        task: what is trained.
        epoch: counted from 0.
        among: indices of the images that it trains on; None is all.
    """
    size, images = task.config.batch_size, len(task.train_labels)
    source = generator(task.config.seed, "order", epoch)
    among = torch.arange(images) if among is None else among
    shuffled = sampling.order(among, images, source)
    return shuffled[: len(among) // size * size].view(-1, size).to(task.device)


def augmented(
    task: Task,
    epoch: int,
    start: int = 0,
    among: Tensor | None = None,
    *,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the epoch's batches, (images, labels), from number `start` on.

    They are the same however many ranks there are. Each rank augments all of a batch, whose
    images may be mixed with each other, and keeps its share; `whole` keeps all.
    """
    config, rows = task.config, order(task, epoch, among)
    how = config.augmentation
    mix = partial(
        augment.mix,
        mixup_alpha=how.mixup_alpha,
        cutmix_alpha=how.cutmix_alpha,
        classes=len(task.classes),
    )
    flip: bool | Tensor = how.flip
    if how.alternate_flip:
        begins = generator(config.seed, "alternate flip")
        flip = augment.alternating(len(task.train_labels), epoch, begins).to(task.device)
    values = task.train_images[0].numel() * config.batch_size
    together = max(1, min(CHUNK, CHUNK_VALUES // values))
    for first in range(start - start % together, len(rows), together):
        chunk = rows[first : first + together]
        source = generator(config.seed, "augmentation", epoch, first, device=task.device)
        images = task.train_images[chunk.flatten()]
        if how.crop_scale < 1:
            images = augment.random_resized_crop(images, source, scale=how.crop_scale)
        images = augment.random_crop_flip(
            images,
            source,
            padding=how.crop_padding,
            flip=flip[chunk.flatten()] if isinstance(flip, Tensor) else flip,
            reflect=how.padding == "reflect",
        )
        if how.policy != "none":
            draws = seed(config.seed, "policy", epoch, first)
            images = augment.transform(images, draws, policy=how.policy)
        images = augment.normalise(images, task.mean, task.std)
        if how.cutout:
            images = augment.cutout(images, source, size=how.cutout, probability=0.5)
        parts = torch.split(images, config.batch_size), task.train_labels[chunk]
        for index, (images, labels) in enumerate(zip(*parts, strict=True), first):
            if index >= start:
                batch = mix(images, labels, seed(config.seed, "mix", epoch, index))
                yield batch if whole else distributed.share(batch)


def own(count: int) -> slice:
    """Return which of so many images this rank looks at, where together all look at all."""
    rank, ranks = distributed.rank(), distributed.size()
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


def eval_batch(images: Tensor) -> int:
    """Return how many images to evaluate at once; as large as these are, NCHW."""
    return max(1, min(EVAL_BATCH, EVAL_VALUES // images[0].numel()))


def clean(
    task: Task,
    images: Tensor,
    labels: Tensor,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images as the model takes them, not augmented, with their labels.

    Raises:
        StopError: `stopping`, which is asked before each batch, said so.
    """
    tensors = (torch.split(tensor, eval_batch(images)) for tensor in (images, labels))
    for some, their_labels in zip(*tensors, strict=True):
        if stopping():
            raise StopError
        inputs = augment.normalise(some, task.mean, task.std)
        yield inputs.contiguous(memory_format=torch.channels_last), their_labels
