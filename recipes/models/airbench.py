"""The networks of airbench, fast on CIFAR: Jordan, 2024, arXiv:2404.00498.

Sizes and first weights are those of github.com/KellerJordan/cifar10-airbench, legacy/.
Shapes: B images, C channels, H x W pixels, K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F

WHITENING, WHITENING_BIAS = "whiten.weight", "whiten.bias"
LEAST = 9  # pixels of a side: one is left of 9 after the filter of 2x2 and three poolings
SCALE = 1 / 9


class Size(NamedTuple):
    """What one network of the family has and another has not."""

    widths: tuple[int, int, int]
    """Channels of the three groups."""
    deep: bool
    """Whether a group has a third convolution, with a residual."""
    momentum: float
    """Share of a batch in the running statistics of BatchNorm."""


SIZES = {
    "airbench94": Size((64, 256, 256), deep=False, momentum=0.4),
    "airbench95": Size((128, 384, 384), deep=False, momentum=0.4),
    "airbench96": Size((128, 384, 512), deep=True, momentum=0.1),
}


class Group(nn.Module):
    """conv-pool-BN-GELU-conv-BN-GELU, of half the pixels.

    A deep group has conv-BN after that, to which the activation before the last two
    convolutions is added, and the last GELU.
    """

    def __init__(self, inputs: int, outputs: int, size: Size) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs), _norm(outputs, size.momentum)
        self.conv2, self.norm2 = _conv(outputs, outputs), _norm(outputs, size.momentum)
        self.deep = size.deep
        if size.deep:
            self.conv3, self.norm3 = _conv(outputs, outputs), _norm(outputs, size.momentum)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first = F.gelu(self.norm1(F.max_pool2d(self.conv1(x_BCHW), 2)))
        second = F.gelu(self.norm2(self.conv2(first)))
        return F.gelu(self.norm3(self.conv3(second)) + first) if self.deep else second


class Head(nn.Module):
    """The largest value of each channel, a linear layer without bias, divided by 9."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        largest = F.max_pool2d(x_BCHW, x_BCHW.shape[2:]).flatten(1)
        return SCALE * self.linear(largest)  # type: ignore[no-any-return]


class Airbench(nn.Sequential):
    """A network of airbench: images_BCHW -> logits_BK, for images of 9x9 pixels or more.

    A frozen filter of 2x2 pixels whitens the image (see `whitening`; until it is fitted it
    is random), three groups halve it, and of the 3x3 pixels that are left of 32x32 the
    largest count. The weights of BatchNorm are frozen at 1. Convolutions start as the
    identity on their first inputs.

    Args:
        name: airbench94, airbench95 or airbench96.
        classes: K.
        channels: C of the images.
        widths: channels of the three groups; None is those of the name.

    Raises:
        ValueError: there is no such network, or a width is not positive.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        *,
        channels: int = 3,
        widths: Sequence[int] | None = None,
    ) -> None:
        if name not in SIZES:
            raise ValueError(f"expected one of {', '.join(SIZES)}, got {name!r}")
        size = SIZES[name]
        first, second, third = _checked(size.widths if widths is None else widths)
        whitened = 2 * channels * 2 * 2
        whiten = nn.Conv2d(channels, whitened, 2)
        whiten.weight.requires_grad_(False)
        nn.init.zeros_(whiten.bias)  # type: ignore[arg-type]
        super().__init__(
            OrderedDict(
                whiten=whiten,
                active=nn.GELU(),
                group1=Group(whitened, first, size),
                group2=Group(first, second, size),
                group3=Group(second, third, size),
                head=Head(third, classes),
            )
        )


def whitening(images_BCHW: Tensor, eps: float = 5e-4) -> Tensor:
    """Return the filters that whiten the patches of 2x2 pixels, and their negatives.

    +-v_i / sqrt(l_i + eps), with mean of p p^T over all patches p = sum_i l_i v_i v_i^T

    so that the outputs of the first half have the mean product 1 with themselves, and 0
    with each other, up to eps. Patches are not centred. The largest l_i is the first.

    Args:
        images_BCHW: as the network takes them, normalised; some thousand.
        eps: keeps directions in which patches hardly differ from being blown up.

    Returns:
        float32, on the images' device, shape (2 n, C, 2, 2) with n = 4 C.

    Source:
        `init_whitening_conv` of github.com/KellerJordan/cifar10-airbench; in float64 here.
    """
    b, channels, h, w = images_BCHW.shape
    total = torch.zeros(4 * channels, 4 * channels, dtype=torch.float64)
    for some in torch.split(
        images_BCHW.cpu().double(), 500
    ):  # All patches fill the memory.
        patches = F.unfold(some, 2)
        total += einsum(patches, patches, "b i p, b j p -> i j")
    values, vectors = torch.linalg.eigh(total / (b * (h - 1) * (w - 1)))
    filters = rearrange(vectors / (values + eps).sqrt(), "i n -> n i").flip(0)
    both = torch.cat([filters, -filters]).view(-1, channels, 2, 2)
    return both.to(images_BCHW.device, torch.float32)


def _checked(widths: Sequence[int]) -> Sequence[int]:
    if len(widths) != 3 or min(widths) < 1:
        raise ValueError(f"expected three positive widths, got {[*widths]}")
    return widths


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.detach()[:inputs])
    return conv


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm
