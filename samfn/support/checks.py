"""Checks at the border: an error says what was expected and what came.

They look at names, shapes and types, which costs nothing in a compiled step, and at no
values of tensors but those of a dial on the CPU: another device would have to wait.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from math import ceil, inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from samfn.tree import Params, any_sharded, is_sharded


def require_dial(name: str, value: float | Tensor) -> float | Tensor:
    """Return a 0-d tensor as it is, and a finite number that is not negative as Python's.

    Raises:
        TypeError: `value` is neither a number nor a tensor of numbers.
        ValueError: a number below 0, or not finite, or a tensor that is not 0-d. What a
            tensor holds is looked at on the CPU, but not in a graph or a transform of
            torch.func: elsewhere that would make a GPU wait.
    """
    value = require_radius(name, value)
    if isinstance(value, Tensor) and is_readable(value):
        require_radius(name, value.item())
    return value


def require_radius(name: str, value: float | Tensor) -> float | Tensor:
    """Return what `require_dial` does, of a tensor whatever it holds.

    For what a step has computed: a radius may then be negative, or not finite.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a number or a 0-d tensor, got {value.dtype}")
        return value
    number = _as_float(name, value, "a number or a 0-d tensor")
    if not 0 <= number < inf:
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return number


def require_finite(**numbers: float | Tensor) -> None:
    """Raise unless each of these is a finite number; of a tensor, if it can be read.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite or NaN.
    """
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            if not is_readable(value):
                continue
            value = value.item()
        if not isfinite(number := _as_float(name, value, "a number")):
            raise ValueError(f"{name} must be finite, got {number}")


def _as_float(name: str, value: Any, expected: str) -> float:
    # NumPy's numbers are the last. True is 1, and was meant for another argument.
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:  # No float holds every integer.
        return inf


def is_readable(value: Tensor) -> bool:
    """Return whether a tensor has a value here that can be read without waiting."""
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return False
    plain = type(value) in (Tensor, torch.nn.Parameter)  # A fake tensor has no value.
    return plain and not is_functorch_wrapped_tensor(value)


def require_count(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least}, got {value!r}"
        )


def require_share(name: str, value: float) -> None:
    """Raise unless `value` is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def require_positive(name: str, value: float) -> None:
    """Raise unless `value` is above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def require_below_one(name: str, value: float) -> None:
    """Raise unless `value` is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


def require_same_layout(expected: Params, given: Params, *, names: str) -> None:
    """Raise unless both mappings agree in names, shapes and dtypes.

    Args:
        expected: the mapping that rules.
        given: the mapping that is checked.
        names: what the two are called in the error, as "params and grads".

    Raises:
        ValueError: says what differs, the first five of it.
    """
    require_same_names(expected, given, names=names)
    for name, leaf in expected.items():
        other = given[name]
        if leaf.shape != other.shape or leaf.dtype != other.dtype:
            _refuse(expected, given, names, "shapes", lambda leaf: tuple(leaf.shape))
            _refuse(expected, given, names, "dtypes", lambda leaf: leaf.dtype)


def require_same_names(expected: Params, given: Params, *, names: str) -> None:
    """Raise unless both mappings have the same names; see `require_same_layout`."""
    if expected.keys() != given.keys():
        missing = sorted(expected.keys() - given.keys())
        unexpected = sorted(given.keys() - expected.keys())
        raise ValueError(
            f"{names} must have the same names: {some(missing)} missing,"
            f" {some(unexpected)} unexpected"
        )


def require_no_text(names: Collection[str], *, what: str) -> None:
    """Raise TypeError for a text in the place of names: its letters would be taken."""
    if isinstance(names, str):
        raise TypeError(f"{what}: expected names of parameters, got the text {names!r}")


def require_names_of(params: Params, names: Collection[str], *, what: str) -> None:
    """Raise unless each of the names is one of a parameter.

    Raises:
        ValueError: says which are not, the first five of them.
    """
    if unknown := [name for name in names if name not in params]:
        raise ValueError(f"{what}: {some(sorted(unknown))} is none of the parameters")


def require_gradients(
    params: Params, grads: Params, *, names: str = "params and grads"
) -> None:
    """Raise unless `grads` can be the gradient at `params`, or another direction.

    Raises:
        ValueError: names, shapes, dtypes or devices differ.
    """
    require_same_layout(params, grads, names=names)
    if any(leaf.device != grads[name].device for name, leaf in params.items()):
        _refuse(params, grads, names, "devices", lambda leaf: leaf.device)


def require_tensors(what: str, mapping: Any, *, sharded: bool = False) -> None:
    """Raise unless `mapping` maps to tensors.

    Args:
        what: it is, in the error.
        mapping: what is checked.
        sharded: whether they may be DTensors.

    Raises:
        TypeError: it is no mapping, or holds something else.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{what} must map names to tensors, got {type(mapping).__name__}")
    for name, value in mapping.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{what}[{name!r}] must be a tensor, got {type(value)}")
        if is_sharded(value) and not sharded:
            raise TypeError(
                f"{what}[{name!r}] must be a plain tensor, got a DTensor: take its"
                " full_tensor(), or samfn.distributed.gather"
            )


def require_base_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is one of PyTorch whose step can be called as it is.

    Raises:
        TypeError: it is something else, or its step needs a closure.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a base optimizer of PyTorch, got {name}")
    needed = [
        repr(argument.name)
        for argument in inspect.signature(optimizer.step).parameters.values()
        if argument.default is argument.empty
        and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    ]
    if needed:
        raise TypeError(
            f"expected an optimizer whose step needs no closure, got {name}, whose step"
            f" needs {', '.join(needed)}"
        )


def require_trainable(params: Params, buffers: Params) -> None:
    """Raise unless `params` can be trained beside `buffers`.

    Raises:
        TypeError: not mappings to tensors.
        ValueError: `params` is empty, or holds a tensor that requires grad or is not
            floating point, or is sparse, or without values, or inside of torch.func; the
            tensors are on several devices.
    """
    require_tensors("params", params, sharded=True)
    require_tensors("buffers", buffers, sharded=any_sharded(params.values()))
    if not params:
        raise ValueError("params must hold at least one tensor, got none")
    sharded = is_sharded(next(iter(params.values())))
    for name, value in params.items():
        if is_sharded(value) != sharded:
            raise ValueError(
                f"params must be DTensors, all or none of them, {name} is"
                f" {'not' if sharded else 'one'}: samfn.distributed.shard places all"
            )
        if value.layout is not torch.strided:
            raise ValueError(f"params must be dense, {name} is {value.layout}")
        if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(value):
            raise ValueError(
                f"params must be plain tensors, {name} is one inside of torch.vmap or"
                " another transform of torch.func: take steps outside of these"
            )
        if not value.is_floating_point():
            raise ValueError(
                f"params must be floating point, {name} is {value.dtype}: make it a buffer"
            )
        if value.requires_grad:
            raise ValueError(
                f"params must not require grad, {name} does: detach them, as"
                " samfn.split does"
            )
    device = next(iter(params.values())).device
    if device.type == "meta":
        raise ValueError(
            f"params must have values, {next(iter(params))} is on the device meta: make the"
            " model with values, as by model.to_empty(device=...) and its initialisation"
        )
    for name, value in (*params.items(), *buffers.items()):
        if value.device != device:
            raise ValueError(
                f"params and buffers must be on one device, {name} is on {value.device},"
                f" others on {device}"
            )


def require_apart(params: Params, buffers: Params) -> None:
    """Raise if a name stands in both mappings."""
    if shared := sorted(params.keys() & buffers.keys()):
        raise ValueError(f"params and buffers must not share names, both hold {shared}")


def some(items: list[str], shown: int = 5) -> str:
    """Return the first few of a list, and how many more there are."""
    text = ", ".join(items[:shown]) or "none"
    return text + (f" and {len(items) - shown} more" if len(items) > shown else "")


def rounded_up(share: float, count: int) -> int:
    """Return ceil(share * count), where 0.07 of 100 is 7, which floats make more of."""
    return ceil(round(share * count, 9))


def _refuse(
    expected: Params,
    given: Params,
    names: str,
    what: str,
    trait: Callable[[Tensor], Any],
) -> None:
    differing = [
        f"{name}: {trait(leaf)} against {trait(given[name])}"
        for name, leaf in expected.items()
        if trait(leaf) != trait(given[name])
    ]
    if differing:
        raise ValueError(f"{names} must have the same {what}: {some(differing)}")
