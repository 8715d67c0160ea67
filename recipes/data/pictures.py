"""One image file to bytes: which files are images, and what their pixels mean.

Pillow's own conversion clips what has more than 8 bits, which makes it white or black, and
shows the colours that transparency hides. Here pixels are scaled by a range that is known,
transparent ones lie over white, and what is not known is refused.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from samfn.storage import files

READING = 2  # to be raised when the same file gives other bytes
# What images may be, and how the names of their files end. Others that Pillow knows run
# programs to be read, or are read by code that few have tried.
ENDINGS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# Tags of TIFF.
BITS, PHOTOMETRIC, CHANNELS = 258, 262, 277
WHITE_IS_ZERO = 0

Remark = Literal["transparent", "frames", "channels", "blank", "deep", "dim"]
REMARKS: dict[Remark, str] = {
    "transparent": "images with transparent parts, which were laid over white",
    "frames": "images of several frames or pages, of which the first was read",
    "channels": "images of more channels than three, which were left out",
    "blank": "images that are nothing but black, or nothing but white",
}
"""Remarks about images, in words. "deep" ones, of 16 bits, have none, unless all are "dim":
a sixteenth of their range holds them."""
LONGEST = 64  # times the shorter side, so that resizing needs no memory without bounds
DIM = 16  # of 255, to which the largest value of 12 bits falls where 16 are expected


class Picture(NamedTuple):
    """An image that was read from a file."""

    pixels: Tensor
    """3 x H x W, uint8."""
    remarks: frozenset[Remark]


def formats() -> tuple[str, ...]:
    """Return the formats of `ENDINGS` that this version of Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in ENDINGS if name in Image.OPEN)


def endings() -> tuple[str, ...]:
    """Return how names of files end that are read, in lower case."""
    return tuple(sorted(end for name in formats() for end in ENDINGS[name]))


def read(path: str | Path, image_size: int | None = None) -> Picture:
    """Read an image upright, as three channels of bytes.

    Args:
        path: of the file.
        image_size: pixels to which the shorter side is resized; a square from the middle
            is kept. None keeps the size.

    Raises:
        ValueError: the range of its values is not known, or nothing of it can be seen.
        OSError: it is no regular file, or cannot be read.
        Exception: decoders raise anything at damaged files.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2 import functional as transforms

    with (
        files.open_regular(path) as content,
        Image.open(content, formats=formats()) as file,
    ):
        remarks = _of_file(file)
        largest = _largest(file)
        image = ImageOps.exif_transpose(file)  # Cameras store how they were held.
    if largest is not None:
        scaled = np.asarray(image) * (255 / largest)
        image = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if _may_be_transparent(image):
        image, is_transparent = _over_white(image)
        remarks |= {"transparent"} if is_transparent else set()
    pixels = transforms.pil_to_tensor(image.convert("RGB"))
    low, high = (int(value) for value in pixels.aminmax())
    remarks |= {"blank"} if low == high and low in (0, 255) else set()
    remarks |= {"dim"} if high <= DIM else set()
    if image_size is not None:
        most = LONGEST * min(pixels.shape[1:])
        pixels = transforms.center_crop(pixels, [min(most, n) for n in pixels.shape[1:]])
        pixels = transforms.resize(pixels, [image_size], antialias=True)
        pixels = transforms.center_crop(pixels, [image_size, image_size])
    return Picture(pixels, frozenset(remarks))


def _of_file(file: Any) -> set[Remark]:
    """Return what of a file will not be read, and whether it has 16 bits."""
    found: set[Remark] = set()
    # A camera's MPO keeps a preview, or the other eye's view, behind the picture.
    if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:
        found.add("frames")
    if file.format == "TIFF" and file.mode == "RGB" and file.tag_v2.get(CHANNELS, 3) > 3:
        found.add("channels")
    if any(";16" in str(tile[-1]) for tile in file.tile):
        found.add("deep")
    return found


def _largest(file: Any) -> int | None:
    """Return the largest value that pixels of more than 8 bits can have; None of 8 bits."""
    is_tiff = file.format == "TIFF"
    if file.mode == "I" and file.format in ("PNG", "PPM"):  # Pillow scales to 16 bits.
        return 65535
    if file.mode.startswith("I;16") and "transparency" not in file.info:
        if not is_tiff:
            return 65535
        if file.tag_v2.get(PHOTOMETRIC) != WHITE_IS_ZERO:  # Pillow does not invert these.
            bits: int = file.tag_v2.get(BITS, (16,))[0]
            return (1 << bits) - 1
    if file.mode[0] in "IF":
        kind = f"{file.format} of mode {file.mode}"
        raise ValueError(
            f"expected 8 bits a channel, or 16 of grey that begin with black, got {kind};"
            " which of its values are black and white is not known"
        )
    return None


def _may_be_transparent(image: Any) -> bool:
    return "transparency" in image.info or bool({"A", "a"} & {*image.getbands()})


def _over_white(image: Any) -> tuple[Any, bool]:
    """Return an image as one sees it on paper, and whether that differs."""
    from PIL import Image

    image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if most == 0:
        raise ValueError("all of it is transparent")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image), least < 255
