import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.transforms import v2

from recipes.data import augment

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


@given(st.integers(3, 9), st.integers(3, 9), st.integers(0, 2), st.booleans(), seeds)
def test_reflected_crops_are_those_of_the_reflected_image(h, w, padding, flip, seed):
    images = numbered(6, h, w)
    how = {"padding": padding, "flip": flip}
    result = augment.random_crop_flip(images, generator(seed), **how, reflect=True)
    # The same draws, where zeros are cut out: so large an image has none to show.
    padded = F.pad(images, [padding] * 4, mode="reflect")
    for original, cropped in zip(padded, result, strict=True):
        crops = original.unfold(1, h, 1).unfold(2, w, 1).flatten(1, 2).unbind(1)
        mirrored = [crop.flip(-1) for crop in crops] if flip else []
        assert any(torch.equal(cropped, crop) for crop in [*crops, *mirrored])
    zeros = augment.random_crop_flip(images, generator(seed), **how)
    assert torch.equal(torch.where(zeros > 0, result, 0.0), zeros)


def test_images_are_reflected_no_further_than_they_reach():
    with pytest.raises(ValueError, match=r"below 3 pixels, the side of .* got 3"):
        augment.random_crop_flip(
            numbered(2, 3, 4), generator(0), padding=3, flip=False, reflect=True
        )


@given(st.integers(1, 9), seeds)
def test_in_two_epochs_each_image_is_shown_once_in_each_way(count, seed):
    images = numbered(count, 4, 5)
    shown = [
        augment.random_crop_flip(
            images,
            generator(epoch),
            padding=0,
            flip=augment.alternating(count, epoch, generator(seed)),
        )
        for epoch in range(4)
    ]
    for first, second in pairwise(shown):
        for image, one, other in zip(images, first, second, strict=True):
            ways = [image, image.flip(-1)]
            there = [torch.equal(one, way) for way in ways]
            assert there == [torch.equal(other, way) for way in ways[::-1]]
            assert sum(there) == 1
    assert torch.equal(shown[0], shown[2])


def test_about_half_of_the_images_are_mirrored_in_the_first_epoch():
    assert 0.45 < augment.alternating(2000, 0, generator(0)).float().mean() < 0.55


def test_six_views_are_flips_and_shifts_with_their_shares():
    images = numbered(2, 4, 5)
    around = F.pad(images, [1] * 4, mode="reflect")
    half = [images, around[:, :, 2:, 2:], around[:, :, :4, :5]]
    expected = zip(half, (0.25, 0.125, 0.125), strict=True)
    found = [*augment.views(images, 6)]
    for (place, share), plain, mirrored in zip(
        expected, found[::2], found[1::2], strict=True
    ):
        assert (plain[0], mirrored[0]) == (share, share)
        assert torch.equal(plain[1], place)
        assert torch.equal(mirrored[1], place.flip(-1))
    ((one, same),) = augment.views(images, 1)
    assert one == 1
    assert same is images
    assert [share for share, _ in augment.views(images, 2)] == [0.5, 0.5]
    with pytest.raises(ValueError, match="expected 1, 2 or 6 views, got 4"):
        [*augment.views(images, 4)]


@given(seeds)
def test_without_padding_and_flip_nothing_changes(seed):
    images = numbered(3, 4, 5)
    result = augment.random_crop_flip(images, generator(seed), padding=0, flip=False)
    assert torch.equal(result, images)


def parts(count, scale, seed, side=128):
    """Return which part of each image is cut out: width, height, middle, in its shares."""
    ramp = torch.arange(side, dtype=torch.uint8)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)])
    cut = augment.random_resized_crop(
        image.repeat(count, 1, 1, 1), generator(seed), scale=scale
    ).double()
    assert (cut[:, 0] - cut[:, 0, :1]).abs().max() <= 1  # Columns stay columns,
    assert (cut[:, 1] - cut[:, 1, :, :1]).abs().max() <= 1  # and rows rows.
    lines = torch.stack([cut[:, 0, 0], cut[:, 1, :, 0]])
    quarter = side // 4  # The ends may be beyond the middle of the last pixel.
    steps = (lines[..., 3 * quarter] - lines[..., quarter]) / (2 * quarter)
    middle = lines[..., side // 2 - 1 : side // 2 + 1].mean(-1)
    return *steps, *((middle + 0.5) / side)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_random_parts_have_their_areas_shapes_and_places(scale):
    width, height, x, y = parts(400, scale, seed=1)
    area, off = width * height, 0.02  # of rounding
    assert scale - off < area.min() < scale + 0.05
    # Where the larger side is that of the image, less is left.
    free = torch.maximum(width, height) < 0.98
    assert area[free].mean() == pytest.approx(
        float((scale + area[free].max()) / 2), abs=0.1
    )
    ratio = (width / height)[free].log()
    assert ratio.abs().max() < math.log(4 / 3) + 0.03
    for side in (-1, 1):
        assert (side * ratio).max() > 0.9 * math.log(4 / 3)
    for place, size in ((x, width), (y, height)):
        assert (place - size / 2).min() > -off
        assert (place + size / 2).max() < 1 + off
        shift = ((place - 0.5) / (1 - size))[size < 0.8]  # from -1/2 to 1/2
        assert shift.mean().abs() < 0.07
        assert shift.std() == pytest.approx(12**-0.5, rel=0.1)


def test_random_parts_are_enlarged_bilinearly_and_depend_on_the_seed():
    images = torch.randint(256, (3, 3, 9, 13), dtype=torch.uint8)
    first, again, other = (
        augment.random_resized_crop(images, generator(s), scale=0.2) for s in (0, 0, 1)
    )
    assert first.dtype is torch.uint8
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    flat = torch.full((2, 3, 6, 6), 77, dtype=torch.uint8)  # No border comes in.
    assert torch.equal(augment.random_resized_crop(flat, generator(0), scale=0.3), flat)


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


POLICIES = {
    "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "trivialaugment": v2.TrivialAugmentWide,
}


def noise(count=16, channels=3, size=8):
    """Return random images, as crops come."""
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_keeps_what_images_are(policy, channels):
    images = noise(200, channels)
    before = images.clone()
    result = augment.transform(images, 1, policy=policy)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert result.stride() == images.stride()
    assert torch.equal(images, before)
    changed = (result != images).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_that_of_torchvision_and_draws_anew_for_each_image(policy):
    images, theirs = noise(1).expand(20, -1, -1, -1), POLICIES[policy]()
    torch.manual_seed(5)
    expected = torch.stack([theirs(image) for image in images])
    result = augment.transform(images, 5, policy=policy)
    assert torch.equal(result, expected)
    assert len(result.flatten(1).unique(dim=0)) > 10
    assert not torch.equal(augment.transform(images, 6, policy=policy), expected)


def mixed(images, labels, seed, mixup_alpha=0.0, cutmix_alpha=0.0):
    return augment.mix(
        images,
        labels,
        seed,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        classes=len(labels),
    )


LABELS = torch.tensor([3, 0, 2, 1, 4])  # of five images, each of its own class


@given(sizes, sizes, st.floats(0.05, 20), seeds)
def test_mixup_blends_each_image_and_its_label_with_the_one_before(h, w, alpha, seed):
    images = numbered(5, h, w)
    result, shares = mixed(images, LABELS, seed, mixup_alpha=alpha)
    kept = shares[0, LABELS[0]]
    classes = F.one_hot(LABELS, 5)
    assert_close(shares, kept * classes + (1 - kept) * classes[[4, 0, 1, 2, 3]])
    assert_close(shares.sum(1), torch.ones(5))
    assert_close(result, kept * images + (1 - kept) * images[[4, 0, 1, 2, 3]])


@given(sizes, sizes, st.floats(0.05, 20), seeds)
def test_cutmix_pastes_one_rectangle_and_mixes_labels_by_its_area(h, w, alpha, seed):
    images = numbered(5, h, w)
    result, shares = mixed(images, LABELS, seed, cutmix_alpha=alpha)
    pasted = result != images
    assert torch.equal(result[pasted], images[[4, 0, 1, 2, 3]][pasted])
    hole = pasted[0, 0]
    assert (pasted == hole).all()
    assert hole.sum() == hole.any(1).sum() * hole.any(0).sum()
    kept = 1 - hole.float().mean()
    classes = F.one_hot(LABELS, 5)
    assert_close(shares, kept * classes + (1 - kept) * classes[[4, 0, 1, 2, 3]])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha):
    images = numbered(5, 1, 1)
    draws = [mixed(images, LABELS, s, mixup_alpha=alpha)[1][0, 3] for s in range(500)]
    kept = torch.stack(draws)
    assert kept.mean().item() == pytest.approx(0.5, abs=0.05)
    variance = 1 / (4 * (2 * alpha + 1))
    assert kept.var().item() == pytest.approx(variance, rel=0.15)


def test_with_both_mixtures_on_each_batch_has_one_and_half_of_them_each():
    images, pasted = numbered(5, 8, 8), []
    for seed in range(300):
        result, _ = mixed(images, LABELS, seed, mixup_alpha=1.0, cutmix_alpha=1.0)
        whole = (result == images) | (result == images.roll(1, 0))
        assert whole.all() or not whole.any()
        pasted.append(whole.all())
    assert 120 < sum(pasted) < 180


def test_without_mixtures_a_batch_is_what_it_was():
    images = numbered(5, 2, 2)
    found = mixed(images, LABELS, 0)
    assert found[0] is images
    assert found[1] is LABELS


@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 0.4}])
def test_mixtures_keep_the_layout_in_memory(alphas):
    images = torch.randn(5, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert mixed(images, LABELS, 0, **alphas)[0].stride() == images.stride()


@pytest.fixture
def two_threads():
    """Compute with two threads, however many this process was given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


PIXELS, FLOATS = noise(5), numbered(5, 8, 8)
DRAWS = {
    "policy": lambda seed: augment.transform(PIXELS, seed, policy="trivialaugment"),
    "mixup": lambda seed: mixed(FLOATS, LABELS, seed, mixup_alpha=1.0)[0],
    "cutmix": lambda seed: mixed(FLOATS, LABELS, seed, cutmix_alpha=1.0)[0],
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", DRAWS)
def test_draws_depend_on_the_seed_alone_and_leave_no_trace(name, monkeypatch):
    def refuse(seed):
        raise AssertionError("the generators of GPUs are none of its business")

    draw = DRAWS[name]
    torch.manual_seed(1)
    first = draw(7)
    assert not all(torch.equal(first, draw(seed)) for seed in (8, 9, 10))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", refuse)
        assert torch.equal(draw(7), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_policy_that_fails_leaves_generator_and_threads_as_they_were():
    images = noise(40, channels=2)
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match="channel values are 1 or 3"):
        augment.transform(images, 0, policy="autoaugment")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
