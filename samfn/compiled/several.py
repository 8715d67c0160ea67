"""Several steps in one call: batches that are stacked, and dials of their own."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.compiled.plan import Dials, Step
from samfn.step import Metrics, TrainState
from samfn.support import checks
from samfn.support.batches import VALUES, keyed, rows_of
from samfn.tree import Batch


def in_turn(
    step: Callable[..., tuple[TrainState, Metrics]], kinds: Sequence[Hashable]
) -> Step:
    """Return the function that takes a step of each kind, each on a batch of its own.

    It returns the last state, and the metrics of all, stacked.
    """

    def several(
        state: TrainState, batch: Batch, rho: Dials, lr: Dials
    ) -> tuple[TrainState, Metrics]:
        seen = []
        for number, kind in enumerate(kinds):
            dials = _nth(rho, number), _nth(lr, number)
            state, metrics = step(state, rows_of(batch, number), *dials, kind)
            seen.append(metrics)
        return state, pytree.tree_map(_stacked, *seen)

    return several


def require_stacked(batch: Batch, steps: int) -> None:
    """Raise unless every tensor of a batch has a first dimension of that many steps.

    Raises:
        ValueError: says what came.
    """
    leaves = [x for x in pytree.tree_leaves(keyed(batch)) if not isinstance(x, VALUES)]
    found = [tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in leaves]
    if not found or any(not isinstance(x, tuple) or x[:1] != (steps,) for x in found):
        raise ValueError(
            f"steps={steps} takes as many batches stacked, as torch.stack does: expected"
            f" tensors of shape ({steps}, ...), got {', '.join(map(str, found)) or 'none'}"
        )


def require_dials(name: str, value: Any, steps: int | None) -> Dials:
    """Return one value of a dial for all steps, or one for each: a tensor, or a tuple.

    Args:
        name: of the dial.
        value: what was given.
        steps: how many; None takes a value of a single step.

    Raises:
        TypeError: it is neither a number nor a tensor, nor a sequence of them.
        ValueError: there are more values, or fewer; one of them is refused by
            `checks.require_dial`.
    """
    if steps is None or not _has_an_order(value):
        return checks.require_dial(name, value)
    values = tuple(checks.require_dial(name, one) for one in value)
    if not isinstance(value, Tensor):
        value = _in_one(values) if any(isinstance(v, Tensor) for v in values) else values
    if (found := len(value)) != steps:
        raise ValueError(
            f"{name} must be one value, or one for each of {steps} steps, got {found}"
        )
    dials: Dials = value
    return dials


def with_zeros(value: float | tuple[float | Tensor, ...], tensor: Tensor) -> Dials:
    """Return the tensor of a dial, with the numbers that are 0 in it as these."""
    if value == 0 or (isinstance(value, tuple) and not any(value)):
        return 0.0
    if isinstance(value, tuple) and not all(value):
        pairs = zip(value, tensor.unbind(), strict=True)
        return tuple(one if number else 0.0 for number, one in pairs)
    return tensor


def _has_an_order(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 1
    return isinstance(value, Iterable) and not isinstance(value, Set | Mapping)


def _in_one(values: tuple[float | Tensor, ...]) -> Tensor:
    first = next(one for one in values if isinstance(one, Tensor))
    how: Any = {"dtype": torch.promote_types(first.dtype, torch.float32)}
    how |= {"device": first.device}
    return torch.stack([torch.as_tensor(one, **how) for one in values])


def _nth(dials: Dials, number: int) -> float | Tensor:
    if isinstance(dials, tuple):
        return dials[number]
    return dials[number] if isinstance(dials, Tensor) and dials.ndim else dials


def _stacked(*values: Any) -> Any:
    """Return tensors of one shape stacked, and all else in a list; of nothing, nothing."""
    if values[0] is None:
        return None
    # Steps that see a part of the batch, or all of it, have outputs of other lengths.
    alike = all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)
    return torch.stack(values) if alike else [*values]
