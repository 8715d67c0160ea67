import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from recipes import augment

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def numbered(count, height, width, channels=2):
    """Return images in which no two pixels are equal, and none is zero."""
    total = count * channels * height * width
    return 1.0 + torch.arange(total).view(count, channels, height, width)


@given(sizes, sizes, st.integers(0, 4), st.booleans(), seeds)
def test_each_image_is_a_crop_of_its_own_padded_original(h, w, padding, flip, seed):
    images = numbered(6, h, w)
    result = augment.random_crop_flip(images, generator(seed), padding=padding, flip=flip)
    for original, cropped in zip(images, result, strict=True):
        padded = F.pad(original, [padding] * 4)
        crops = padded.unfold(1, h, 1).unfold(2, w, 1).flatten(1, 2).unbind(1)
        mirrored = [crop.flip(-1) for crop in crops] if flip else []
        assert any(torch.equal(cropped, crop) for crop in [*crops, *mirrored])


@given(seeds)
def test_shifts_and_flips_are_all_reached_and_equally_likely(seed):
    images = torch.zeros(3000, 1, 5, 5)
    images[:, 0, 2, 2] = 1.0
    images[:, 0, 2, 3] = 2.0
    result = augment.random_crop_flip(images, generator(seed), padding=1, flip=True)
    ones, twos = (result == 1).nonzero(), (result == 2).nonzero()
    assert set(map(tuple, (ones[:, 2:] - 2).tolist())) == {
        (row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)
    }
    assert len(ones) == len(twos) == 3000
    flipped = (ones[:, 3] > twos[:, 3]).float().mean()
    assert 0.45 < flipped < 0.55
    above = (ones[:, 2] == 1).float().mean()
    assert 0.28 < above < 0.39


@given(seeds)
def test_without_padding_and_flip_nothing_changes(seed):
    images = numbered(3, 4, 5)
    result = augment.random_crop_flip(images, generator(seed), padding=0, flip=False)
    assert torch.equal(result, images)


def test_the_same_seed_gives_the_same_batch_and_another_seed_another():
    images = numbered(20, 8, 8)

    def batch(seed):
        source = generator(seed)
        crops = augment.random_crop_flip(images, source, padding=4, flip=True)
        return augment.cutout(crops, source, size=4, probability=0.5)

    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))


def test_crops_are_channels_last_and_keep_their_dtype():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    result = augment.random_crop_flip(images, generator(0), padding=2, flip=True)
    assert result.dtype is torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)


@given(sizes, sizes, st.integers(1, 12), seeds)
def test_cutout_removes_one_rectangle_from_all_channels_and_nothing_else(h, w, size, seed):
    images = numbered(5, h, w)
    result = augment.cutout(images, generator(seed), size=size, probability=1.0)
    holes = result == 0
    assert torch.equal(result[~holes], images[~holes])
    assert torch.equal(holes[:, 0], holes[:, 1])
    for hole in holes[:, 0]:
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns
        assert max(rows, columns) <= size


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_cutout_takes_its_share_of_images_and_of_their_pixels(probability, share):
    images = torch.ones(4000, 1, 32, 32)
    result = augment.cutout(images, generator(0), size=16, probability=probability)
    cut = (result == 0).flatten(1).float().mean(1)
    assert (cut > 0).float().mean().item() == pytest.approx(share, abs=0.03)
    if share:  # 196 of 1024 pixels on average, by the distribution of the corner
        assert cut[cut > 0].mean().item() == pytest.approx(196 / 1024, abs=0.01)


def test_normalising_centres_and_scales_each_channel():
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    result = augment.normalise(images, mean.float(), std.float())
    assert result.dtype is torch.float32
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    assert_close(result.double(), expected, rtol=0, atol=1e-5)
