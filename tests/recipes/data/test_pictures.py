"""What an image file means: no picture becomes black or white without a word."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.data import pictures

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # of 16 bits, from 0 to 65520
BYTES = torch.from_numpy(np.rint(RAMP / 257).astype(np.uint8))
GREY = Image.fromarray(BYTES.numpy())
PHOTO = GREY.convert("RGB")
FLAT = Image.new("L", (8, 8), 128)


def stamped(path, tag, before, after):
    """Change the value of a short tag of a little-endian TIFF."""
    entry = struct.pack("<HHI", tag, 3, 1)
    content = path.read_bytes()
    assert content.count(entry + struct.pack("<H", before)) == 1
    where = content.index(entry) + len(entry)
    path.write_bytes(content[:where] + struct.pack("<H", after) + content[where + 2 :])
    return path


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_of_16_bits_is_scaled_by_its_range(tmp_path, name):
    found = pictures.read(saved(tmp_path / name, Image.fromarray(RAMP)))
    assert found.pixels.shape == (3, 8, 8)
    assert found.pixels.eq(BYTES).all()
    assert found.remarks == {"deep"}


@pytest.mark.parametrize("largest", [1023, 65535])
def test_a_graymap_is_scaled_by_the_largest_value_that_it_names(tmp_path, largest):
    path, values = tmp_path / "x.pgm", np.arange(64) * largest // 63
    path.write_bytes(b"P5 8 8 %d\n" % largest + values.astype(">u2").tobytes())
    expected = torch.from_numpy(np.rint(values * 255 / largest)).view(8, 8)
    assert (pictures.read(path).pixels.double() - expected).abs().max() <= 1


def test_grey_of_12_bits_is_scaled_by_its_range(tmp_path):
    values = (RAMP >> 4).reshape(-1, 2).astype(np.uint32)  # Two of them take three bytes.
    packed = (values[:, 0] << 12 | values[:, 1]).astype(">u4").view(np.uint8)
    rows = packed.reshape(-1, 4)[:, 1:].tobytes().ljust(128, b"\0")
    wide = Image.fromarray(np.frombuffer(rows, np.uint16).reshape(8, 8))
    path = stamped(saved(tmp_path / "x.tif", wide), pictures.BITS, 16, 12)
    difference = pictures.read(path).pixels.int() - BYTES
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floats_are_refused_whatever_they_hold(tmp_path, top):
    values = (RAMP / 65520 * top).astype(np.float32)
    with pytest.raises(ValueError, match=r"expected 8 bits a channel.* TIFF of mode F;"):
        pictures.read(saved(tmp_path / "x.tif", Image.fromarray(values)))


def test_integers_of_32_bits_are_refused(tmp_path):
    path = saved(tmp_path / "x.tif", Image.fromarray(RAMP.astype(np.int32)))
    with pytest.raises(ValueError, match=r"expected 8 bits a channel.* TIFF of mode I;"):
        pictures.read(path)


def test_grey_of_16_bits_that_begins_with_white_is_refused(tmp_path):
    path = saved(tmp_path / "x.tif", Image.fromarray(RAMP))
    with pytest.raises(ValueError, match="begin with black"):
        pictures.read(stamped(path, pictures.PHOTOMETRIC, 1, 0))


def test_grey_of_16_bits_with_a_transparent_value_is_refused(tmp_path):
    path = saved(tmp_path / "x.png", Image.fromarray(RAMP), transparency=0)
    with pytest.raises(ValueError, match="expected 8 bits a channel"):
        pictures.read(path)


def drawn(mode):
    """Return a black drawing on nothing: without transparency, it is all black."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    return image.convert(mode)


TRANSPARENT = [
    ("x.png", drawn("RGBA"), {}),
    ("x.png", drawn("LA"), {}),
    ("x.webp", drawn("RGBA"), {"lossless": True}),
    ("x.tif", drawn("RGBA"), {}),
    ("x.gif", drawn("RGBA"), {}),
    ("x.png", drawn("RGBA").quantize(4), {}),
    (
        "x.png",
        Image.fromarray(np.asarray(drawn("LA"))[..., 1] ^ 255),
        {"transparency": 255},
    ),
]


@pytest.mark.parametrize(("name", "image", "options"), TRANSPARENT)
def test_transparent_parts_are_white_and_said_to_be(tmp_path, name, image, options):
    found = pictures.read(saved(tmp_path / name, image, **options))
    assert found.remarks == {"transparent"}
    assert found.pixels[:, 3, 3].tolist() == [0, 0, 0]
    assert found.pixels[:, 0, 0].tolist() == [255, 255, 255]


def test_an_image_that_could_be_transparent_and_is_not_gets_no_remark(tmp_path):
    found = pictures.read(saved(tmp_path / "x.png", PHOTO.convert("RGBA")))
    assert not found.remarks
    assert found.pixels.eq(BYTES).all()


def test_an_image_of_which_nothing_is_seen_is_refused(tmp_path):
    path = saved(tmp_path / "x.png", Image.new("RGBA", (8, 8), (9, 9, 9, 0)))
    with pytest.raises(ValueError, match="all of it is transparent"):
        pictures.read(path)


MODES = [
    *[(name, PHOTO, 0) for name in ("x.png", "x.bmp", "x.ppm", "x.tif")],
    *[(name, GREY, 0) for name in ("x.png", "x.pgm", "x.tif", "x.gif", "x.bmp")],
    *[(name, PHOTO, 12) for name in ("x.jpg", "x.jpe", "x.jfif", "x.webp", "x.avif")],
    ("x.jpg", PHOTO.convert("CMYK"), 12),
    ("x.tif", PHOTO.convert("CMYK"), 1),
    ("x.png", PHOTO.quantize(64), 8),
]


@pytest.mark.parametrize(("name", "image", "off"), MODES)
def test_each_format_and_mode_gives_the_same_picture(tmp_path, name, image, off):
    if name.endswith(".avif") and ".avif" not in pictures.endings():
        pytest.skip("this Pillow knows no AVIF")
    found = pictures.read(saved(tmp_path / name, image))
    assert not found.remarks
    assert (found.pixels.int() - BYTES).abs().max() <= off


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pbm"])
def test_one_bit_is_black_and_white(tmp_path, name):
    drawing = np.asarray(GREY) > 100
    found = pictures.read(saved(tmp_path / name, Image.fromarray(drawing)))
    assert found.pixels.eq(torch.from_numpy(drawing) * 255).all()


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_of_several_frames_the_first_is_read_and_that_is_said(tmp_path, name):
    more = {"save_all": True, "append_images": [PHOTO.rotate(90)]}
    more |= {"lossless": True} if name == "x.webp" else {}
    found = pictures.read(saved(tmp_path / name, PHOTO, **more))
    assert found.remarks == {"frames"}
    assert found.pixels.eq(BYTES).all()


def test_what_a_camera_keeps_behind_a_photograph_needs_no_remark(tmp_path):
    options = {"format": "MPO", "save_all": True, "append_images": [PHOTO]}
    assert not pictures.read(saved(tmp_path / "x.jpg", PHOTO, **options)).remarks


def test_channels_beyond_three_are_left_out_and_that_is_said(tmp_path):
    four = Image.merge("RGBX", [GREY, GREY, GREY, FLAT])
    found = pictures.read(saved(tmp_path / "x.tif", four))
    assert found.remarks == {"channels"}
    assert found.pixels.eq(BYTES).all()


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_a_turned_camera_is_heeded_once_whatever_the_depth(tmp_path, name, deep):
    upright = Image.fromarray(RAMP) if deep else GREY
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    assert pictures.read(saved(tmp_path / name, turned, exif=exif)).pixels.eq(BYTES).all()


def colour_of_16_bits(path, values):
    """Write what Pillow reads and does not write: colours of 16 bits, as a PNG."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = np.repeat(values[..., None], 3, 2).astype(">u2").tobytes()
    lines = b"".join(b"\0" + rows[i : i + 48] for i in range(0, len(rows), 48))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    content = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join([*content, chunk(b"IEND", b"")]))
    return path


def test_what_uses_a_sixteenth_of_16_bits_is_dim(tmp_path):
    colour = pictures.read(colour_of_16_bits(tmp_path / "x.png", RAMP >> 4))
    grey = pictures.read(saved(tmp_path / "y.png", Image.fromarray(RAMP >> 4)))
    assert colour.remarks == grey.remarks == {"deep", "dim"}
    bright = pictures.read(colour_of_16_bits(tmp_path / "x.png", RAMP))
    assert bright.remarks == {"deep"}
    assert (bright.pixels.int() - BYTES).abs().max() <= 1


@pytest.mark.parametrize(("colour", "blank"), [(0, True), (255, True), (128, False)])
def test_black_and_white_alone_are_blank(tmp_path, colour, blank):
    image = Image.new("L", (4, 4), colour)
    found = pictures.read(saved(tmp_path / "x.png", image)).remarks
    assert ("blank" in found) == blank


def test_a_format_that_runs_programs_is_not_read(tmp_path):
    path = saved(tmp_path / "x.eps", PHOTO).rename(tmp_path / "x.png")
    with pytest.raises(OSError, match="cannot identify"):
        pictures.read(path)
