"""Presets: settings under a name, those of papers and of other code among them."""

from typing import Any

from recipes.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # Seconds on a laptop. Digits are 8x8, and a mirrored 3 is no 3.
    "digits": {
        "data": "digits",
        "model": "wrn-10-1",
        "epochs": 16,
        "batch_size": 64,
        "lr": 0.2,
        "crop_padding": 1,
        "flip": False,
    },
    # A WRN on CIFAR on a CPU: far from published accuracy, but minutes and not days.
    "small-wrn": {"model": "wrn-10-1", "epochs": 5},
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
# Long enough for SGD to learn wrong labels by heart.
PRESETS["digits-noise"] = PRESETS["digits"] | {
    "epochs": 80,
    "lr": 0.1,
    "label_noise": 0.4,
}
# github.com/KellerJordan/cifar10-airbench, legacy/: arXiv:2404.00498. Its learning rate is
# of summed losses, and times 1 + 1 / (1 - momentum): for the mean over a batch of 1024 it
# is 11.5 / (1 + 1 / 0.15) = 1.5. Its decay is apart from that, here it is over it.
# It takes 9.9 epochs; here they are whole. Its 5,000 images for the whitening are the first
# ones, here drawn by the seed, as folders are in the order of their classes.
MEAN = 1 / (1 + 1 / 0.15)
PRESETS["airbench94"] = {
    "model": "airbench94",
    "whitening_epochs": 3,
    "epochs": 10,
    "batch_size": 1024,
    "lr": 11.5 * MEAN,
    "schedule": "triangle",
    "momentum": 0.85,
    "nesterov": True,
    "weight_decay": 0.0153 / 11.5,
    "norm_bias_lr": 64.0,
    "label_smoothing": 0.2,
    "lookahead": 0.95,
    "alternate_flip": True,
    "crop_padding": 2,
    "padding": "reflect",
    "views": 6,
}
PRESETS["airbench95"] = PRESETS["airbench94"] | {
    "model": "airbench95",
    "epochs": 15,
    "lr": 10 * MEAN,
    "weight_decay": 0.0153 / 10,
}
# Its cutout is of every image, and wholly inside; here half of the images have one.
PRESETS["airbench96"] = PRESETS["airbench94"] | {
    "model": "airbench96",
    "epochs": 37,
    "lr": 9 * MEAN,
    "rise": 0.1,
    "fall_to": 0.0,
    "weight_decay": 0.012 / 9,
    "crop_padding": 4,
    "cutout": 12,
}
# CIFAR on a CPU, in five minutes and not days: 1e8 operations for the gradient of an image,
# and ten passes over 50,000, as SAM takes two in the last quarter of the eight epochs.
PRESETS["small"] = PRESETS["airbench94"] | {
    "widths": (32, 64, 64),
    "epochs": 8,
    "sam_last": 0.25,
    "batch_size": 512,
    "lr": 11.5 * MEAN / 2,
    "views": 2,
}
PRESETS["davda54-adaptive"] = PRESETS["davda54"] | {
    "method": "asam(0.0, adapts=everything)",
    "rho": 2.0,
}
PRESETS["foret2021-cifar100"] = PRESETS["foret2021"] | {"data": "cifar100", "rho": 0.1}


# Those that take bfloat16 where a CPU has instructions for it.
FAST = ("airbench94", "airbench95", "airbench96", "small")


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
