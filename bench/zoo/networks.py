"""The networks of torchvision, timm and transformers, small enough to be trained here."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.zoo.habits import Case, Criterion

CLASSES = 10

# As small as the network allows; others are shown 64 pixels.
SIZES = {"inception_v3": 299, "maxvit_t": 224, "squeezenet1_0": 96, "alexnet": 96}

# Of networks of more parameters, only tensors of at most SMALL entries are trained: every
# layer takes part, and all fits into memory.
LARGE, SMALL = 100_000_000, 1_000_000
# Of more than 600 million parameters, of which 24 GiB hold too few copies in float64.
IN_FLOAT32 = "vit_h_14", "regnet_y_128gf"

TIMM = [
    "resnet10t",
    "seresnext26t_32x4d",
    "res2net50_14w_8s",
    "gernet_s",
    "repvgg_a0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_050",
    "efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "ghostnet_050",
    "tinynet_e",
    "lcnet_050",
    "fbnetc_100",
    "hardcorenas_a",
    "mnasnet_small",
    "convnext_atto",
    "convnextv2_atto",
    "nfnet_f0",
    "dm_nfnet_f0",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "poolformer_s12",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "levit_128s",
    "edgenext_xx_small",
    "fastvit_t8",
    "densenet121",
    "dla34",
    "hrnet_w18_small",
]
# Whose configuration holds the size of its images.
OF_PATCHES = ("vit_", "deit_", "cait_", "swin_", "mixer_", "gmlp_", "levit_")
SMALLER: dict[str, dict[str, Any]] = {
    name: {"depths": (1, 1, 1, 1)} for name in ("nfnet_f0", "dm_nfnet_f0")
}


class Scores(nn.Module):
    """A network of transformers that gives scores alone."""

    def __init__(self, network: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self._pick = network, pick

    def forward(self, inputs: Any) -> Tensor:
        """Return scores, shape (examples, classes)."""
        return self._pick(self.network(inputs))


def images(size: int, examples: int = 4) -> Tensor:
    """Return images, shape (examples, 3, size, size)."""
    return torch.randn(examples, 3, size, size, dtype=torch.float64)


def classes(examples: int = 4) -> Tensor:
    """Return targets, shape (examples,)."""
    return torch.randint(CLASSES, (examples,))


def first_output(model: nn.Module) -> Criterion:
    """Return the cross entropy of the scores, with those of auxiliary heads."""

    def criterion(outputs: Any, targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return F.cross_entropy(outputs, targets)
        heads = [head for head in outputs if head is not None]
        return torch.stack([F.cross_entropy(head, targets) for head in heads]).sum()

    return criterion


def of_torchvision() -> Iterator[Case]:
    """Yield every classification network of torchvision."""
    from torchvision import models

    for name in models.list_models(module=models):
        size = SIZES.get(name, 64)
        options: dict[str, Any] = {"num_classes": CLASSES, "weights": None}
        if name.startswith("vit_"):
            size = 56 if name == "vit_h_14" else 64
            options["image_size"] = size
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        yield Case(
            f"torchvision {name}",
            partial(_trainable, partial(models.get_model, name, **options)),
            partial(images, size),
            classes,
            first_output,
            dtype=torch.float32 if name in IN_FLOAT32 else torch.float64,
        )


def _trainable(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    if sum(p.numel() for p in model.parameters()) > LARGE:
        for p in model.parameters():
            p.requires_grad_(p.numel() <= SMALL)
    return model


def of_timm() -> Iterator[Case]:
    """Yield thirty networks of timm, the last again with gradient checkpointing."""
    import timm

    def make(name: str, *, checkpointing: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
        if checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        return model

    for name in TIMM:
        options = dict(SMALLER.get(name, {}))
        if name.startswith(OF_PATCHES):
            options["img_size"] = 64
        data = partial(images, 64), classes, first_output
        yield Case(f"timm {name}", partial(make, name, **options), *data)
    for name in ("resnet10t", "vit_tiny_patch16_224", "densenet121", "convnext_atto"):
        options = {"img_size": 64} if name.startswith("vit_") else {}
        made = partial(make, name, checkpointing=True, **options)
        yield Case(f"timm {name}, checkpointing", made, *data)


def of_transformers() -> Iterator[Case]:
    """Yield networks of transformers of a few thousand parameters, as they are made."""
    import transformers

    hf: Any = transformers

    words = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "intermediate_size": 32}
    decoders = {**words, **heads, "num_key_value_heads": 1, "pad_token_id": 0}
    gpt = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
    small: dict[str, tuple[Any, Any]] = {
        "Bert": (hf.BertForSequenceClassification, hf.BertConfig(**words, **heads)),
        "Roberta": (
            hf.RobertaForSequenceClassification,
            hf.RobertaConfig(**words, **heads, max_position_embeddings=64),
        ),
        "DistilBert": (
            hf.DistilBertForSequenceClassification,
            hf.DistilBertConfig(
                vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=32
            ),
        ),
        "Electra": (
            hf.ElectraForSequenceClassification,
            hf.ElectraConfig(**words, **heads, embedding_size=16),
        ),
        "Albert": (
            hf.AlbertForSequenceClassification,
            hf.AlbertConfig(**words, **heads, embedding_size=16),
        ),
        "GPT2": (hf.GPT2ForSequenceClassification, hf.GPT2Config(**gpt)),
        "GPTNeoX": (
            hf.GPTNeoXForSequenceClassification,
            hf.GPTNeoXConfig(**words, **heads, pad_token_id=0),
        ),
        "Llama": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**decoders)),
        "Mistral": (hf.MistralForSequenceClassification, hf.MistralConfig(**decoders)),
        "Qwen2": (hf.Qwen2ForSequenceClassification, hf.Qwen2Config(**decoders)),
        "ViT": (
            hf.ViTForImageClassification,
            hf.ViTConfig(
                hidden_size=16, num_hidden_layers=2, **heads, image_size=16, patch_size=8
            ),
        ),
        "ConvNext": (
            hf.ConvNextForImageClassification,
            hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
        ),
    }

    def make(name: str, *, checkpointing: Any = None) -> nn.Module:
        kind, config = small[name]
        config.num_labels = CLASSES
        network = kind(config).train()
        if checkpointing is not None:
            how = {"use_reentrant": checkpointing}
            names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            enable: Any = next(getattr(network, n) for n in names if hasattr(network, n))
            enable(how)
        return Scores(network, lambda outputs: outputs.logits)

    def data(name: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Any]:
        of_images = name in ("ViT", "ConvNext")
        size = 16 if name == "ViT" else 32
        read = partial(torch.randint, 2, 32, (4, 6))
        return partial(images, size) if of_images else read, classes, first_output

    for name in small:
        yield Case(f"transformers {name}", partial(make, name), *data(name))
    for name in ("Bert", "GPT2", "Llama", "ViT"):
        for reentrant in (False, True):
            kind = "checkpointing, reentrant" if reentrant else "checkpointing"
            made = partial(make, name, checkpointing=reentrant)
            yield Case(f"transformers {name}, {kind}", made, *data(name))
