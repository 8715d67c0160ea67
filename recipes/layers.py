"""What each layer did in an epoch, where a run is monitored."""

from typing import Any

import torch
from torch import Tensor

import samfn
from samfn.tree import Params

WHAT = ("gradient", "perturbation", "update", "weight", "cosine")


class LayerMeter:
    """Sums over the steps of an epoch, kept on the device until they are read.

    Args:
        parameters: how many the model has.
        device: where the steps are taken.
        sums: those of the part of the epoch before it was interrupted.
    """

    def __init__(
        self, parameters: int, device: torch.device, sums: Tensor | None = None
    ) -> None:
        # The last row is of all layers together; the last column counts.
        shape = (parameters + 1, len(WHAT) + 1)
        self.sums = torch.zeros(shape, device=device) if sums is None else sums

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
