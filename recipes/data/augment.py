"""Augmentation of whole batches on the device: crops, policies, cutout, mixtures.

Shapes: B images, C channels, H x W pixels, K classes. Every random choice comes from the
generator or the seed that is passed in, so that a seed fixes the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn import functional as F

from recipes.roles import ABOVE_0_TO_1, FROM_0, Group, Role, Rule, at_least, setting

Policy = Literal["autoaugment", "trivialaugment"]


@dataclass(frozen=True, kw_only=True)
class Augmentation(Group, role=Role.RESULT):
    """Augmentation of the training images, anew in each epoch."""

    crop_scale: float = setting(1.0, ABOVE_0_TO_1)
    """Least share of a training image that is cut out at random and enlarged to the size of
    the image, above 0 to 1; for photographs. 1 is off."""
    crop_padding: int = setting(4, at_least(0, " pixels"))
    """Largest shift of a training image, in pixels. 0 is off."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """Pixels beyond the edge of a shifted image: zeros, or the image mirrored at its
    edge."""
    flip: bool = True
    """Mirroring of half of the training images."""
    alternate_flip: bool = False
    """Mirroring of each training image in every second epoch, in place of at random; the
    seed draws in which."""
    cutout: int = setting(0, at_least(0, " pixels"))
    """Side of the square cut out of half of the training images, in pixels. 0 is off."""
    policy: Literal["none", "autoaugment", "trivialaugment"] = "none"
    """Transformation of each training image, after crop and flip: what AutoAugment found
    for CIFAR-10, or one operation of TrivialAugment. Takes 0.2 ms an image."""
    mixup_alpha: float = setting(0.0, FROM_0)
    """Alpha of mixup: each training image and its label are blended with another's, the
    share drawn from Beta(alpha, alpha). 0 is off."""
    cutmix_alpha: float = setting(0.0, FROM_0)
    """Alpha of CutMix: a rectangle of another image is pasted into each training image, and
    the labels are mixed by area. 0 is off. With both on, each batch has one of them."""

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread."""
        yield from super().unread()
        yield "alternate_flip", self.flip or not self.alternate_flip, "--flip with it"
        shifts = self.crop_padding > 0 or self.padding == "zeros"
        yield "padding", shifts, "--crop-padding with it"


def random_crop_flip(
    images_BCHW: Tensor,
    generator: Generator,
    *,
    padding: int,
    flip: bool | Tensor,
    reflect: bool = False,
) -> Tensor:
    """Cut each image out of itself, padded with zeros or mirrored at its edges.

    Args:
        images_BCHW: any dtype.
        generator: on the device of the images.
        padding: pixels added on each side, and so the largest shift.
        flip: mirror left and right with probability 0.5; or those for which it is true,
            shape (B,).
        reflect: pad with the image mirrored at its edge, whose pixels are not repeated.

    Returns:
        Same shape and dtype, in channels_last memory.

    Raises:
        ValueError: images are too small to be reflected so far.
    """
    if reflect and padding >= min(images_BCHW.shape[2:]):
        raise ValueError(
            f"expected a shift below {min(images_BCHW.shape[2:])} pixels, the side of the"
            f" images that are reflected, got {padding}"
        )
    b, _, h, w = images_BCHW.shape
    device = images_BCHW.device
    top, left = torch.randint(
        2 * padding + 1, (2, b, 1), generator=generator, device=device
    )
    rows_BH = top + torch.arange(h, device=device)
    columns_BW = left + torch.arange(w, device=device)
    if flip is True:
        flip = torch.randint(2, (b, 1), generator=generator, device=device) == 1
    if isinstance(flip, Tensor):
        columns_BW = torch.where(flip.view(b, 1), columns_BW.flip(1), columns_BW)
    if reflect:
        padded = images_BCHW
        rows_BH = _reflected(rows_BH - padding, h)
        columns_BW = _reflected(columns_BW - padding, w)
    else:
        padded = F.pad(images_BCHW, [padding] * 4)
    crops_BHWC = padded[
        torch.arange(b, device=device)[:, None, None],
        :,
        rows_BH[:, :, None],
        columns_BW[:, None, :],
    ]
    return rearrange(crops_BHWC, "b h w c -> b c h w")


def alternating(images: int, epoch: int, generator: Generator) -> Tensor:
    """Return which images are mirrored in an epoch: each in every second one.

    Args:
        images: how many there are.
        epoch: counted from 0.
        generator: on the CPU; seeded alike in each epoch, as it draws who begins.

    Returns:
        Booleans, shape (images,).

    Source:
        Jordan, 2024, arXiv:2404.00498.
    """
    begins = torch.randint(2, (images,), generator=generator)
    return (begins + epoch) % 2 == 1


def views(images_BCHW: Tensor, count: int) -> Iterator[tuple[float, Tensor]]:
    """Yield views of images, each with its share in their mean, which add up to 1.

    Args:
        images_BCHW: of two pixels a side or more.
        count: 1, the images themselves; 2, also mirrored; 6, also both shifted by a pixel
            to the upper left, and to the lower right, reflected at the edges. Those that
            are not shifted count half.

    Raises:
        ValueError: `count` is another number.

    Source:
        Jordan, 2024, arXiv:2404.00498.
    """
    if count not in (1, 2, 6):
        raise ValueError(f"expected 1, 2 or 6 views, got {count}")
    placed = [(1.0, images_BCHW)]
    if count == 6:
        h, w = images_BCHW.shape[2:]
        padded = F.pad(images_BCHW, [1] * 4, mode="reflect")
        shifted = padded[..., 2:, 2:], padded[..., :h, :w]
        placed = [(0.5, images_BCHW), *((0.25, some) for some in shifted)]
    for share, some in placed:
        if count == 1:
            yield share, some
        else:
            yield from ((share / 2, some), (share / 2, some.flip(3)))


def random_resized_crop(
    images_BCHW: Tensor, generator: Generator, *, scale: float
) -> Tensor:
    """Cut a random part out of each image, and enlarge it to the image's size, bilinearly.

    Its area is uniform from `scale` to 1 of the image's, its width against its height, both
    in shares of the image's, log-uniform from 3/4 to 4/3, its place uniform. What would be
    larger than the image is cut off.

    Args:
        images_BCHW: uint8.
        generator: on the device of the images.
        scale: above 0 to 1.

    Returns:
        Same shape and dtype.

    Source:
        Szegedy et al., 2015, arXiv:1409.4842, section 6; enlarged parts alone need no
        filter against aliasing.
    """
    b, device = len(images_BCHW), images_BCHW.device
    area, ratio, x, y = torch.rand(4, b, generator=generator, device=device)
    area, ratio = scale + (1 - scale) * area, (4 / 3) ** (2 * ratio - 1)
    width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    nothing = torch.zeros_like(area)
    # From -1 to 1 in the part to the same in the image: shares of its sides, and places.
    map_B23 = torch.stack(
        [
            torch.stack([width, nothing, (2 * x - 1) * (1 - width)], 1),
            torch.stack([nothing, height, (2 * y - 1) * (1 - height)], 1),
        ],
        1,
    )
    grid = F.affine_grid(map_B23, [*images_BCHW.shape], align_corners=False)
    parts = F.grid_sample(
        images_BCHW.float(), grid, padding_mode="border", align_corners=False
    )
    return parts.round().to(images_BCHW.dtype)


def transform(images_BCHW: Tensor, seed: int, *, policy: Policy) -> Tensor:
    """Transform each image by what a policy draws for it.

    Args:
        images_BCHW: uint8, of one channel or three.
        seed: of all draws.
        policy: "autoaugment" is the policy that was found on CIFAR-10, "trivialaugment"
            one operation of any strength. Pixels from outside of the image are 0.

    Returns:
        Same shape, dtype and layout in memory.

    Source:
        Cubuk et al., 2019, arXiv:1805.09501; Mueller and Hutter, 2021, arXiv:2103.10158,
        with its wide set of operations; both as in torchvision, which draws once a call.
    """
    from torchvision.transforms import v2

    if policy == "autoaugment":
        draw = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    else:
        draw = v2.TrivialAugmentWide()
    with _global_draws(seed), _one_thread():
        images = [draw(image) for image in images_BCHW]
    return torch.stack(images, out=torch.empty_like(images_BCHW))


def mix(
    images_BCHW: Tensor,
    labels_B: Tensor,
    seed: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch, and its label, with the image before it.

    mixup: r x_i + (1 - r) x_(i-1);  cutmix: x_i with a rectangle of x_(i-1) of the area
    1 - r;  r from Beta(alpha, alpha), one for the batch

    Args:
        images_BCHW: float, in random order.
        labels_B: int64.
        seed: of all draws.
        mixup_alpha: 0 is off.
        cutmix_alpha: 0 is off. With both on, one of them is drawn for the batch.
        classes: K.

    Returns:
        Images of the same shape, and the shares r and 1 - r of the labels, shape (B, K).
        For cutmix, r is the share of x_i that is left, also where the image's edge cuts
        the rectangle. With both off, what was given.

    Source:
        Zhang et al., 2018, arXiv:1710.09412; Yun et al., 2019, arXiv:1905.04899; both as
        in torchvision.
    """
    if not (mixup_alpha or cutmix_alpha):
        return images_BCHW, labels_B
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
    mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    with _global_draws(seed):
        images, labels = v2.RandomChoice(mixes)(images_BCHW, labels_B)
    return images, labels


def cutout(
    images_BCHW: Tensor, generator: Generator, *, size: int, probability: float
) -> Tensor:
    """Set a square of each image to zero, the mean colour once images are normalised.

    The square's corner is uniform from -size/2 to H - size/2 - 1, in both directions; the
    image cuts off what lies outside.

    Args:
        images_BCHW: normalised images.
        generator: on the device of the images.
        size: side of the square, in pixels.
        probability: of an image to lose a square.

    Source:
        DeVries and Taylor, 2017, arXiv:1708.04552; corner and probability as in
        davda54/sam, example/utility/cutout.py.
    """
    b, _, h, w = images_BCHW.shape
    device = images_BCHW.device
    applied = torch.rand(b, 1, generator=generator, device=device) < probability
    rows = _interval(b, h, size, generator, device) & applied
    columns = _interval(b, w, size, generator, device)
    hole = rearrange(rows, "b h -> b 1 h 1") & rearrange(columns, "b w -> b 1 1 w")
    return images_BCHW.masked_fill(hole, 0)


def normalise(images_BCHW: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Return (images / 255 - mean) / std per channel, float32."""
    scale = rearrange(1 / (255 * std_C), "c -> c 1 1")
    shift = rearrange(mean_C / std_C, "c -> c 1 1")
    return images_BCHW * scale - shift


def _reflected(places: Tensor, length: int) -> Tensor:
    """Return places from 0 to length - 1, of which others are mirror images at the ends."""
    last = length - 1
    return last - (last - places.abs()).abs()


def _interval(
    b: int, length: int, size: int, generator: Generator, device: torch.device
) -> Tensor:
    start = torch.randint(length, (b, 1), generator=generator, device=device)
    start = start - size // 2
    pixels = torch.arange(length, device=device)
    return (pixels >= start) & (pixels < start + size)


@contextmanager
def _global_draws(seed: int) -> Iterator[None]:
    """Fix what the global generator gives, and leave it afterwards as it was.

    torchvision draws from the CPU's, wherever the images are. `torch.manual_seed` would
    change those of the GPUs too, and forking them would wait for each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: a second one takes longer to wake than an image takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
