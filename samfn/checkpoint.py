"""Checkpoints of a training state: the one module that knows safetensors."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from samfn import border
from samfn.update import TrainState

FORMAT = "samfn-1"


def save(path: str | os.PathLike[str], state: TrainState, **metadata: Any) -> None:
    """Write a state and its metadata to one safetensors file, or leave the old file.

    The file appears whole or not at all: it is written beside its place, synced, and
    renamed. Tensors are named by their place in the state, as "params/conv.weight".

    Args:
        path: where to; its directory exists.
        state: any training state.
        metadata: whatever JSON holds, given back by `restore`.

    Raises:
        OSError: the file cannot be written.
        TypeError: JSON does not hold the metadata.
    """
    path = Path(path)
    tensors = {key: leaf.contiguous() for key, leaf in _flatten(state).items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    content = safetensors.torch.save(tensors, {"samfn.format": FORMAT, **texts})
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def restore(
    path: str | os.PathLike[str], like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Read a state back, with its metadata.

    Args:
        path: a file that `save` wrote.
        like: a state of the same structure, as `init` makes it; gives names, shapes,
            dtypes, devices and memory formats, not values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or holds other names, shapes or dtypes
            than `like`.
    """
    tensors, metadata = _read(Path(path))
    expected = _flatten(like)
    border.require_same_layout(expected, tensors, names=f"the state and {path}")
    return _rebuild(like, tensors, ""), metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            # Clones own their memory: the file may change while they live.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if texts.pop("samfn.format", None) != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of samfn, format {FORMAT}")
    return tensors, {key: json.loads(text) for key, text in texts.items()}


def _flatten(node: Any, place: str = "") -> dict[str, Tensor]:
    """Name every tensor of a nested state by the path that leads to it."""
    if isinstance(node, Tensor):
        return {place: node}
    flat: dict[str, Tensor] = {}
    for key, child in _children(node).items():
        flat |= _flatten(child, f"{place}/{key}" if place else key)
    return flat


def _rebuild(like: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    if isinstance(like, Tensor):
        return torch.empty_like(like).copy_(tensors[place])
    children = {
        key: _rebuild(child, tensors, f"{place}/{key}" if place else key)
        for key, child in _children(like).items()
    }
    return TrainState(**children) if isinstance(like, TrainState) else children


def _children(node: Any) -> Mapping[str, Any]:
    return node._asdict() if isinstance(node, TrainState) else node


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
