"""Networks by name: wide residual ones, made here, and torchvision's for classification.

WRN: Zagoruyko and Komodakis, 2016, arXiv:1605.07146.

Shapes: B images, C channels, H x W pixels, K classes.
"""

import difflib
from collections import OrderedDict
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class Layout(NamedTuple):
    """What a reading of "WRN-depth-width" adds to the paper's."""

    more_blocks: int
    """Blocks in each stage beyond those that the depth counts."""
    fan: Literal["fan_in", "fan_out"]
    """What the variance of the initial convolutions is divided by."""


LAYOUTS = {
    # fan_out as in the authors' code: standard deviation sqrt(2 / (k * k * outputs))
    "standard": Layout(0, "fan_out"),
    # github.com/davda54/sam, example/model/wide_res_net.py
    "davda54": Layout(1, "fan_in"),
}


# torchvision's, with heads beside the last one that only their first training used: name
# -> how the names of those heads' tensors begin.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


class Photographs(NamedTuple):
    """The images that torchvision's weights of a network were trained on."""

    side: int
    """Pixels."""
    mean: tuple[float, ...]
    """Of the pixels of each channel, in [0, 1]."""
    std: tuple[float, ...]


def make(
    name: str,
    classes: int,
    *,
    shape: tuple[int, int, int],
    dropout: float = 0.0,
    zero_head: bool = False,
    layout: str = "standard",
    pretrained: bool = False,
) -> nn.Module:
    """Return a network with new weights, which PyTorch's generator draws.

    Args:
        name: as `require_known` takes it.
        classes: K.
        shape: C, H, W of the images.
        dropout: as zero_head and layout, of a `WideResNet` alone.
        zero_head: as there.
        layout: as there.
        pretrained: be what torchvision's own weights fit: with those, GoogLeNet and
            Inception v3 first bring images to another mean and deviation.

    Raises:
        ValueError: there is no such network, or it takes no such images.
    """
    require_known(name)
    if is_wide(name):
        options: dict[str, Any] = {"dropout": dropout, "zero_head": zero_head}
        options |= {"layout": layout, "channels": shape[0]}
        return WideResNet(*parse_name(name), classes, **options)
    try:
        model = _from_torchvision(name, classes, shape, pretrained)
        _require_images(model, shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' * (shape[0] > 1)}"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} takes no images of {size}: {reason}") from error
    return model


def require_known(name: str) -> None:
    """Raise unless a network is called so: wrn-<depth>-<width>, or as in torchvision.

    Raises:
        ValueError: says which names are close to it.
    """
    if is_wide(name):
        parse_name(name)
    elif name not in _torchvision_names():
        close = difflib.get_close_matches(name.lower(), _torchvision_names(), 3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(
            "expected wrn-<depth>-<width>, as wrn-28-10, or a network of torchvision for"
            f" classification, as resnet18, got {name!r}{hint}"
        )


def is_wide(name: str) -> bool:
    """Return whether a name is meant to be that of a wide residual network."""
    return name.lower().startswith("wrn")


def photographs(name: str) -> Photographs:
    """Return what torchvision's weights of its network `name` were trained on."""
    transform = published(name).transforms()
    return Photographs(transform.crop_size[0], tuple(transform.mean), tuple(transform.std))


def published(name: str) -> Any:
    """Return where torchvision has the weights of its network `name`, and what they are."""
    from torchvision import models

    return models.get_model_weights(name).DEFAULT


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the last layer, whose outputs are classes."""
    names = [name for name, _ in model.named_parameters()]
    layer = names[-1].rpartition(".")[0]
    return tuple(name for name in names if name.rpartition(".")[0] == layer)


def freeze(model: nn.Module) -> None:
    """Let the last layer train alone, and all before it stay as in evaluation."""
    head = head_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    model.eval()
    model.get_submodule(head[0].rpartition(".")[0]).train()


@cache
def _torchvision_names() -> tuple[str, ...]:
    from torchvision import models

    return tuple(models.list_models(module=models))


def _from_torchvision(
    name: str, classes: int, shape: tuple[int, int, int], pretrained: bool
) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"num_classes": classes}
    if name.startswith("vit_"):
        options["image_size"] = shape[1]
    elif name.startswith("maxvit_"):
        options["input_size"] = shape[1:]
    elif name in AUXILIARY:
        # Else it warns that what it does without being asked will change.
        options |= {"aux_logits": False, "init_weights": True}
        options["transform_input"] = pretrained
    model: nn.Module = models.get_model(name, **options)
    return model


def _require_images(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise what the network raises at such images; nothing is computed."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    nowhere = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    model.eval()
    with torch.no_grad():
        functional_call(model, nowhere, torch.empty(2, *shape, device="meta"))
    model.train()


class Block(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, added to its input.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            if inputs != outputs or stride != 1
            else None
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active = F.relu(self.norm1(x_BCHW))
        shortcut = x_BCHW if self.shortcut is None else self.shortcut(active)
        hidden = self.dropout(F.relu(self.norm2(self.conv1(active))))
        residual: Tensor = self.conv2(hidden)
        return shortcut + residual


class WideResNet(nn.Sequential):
    """WRN-depth-width: images_BCHW -> logits_BK, for images of any size.

    Args:
        depth: layers in the paper's count, 6 n + 4 for n blocks a stage.
        width: factor of the stages' 16, 32 and 64 channels.
        classes: K.
        channels: C of the images.
        dropout: probability between the two convolutions of a block.
        zero_head: start with a classifier of zeros, so that every class is equally
            likely at first.
        layout: "standard", or "davda54" for that example's network, which has one block
            more in each stage, so that his "16-8" is WRN-22-8, and starts differently.

    Raises:
        ValueError: no such depth, width or layout.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        classes: int,
        *,
        channels: int = 3,
        dropout: float = 0.0,
        zero_head: bool = False,
        layout: str = "standard",
    ) -> None:
        _require_size(depth, width)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {[*LAYOUTS]}, got {layout!r}")
        blocks = (depth - 4) // 6 + LAYOUTS[layout].more_blocks
        widths = [16, 16 * width, 32 * width, 64 * width]
        stages = [
            _stage(blocks, inputs, outputs, stride, dropout)
            for inputs, outputs, stride in zip(
                widths[:-1], widths[1:], (1, 2, 2), strict=True
            )
        ]
        super().__init__(
            OrderedDict(
                stem=nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
                stage1=stages[0],
                stage2=stages[1],
                stage3=stages[2],
                norm=nn.BatchNorm2d(widths[-1]),
                active=nn.ReLU(),
                pool=GlobalMean(),
                head=nn.Linear(widths[-1], classes),
            )
        )
        _initialise(self, LAYOUTS[layout].fan, zero_head)


class GlobalMean(nn.Module):
    """Mean over all pixels, whatever the size of the image."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return reduce(x_BCHW, "b c h w -> b c", "mean")


def parse_name(name: str) -> tuple[int, int]:
    """Return depth and width of a name such as "wrn-28-10".

    Raises:
        ValueError: `name` is not of that form, or there is no such network.
    """
    match name.lower().split("-"):
        case ["wrn", depth, width] if depth.isdecimal() and width.isdecimal():
            _require_size(int(depth), int(width))
            return int(depth), int(width)
    raise ValueError(f"model must look like wrn-28-10, got {name!r}")


def _require_size(depth: int, width: int) -> None:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 10, 16, 22, 28, ..., got {depth}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


def _stage(
    blocks: int, inputs: int, outputs: int, stride: int, dropout: float
) -> nn.Sequential:
    first = Block(inputs, outputs, stride, dropout)
    rest = [Block(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


@torch.no_grad()
def _initialise(
    model: nn.Module, fan: Literal["fan_in", "fan_out"], zero_head: bool
) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if zero_head:
                nn.init.zeros_(module.weight)
