"""A step in place: on a state that stays where it is, and as one CUDA graph."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from samfn.compiled.plan import Step
from samfn.step import Metrics, TrainState
from samfn.support.batches import keyed
from samfn.tree import Batch


def in_place_of(step: Step) -> Callable[..., Metrics]:
    """Return the step that writes the new state over the old one."""

    def in_place(
        state: TrainState, batch: Batch, rho: float | Tensor, lr: float | Tensor
    ) -> Metrics:
        new, metrics = step(state, batch, rho, lr)
        _overwrite(state._asdict(), new._asdict())
        return metrics

    return in_place


class StaticState:
    """A step in place, on a state of its own that other states are copied into."""

    def __init__(self) -> None:
        self._state: TrainState | None = None

    def __call__(
        self,
        in_place: Callable[..., Metrics],
        state: TrainState,
        batch: Batch,
        rho: float | Tensor,
        lr: float | Tensor,
    ) -> tuple[TrainState, Metrics]:
        """Take a step on the state of its own."""
        origin = None
        if self._state is None:
            self._state, origin = _copy(state), state
            for leaf in pytree.tree_leaves(self._state):
                # Tells Inductor's own CUDA graphs not to copy it in at every step.
                torch._dynamo.mark_static_address(leaf)
        elif state is not self._state:
            _overwrite(self._state._asdict(), state._asdict())
        return self._state, self._take(in_place, self._state, origin, batch, rho, lr)

    def _take(
        self,
        in_place: Callable[..., Metrics],
        state: TrainState,
        origin: TrainState | None,
        batch: Any,
        *dials: Any,
    ) -> Metrics:
        """Take a step on a state, maybe the first, of the copy of an origin."""
        return in_place(state, batch, *dials)


class CudaGraphed(StaticState):
    """A step in place as a CUDA graph: one launch, whatever it holds.

    A graph reads and writes fixed addresses: the state's own, and those of inputs that
    every step copies the batch and the dials to. It is recorded once for batches of a
    shape, and for a kind of step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any, Metrics]] = {}

    def _take(
        self,
        in_place: Callable[..., Metrics],
        state: TrainState,
        origin: TrainState | None,
        batch: Any,
        *dials: Any,
    ) -> Metrics:
        inputs = keyed(batch), *dials  # Tensors in other mappings would not be found.
        leaves, structure = pytree.tree_flatten(inputs)
        key = in_place, str(structure), tuple(map(_kind, leaves))
        with torch.cuda.device(state.step.device):
            if key not in self._graphs:
                before = origin or _copy(state)
                self._graphs[key] = self._record(in_place, state, before, _copy(inputs))
            graph, own, metrics = self._graphs[key]
            for old, new in zip(pytree.tree_leaves(own), leaves, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new, non_blocking=True)
            graph.replay()
        return Metrics(*_copy(tuple(metrics)))  # The next replay writes over them.

    def _record(
        self,
        in_place: Callable[..., Metrics],
        state: TrainState,
        before: TrainState,
        inputs: Any,
    ) -> tuple[torch.cuda.CUDAGraph, Any, Metrics]:
        random = torch.cuda.get_rng_state()
        here = torch.cuda.current_stream()
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(aside):
                for _ in range(3):  # Compiles, tunes, and makes the libraries' workspaces.
                    in_place(state, *inputs)
            here.wait_stream(aside)
            with torch.cuda.graph(graph):
                metrics = in_place(state, *inputs)
        finally:  # What cannot be recorded is taken eagerly, from where the step began.
            _overwrite(state._asdict(), before._asdict())
            torch.cuda.set_rng_state(random)
        return graph, inputs, metrics


def _copy(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, values)


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Mapping):
        for key in old:
            _overwrite(old[key], new[key])
    else:
        old.copy_(new)


def _kind(leaf: Any) -> Any:
    """Return what a graph depends on: of a tensor all but its values, else the value."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.stride(), leaf.device
    return leaf
