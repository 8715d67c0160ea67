"""A trained model for those who have no samfn: plain weights, and torch.export programs."""

import os
from pathlib import Path
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
    path: str | os.PathLike[str], model: nn.Module, params: Params, buffers: Params
) -> None:
    """Write what `model.load_state_dict(safetensors.torch.load_file(path))` takes.

    A weight that is tied to another is written under each of its names. The file is
    verified like a checkpoint when `samfn` reads it.

    Args:
        path: where to; its directory exists.
        model: whose names count; its own tensors do not, and stay as they are.
        params: as `TrainState.params`.
        buffers: as `TrainState.buffers`.

    Raises:
        ValueError: names, shapes or dtypes are not those of `samfn.split(model)`.
        OSError: the file cannot be written.
    """
    tensorfile.write(Path(path), parameters.state_dict(model, params, buffers), {})


def export_program(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    buffers: Params,
    inputs: Any,
) -> None:
    """Write the model as a program that `torch.export.load(path).module()` runs.

    It evaluates: batch statistics are those of `buffers`, and there is no dropout. The
    batch may have any length. What was written is read back and run, and replaces
    `path` only if it gives the model's outputs.

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
            found = torch.export.load(file).module()(*given, **named)
        expected = network(*given, **named)
        if not _close(found, expected):
            raise ExportError(f"the program written to {path} gives other outputs")


def _close(found: Any, expected: Any) -> bool:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return all(
        not isinstance(old, Tensor)
        or bool((new - old).abs().max() <= 1e-5 * old.abs().max().clamp(min=1))
        for new, old in pairs
    )
