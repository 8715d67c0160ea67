"""Sharpness-aware training as pure functions over parameter dicts."""

from samfn import schedules
from samfn.checkpoint import restore, save
from samfn.combinators import (
    accumulated,
    every,
    loss_scaled,
    on_parameters,
    per_micro_batch,
    same_randomness,
    sub_batch_ascent,
)
from samfn.compiled import compile_update
from samfn.descend import (
    Optimizer,
    adagrad,
    adam,
    adamw,
    clipped,
    descend,
    from_torch,
    nadam,
    rmsprop,
    sgd,
)
from samfn.gradient import Aux, l2_regularized
from samfn.method import Method
from samfn.methods import (
    ae_sam,
    asam,
    esam,
    fisher_sam,
    friendly_sam,
    gsam,
    looksam,
    momentum_sam,
    multi_step_sam,
    sam,
    vasso,
    wsam,
)
from samfn.optimizer import SAM
from samfn.perturb import (
    everything,
    named_weight,
    perturb,
    perturb_adaptive,
    perturb_fisher,
)
from samfn.stateless import load, norm_parameters, split, supervised
from samfn.tree import norm
from samfn.update import (
    Metrics,
    NonFiniteError,
    TrainState,
    init,
    require_finite,
    sam_update,
)

__all__ = [
    "SAM",
    "Aux",
    "Method",
    "Metrics",
    "NonFiniteError",
    "Optimizer",
    "TrainState",
    "accumulated",
    "adagrad",
    "adam",
    "adamw",
    "ae_sam",
    "asam",
    "clipped",
    "compile_update",
    "descend",
    "esam",
    "every",
    "everything",
    "fisher_sam",
    "friendly_sam",
    "from_torch",
    "gsam",
    "init",
    "l2_regularized",
    "load",
    "looksam",
    "loss_scaled",
    "momentum_sam",
    "multi_step_sam",
    "nadam",
    "named_weight",
    "norm",
    "norm_parameters",
    "on_parameters",
    "per_micro_batch",
    "perturb",
    "perturb_adaptive",
    "perturb_fisher",
    "require_finite",
    "restore",
    "rmsprop",
    "sam",
    "sam_update",
    "same_randomness",
    "save",
    "schedules",
    "sgd",
    "split",
    "sub_batch_ascent",
    "supervised",
    "vasso",
    "wsam",
]
