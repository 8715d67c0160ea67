"""How a batch becomes the gradient that descends: each method a value, a few functions.

`base` says what a method is. `published` holds those of the literature, as do `lengths`,
those that choose how far they climb, `one_pass`, those that perturb before they look, and
`functional`, that takes losses apart; `spectral` holds one that is not published.
`combinators` turn methods into others.
"""

from samfn.methods.base import (
    Descended,
    Descent,
    Direction,
    Length,
    Method,
    MethodState,
    Point,
    two_pass,
)
from samfn.methods.combinators import (
    accumulated,
    ascent_on,
    every,
    loss_scaled,
    on_loss,
    on_parameters,
    per_micro_batch,
    same_randomness,
    sub_batch_ascent,
)
from samfn.methods.functional import functional_sam, preconditioned
from samfn.methods.lengths import le_sam, light_sam, sagm, unified_sam, usam
from samfn.methods.one_pass import momentum_sam, rwp, s2_sam
from samfn.methods.published import (
    ae_sam,
    asam,
    awp,
    esam,
    fisher_sam,
    friendly_sam,
    gsam,
    looksam,
    multi_step_sam,
    sam,
    ssam,
    vasso,
    wsam,
)
from samfn.methods.spectral import spectral_sam
from samfn.methods.watched import watched

__all__ = [
    "Descended",
    "Descent",
    "Direction",
    "Length",
    "Method",
    "MethodState",
    "Point",
    "accumulated",
    "ae_sam",
    "asam",
    "ascent_on",
    "awp",
    "esam",
    "every",
    "fisher_sam",
    "friendly_sam",
    "functional_sam",
    "gsam",
    "le_sam",
    "light_sam",
    "looksam",
    "loss_scaled",
    "momentum_sam",
    "multi_step_sam",
    "on_loss",
    "on_parameters",
    "per_micro_batch",
    "preconditioned",
    "rwp",
    "s2_sam",
    "sagm",
    "sam",
    "same_randomness",
    "spectral_sam",
    "ssam",
    "sub_batch_ascent",
    "two_pass",
    "unified_sam",
    "usam",
    "vasso",
    "watched",
    "wsam",
]
