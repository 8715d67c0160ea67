import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samfn
from recipes.models import networks
from recipes.models.wide_resnet import GlobalMean, WideResNet, parse_name


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
        (lambda: WideResNet(10, 0, 10), "width must be 1 to 10000, got 0"),
        (lambda: WideResNet(10, 1, 10, layout="x"), "one of .* got 'x'"),
        (lambda: parse_name("resnet-18"), "look like wrn-28-10, got 'resnet-18'"),
        (lambda: parse_name("wrn-12-1"), "depth must be 10, 16, .* got 12"),
        (lambda: parse_name(f"wrn-{6 * 10**12 + 4}-1"), "depth must .* below 10000, got 6"),
        (lambda: parse_name(f"wrn-10-{2**63}"), "width must be 1 to 10000, got 9"),
        (lambda: parse_name("wrn-28"), "look like wrn-28-10, got 'wrn-28'"),
        (lambda: parse_name("wrn-a-b"), "look like wrn-28-10, got 'wrn-a-b'"),
    ],
)
def test_networks_that_do_not_exist_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# One of each kind: batch statistics; dropout before a head of convolutions; squeeze and
# excitation; auxiliary heads; stochastic depth; attention in shifted windows.
KINDS = {
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "googlenet": "fc",
    "efficientnet_b0": "classifier.1",
    "swin_t": "head",
    "wrn-10-1": "head",
}


@pytest.mark.parametrize("name", KINDS)
def test_networks_of_every_kind_take_a_step_and_their_head_comes_last(name):
    model = networks.make(name, 3, shape=(3, 32, 32))
    assert networks.head_of(model) == (f"{KINDS[name]}.weight", f"{KINDS[name]}.bias")
    model = model.to(memory_format=torch.channels_last)
    loss_fn, optimizer = samfn.supervised(model, F.cross_entropy), samfn.sgd()
    state = samfn.init(*samfn.split(model), optimizer=optimizer)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batch = images, torch.tensor([0, 1, 2, 0])
    new, metrics = samfn.sam_update(
        state, batch, loss_fn=loss_fn, optimizer=optimizer, rho=0.05, lr=0.01
    )
    assert metrics.outputs.shape == (4, 3)
    assert metrics.finite
    assert metrics.perturbation_norm == pytest.approx(0.05, rel=1e-3)
    moved = [not torch.equal(new.params[n], leaf) for n, leaf in state.params.items()]
    assert sum(moved) > 0.9 * len(moved)  # Stochastic depth leaves some out.


def test_the_head_is_what_depends_on_the_number_of_classes():
    for name in ("resnet18", "maxvit_t", "wrn-16-2"):
        with torch.device("meta"):
            few, many = (networks.make(name, k, shape=(3, 224, 224)) for k in (2, 3))
        sizes = {n: p.shape for n, p in few.named_parameters()}
        differ = [n for n, p in many.named_parameters() if p.shape != sizes[n]]
        assert networks.head_of(few) == tuple(differ), name


def test_transformers_are_made_for_the_size_of_the_images():
    with torch.device("meta"):
        model = networks.make("vit_b_16", 2, shape=(3, 48, 48))
    assert model.encoder.pos_embedding.shape == (1, 1 + 3 * 3, 768)


def test_heads_for_the_first_training_alone_are_left_out():
    model = networks.make("googlenet", 5, shape=(3, 32, 32))
    assert not [n for n in model.state_dict() if n.startswith("aux")]
    assert not model.transform_input
    model = networks.make("googlenet", 5, shape=(3, 32, 32), pretrained=True)
    assert model.transform_input


def test_frozen_networks_train_their_head_and_evaluate_the_rest():
    model = networks.make("shufflenet_v2_x0_5", 2, shape=(3, 32, 32))
    networks.freeze(model)
    params, buffers = samfn.split(model)
    assert params.keys() == {"fc.weight", "fc.bias"}
    assert "conv1.0.weight" in buffers
    assert [n for n, m in model.named_modules() if m.training] == ["fc"]


def test_published_weights_say_what_images_they_are_for():
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert networks.photographs("resnet18") == (224, *imagenet)
    assert networks.photographs("efficientnet_v2_l") == (480, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18", (1, 8, 8), "resnet18 takes no images of 8x8 with 1 channel: "),
        ("alexnet", (3, 32, 24), "alexnet takes no images of 24x32 with 3 channels: "),
        ("vit_b_16", (3, 40, 40), "vit_b_16 takes no images of 40x40 .*indivisible"),
        ("resnt50", (3, 32, 32), "got 'resnt50'; close to it: resnet50, "),
        ("ResNet50", (3, 32, 32), "got 'ResNet50'; close to it: resnet50, "),
        ("raft_large", (3, 32, 32), "for classification, .* got 'raft_large'"),
    ],
)
def test_what_a_network_cannot_take_is_named(name, shape, message):
    with pytest.raises(ValueError, match=message):
        networks.make(name, 2, shape=shape)
