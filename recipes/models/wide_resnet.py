"""Wide residual networks: Zagoruyko and Komodakis, 2016, arXiv:1605.07146.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

MOST = 10_000  # of depth and width; the deepest that is published has about a thousand


class Layout(NamedTuple):
    """A reading of "WRN-depth-width", against the paper's."""

    more_blocks: int
    """Blocks in each stage beyond those that the depth counts."""
    fan: Literal["fan_in", "fan_out"]
    """Divisor of the variance of the initial convolutions."""


LAYOUTS = {
    # fan_out as in the authors' code: standard deviation sqrt(2 / (k * k * outputs))
    "standard": Layout(0, "fan_out"),
    # github.com/davda54/sam, example/model/wide_res_net.py
    "davda54": Layout(1, "fan_in"),
}


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
    if not 10 <= depth <= MOST or (depth - 4) % 6:
        raise ValueError(f"depth must be 10, 16, 22, 28, ..., below {MOST}, got {depth}")
    if not 1 <= width <= MOST:
        raise ValueError(f"width must be 1 to {MOST}, got {width}")


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
