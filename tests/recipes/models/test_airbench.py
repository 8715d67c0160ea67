"""The networks of airbench: sizes, first weights and what stays as it is."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import samfn
from recipes.models import airbench, networks
from recipes.models.airbench import Airbench, whitening


@pytest.mark.parametrize(
    ("name", "parameters", "products"),
    [
        ("airbench94", 1_972_792, 118_147_360),
        ("airbench95", 4_606_520, 301_560_864),
        ("airbench96", 9_918_776, 451_967_264),
    ],
)
def test_sizes_are_those_of_the_published_networks(name, parameters, products):
    with torch.device("meta"):
        model = Airbench(name, 10)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.empty(1, 3, 32, 32))
    count = sum(p.numel() for p in model.parameters())
    assert (count, counter.get_total_flops()) == (parameters, 2 * products)


def test_the_filter_and_the_weights_of_normalisation_travel_as_buffers():
    params, buffers = samfn.split(Airbench("airbench96", 10, widths=(4, 5, 6)))
    frozen = {name for name in buffers if name.endswith(".weight")}
    norms = {f"group{g}.norm{n}.weight" for g in (1, 2, 3) for n in (1, 2, 3)}
    assert frozen == {"whiten.weight", *norms}
    assert all(buffers[name].eq(1).all() for name in norms)
    convs = {f"group{g}.conv{n}.weight" for g in (1, 2, 3) for n in (1, 2, 3)}
    biases = {name.replace("weight", "bias") for name in norms}
    assert params.keys() == {"whiten.bias", "head.linear.weight"} | convs | biases


@pytest.mark.parametrize(("name", "momentum"), [("airbench94", 0.4), ("airbench96", 0.1)])
def test_statistics_of_a_batch_count_as_published(name, momentum):
    model = Airbench(name, 10, widths=(4, 4, 4))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(momentum, 1e-12)}


def test_convolutions_start_as_the_identity_on_their_first_inputs():
    model = Airbench("airbench94", 10, widths=(30, 40, 20))
    images = torch.randn(2, 24, 6, 6)
    outputs = model.group1.conv1(images)
    assert_close(outputs[:, :24], images)
    assert not torch.allclose(outputs[:, 24:], images[:, :6])
    narrower = torch.randn(2, 40, 6, 6)
    assert_close(model.group3.conv1(narrower), narrower[:, :20])


def test_a_deep_group_adds_its_first_activation_to_its_last_convolution():
    torch.manual_seed(0)
    group = Airbench("airbench96", 10, widths=(4, 4, 4)).group2.eval()
    with torch.no_grad():
        group.conv3.weight.zero_()
        group.norm3.bias.fill_(0.3)
    images = torch.randn(2, 4, 8, 8)
    first = F.gelu(F.max_pool2d(group.conv1(images), 2))
    assert_close(group(images), F.gelu(first + 0.3))


def before_the_head(model, images):
    *layers, _ = model
    for layer in layers:
        images = layer(images)
    return images


def test_logits_are_a_ninth_of_a_layer_of_the_largest_values():
    model = Airbench("airbench94", 5, widths=(4, 5, 6)).eval()
    images = torch.randn(3, 3, 32, 32)
    left = before_the_head(model, images)
    assert left.shape == (3, 6, 3, 3)
    expected = left.flatten(2).max(2).values @ model.head.linear.weight.T / 9
    assert_close(model(images), expected)


def test_patches_behind_the_filter_have_the_identity_as_their_covariance():
    torch.manual_seed(0)
    smooth = F.avg_pool2d(torch.randn(600, 3, 14, 14), 3, 1, 1)  # as photographs are
    images = smooth + 0.3 * smooth.mean(1, keepdim=True)
    filters = whitening(images, eps=0.0)
    assert filters.shape == (24, 3, 2, 2)
    outputs = F.conv2d(images, filters)
    covariance = torch.einsum("bihw,bjhw->ij", outputs, outputs) / outputs[:, 0].numel()
    assert_close(covariance[:12, :12], torch.eye(12), rtol=0, atol=1e-4)
    assert torch.equal(filters[12:], -filters[:12])
    # What varies most comes first, and needs the smallest filter.
    sizes = filters[:12].flatten(1).norm(dim=1)
    assert sizes.tolist() == sorted(sizes.tolist())
    # With eps, a direction of no variance is not blown up.
    flat = whitening(torch.zeros(3, 1, 9, 9), eps=0.25)
    assert_close(flat.flatten(1).norm(dim=1), torch.full((8,), 2.0))


def test_images_of_nine_pixels_and_any_channels_are_enough():
    for shape in ((3, 9, 9), (1, 9, 40), (3, 32, 32), (3, 49, 48)):
        model = networks.make("airbench94", 2, shape=shape, widths=(4, 4, 4))
        assert model(torch.randn(2, *shape)).shape == (2, 2)
    assert networks.head_of(model) == ("head.linear.weight",)
    with pytest.raises(ValueError, match=r"no images of 8x9 .*: expected 9 pixels or more"):
        networks.make("airbench94", 2, shape=(3, 9, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Airbench("airbench97", 10), "one of airbench94, .* got 'airbench97'"),
        (lambda: Airbench("airbench94", 10, widths=(4, 4)), r"three .* got \[4, 4\]"),
        (lambda: Airbench("airbench94", 10, widths=(4, 0, 4)), "three positive widths"),
        (lambda: networks.require_known("airbench93"), "close to it: airbench9"),
    ],
)
def test_networks_that_are_none_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_least_side_is_that_of_which_one_pixel_is_left():
    model = Airbench("airbench94", 2, widths=(4, 4, 4)).eval()
    for side in (airbench.LEAST, 16, 17):
        left = before_the_head(model, torch.zeros(1, 3, side, side))
        assert left.shape == (1, 4, *[(side - 1) // 8] * 2)
