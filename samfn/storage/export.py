"""A trained model for those who have no samfn: plain weights, and torch.export programs."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from samfn.modules import parameters
from samfn.storage import files, tensorfile
from samfn.tree import Params


class ExportError(RuntimeError):
    """An exported program does not give what the model gives."""


def export_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    buffers: Params,
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write what `model.load_state_dict(safetensors.torch.load_file(path))` takes.

    A weight that is tied to another is written under each of its names. The file is
    verified like a checkpoint when `samfn` reads it.

    Args:
        path: where to; its directory exists.
        model: whose names count; its own tensors do not, and stay as they are.
        params: as `TrainState.params`.
        buffers: as `TrainState.buffers`.
        metadata: texts about the weights, by name, as `metadata()` of
            `safetensors.safe_open(path, "pt")` returns them.

    Raises:
        TypeError: something in `metadata` is no text.
        ValueError: names, shapes or dtypes are not those of `samfn.split(model)`, a
            module has extra state that is no tensor, or the name of a text begins with
            "samfn.".
        OSError: the file cannot be written.
    """
    values = parameters.state_dict(model, params, buffers)
    if others := [name for name, value in values.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"expected tensors to write, got a {type(values[others[0]]).__name__} as"
            f" {others[0]}: the module's get_extra_state has to give a tensor"
        )
    for name, text in metadata.items():
        if not (isinstance(name, str) and isinstance(text, str)):
            raise TypeError(f"metadata holds texts by name, got {name!r}: {text!r}")
        if name.startswith("samfn."):
            raise ValueError(f'expected names of texts without "samfn.", got {name!r}')
    tensorfile.write(Path(path), values, dict(metadata))


def export_program(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    buffers: Params,
    inputs: Any,
) -> None:
    """Write the model as a program that `torch.export.load(path).module()` runs.

    It evaluates: batch statistics are those of `buffers`, and there is no dropout. The
    batch may have any length, unless a warning says which it may not, as of a model whose
    forward pass depends on it. What was written is read back and run, and replaces `path`
    only if it gives the model's outputs.

    Args:
        path: where to, usually `*.pt2`; its directory exists.
        model: the network; its own tensors and mode stay as they are.
        params: as `TrainState.params`.
        buffers: as `TrainState.buffers`.
        inputs: a batch of at least two examples, on the device of the model; a tuple
            becomes positional arguments, a mapping keyword arguments.

    Raises:
        ExportError: the program's outputs differ by more than 1e-5 of the largest.
        OSError: the file cannot be written.
        ValueError: names, shapes or dtypes are not those of `samfn.split(model)`.
    """
    network = parameters.trained(model, params, buffers)
    network = network.to(memory_format=torch.contiguous_format)  # all that it can hold
    any_length: Any = torch.export.Dim.AUTO
    with torch.no_grad(), files.replacing(Path(path)) as temporary:
        given, named = parameters.arguments(inputs)
        lengths = pytree.tree_map(
            lambda leaf: {0: any_length} if isinstance(leaf, Tensor) else None,
            named or given,
        )
        program = torch.export.export(network, given, named, dynamic_shapes=lengths)
        with temporary.open("wb") as file:
            torch.export.save(program, file)
        with temporary.open("rb") as file:
            loaded: Any = torch.export.load(file).module()
        found = loaded(*given, **named)
        expected = network(*given, **named)
        if not _close(found, expected):
            raise ExportError(f"the program written to {path} gives other outputs")
        if counts := " or ".join(map(str, _refused(loaded, given, named))):
            warnings.warn(
                f"the program written to {path} takes no batch of {counts} examples, as"
                " the model's forward pass depends on how many there are",
                RuntimeWarning,
                stacklevel=2,
            )


def _close(found: Any, expected: Any) -> bool:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return all(_alike(new, old) if isinstance(old, Tensor) else True for new, old in pairs)


def _alike(new: Tensor, old: Tensor) -> bool:
    """Return whether values differ by little, and none is inf or nan in one place alone."""
    if new.shape != old.shape or not old.is_floating_point():
        return torch.equal(new, old)
    finite = old.isfinite()
    most = old[finite].abs().max() if finite.any() else torch.ones(())
    near = 1e-5 * float(most.clamp(min=1))
    return torch.allclose(new, old, rtol=0.0, atol=near, equal_nan=True)


def _refused(program: Any, given: tuple[Any, ...], named: dict[str, Any]) -> list[int]:
    """Return of some other numbers of examples those that a program does not take."""
    first = next(x for x in pytree.tree_leaves((given, named)) if isinstance(x, Tensor))
    count, refused = len(first), []

    def rows(leaf: Any, wanted: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != count:
            return leaf
        return leaf[torch.arange(wanted, device=leaf.device) % count]

    for wanted in sorted({1, count + 1} - {count}):
        own = pytree.tree_map(lambda leaf, n=wanted: rows(leaf, n), (given, named))
        try:
            program(*own[0], **own[1])
        except Exception:
            refused.append(wanted)
    return refused
