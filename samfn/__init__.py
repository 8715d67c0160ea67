"""Sharpness-aware training as pure functions over parameter dicts."""

from samfn import schedules
from samfn.checkpoint import restore, save
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
from samfn.methods import (
    Method,
    accumulated,
    asam,
    per_micro_batch,
    sam,
    same_randomness,
)
from samfn.perturb import everything, named_weight, perturb, perturb_adaptive
from samfn.stateless import load, split, supervised
from samfn.tree import norm
from samfn.update import Metrics, TrainState, init, sam_update

__all__ = [
    "Aux",
    "Method",
    "Metrics",
    "Optimizer",
    "TrainState",
    "accumulated",
    "adagrad",
    "adam",
    "adamw",
    "asam",
    "clipped",
    "compile_update",
    "descend",
    "everything",
    "from_torch",
    "init",
    "l2_regularized",
    "load",
    "nadam",
    "named_weight",
    "norm",
    "per_micro_batch",
    "perturb",
    "perturb_adaptive",
    "restore",
    "rmsprop",
    "sam",
    "sam_update",
    "same_randomness",
    "save",
    "schedules",
    "sgd",
    "split",
    "supervised",
]
