"""The state of the random generators that a program draws from: to tensors, and back."""

import json
import random
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return the states of PyTorch's, NumPy's and Python's global generators.

    Returns:
        uint8 tensors by name: "torch", "python", "numpy", and "cuda:0", ... for each GPU;
        made for `samfn.save(path, state, random=samfn.random_state())`.
    """
    name, keys, *rest = numpy.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": _as_tensor(random.getstate()),
        "numpy": _as_tensor([name, [int(key) for key in keys], *rest]),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{index}"] = state
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put the generators back to where `random_state` found them.

    Raises:
        TypeError: they are no mapping.
        ValueError: the states are not of this machine's generators; none was set.
    """
    if not isinstance(states, Mapping):
        kind = type(states).__name__
        raise TypeError(f"expected states of generators by their names, got a {kind}")
    own = random_state()
    if states.keys() != own.keys():
        raise ValueError(
            f"expected the states of {sorted(own)}, got those of {sorted(states)}"
        )
    try:
        _set(states)
    except Exception as error:  # Each generator has its own ways to say so.
        _set(own)
        raise ValueError(f"expected states of generators, got others: {error}") from error


def _set(states: Mapping[str, Tensor]) -> None:
    version, internal, gauss = json.loads(_as_text(states["python"]))
    name, keys, *rest = json.loads(_as_text(states["numpy"]))
    torch.set_rng_state(states["torch"])
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    for key, state in states.items():
        if key.startswith("cuda:"):
            torch.cuda.set_rng_state(state, key)


def _as_tensor(state: object) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _as_text(state: Tensor) -> str:
    return bytes(state.tolist()).decode()
