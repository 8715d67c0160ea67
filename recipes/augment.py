"""Augmentation of whole batches on the device: crop, flip, cutout, normalisation.

Shapes: B images, C channels, H x W pixels. Every random choice comes from the generator
that is passed in, so that a seed fixes the batch.
"""

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn import functional as F


def random_crop_flip(
    images_BCHW: Tensor, generator: Generator, *, padding: int, flip: bool
) -> Tensor:
    """Cut each image out of itself padded with zeros, mirrored half of the time.

    Args:
        images_BCHW: any dtype.
        generator: on the device of the images.
        padding: pixels added on each side, and so the largest shift.
        flip: mirror left and right with probability 0.5.

    Returns:
        Same shape and dtype, in channels_last memory.
    """
    b, _, h, w = images_BCHW.shape
    device = images_BCHW.device
    top, left = torch.randint(
        2 * padding + 1, (2, b, 1), generator=generator, device=device
    )
    rows_BH = top + torch.arange(h, device=device)
    columns_BW = left + torch.arange(w, device=device)
    if flip:
        mirrored = torch.randint(2, (b, 1), generator=generator, device=device) == 1
        columns_BW = torch.where(mirrored, columns_BW.flip(1), columns_BW)
    padded = F.pad(images_BCHW, [padding] * 4)
    crops_BHWC = padded[
        torch.arange(b, device=device)[:, None, None],
        :,
        rows_BH[:, :, None],
        columns_BW[:, None, :],
    ]
    return rearrange(crops_BHWC, "b h w c -> b c h w")


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


def _interval(
    b: int, length: int, size: int, generator: Generator, device: torch.device
) -> Tensor:
    start = torch.randint(length, (b, 1), generator=generator, device=device)
    start = start - size // 2
    pixels = torch.arange(length, device=device)
    return (pixels >= start) & (pixels < start + size)
