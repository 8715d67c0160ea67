"""Networks by name: wide residual ones, airbench's, torchvision's for classification."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from recipes.models import airbench
from recipes.models.wide_resnet import WideResNet, parse_name
from recipes.roles import BELOW_1, Group, Range, Role, Rule, at_least, setting

WIDTHS = Range(
    lambda widths: len(widths) == 3 and all(1 <= width <= 10**6 for width in widths),
    "three numbers from 1 to 1000000",
)
# torchvision's, with heads beside the last one that only their first training used: name
# -> how the names of those heads' tensors begin.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@dataclass(frozen=True, kw_only=True)
class Network(Group, role=Role.FIXED):
    """The network, and the weights that it starts from."""

    weights: str = "none"
    """Weights that a network starts from: none, new ones; default, those that torchvision
    has for it, downloaded once; or a file of a state dict, .safetensors or .pth. The last
    layer starts anew where it has other classes."""
    freeze: bool = False
    """Training and perturbation of the last layer alone. The rest stays, statistics and
    all, and computes as in evaluation."""
    layout: Literal["standard", "davda54"] = "standard"
    """Counting of depth. davda54 has one more block in each stage, as his example."""
    zero_head: bool = setting(False, role=Role.RESULT)
    """Zeros as the first weights of the classifier."""
    dropout: float = setting(0.0, BELOW_1, role=Role.RESULT)
    """Dropout between the convolutions of a block, 0 to below 1."""
    widths: tuple[int, ...] | None = setting(None, WIDTHS)
    """Channels of airbench's three groups, as 32 64 64, which a CPU trains in minutes. None
    is those of its name: 64 256 256 for airbench94, 128 384 384, 128 384 512."""
    whitening_epochs: int | None = setting(None, at_least(1), role=Role.RESULT)
    """Epochs after which the bias of airbench's whitening layer stays as it is. None is
    never."""

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread."""
        yield from super().unread()
        yield "freeze", self.weights != "none" or not self.freeze, "--weights with it"


class Photographs(NamedTuple):
    """The images that torchvision's weights of a network were trained on."""

    side: int
    """Pixels."""
    mean: tuple[float, ...]
    """Mean pixel of each channel, in [0, 1]."""
    std: tuple[float, ...]


def make(
    name: str,
    classes: int,
    *,
    shape: tuple[int, int, int],
    dropout: float = 0.0,
    zero_head: bool = False,
    layout: str = "standard",
    widths: tuple[int, ...] | None = None,
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
        widths: of an `Airbench` alone, as there.
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
        if is_airbench(name):
            model = _airbench(name, classes, shape, widths)
        else:
            model = _from_torchvision(name, classes, shape, pretrained)
        _require_images(model, shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' * (shape[0] > 1)}"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} takes no images of {size}: {reason}") from error
    return model


def require_known(name: str) -> None:
    """Raise unless a network is called so: as a WRN, of airbench, or as in torchvision.

    Raises:
        ValueError: says which names are close to it.
    """
    if is_wide(name):
        parse_name(name)
    elif not is_airbench(name) and name not in _torchvision_names():
        known = (*airbench.SIZES, *_torchvision_names())
        close = difflib.get_close_matches(name.lower(), known, 3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(
            "expected wrn-<depth>-<width>, as wrn-28-10, airbench94, 95 or 96, or a network"
            f" of torchvision for classification, as resnet18, got {name!r}{hint}"
        )


def is_wide(name: str) -> bool:
    """Return whether a name is meant to be that of a wide residual network."""
    return name.lower().startswith("wrn")


def is_airbench(name: str) -> bool:
    """Return whether a name is that of a network of airbench."""
    return name in airbench.SIZES


def is_published(name: str) -> bool:
    """Return whether a name is that of a network of torchvision, with its weights."""
    return not is_wide(name) and not is_airbench(name)


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


def _airbench(
    name: str, classes: int, shape: tuple[int, int, int], widths: tuple[int, ...] | None
) -> nn.Module:
    if min(shape[1:]) < airbench.LEAST:
        raise ValueError(f"expected {airbench.LEAST} pixels or more a side")
    return airbench.Airbench(name, classes, channels=shape[0], widths=widths)


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
