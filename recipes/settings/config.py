"""The settings of the recipes: fields, their rules, and how they are read and written."""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import torch
import tyro

from recipes.data.sources import choose_source, root_of
from recipes.errors import ConfigError
from recipes.models import networks
from recipes.settings import method_expression
from recipes.settings.presets import PRESETS, preset_of
from recipes.terminal.hardware import emulated
from samfn.compiled import missing_compiler
from samfn.storage import files

PROGRAM = "python -m recipes.cifar_wrn"
CONFIG_FILE = "config.toml"
# Names of files are bytes; those of them that are no UTF-8 stand in it as they are.
AS_TOML = {"encoding": "utf-8", "errors": "surrogateescape"}

METHOD_HELP = (
    'How a batch becomes the gradient that descends, as sam, "asam(eta=0.1)" or'
    f' "every(gsam, 5)": one of {", ".join(method_expression.MAKERS)}.'
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a network for images with sharpness-aware minimisation."""

    preset: str = "auto"
    """Named settings to start from: digits, small, davda54, davda54-adaptive, sairam,
    foret2021, foret2021-cifar100, finetune, or none. auto takes finetune for networks of
    torchvision, digits for the digits, else small on a CPU and davda54 on a GPU."""
    config: Path | None = None
    """TOML file of settings. It overrides the preset, the command line overrides it."""

    data: Literal["auto", "cifar10", "cifar100", "folder", "digits"] = "auto"
    """Images to train on. auto takes class folders or CIFAR-10 from --data-dir, else
    downloads CIFAR-10, else falls back on the digits that scikit-learn brings."""
    data_dir: Path | None = None
    """Directory of train/<class>/* and test/<class>/* images, or of CIFAR. None is, for
    CIFAR, a directory in the user's cache."""
    allow_modified_data: bool = False
    """Take CIFAR even if its files are not the published ones."""
    image_size: int | None = None
    """Pixels to which the shorter side of a folder's images is resized; what the longer one
    has beside the middle is cut off. None keeps them as they are; finetune takes what
    torchvision's weights of the network were trained on."""
    label_noise: float = 0.0
    """Share of the training labels that are replaced by another class, 0 to 1."""
    validation: float = 0.0
    """Share of the training set held out to choose the best epoch by, 0 to below 1; its
    labels stay clean. With 0 the best epoch is chosen by the test set."""

    crop_scale: float = 1.0
    """Least share of a training image that is cut out at random and enlarged to the size of
    the image, above 0 to 1; for photographs. 1 is off."""
    crop_padding: int = 4
    """Largest shift of a training image, in pixels. 0 is off."""
    flip: bool = True
    """Mirror half of the training images."""
    cutout: int = 0
    """Side of the square cut out of half of the training images, in pixels. 0 is off."""
    policy: Literal["none", "autoaugment", "trivialaugment"] = "none"
    """Transform each training image, after crop and flip, as AutoAugment found it for
    CIFAR-10, or by one operation of TrivialAugment. Takes 0.2 ms an image."""
    mixup_alpha: float = 0.0
    """Blend each training image and its label with another's, the share drawn from
    Beta(alpha, alpha). 0 is off."""
    cutmix_alpha: float = 0.0
    """Paste a rectangle of another image into each training image, and mix the labels by
    area; alpha as for mixup. 0 is off. With both on, each batch has one of them."""

    model: str = "wrn-16-8"
    """Network: wrn-<depth>-<width>, or one of torchvision's for classification, as
    resnet18, efficientnet_b0 or vit_b_16."""
    weights: str = "none"
    """What a network starts from: none, new ones; default, those that torchvision has for
    it, downloaded once; or a file of a state dict, .safetensors or .pth. The last layer
    starts anew where it has other classes."""
    freeze: bool = False
    """Train the last layer alone. The perturbation, and so what is sharp, is its alone; the
    rest stays, statistics and all, and computes as in evaluation."""
    layout: Literal["standard", "davda54"] = "standard"
    """Counting of depth. davda54 has one more block in each stage, as his example."""
    zero_head: bool = False
    """Start with a classifier of zeros."""
    dropout: float = 0.0
    """Dropout between the convolutions of a block, 0 to below 1."""

    method: Annotated[str, tyro.conf.arg(help=METHOD_HELP)] = "sam"
    rho: float = 0.05
    """Radius of the perturbation. 0 is the plain optimizer, with one pass a step."""
    rho_schedule: Literal["constant", "linear", "proportional"] = "constant"
    """Radius over time: linear goes from rho to rho-final at the end, proportional from rho
    where the learning rate is lr to rho-final where it is 0. A rho of 0 stays 0."""
    rho_final: float = 0.0
    """Radius that a linear or proportional schedule leads to."""
    same_dropout: bool = False
    """Use one dropout mask for both passes of a step."""

    epochs: int = 200
    """Passes over the training set."""
    batch_size: int = 128
    """Examples in a step. A last, smaller batch of an epoch is left out."""
    optimizer: Literal["sgd", "adam", "adamw", "nadam"] = "sgd"
    """Base optimizer. adamw has decoupled weight decay. All but sgd want an lr of about
    0.001."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Adam's beta1 and beta2: decay of the running means of the gradient and its square."""
    weight_decay: float = 5e-4
    """Weight decay."""
    decay_norm: bool = True
    """Let weight decay act on normalisation and biases, too."""
    decay_in_loss: bool = False
    """Put weight decay into the loss, so that it bends the perturbation too."""
    clip_norm: float | None = None
    """Largest norm of the final gradient. None is off."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, 0 to below 1; in training only."""
    schedule: Literal[
        "cosine", "polynomial", "one-cycle", "warm-restarts", "step", "constant"
    ] = "cosine"
    """Learning rate over time: cosine or polynomial, with power 0.9, to lr-final;
    one-cycle, from lr / 25 up to lr and down to almost 0; warm-restarts, a cosine again and
    again; step, times step-factor at each of the milestones."""
    lr_final: float = 0.0
    """Learning rate that a cosine or polynomial schedule, or each of the restarts, leads
    to."""
    milestones: tuple[int, ...] | None = None
    """Epochs after which the step schedule multiplies the learning rate. None is 30, 60 and
    80 % of all."""
    step_factor: float = 0.2
    """Factor of the learning rate in the step schedule, above 0 to 1."""
    restart_epochs: int = 10
    """Epochs of the first cosine of warm-restarts."""
    restart_growth: int = 2
    """Length of each further cosine, relative to the one before."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0."""

    ema_decay: float | None = None
    """Decay of the moving average of the weights, for example 0.999. With it, the average
    is evaluated beside the weights, and exported in the end. None is off."""
    ema_start: float = 0.0
    """Epochs before the average begins."""
    ema_copy: int | None = None
    """Epoch after which training goes on from the average. None is never."""
    patience: int | None = None
    """Epochs without a new best accuracy after which the run ends. None is never."""

    average_best: int | None = None
    """Also average the weights of this many best epochs at the end, with statistics of
    BatchNorm of their own, into average.safetensors. None is off."""

    select: Literal["all", "easy-skipped", "loss", "sharpness"] = "all"
    """Images that an epoch trains on. easy-skipped leaves out what was predicted right, and
    with confidence, in several scans; loss and sharpness draw a share of all, by the loss
    or by how much it grows under the perturbation. Schedules go by epochs as ever."""
    select_every: int = 5
    """Epochs from one scan of all images to the next."""
    select_with: Literal["weights", "average"] = "weights"
    """Weights that scan: those that train, or their moving average."""
    select_share: float = 0.5
    """Share of the images that loss and sharpness draw, above 0 to 1."""
    easy_confidence: float = 0.5
    """Least confidence of a right prediction that is easy, above 0 to 1."""
    easy_scans: int = 5
    """Scans, net of those in which it was not easy, after which an image is skipped."""
    easy_replay: float = 0.25
    """Share of the easy images that each epoch trains on in turn, 0 to below 1; 0 is
    ml-cvnets."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Arithmetic of the passes. Weights and perturbation stay float32; fp16 scales the
    loss. auto is bf16 on a GPU and float32 on a CPU. A CPU without instructions for the
    16 bits emulates them, many times slower than float32."""
    max_skipped: int = 50
    """Steps in a row that may be skipped because a loss or gradient is not finite; one more
    ends the run."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ... auto takes a GPU if there is one."""
    placement: str = "replica"
    """On several devices, which of them share a perturbation: replica, each has its own,
    as in the paper; group:n, n of them; global, all. Of the batch, each has its share."""
    sync_batch_norm: bool = False
    """On several devices, let BatchNorm normalise by the images of all of them; with
    --placement global the step is that of one device then."""
    timeout: float = 300.0
    """Seconds that a device waits for another before all are ended, more than 0."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the step. auto does so on a GPU, and on a CPU where the run is long enough
    to pay for it."""
    deterministic: bool = False
    """Take no kernel whose result may differ from call to call, so that a GPU repeats a run
    bit for bit. Slower there; a CPU does so anyway."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and label noise."""

    monitor: bool = False
    """Measure each layer's gradient, perturbation, update and cosine at every step, into
    metrics.jsonl and layers.png; warn of gradients that vanish or explode."""

    save_steps: int | None = None
    """Steps from one checkpoint to the next. None saves at the end of each epoch."""
    on_write_error: Literal["stop", "warn"] = "stop"
    """What to do when a checkpoint cannot be written. With warn, training goes on, and only
    the exit code tells at the end if the last one is missing."""

    output: Path | None = None
    """Directory of the run, new or empty. None makes one below runs/."""
    resume: Path | None = None
    """Directory of a run to go on with, exactly where it stopped, or one of its
    checkpoints."""
    auto_resume: bool = False
    """Go on with the run in --output if there is one, else begin it, so that a command can
    be given again and again."""
    resume_override: bool = False
    """Go on with settings that differ from the run's; without it they are listed."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers beside metrics.jsonl, each into the run's directory, without account or
    network. Each needs its package: pip install -e ".[wandb]"."""
    export: bool = False
    """At the end, write the best epoch's model as a program for torch.export.load, too."""
    eval_only: bool = False
    """Evaluate the best checkpoint of the run given by --resume, and train nothing."""
    dry_run: bool = False
    """Show the configuration, take one step, and leave no run behind."""


WEIGHTS = ("none", "default")  # beside files
# Of the passes; None is that of the weights.
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What belongs to one call of the command and not to what it trains.
PER_CALL = {"config", "output", "resume", "auto_resume", "resume_override", "export"}
PER_CALL |= {"eval_only", "dry_run", "timeout"}
# What a run may be resumed with that it was not started with. Another device rounds
# differently and draws other random numbers; the data are checked by their content.
FREE_ON_RESUME = {"preset", "device", "data_dir", "allow_modified_data"}
FREE_ON_RESUME |= {"save_steps", "on_write_error", "max_skipped", "log", "average_best"}
# What no run can go on with if it changes: the state would fit no more, or its place in
# the data mean nothing.
FIXED = {"data", "image_size", "label_noise", "validation", "batch_size", "seed"}
FIXED |= {"model", "layout", "weights", "freeze"}
# What may be "auto", and is kept as what it came to.
RESOLVED = {"preset", "data", "precision", "compile"}

# Settings that only some values of another one read, by that other one.
EASY, SCORED = ("easy-skipped",), ("loss", "sharpness")
ADAMS, RESTARTS = ("adam", "adamw", "nadam"), ("warm-restarts",)
READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "select": {
        "select_every": EASY + SCORED,
        "select_with": EASY + SCORED,
        "select_share": SCORED,
        "easy_confidence": EASY,
        "easy_scans": EASY,
        "easy_replay": EASY,
    },
    "optimizer": {"momentum": ("sgd",), "nesterov": ("sgd",), "betas": ADAMS},
    "schedule": {
        "lr_final": ("cosine", "polynomial", *RESTARTS),
        "milestones": ("step",),
        "step_factor": ("step",),
        "restart_epochs": RESTARTS,
        "restart_growth": RESTARTS,
    },
}


def parse(
    args: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    *,
    program: str = PROGRAM,
    base: str = "auto",
) -> Config:
    """Read the command line: defaults, then preset, then TOML file, then flags.

    Args:
        args: flags; None takes those that the program was called with.
        say: is given a line about where the images come from, and one about a precision
            that this machine has no instructions for.
        program: what the command is called in its help.
        base: the preset where none is named.

    Returns:
        The settings, resolved: the source of the images, its directory, the device and
        the preset are what they came to, and never "auto".

    Raises:
        ConfigError: a value, a preset or a key of the file is not among what is allowed.
        DataError: there are no images where they should be.
        SystemExit: the command line is wrong, or asks for help.
    """
    config = _parsed(args, say, program, base)
    if emulated(DTYPES.get(config.precision), config.device):
        say(
            f"{config.precision} is emulated on this CPU: expect it to be many times slower"
            " than float32"
        )
    return config


def _parsed(
    args: Sequence[str] | None, say: Callable[[str], None], program: str, base: str
) -> Config:
    def read(values: dict[str, Any]) -> Config:
        default = Config(**{"preset": base} | values)
        config = tyro.cli(Config, prog=program, args=args, default=default)
        _require_names(config)
        return config

    asked = read(preset_of(base))
    if (run := _to_resume(asked)) is not None:
        return _resumed(asked, run, read, base)
    values = read_toml(asked.config) if asked.config else {}
    preset = read(values).preset
    asked = read(preset_of(preset) | values)
    _require_model(asked.model)
    if preset == "auto" and not networks.is_wide(asked.model):
        preset = "finetune"
        asked = read(preset_of(preset) | values)
    _require_fitting(asked)
    source, origin = choose_source(asked.data, asked.data_dir)
    say(origin)
    device = choose_device(asked.device)
    if preset == "auto":
        small = "digits" if source == "digits" else "small"
        preset = small if device.type == "cpu" or source == "digits" else "davda54"
    config = read(PRESETS[preset] | _side(preset, source, asked.model) | values)
    config = replace(
        config,
        preset=preset,
        data=source,
        data_dir=None if source == "digits" else root_of(asked.data_dir),
        weights=_resolved(config.weights),
        device=str(device),
    )
    _require_weights(config.weights)
    if config.precision == "auto":
        precision: Any = "float32" if device.type == "cpu" else "bf16"
        config = replace(config, precision=precision)
    validate(config)
    _require_loggers(config.log)
    return config


def validate(config: Config) -> None:
    """Raise unless every value is in its range.

    Raises:
        ConfigError: names the flag, what was expected and what came.
    """
    _require_model(config.model)
    groups = (
        _rules_of_numbers,
        _rules_of_data,
        _rules_of_networks,
        _rules_of_training,
        _rules_of_runs,
        _rules_of_readers,
    )
    for name, holds, expected in (rule for rules in groups for rule in rules(config)):
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: expected {expected}, got {getattr(config, name)!r}")
    try:
        method_expression.parse(config.method, steps=1, norm_layers=())
    except ValueError as error:
        raise ConfigError(f"--method: {error}") from error


def _require_loggers(names: Iterable[str]) -> None:
    """Raise unless the packages of loggers are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            missing = f'{name} is not installed: pip install -e ".[{name}]"'
            raise ConfigError(f"--log: {missing}")


Rule = tuple[str, bool, str]
"""Name of a setting, whether its value is allowed, and what is expected of it."""
FINITE = float("inf")
AT_LEAST_0 = "a finite number of at least 0"


def _rules_of_readers(config: Config) -> Iterator[Rule]:
    """Refuse what was given, but has no effect."""
    for choice, settings in READ_BY.items():
        for name, readers in settings.items():
            read = getattr(config, choice) in readers
            given = getattr(config, name) != getattr(Config, name)
            yield name, read or not given, f"--{choice} {' or '.join(readers)} with it"


def _rules_of_numbers(config: Config) -> Iterator[Rule]:
    for name, value in dataclasses.asdict(config).items():
        small = not isinstance(value, int) or abs(value) < 2**63
        yield name, small, "a number of at most 64 bits"


def _rules_of_data(config: Config) -> Iterator[Rule]:
    side = config.image_size
    yield "label_noise", 0 <= config.label_noise <= 1, "0 to 1"
    yield "validation", 0 <= config.validation < 1, "0 to below 1"
    yield "image_size", side is None or side >= 4, "at least 4 pixels, or None"
    yield "crop_scale", 0 < config.crop_scale <= 1, "above 0 to 1"
    yield "crop_padding", config.crop_padding >= 0, "at least 0 pixels"
    yield "cutout", config.cutout >= 0, "at least 0 pixels"
    for name in ("mixup_alpha", "cutmix_alpha"):
        yield name, 0 <= getattr(config, name) < FINITE, AT_LEAST_0
    yield "batch_size", config.batch_size >= 2, "at least 2"
    yield "select", config.select != "sharpness" or config.rho > 0, "--rho above 0 with it"
    yield "select_every", config.select_every >= 1, "at least 1"
    averaged = config.ema_decay is not None or config.select_with == "weights"
    yield "select_with", averaged, "--ema-decay with it"
    for name in ("select_share", "easy_confidence"):
        yield name, 0 < getattr(config, name) <= 1, "above 0 to 1"
    yield "easy_scans", 1 <= config.easy_scans <= 127, "1 to 127"
    yield "easy_replay", 0 <= config.easy_replay < 1, "0 to below 1"


def _rules_of_networks(config: Config) -> Iterator[Rule]:
    wide, named = networks.is_wide(config.model), "--model wrn-<depth>-<width> with it"
    yield "weights", config.weights != "default" or not wide, "none or a file, for a WRN"
    yield "freeze", config.weights != "none" or not config.freeze, "--weights with it"
    yield "layout", wide or config.layout == "standard", named
    yield "zero_head", wide or not config.zero_head, named
    yield "dropout", wide or config.dropout == 0, named


def _rules_of_training(config: Config) -> Iterator[Rule]:
    clip, final, marks = config.clip_norm, config.rho_final, config.milestones
    for name in ("dropout", "label_smoothing", "momentum"):
        yield name, 0 <= getattr(config, name) < 1, "0 to below 1"
    shares = len(config.betas) == 2 and all(0 <= beta < 1 for beta in config.betas)
    yield "betas", shares, "two numbers from 0 to below 1"
    yield "nesterov", config.momentum > 0 or not config.nesterov, "momentum with it"
    for name in ("rho", "rho_final"):
        yield name, 0 <= getattr(config, name) < FINITE, AT_LEAST_0
    moves = config.rho_schedule != "constant"
    yield "rho_final", final == 0 or moves, "--rho-schedule linear or proportional with it"
    yield "lr", 0 < config.lr < FINITE, "a finite number above 0"
    yield "weight_decay", 0 <= config.weight_decay < FINITE, AT_LEAST_0
    yield "clip_norm", clip is None or clip > 0, "a number above 0, or None"
    yield "epochs", config.epochs >= 1, "at least 1"
    yield "warmup_epochs", 0 <= config.warmup_epochs <= config.epochs, "0 to all epochs"
    rising = all(a < b for a, b in pairwise((0, *(marks or ()), config.epochs)))
    yield "milestones", rising, "rising epochs from 1 on, below --epochs, or None"
    yield "lr_final", 0 <= config.lr_final <= config.lr, "0 to --lr"
    yield "step_factor", 0 < config.step_factor <= 1, "above 0 to 1"
    for name in ("restart_epochs", "restart_growth"):
        yield name, getattr(config, name) >= 1, "at least 1"


def _rules_of_runs(config: Config) -> Iterator[Rule]:
    decay = config.ema_decay
    yield "ema_decay", decay is None or 0 <= decay < 1, "0 to below 1, or None"
    yield "ema_start", 0 <= config.ema_start <= config.epochs, "0 to all epochs"
    yield "ema_start", decay is not None or not config.ema_start, "--ema-decay with it"
    yield "ema_copy", decay is not None or config.ema_copy is None, "--ema-decay with it"
    for name, least in (
        ("ema_copy", 1),
        ("patience", 1),
        ("save_steps", 1),
        ("average_best", 2),
    ):
        value = getattr(config, name)
        yield name, value is None or value >= least, f"at least {least}, or None"
    yield "timeout", 0 < config.timeout < FINITE, "a finite number above 0"
    yield "max_skipped", config.max_skipped >= 0, "at least 0"
    yield "eval_only", bool(config.resume) or not config.eval_only, "--resume with it"


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file.

    Raises:
        ConfigError: no such file, no TOML, or a key or type that `Config` does not have.
    """
    try:
        values = tomllib.loads(files.read_text(path, AS_TOML["errors"]))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    types = get_type_hints(Config)
    if unknown := sorted(values.keys() - (types.keys() - PER_CALL)):
        close = difflib.get_close_matches(unknown[0], types, 3)
        hint = f"; close to {unknown[0]}: {', '.join(close)}" if close else ""
        raise ConfigError(f"{path} has unknown settings: {', '.join(unknown)}{hint}")
    return {key: _typed(path, key, value, types[key]) for key, value in values.items()}


def to_toml(config: Config) -> str:
    """Return what a run trains as the text of a file, with which `--config` repeats it."""
    return plain_toml(plain_values(config))


def plain_toml(values: Mapping[str, Any]) -> str:
    """Return the same of settings as `plain_values` gives them."""
    # With all settings named, a preset would only bring back what was turned off.
    written = {
        key: value
        for key, value in {**values, "preset": "none"}.items()
        if value is not None and key not in PER_CALL
    }
    text = "# Settings of a run; what is absent is off.\n"
    return text + tomli_w.dumps(written)


def plain_values(config: Config) -> dict[str, Any]:
    """Return all settings by name, as JSON and TOML hold them: no paths, no tuples.

    Names of files are read as UTF-8 whatever the locale, as `AS_TOML` writes them.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        if isinstance(value, Path | str):
            return os.fsencode(value).decode("utf-8", "surrogateescape")
        return value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def _to_resume(asked: Config) -> Path | None:
    """Return the run to go on with, if there is one."""
    if not asked.auto_resume:
        return asked.resume
    if asked.resume is not None:
        raise ConfigError("--auto-resume: expected --output with it, and no --resume")
    if asked.output is None:
        raise ConfigError("--auto-resume: expected --output with it")
    return asked.output if (asked.output / CONFIG_FILE).exists() else None


def _resumed(
    asked: Config, run: Path, read: Callable[[dict[str, Any]], Config], base: str
) -> Config:
    """Return the settings of a run, which flags may repeat, and some of them change."""
    values = read_toml(run_of(run) / CONFIG_FILE)
    before = _settled(values, run)
    if asked.auto_resume:  # The command that began the run repeats all that it said then.
        file = read_toml(asked.config) if asked.config else {}
        config = read(values | preset_of(read(file).preset) | file)
        resolved = {name: getattr(before, name) for name in _unresolved(config)}
        config = replace(config, resume=run, **resolved)
    else:
        for name in ("config", "preset", "output"):
            if getattr(asked, name) != getattr(Config(preset=base), name):
                raise ConfigError(f"--{name}: a run is resumed with its own, drop it")
        config = read(values)
    config = replace(config, weights=_resolved(config.weights))
    require_same_settings(plain_values(before), config)
    validate(config)
    if not config.eval_only:  # The run's own are left out where they are missing.
        _require_loggers({*config.log} - {*before.log})
    _require_fitting(config)
    root = None if config.data == "digits" else root_of(config.data_dir)
    return replace(config, data_dir=root, device=str(choose_device(config.device)))


def _unresolved(config: Config) -> set[str]:
    """Return the settings that do not say what they come to."""
    names = {name for name in RESOLVED if getattr(config, name) == "auto"}
    if config.compile == "yes" and missing_compiler(choose_device(config.device)):
        names.add("compile")
    return names


def require_same_settings(before: dict[str, Any], config: Config) -> None:
    """Raise unless a run may go on with other settings than it had.

    Args:
        before: those it had, as `plain_values` gives them.
        config: those it is to go on with.

    Raises:
        ConfigError: lists what differs, of what may never differ, or else of what needs
            `resume_override`.
    """
    changed = {
        name: f"{name} was {one!r}, is now {other!r}"
        for name, (one, other) in differing(before, plain_values(config)).items()
    }
    if fixed := changed.keys() & FIXED:
        changes = "; ".join(changed[name] for name in sorted(fixed))
        raise ConfigError(f"--resume: no run can go on so: {changes}")
    if changed and not config.resume_override:
        changes = "; ".join(changed.values())
        raise ConfigError(
            f"--resume: the run had other settings: {changes}; --resume-override goes on"
            " with these"
        )


def differing(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return both values of the settings in which two runs are not one, by name.

    Settings that only one of the two has are of another version, and count as alike.
    """
    names = sorted(now.keys() & before.keys() - PER_CALL - FREE_ON_RESUME)
    return {n: (before[n], now[n]) for n in names if before[n] != now[n]}


def of_run(path: Path) -> Config:
    """Return the settings of the run that `path` is, or is a checkpoint of.

    Raises:
        ConfigError: there is no run, or a setting is not among what is allowed.
    """
    config = _settled(read_toml(run_of(path) / CONFIG_FILE), path)
    validate(config)
    return config


def _settled(values: Mapping[str, Any], run: Path) -> Config:
    """Return the settings that a run wrote, which names its data and its precision."""
    config = Config(**values)
    for name in ("data", "precision"):
        if getattr(config, name) == "auto":
            file = run_of(run) / CONFIG_FILE
            raise ConfigError(f"{file} is none that a run wrote: it does not say {name}")
    return config


def run_of(path: Path) -> Path:
    """Return the directory of the run that `path` is, or is a checkpoint of."""
    return path.parent.parent if path.is_file() else path


def _side(preset: str, source: str, model: str) -> dict[str, int]:
    """Return the size of images that the preset for torchvision's networks has."""
    if preset != "finetune" or source != "folder" or networks.is_wide(model):
        return {}
    return {"image_size": networks.photographs(model).side}


def _resolved(weights: str) -> str:
    # Unlike `Path.resolve`, this takes a loop of links for a path.
    return weights if weights in WEIGHTS else os.path.realpath(weights)


def _require_names(config: Config) -> None:
    """Raise where a text, which may be the name of a file, holds what no name can."""
    for name, value in vars(config).items():
        if "\0" in str(value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: expected a text without NUL, got {str(value)!r}")


def _require_weights(weights: str) -> None:
    if weights not in WEIGHTS and not Path(weights).is_file():
        close = difflib.get_close_matches(Path(weights).name, WEIGHTS, 1)
        hint = f"; close to it: {close[0]}" if close else ""
        raise ConfigError(
            f"--weights: expected none, default or a file, got {weights}{hint}"
        )


def _require_model(name: str) -> None:
    try:
        networks.require_known(name)
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from error


def _require_fitting(config: Config) -> None:
    """Raise where a setting of the data is missing, or would have no effect."""
    if config.data == "folder" and config.data_dir is None:
        raise ConfigError(
            "--data-dir: expected the directory of your images, which holds train/<class>/*"
            " and test/<class>/*, got none"
        )
    if config.image_size is not None and config.data not in ("auto", "folder"):
        raise ConfigError(f"--image-size: only folders are resized, not {config.data}")
    if config.data_dir is not None and config.data == "digits":
        raise ConfigError("--data-dir: digits come with scikit-learn, not from a directory")


def choose_device(name: str) -> torch.device:
    """Return the named device, or for auto the best that there is.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device(
            "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # A meta tensor has no value.
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {name!r} cannot be used: {error}") from error
    return device


def _typed(path: Path, key: str, value: Any, expected: Any) -> Any:
    """Return the value of a TOML key as its field wants it."""
    union = get_origin(expected) is UnionType
    kinds = [k for k in (get_args(expected) if union else (expected,)) if k is not NoneType]
    for kind in kinds:
        with contextlib.suppress(TypeError):
            return _as(kind, value)
    names = " or ".join(map(_named, kinds))
    raise ConfigError(f"{path}: {key} cannot be {value!r}, expected {names}")


def _as(kind: Any, value: Any) -> Any:
    """Return a TOML value as one of a kind, or raise TypeError."""
    if isinstance(value, str) and "\0" in value:  # which no path has
        raise TypeError
    if isinstance(value, str):  # the reverse of `plain_values`
        value = os.fsdecode(value.encode("utf-8", "surrogateescape"))
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as(get_args(kind)[0], item) for item in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    # Whole numbers will do for floats, but true is no number.
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits and value not in (get_args(kind) if get_origin(kind) is Literal else ()):
        raise TypeError
    return value


def _named(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_named(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return str(kind.__name__)
