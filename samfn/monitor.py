"""What each layer does in a step: norms of gradient, perturbation and update."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from samfn import tree
from samfn.gradient import Pass
from samfn.tree import Params


class Layers(NamedTuple):
    """What each parameter did in a step, shapes (parameters,), in the state's order.

    With micro-batches, the first pass is that of the first one, and the last of the last.
    """

    gradient: Tensor
    """||g||, of the clean pass."""
    perturbation: Tensor
    """||e||, how far the last pass was from the parameters."""
    update: Tensor
    """||w' - w||, what the optimizer added to the weights."""
    weight: Tensor
    """||w|| before the step."""
    cosine: Tensor
    """Of the angle between the gradients of the first and the last pass, -1 to 1."""
    overall_cosine: Tensor
    """The same of all parameters as one vector, shape ()."""


def layers(params: Params, passes: list[tuple[Params, Pass]], new_params: Params) -> Layers:
    """Measure a step, on the device.

    Args:
        params: before the step.
        passes: (parameters, Pass) of each evaluation, in their order. A parameter that a
            pass was not derived by has gradient 0 there.
        new_params: after the step.
    """
    first, last = (_whole(params, seen.grads) for _, seen in (passes[0], passes[-1]))
    shift = tree.subtract(tree.only(passes[-1][0], params.keys()), params)
    lengths = tree.norms(first), tree.norms(last)
    product = tree.dots(first, last)
    return Layers(
        gradient=lengths[0],
        perturbation=tree.norms(shift),
        update=tree.norms(tree.subtract(new_params, params)),
        weight=tree.norms(params),
        cosine=_cosine(product, *lengths),
        overall_cosine=_cosine(product.sum(), *map(torch.linalg.vector_norm, lengths)),
    )


class Alarm(NamedTuple):
    """A layer whose gradient vanishes or explodes."""

    name: str
    """Of the parameter."""
    kind: Literal["vanishing", "exploding"]
    gradient: float
    """||g||."""
    expected: float
    """What ||g|| was compared with."""

    def __str__(self) -> str:
        """Return it as a phrase."""
        compared = {
            "vanishing": "at the median of all layers it would be",
            "exploding": "it was",
        }[self.kind]
        gradient, expected = f"{self.gradient:.3g}", f"{self.expected:.3g}"
        return f"{self.name}: {self.kind} gradient, norm {gradient}, {compared} {expected}"


def alarms(
    params: Params,
    gradient: Tensor,
    before: Tensor | None = None,
    *,
    vanishing: float = 1e-6,
    exploding: float = 100.0,
) -> list[Alarm]:
    """Name the layers whose gradients vanish or explode. It waits for a GPU.

    vanishing: ||g_i|| / sqrt(n_i) <= vanishing * median over j of ||g_j|| / sqrt(n_j)
    exploding: ||g_i|| not finite, or > exploding * what it was before

    Args:
        params: their names and sizes n.
        gradient: ||g|| of each, shape (parameters,), as in `Layers`; or means of several
            steps, which one unusual batch does not move.
        before: the same some steps or an epoch ago; None asks for no growth.
        vanishing: 1e-6 is beyond the spread of layers that train, seen up to 1e-3.
        exploding: factor above 1.

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
    small = now <= vanishing * usual
    large = ~now.isfinite() | ((now > exploding * old) & (old > 0))
    return [
        Alarm(name, "exploding" if large[i] else "vanishing", *pair)
        for i, name in enumerate(params)
        if large[i] or small[i]
        for pair in [(float(now[i]), float(old[i] if large[i] else usual[i]))]
    ]


def _cosine(product: Tensor, *lengths: Tensor) -> Tensor:
    both = lengths[0] * lengths[1]
    return torch.where(both > 0, product / both, 0.0)


def _whole(params: Params, grads: Params) -> dict[str, Tensor]:
    return {
        name: grads[name] if name in grads else torch.zeros_like(w)
        for name, w in params.items()
    }
