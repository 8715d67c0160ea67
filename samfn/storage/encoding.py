"""How a checkpoint names what it holds: a state and metadata as tensors and texts.

Tensors are named by their place in the state, as "params/conv.weight"; metadata is JSON in
the header, and tensors among it are named "metadata/<key>"; JSON that is too long for a
header is the bytes of "samfn.json/<key>".
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samfn import tree
from samfn.step import TrainState

FORMAT = "2"  # the newest, and the only one that was ever released
RESERVED = "samfn."
FORMAT_KEY = f"{RESERVED}format"
METADATA = "metadata"
LONG = 2**16  # characters of JSON, above which it is a tensor: headers have an end
LONG_KEY = f"{RESERVED}json"
DEEPEST = 100  # levels of JSON; readers have about ten times as many


def encoded(
    state: TrainState, metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and texts that are a state and its metadata."""
    tensors = flatten(state)
    texts = {FORMAT_KEY: FORMAT}
    if reserved := [key for key in metadata if key.startswith(RESERVED)]:
        raise ValueError(f"metadata must not be called {RESERVED}*, got {reserved}")
    for key, value in metadata.items():
        if holds_tensors(value):
            if "/" in key:
                raise ValueError(f"metadata of tensors must have no / in its name: {key!r}")
            tensors |= tree.named(value, f"{METADATA}/{key}")
        else:
            put(_to_json(value, key), key, tensors, texts)
    for name, leaf in tensors.items():
        if any(placement.is_partial() for placement in getattr(leaf, "placements", ())):
            raise ValueError(f"expected DTensors that are whole or cut, {name} is a sum")
    return tensors, texts


def put(text: str, key: str, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Add a text to those of a file, or to its tensors if it is long."""
    if len(text) > LONG:
        content = bytearray(text.encode())
        tensors[f"{LONG_KEY}/{key}"] = torch.frombuffer(content, dtype=torch.uint8)
    else:
        texts[key] = text


def holds_tensors(value: Any) -> bool:
    """Return whether metadata is a tensor, or a mapping of nothing else."""
    if isinstance(value, Mapping) and value:
        return all(isinstance(item, Tensor) for item in value.values())
    return isinstance(value, Tensor)


def _to_json(value: Any, key: str) -> str:
    """Return what `restore` reads back as it was, or raise."""
    _require_json(value, f"metadata {key}", DEEPEST)
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata {key}: {error}") from error


def _require_json(value: Any, place: str, levels: int) -> None:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{place} is a tensor: those among metadata stand alone, or in a mapping that"
            " holds nothing else"
        )
    if not levels:
        raise ValueError(f"{place[:80]}... is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        names = [key if isinstance(key, str) else json.dumps(key) for key in value]
        if len({*names}) < len(names):
            raise ValueError(f"{place} has two names that JSON makes one: {[*value]}")
    nested = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list | tuple) else nested:
        if isinstance(item, dict | list | tuple | Tensor):
            _require_json(item, f"{place}/{key}", levels - 1)


def flatten(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state, or of nested mappings, by their places in it."""
    if not isinstance(state, TrainState | Mapping):
        raise TypeError(f"expected a training state, got a {type(state).__name__}")
    return tree.named(state._asdict() if isinstance(state, TrainState) else state)


def rebuilt(like: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Return nested mappings, or a state, with other tensors, named as by `flatten`."""
    if isinstance(like, Tensor):
        return tensors[place]
    if isinstance(like, TrainState):
        return TrainState(**rebuilt(like._asdict(), tensors))
    return {
        key: rebuilt(child, tensors, f"{place}/{key}" if place else str(key))
        for key, child in like.items()
    }
