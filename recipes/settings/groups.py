"""The settings of training, in groups; those of data and networks stand beside these."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from recipes.roles import (
    ABOVE_0,
    ABOVE_0_TO_1,
    BELOW_1,
    FROM_0,
    Group,
    Range,
    Role,
    Rule,
    at_least,
    setting,
)

# Dtypes of the passes by --precision; None is that of the weights.
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAMS, RESTARTS = ("adam", "adamw", "nadam", "muon"), ("warm-restarts",)
TRIANGLE = ("triangle",)
EASY, SCORED = ("easy-skipped",), ("loss", "sharpness")
BETAS = Range(
    lambda betas: len(betas) == 2 and all(map(BELOW_1.holds, betas)),
    "two numbers from 0 to below 1",
)


@dataclass(frozen=True, kw_only=True)
class Perturbation(Group, role=Role.RESULT):
    """The perturbation: its radius over time, and its dropout masks."""

    rho_schedule: Literal["constant", "linear", "proportional"] = "constant"
    """Radius over time: linear goes from rho to rho-final at the end, proportional from rho
    where the learning rate is lr to rho-final where it is 0. A rho of 0 stays 0."""
    rho_final: float = setting(0.0, FROM_0)
    """Radius that a linear or proportional schedule leads to."""
    sam_last: float = setting(1.0, ABOVE_0_TO_1)
    """Share of the steps, the last, that perturb the weights, above 0 to 1. Those before
    are the plain optimizer's, of one pass."""
    same_dropout: bool = False
    """One dropout mask for both passes of a step."""

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread."""
        yield from super().unread()
        moves = self.rho_schedule != "constant" or self.rho_final == 0
        yield "rho_final", moves, "--rho-schedule linear or proportional with it"


@dataclass(frozen=True, kw_only=True)
class Descent(Group, role=Role.RESULT, choice="optimizer"):
    """The loss, and the base optimizer that descends it."""

    optimizer: Literal["sgd", "adam", "adamw", "nadam", "muon"] = "sgd"
    """Base optimizer. adamw has decoupled weight decay; muon is that of the hidden layers'
    matrices and filters, and adamw that of the rest. All but sgd want an lr of about
    0.001."""
    momentum: float = setting(0.9, BELOW_1, readers=("sgd",))
    """Momentum of SGD."""
    nesterov: bool = setting(False, readers=("sgd",))
    """Nesterov momentum."""
    betas: tuple[float, ...] = setting((0.9, 0.999), BETAS, readers=ADAMS)
    """Adam's beta1 and beta2: decay of the running means of the gradient and its square."""
    weight_decay: float = setting(5e-4, FROM_0)
    """Weight decay."""
    decay_norm: bool = True
    """Weight decay of normalisation and biases, too."""
    decay_in_loss: bool = False
    """Weight decay as a part of the loss, so that it bends the perturbation too."""
    norm_bias_lr: float = setting(1.0, ABOVE_0, readers=("sgd",))
    """Factor of the learning rate of the biases of normalisation, 64 in airbench; their
    weight decay is divided by it, so that both together decay them as all else."""
    clip_norm: float | None = setting(
        None, Range(lambda norm: norm > 0, "a number above 0")
    )
    """Largest norm of the final gradient. None is off."""
    label_smoothing: float = setting(0.0, BELOW_1)
    """Share of the target spread over all classes, 0 to below 1; in training only."""

    def relations(self) -> Iterator[Rule]:
        """Yield what holds of several values together."""
        apart = self.norm_bias_lr == 1 or not self.decay_in_loss
        yield "norm_bias_lr", apart, "1 with --decay-in-loss"

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread."""
        yield from super().unread()
        yield "nesterov", self.momentum > 0 or not self.nesterov, "momentum with it"


@dataclass(frozen=True, kw_only=True)
class LearningRate(Group, role=Role.RESULT, choice="schedule"):
    """The learning rate over time."""

    schedule: Literal[
        "cosine",
        "polynomial",
        "one-cycle",
        "warm-restarts",
        "step",
        "wsd",
        "triangle",
        "constant",
    ] = "cosine"
    """Learning rate over time: cosine or polynomial, with power 0.9, to lr-final;
    one-cycle, from lr / 25 up to lr and down to almost 0; warm-restarts, a cosine again and
    again; step, times step-factor at each of the milestones; wsd, constant until the
    cooldown, a straight line to lr-final; triangle, a straight line up to lr, and
    one down."""
    lr_final: float = setting(0.0, readers=("cosine", "polynomial", "wsd", *RESTARTS))
    """Learning rate that a cosine, polynomial or wsd schedule, or each of the restarts,
    leads to."""
    rise_from: float = setting(0.2, ABOVE_0_TO_1, readers=TRIANGLE)
    """Share of lr that triangle starts from, above 0 to 1."""
    fall_to: float = setting(0.07, BELOW_1, readers=TRIANGLE)
    """Share of lr that triangle leads to, 0 to below 1."""
    rise: float = setting(0.23, BELOW_1, readers=TRIANGLE)
    """Share of the steps, the first, in which triangle rises, 0 to below 1."""
    milestones: tuple[int, ...] | None = setting(None, readers=("step",))
    """Epochs after which the step schedule multiplies the learning rate. None is 30, 60 and
    80 % of all."""
    step_factor: float = setting(0.2, ABOVE_0_TO_1, readers=("step",))
    """Factor of the learning rate in the step schedule, above 0 to 1."""
    restart_epochs: int = setting(10, at_least(1), readers=RESTARTS)
    """Epochs of the first cosine of warm-restarts."""
    restart_growth: int = setting(2, at_least(1), readers=RESTARTS)
    """Length of each further cosine, relative to the one before."""
    cooldown: float = setting(0.2, ABOVE_0_TO_1, readers=("wsd",))
    """Share of the steps, the last, in which wsd falls, above 0 to 1; the same as sam-last
    lets SAM begin where the learning rate begins to fall."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class Average(Group, role=Role.RESULT):
    """Averages of the weights, and training that goes on from them."""

    ema_decay: float | None = setting(None, BELOW_1)
    """Decay of the moving average of the weights, for example 0.999. With it, the average
    is evaluated beside the weights, and exported in the end. None is off."""
    ema_start: float = 0.0
    """Epochs before the average begins."""
    ema_copy: int | None = setting(None, at_least(1))
    """Epoch after which training goes on from the average. None is never."""
    lookahead: float | None = setting(None, BELOW_1)
    """Lookahead: every few steps the weights become an average of their own. Its decay is
    this, a step, times the cube of the share of the steps taken; 0.95 in airbench. None is
    off."""
    lookahead_every: int = setting(5, at_least(1))
    """Steps from one such average to the next."""
    average_best: int | None = setting(None, at_least(2), role=Role.FREE)
    """Number of best epochs whose weights are averaged at the end, with statistics of
    BatchNorm of their own, into average.safetensors. None is off."""

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread."""
        yield from super().unread()
        for name in ("ema_start", "ema_copy"):
            averages = self.ema_decay is not None or not getattr(self, name)
            yield name, averages, "--ema-decay with it"
        looks = self.lookahead is not None or self.lookahead_every == 5
        yield "lookahead_every", looks, "--lookahead with it"


@dataclass(frozen=True, kw_only=True)
class Selection(Group, role=Role.RESULT, choice="select"):
    """Training on a part of the images."""

    select: Literal["all", "easy-skipped", "loss", "sharpness"] = "all"
    """Images that an epoch trains on. easy-skipped leaves out what was predicted right, and
    with confidence, in several scans; loss and sharpness draw a share of all, by the loss
    or by how much it grows under the perturbation. Schedules still count whole epochs."""
    select_every: int = setting(5, at_least(1), readers=EASY + SCORED)
    """Epochs from one scan of all images to the next."""
    select_with: Literal["weights", "average"] = setting("weights", readers=EASY + SCORED)
    """Weights that scan: those that train, or their moving average."""
    select_share: float = setting(0.5, ABOVE_0_TO_1, readers=SCORED)
    """Share of the images that loss and sharpness draw, above 0 to 1."""
    easy_confidence: float = setting(0.5, ABOVE_0_TO_1, readers=EASY)
    """Least confidence of a right prediction that is easy, above 0 to 1."""
    easy_scans: int = setting(
        5, Range(lambda scans: 1 <= scans <= 127, "1 to 127"), readers=EASY
    )
    """Scans, net of those in which it was not easy, after which an image is skipped."""
    easy_replay: float = setting(0.25, BELOW_1, readers=EASY)
    """Share of the easy images that each epoch trains on in turn, 0 to below 1; 0 is
    ml-cvnets."""


@dataclass(frozen=True, kw_only=True)
class Stopping(Group, role=Role.FREE):
    """Ends of a run before its last epoch."""

    patience: int | None = setting(None, at_least(1), role=Role.RESULT)
    """Epochs without a new best accuracy after which the run ends. None is never."""
    max_skipped: int = setting(50, at_least(0))
    """Steps in a row that may be skipped because a loss or gradient is not finite; one more
    ends the run."""
    on_write_error: Literal["stop", "warn"] = "stop"
    """End of the run when a checkpoint cannot be written, or a warning: then training goes
    on, and only the exit code tells at the end if the last one is missing."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Group, role=Role.RESULT):
    """Precision, compilation and kernels."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Arithmetic of the passes. Weights and perturbation stay float32; fp16 scales the
    loss. auto is bf16 on a GPU and float32 on a CPU. A CPU without instructions for the
    16 bits emulates them, many times slower than float32."""
    compile: Literal["auto", "yes", "no"] = setting("auto", role=Role.ROUNDING)
    """Compilation of the step. auto compiles on a GPU, and on a CPU where the run is long
    enough to pay for it."""
    deterministic: bool = False
    """Deterministic kernels alone, so that a GPU repeats a run bit for bit. Slower there; a
    CPU repeats it anyway."""


@dataclass(frozen=True, kw_only=True)
class Ranks(Group, role=Role.RESULT):
    """Training on several devices, which torchrun starts."""

    placement: str = "replica"
    """Devices that share a perturbation: replica, each has its own, as in the paper;
    group:n, n of them; global, all. Each has its share of the batch. With sharded, or
    hsdp:n in copies of n parts, all share one, and each keeps a part of the weights."""
    sync_batch_norm: bool = False
    """BatchNorm over the images of all devices; with --placement global the step is that of
    one device then."""
    timeout: float = setting(
        300.0, Range(lambda seconds: 0 < seconds <= 1e9, "above 0 to 1e9"), role=Role.CALL
    )
    """Seconds that a device waits for another before all are ended, above 0 to 1e9."""

    def relations(self) -> Iterator[Rule]:
        """Yield what holds of a value, however many devices there are."""
        known = re.fullmatch(
            "replica|global|sharded|(group|hsdp):[1-9][0-9]*", self.placement
        )
        yield "placement", known is not None, "replica, group:n, global, sharded or hsdp:n"


@dataclass(frozen=True, kw_only=True)
class Recording(Group, role=Role.FREE):
    """Files that a run leaves in its directory."""

    save_steps: int | None = setting(None, at_least(1))
    """Steps from one checkpoint to the next. None saves at the end of each epoch."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers beside metrics.jsonl, each into the run's directory, without account or
    network. Each needs its package: pip install -e ".[wandb]"."""
    monitor: bool = setting(False, role=Role.RESULT)
    """Each layer's gradient, perturbation, update and cosine at every step, in
    metrics.jsonl and layers.png; warnings of gradients that vanish or explode."""
    export: bool = setting(False, role=Role.CALL)
    """The best epoch's model as a program for torch.export.load, too."""


@dataclass(frozen=True, kw_only=True)
class Call(Group, role=Role.ONE_RUN):
    """Resumption of a run, and what to do instead of training."""

    auto_resume: bool = False
    """Resumption of the run in --output if there is one, else its beginning, so that a
    command can be given again and again."""
    resume_override: bool = False
    """Resumption with settings that differ from the run's; without it they are listed."""
    eval_only: bool = False
    """Evaluation of the best checkpoint of the run given by --resume, without training."""
    dry_run: bool = False
    """The configuration and one step, without a run that is left behind."""
