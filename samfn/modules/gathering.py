"""DTensors that a module reads as whole tensors: gathered at use, and released after it.

A rank holds a part of each parameter. While a model is lent DTensors, reading one as an
attribute of its module gathers it, as SimpleFSDP of torchtitan does. Whole are those of the
module that is at work, and what is in use elsewhere; for the backward pass they are
gathered once more.
"""

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from samfn.modules.memory import address
from samfn.support.collectives import whole
from samfn.tree import is_sharded

CHANGED = (
    "one of the variables needed for gradient computation has been modified by an in-place"
    " operation: {} is at version {}, expected {}"
)


NOTHING: Any = None, None, 0


class _Full(NamedTuple):
    """A whole tensor, what it is made of, and its version then."""

    full: Tensor
    leaf: Tensor
    version: int


class _Again(NamedTuple):
    """A view of a whole tensor, to be made again."""

    leaf: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class Gathering:
    """The whole tensors of one pass, each as long as it is in use.

    Args:
        dress: (whole, its part) -> the tensor that the model reads.
        written: (its part) raises; a whole tensor was written to.
    """

    def __init__(
        self,
        dress: Callable[[Tensor, Tensor], Tensor],
        written: Callable[[Tensor], None],
    ) -> None:
        self._dress, self._written = dress, written
        self._working: tuple[Any, list[_Full]] = (None, [])
        self._alive: dict[Any, ref[Tensor]] = {}
        self._made: dict[int | None, tuple[ref[Tensor], Tensor, int]] = {}

    def read(self, module: Any, leaf: Tensor) -> Tensor:
        """Return what a module reads in place of a DTensor."""
        if module is not self._working[0]:
            self.release()
            self._working = module, []
        key = id(leaf), torch.is_grad_enabled()
        full = self._alive[key]() if key in self._alive else None
        if full is None:
            full = self._dress(whole(leaf), leaf)
            self._alive[key] = ref(full)
            self._made[address(full)] = ref(full), leaf, full._version
            self._working[1].append(_Full(full, leaf, full._version))
        return full

    def release(self) -> None:
        """Let go of the module that was at work."""
        for full, leaf, version in self._working[1]:
            if full._version != version:
                self._written(leaf)
        self._working = None, []

    def gathering_again(self) -> AbstractContextManager[Any]:
        """Let autograd keep no whole tensor: its backward pass gathers them again."""
        return saved_tensors_hooks(self._packed, _unpacked)

    def _packed(self, saved: Tensor) -> Any:
        full, leaf, version = self._made.get(address(saved), NOTHING)
        if (alive := full and full()) is None or address(alive) != address(saved):
            return saved, saved._version
        if saved._version != version:
            self._written(leaf)
        return _Again(leaf, saved.size(), saved.stride(), saved.storage_offset())

    @contextmanager
    def in_modules(self, modules: list[nn.Module]) -> Iterator[None]:
        """Let modules read whole tensors in place of the DTensors that they hold."""
        before = [(module, module._parameters) for module in modules]
        for module, held in before:
            if any(leaf is not None and is_sharded(leaf) for leaf in held.values()):
                vars(module)["_parameters"] = _Read(held, self)
        try:
            yield
            self.release()
        finally:
            for module, held in before:
                vars(module)["_parameters"] = held


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, _Again):
        with torch.no_grad():
            full = whole(packed.leaf)
        return full.as_strided(packed.size, packed.stride, packed.offset)
    # With hooks, autograd does not look itself.
    saved, version = packed
    if saved._version != version:
        shape = f"a tensor of shape {tuple(saved.shape)}"
        raise RuntimeError(CHANGED.format(shape, saved._version, version))
    kept: Tensor = saved
    return kept


class _Read(dict[str, Any]):
    """The parameters of a module, each DTensor whole as it is read."""

    def __init__(self, held: dict[str, Any], gathering: Gathering) -> None:
        super().__init__(held)
        self._gathering = gathering

    def __getitem__(self, name: str) -> Any:
        leaf = super().__getitem__(name)
        if leaf is None or not is_sharded(leaf):
            return leaf
        return self._gathering.read(self, leaf)

    # Those of a dict would give the parts. Each of these reads one at a time.

    def get(self, name: str, default: Any = None) -> Any:
        return Mapping.get(self, name, default)

    def items(self) -> Any:
        return ItemsView(self)

    def values(self) -> Any:
        return ValuesView(self)
