"""How a batch becomes the gradient that descends: each method a value, a few functions.

`base` says what a method is, `published` holds those of the literature, `functional` one
that takes losses apart, `spectral` one that is not published, `combinators` turn methods
into others.
"""

from samfn.methods.base import (
    Descended,
    Descent,
    Direction,
    Method,
    MethodState,
    Point,
    two_pass,
)
from samfn.methods.combinators import (
    accumulated,
    every,
    loss_scaled,
    on_parameters,
    per_micro_batch,
    same_randomness,
    sub_batch_ascent,
)
from samfn.methods.functional import functional_sam, preconditioned
from samfn.methods.published import (
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
from samfn.methods.spectral import spectral_sam
from samfn.methods.watched import watched

__all__ = [
    "Descended",
    "Descent",
    "Direction",
    "Method",
    "MethodState",
    "Point",
    "accumulated",
    "ae_sam",
    "asam",
    "esam",
    "every",
    "fisher_sam",
    "friendly_sam",
    "functional_sam",
    "gsam",
    "looksam",
    "loss_scaled",
    "momentum_sam",
    "multi_step_sam",
    "on_parameters",
    "per_micro_batch",
    "preconditioned",
    "sam",
    "same_randomness",
    "spectral_sam",
    "sub_batch_ascent",
    "two_pass",
    "vasso",
    "watched",
    "wsam",
]
