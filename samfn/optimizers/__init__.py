"""Base optimizers: those of torch.optim, Muon, and what combines them."""

from samfn.optimizers.combinators import clipped, frozen_after, grouped, scaled_lr
from samfn.optimizers.kernels import adagrad, adam, adamw, from_torch, nadam, rmsprop, sgd
from samfn.optimizers.muon import muon

__all__ = [
    "adagrad",
    "adam",
    "adamw",
    "clipped",
    "from_torch",
    "frozen_after",
    "grouped",
    "muon",
    "nadam",
    "rmsprop",
    "scaled_lr",
    "sgd",
]
