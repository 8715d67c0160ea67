import pytest
import torch
from torch import nn

from recipes.models import GlobalMean, WideResNet, parse_name


def count(*args, **options):
    return sum(p.numel() for p in WideResNet(*args, **options).parameters())


def test_parameters_are_those_of_the_published_networks():
    assert count(28, 10, 10) == 36_479_194
    assert count(16, 8, 10) == 10_961_370
    assert count(16, 8, 10, layout="davda54") == 17_158_106
    assert count(40, 2, 10) == 2_243_546


def test_davda54s_16_8_is_wrn_22_8():
    def shapes(model):
        return {name: p.shape for name, p in model.named_parameters()}

    assert shapes(WideResNet(16, 2, 10, layout="davda54")) == shapes(WideResNet(22, 2, 10))


@pytest.mark.parametrize("size", [8, 28, 32, 37])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_give_logits(size, channels):
    model = WideResNet(10, 1, 7, channels=channels)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_pooling_is_the_mean_over_pixels():
    images = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(GlobalMean()(images), images.mean((2, 3)))


def test_stages_halve_the_image_twice():
    shapes = []
    model = WideResNet(16, 2, 10)
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


@pytest.mark.parametrize(("layout", "fan"), [("standard", 32), ("davda54", 16)])
def test_convolutions_start_with_the_variance_of_their_layout(layout, fan):
    torch.manual_seed(0)
    weight = WideResNet(10, 2, 10, layout=layout).stage1[0].conv1.weight
    assert weight.shape == (32, 16, 3, 3)
    expected = (2 / (9 * fan)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.05)


def test_a_head_of_zeros_finds_every_class_equally_likely():
    images = torch.randn(4, 3, 8, 8)
    assert not WideResNet(10, 1, 5, zero_head=True)(images).any()
    assert WideResNet(10, 1, 5)(images).any()


def test_dropout_reaches_the_blocks():
    model = WideResNet(10, 1, 5, dropout=0.3)
    found = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert found == [0.3] * 3
    images = torch.randn(4, 3, 8, 8)
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WideResNet(12, 1, 10), "depth must be 10, 16, .* got 12"),
        (lambda: WideResNet(4, 1, 10), "depth must be 10, 16, .* got 4"),
        (lambda: WideResNet(10, 0, 10), "width must be at least 1, got 0"),
        (lambda: WideResNet(10, 1, 10, layout="x"), "one of .* got 'x'"),
        (lambda: parse_name("resnet-18"), "look like wrn-28-10, got 'resnet-18'"),
        (lambda: parse_name("wrn-12-1"), "depth must be 10, 16, .* got 12"),
        (lambda: parse_name("wrn-28"), "look like wrn-28-10, got 'wrn-28'"),
        (lambda: parse_name("wrn-a-b"), "look like wrn-28-10, got 'wrn-a-b'"),
    ],
)
def test_networks_that_do_not_exist_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
