"""Presets: settings under a name, those of papers and of other code among them."""

from typing import Any

from recipes.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # A minute on a laptop. Digits are 8x8, and a mirrored 3 is no 3.
    "digits": {
        "data": "digits",
        "model": "wrn-10-1",
        "epochs": 80,
        "batch_size": 64,
        "crop_padding": 1,
        "flip": False,
    },
    # CIFAR on a CPU: far from published accuracy, but minutes and not days.
    "small": {"model": "wrn-10-1", "epochs": 5},
    # davda54/sam, example/train.py. His smoothing gives s / (K - 1) to each wrong class;
    # PyTorch's gives s / K to every class, so 0.1 there is 0.1 * 10 / 9 here.
    "davda54": {
        "model": "wrn-16-8",
        "layout": "davda54",
        "zero_head": True,
        "label_smoothing": 0.1 * 10 / 9,
        "cutout": 16,
        "schedule": "step",
    },
    # Foret et al., 2021, arXiv:2010.01412, table 1: WRN-28-10 with basic augmentation.
    # Nesterov, the decay in the loss and the clip are those of their code. They perturb on
    # each of several devices, as this does under torchrun; on one, for the batch.
    "foret2021": {
        "model": "wrn-28-10",
        "batch_size": 256,
        "nesterov": True,
        "decay_in_loss": True,
        "clip_norm": 5.0,
    },
    # S-Sairam/sam-optimizer, src/train.py: plain cross entropy, crops and flips, cosine.
    # He sets lr once an epoch, keeps the last, smaller batch, counts the statistics of both
    # passes, and normalises by 0.2023, 0.1994, 0.2010, which are no standard deviations of
    # CIFAR-10's pixels; here they are measured.
    "sairam": {"model": "wrn-28-10"},
    # Photographs of one's own; `resolve` adds their size. Not tuned on any data.
    "finetune": {
        "data": "folder",
        "model": "resnet18",
        "weights": "default",
        "crop_scale": 0.25,
        "crop_padding": 0,
        "epochs": 10,
        "batch_size": 32,
        "lr": 0.005,
        "weight_decay": 1e-4,
        "warmup_epochs": 1.0,
        "compile": "no",  # It takes minutes, and many images to pay for it.
    },
}
PRESETS["davda54-adaptive"] = PRESETS["davda54"] | {
    "method": "asam(0.0, adapts=everything)",
    "rho": 2.0,
}
PRESETS["foret2021-cifar100"] = PRESETS["foret2021"] | {"data": "cifar100", "rho": 0.1}


def preset_of(name: str) -> dict[str, Any]:
    """Return the settings of a preset; "auto" has none before the data are known.

    Raises:
        ConfigError: there is no such preset.
    """
    if name == "auto":
        return {}
    if name not in PRESETS:
        raise ConfigError(f"--preset: expected auto or one of {[*PRESETS]}, got {name!r}")
    return PRESETS[name]
