"""Norms and angles of each layer in an epoch, where a run is monitored."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import samfn
from samfn.tree import Params

WHAT = ("gradient", "perturbation", "update", "weight", "cosine")
VANISHING = 1e-6  # beyond the spread of layers that train, seen up to 1e-3
EXPLODING = 100.0


class LayerMeter:
    """Sums over the steps of an epoch, kept on the device until they are read.

    Args:
        parameters: how many the model has.
        device: where the steps are taken.
    """

    def __init__(self, parameters: int, device: torch.device) -> None:
        # The last row is of all layers together; the last column counts.
        self.sums = torch.zeros((parameters + 1, len(WHAT) + 1), device=device)

    def add(self, metrics: samfn.Metrics) -> None:
        """Add one step; one that was skipped counts for nothing."""
        layers = metrics.layers
        assert layers is not None
        columns = [getattr(layers, what).float() for what in WHAT]
        whole = [torch.linalg.vector_norm(column) for column in columns[:-1]]
        whole.append(layers.overall_cosine.float())
        found = torch.stack(
            [torch.cat([c, w[None]]) for c, w in zip(columns, whole, strict=True)], dim=1
        )
        row = torch.cat([found, torch.ones_like(found[:, :1])], dim=1)
        self.sums += torch.where(metrics.finite, row, 0.0)

    def means(self) -> Tensor:
        """Return the means over the steps, shape (parameters + 1, 5), all layers last."""
        return self.sums[:, :-1] / self.sums[:, -1:].clamp(min=1)

    def gradient(self) -> Tensor:
        """Return the mean norm of each parameter's gradient, shape (parameters,)."""
        return self.means()[:-1, 0].clone()

    def row(self, params: Params) -> dict[str, Any]:
        """Return what goes into the epoch's row: of all together, and of each layer."""
        *each, whole = self.means().tolist()
        columns = zip(*each, strict=True)
        layers = {
            w: dict(zip(params, c, strict=True)) for w, c in zip(WHAT, columns, strict=True)
        }
        _, _, update, weight, cosine = whole
        ratio = update / weight if weight else 0.0
        return {"update_to_weight": ratio, "gradient_cosine": cosine, "layers": layers}


class Alarm(NamedTuple):
    """A layer whose gradient vanishes or explodes."""

    name: str
    """Name of the parameter."""
    kind: Literal["vanishing", "exploding"]
    gradient: float
    """||g||."""
    expected: float
    """The norm that ||g|| was compared with."""

    def __str__(self) -> str:
        """Return it as a phrase."""
        compared = {
            "vanishing": "at the median of all layers it would be",
            "exploding": "it was",
        }[self.kind]
        gradient, expected = f"{self.gradient:.3g}", f"{self.expected:.3g}"
        return f"{self.name}: {self.kind} gradient, norm {gradient}, {compared} {expected}"


def alarms(params: Params, gradient: Tensor, before: Tensor | None = None) -> list[Alarm]:
    """Name the layers whose gradients vanish or explode. It waits for a GPU.

    vanishing: ||g_i|| / sqrt(n_i) <= VANISHING * median over j of ||g_j|| / sqrt(n_j)
    exploding: ||g_i|| not finite, or > EXPLODING * what it was before

    Args:
        params: their names and sizes n.
        gradient: ||g|| of each, shape (parameters,), as in `Layers`; or means of several
            steps, which one unusual batch does not move.
        before: the same some steps or an epoch ago; None asks for no growth.

    Returns:
        One for each such layer, in the order of `params`.

    Raises:
        ValueError: shapes do not fit.
    """
    expected = (len(params),)
    for name, value in (("gradient", gradient), ("before", before)):
        if value is not None and value.shape != expected:
            raise ValueError(
                f"{name} must have the shape {expected}, got {tuple(value.shape)}"
            )
    roots = torch.tensor([max(1, w.numel()) for w in params.values()]).double().sqrt()
    now = gradient.double().cpu()
    usual = (now / roots).nanmedian() * roots
    old = torch.full_like(now, torch.inf) if before is None else before.double().cpu()
    small = now <= VANISHING * usual
    large = ~now.isfinite() | ((now > EXPLODING * old) & (old > 0))
    return [
        Alarm(name, "exploding" if large[i] else "vanishing", *pair)
        for i, name in enumerate(params)
        if large[i] or small[i]
        for pair in [(float(now[i]), float(old[i] if large[i] else usual[i]))]
    ]
