"""Networks to time, with a batch, from bound by arithmetic to bound by overhead."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipes.models.wide_resnet import WideResNet, parse_name

LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.01, 0.9, 5e-4, 0.05  # that all are trained with


class Network(NamedTuple):
    """A network and the batch that it is timed on."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    """Classes, one for each row of what the model returns."""


class Transformer(nn.Module):
    """A small language model of PyTorch's own layers: tokens_BL -> logits_(BL)V."""

    def __init__(self, layers: int, width: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits of every position, in one row each."""
        hidden = self.layers(self.tokens(tokens_BL) + self.positions)
        logits: Tensor = self.head(hidden).flatten(0, 1)
        return logits


def mlp(batch: int, hidden: int = 7) -> Network:
    """Return eight layers of width 64: next to no arithmetic."""
    layers = [layer for _ in range(hidden) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return Network("mlp", model, torch.randn(batch, 64), torch.randint(10, (batch,)))


def small_mlp(batch: int) -> Network:
    """Return one layer, for tests: it compiles in a fraction of the time."""
    return mlp(batch, hidden=0)


def small_convolution(batch: int) -> Network:
    """Return one convolution with its statistics, channels last, for tests."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(8 * 8 * 8, 10))
    return Network(
        "convolution-small",
        model.to(memory_format=torch.channels_last),
        torch.randn(batch, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        torch.randint(10, (batch,)),
    )


def wide_mlp(batch: int) -> Network:
    """Return four layers of width 2048: many parameters, each used once for an example."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(2048, 10))
    images = torch.randn(batch, 2048)
    return Network("mlp-2048", model, images, torch.randint(10, (batch,)))


def transformer(batch: int) -> Network:
    """Return four layers of width 64 on sequences of 64."""
    tokens = torch.randint(64, (batch, 64))
    model = Transformer(4, 64, 64, vocabulary=64)
    return Network("transformer", model, tokens, torch.randint(64, (64 * batch,)))


def large_transformer(layers: int, width: int, batch: int) -> Network:
    """Return a transformer of many parameters on sequences of 16."""
    tokens = torch.randint(10_000, (batch, 16))
    model = Transformer(layers, width, 16, vocabulary=10_000)
    return Network("large", model, tokens, torch.randint(10_000, (16 * batch,)))


def wide_resnet(name: str, batch: int, side: int, layout: str = "standard") -> Network:
    """Return a wide residual network, channels last, on square images."""
    model = WideResNet(*parse_name(name), 10, layout=layout)
    images = torch.randn(batch, 3, side, side)
    return Network(
        name,
        model.to(memory_format=torch.channels_last),
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(10, (batch,)),
    )


NETWORKS: dict[str, Callable[[int], Network]] = {
    "mlp": mlp,
    "mlp-small": small_mlp,
    "convolution-small": small_convolution,
    "mlp-2048": wide_mlp,
    "transformer": transformer,
    "transformer-18m": lambda batch: large_transformer(6, 384, batch),
    "transformer-100m": lambda batch: large_transformer(12, 768, batch),
    "wrn-10-1 8x8": lambda batch: wide_resnet("wrn-10-1", batch, 8),
    "wrn-10-1": lambda batch: wide_resnet("wrn-10-1", batch, 32),
    "wrn-16-2": lambda batch: wide_resnet("wrn-16-2", batch, 32),
    "wrn-16-4": lambda batch: wide_resnet("wrn-16-4", batch, 32),
    "wrn-40-2": lambda batch: wide_resnet("wrn-40-2", batch, 32),
    "wrn-16-8": lambda batch: wide_resnet("wrn-16-8", batch, 32),
    "wrn-28-10": lambda batch: wide_resnet("wrn-28-10", batch, 32),
    "davda54 wrn-16-8": lambda batch: wide_resnet("wrn-16-8", batch, 32, "davda54"),
}


def build(name: str, batch: int, device: str = "cpu") -> Network:
    """Return the network `name` and its batch, the same at every call."""
    torch.manual_seed(0)
    network = NETWORKS[name](batch)
    return network._replace(
        name=name,
        model=network.model.to(device),
        inputs=network.inputs.to(device),
        targets=network.targets.to(device),
    )
