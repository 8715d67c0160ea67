"""Muon, for matrices and for the filters of convolutions."""

from collections.abc import Callable
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from samfn import tree
from samfn.descend import Optimizer, OptState, require_memory
from samfn.support import checks
from samfn.support.orthogonal import MUON, as_matrix, newton_schulz
from samfn.tree import Params

Adjusts = Literal["original", "match_rms_adamw", "spectral_unclamped"]
ADJUSTS: dict[Adjusts, Callable[[int, int], float]] = {
    "original": lambda rows, columns: sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: sqrt(rows / columns),
}


def muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    adjust_lr_fn: Adjusts = "original",
    *,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Orthogonalised momentum for matrices and filters, as `torch.optim.Muon`.

    v <- momentum v + (1 - momentum) g;
    w <- (1 - lr weight_decay) w - lr f NewtonSchulz(v), or with nesterov
    NewtonSchulz(momentum v + (1 - momentum) g)

    The filters of a convolution, (out, in, height, width), are one matrix of (out, in *
    height * width), which torch.optim.Muon refuses. Vectors, embeddings and the layer of
    the outputs belong to another optimizer::

        others = [name for name, w in params.items() if w.ndim < 2] + ["head.weight"]
        rest = samfn.scaled_lr(samfn.adamw(), 0.1)
        optimizer = samfn.grouped(samfn.muon(), (others, rest))

    A matrix of which each rank has a part is gathered, and orthogonalised on every rank.

    Args:
        momentum: share of v that stays, in [0, 1).
        nesterov: look ahead along v.
        weight_decay: decoupled, in units of 1 / lr.
        adjust_lr_fn: f of a matrix of m rows and n columns: "original" sqrt(max(1, m / n)),
            "match_rms_adamw" 0.2 sqrt(max(m, n)), with which lr and weight decay are those
            of AdamW, "spectral_unclamped" sqrt(m / n).
        dtype: of the products. None is bfloat16, as in torch.optim.Muon, but on a CPU the
            dtype of the gradient: most have no instructions for bfloat16, and would take 10
            to 30 times as long.

    Raises:
        ValueError: a number or `adjust_lr_fn` is not as described. When a state is made:
            a parameter is no matrix.

    Source:
        Jordan, 2024, kellerjordan.github.io/posts/muon; `torch.optim.Muon`.
    """
    checks.require_below_one("momentum", momentum)
    checks.require_dial("weight_decay", weight_decay)
    if adjust_lr_fn not in ADJUSTS:
        raise ValueError(f"adjust_lr_fn must be one of {[*ADJUSTS]}, got {adjust_lr_fn!r}")

    def orthogonal(matrix: Tensor) -> Tensor:
        own = matrix.dtype if matrix.device.type == "cpu" else torch.bfloat16
        return newton_schulz(matrix, [MUON] * 5, dtype or own)

    def init(params: Params) -> OptState:
        _require_matrices(params)
        return {"momentum": tree.zeros_like(params)}

    def update(
        params: Params, grads: Params, opt_state: OptState, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], OptState]:
        new = {n: v.lerp(grads[n], 1 - momentum) for n, v in opt_state["momentum"].items()}
        way = {}
        for name, w in params.items():
            ahead = grads[name].lerp(new[name], momentum) if nesterov else new[name]
            if not w.numel():  # As of experts that there are none of.
                way[name] = ahead
                continue
            factor = ADJUSTS[adjust_lr_fn](len(w), w[0].numel())
            way[name] = factor * as_matrix(orthogonal, ahead)
        decayed = tree.scale(params, 1 - lr * weight_decay)
        return tree.add_scaled(decayed, -lr, way), {"momentum": new}

    def check(opt_state: OptState, params: Params) -> None:
        require_memory(opt_state, {"momentum"}, params)

    return Optimizer(init, update, check)


def _require_matrices(params: Params) -> None:
    if others := [name for name, w in params.items() if w.ndim < 2]:
        raise ValueError(
            "muon moves matrices and filters, of two dimensions and more, got"
            f" {checks.some(others)}: give them to another optimizer, as"
            " samfn.grouped(samfn.muon(), (names, samfn.adamw()))"
        )
