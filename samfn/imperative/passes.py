"""How many backward passes a gradient is the sum of, as two parameters tell."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from samfn import tree


class Seen(NamedTuple):
    """A gradient as it was, without keeping it: it may be as large as the model."""

    grad: "weakref.ref[Tensor]"
    version: int
    """How often it was written to."""

    @classmethod
    def of(cls, grad: Tensor) -> "Seen":
        """Look at a gradient."""
        return cls(weakref.ref(grad), _version(grad))

    def is_still(self, grad: Tensor, writes: int = 0) -> bool:
        """Return whether a gradient is this one, and was written to so often since then."""
        return self.grad() is grad and _version(grad) == self.version + writes


class Home(NamedTuple):
    """Where a parameter is in a model."""

    module: "weakref.ref[torch.nn.Module]"
    name: str


Homes = Mapping[int, Home]
"""By the identity of the parameter."""


def homes(model: torch.nn.Module) -> dict[int, Home]:
    """Return where the parameters of a model are."""
    return {
        id(p): Home(weakref.ref(module), name)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _version(grad: Tensor) -> int:
    return int(tree.local(grad)._version)  # A DTensor does not count itself.


class Passes:
    """Counts backward passes since gradients were cleared, whoever clears them.

    Hooks at all parameters would cost more than a step of a small network may; the first
    and the last see what the whole network does.
    """

    def __init__(self) -> None:
        self._watches: list[_Watch] = []
        self.first = 0
        """How many the first pass had."""

    def watch(self, parameters: Sequence[Tensor], known: Homes) -> None:
        """Watch the first and the last of parameters, beside those of before.

        Args:
            parameters: in their order.
            known: where they are, as far as that is known.
        """
        trained = [p for p in parameters if p.requires_grad and p.numel()]
        ends = dict.fromkeys((*trained[:1], *trained[-1:]))
        watched = {id(watch.parameter()) for watch in self._watches}
        self._watches += [_Watch(p) for p in ends if id(p) not in watched]
        self.visit(known)

    def visit(self, known: Homes) -> None:
        """Count also what `fully_shard` adds up by itself, in the homes of parameters."""
        for watch in self._watches:
            watch.visit(known)

    def end(self) -> None:
        """Take the hooks away."""
        for watch in self._watches:
            watch.end()

    def end_first(self, parameters: Sequence[Tensor], known: Homes) -> None:
        """Remember how many there were; watch others, too, if those had no gradient."""
        self.first = self.count
        if not self.first:
            self.watch(parameters, known)

    def begin(self, *, anew: bool = False) -> None:
        """Look at the gradients as they are; what is not cleared from now on counts on.

        Args:
            anew: count from 0 in any case.
        """
        for watch in self._watches:
            watch.begin(anew)

    @property
    def count(self) -> int:
        """The most backward passes that a gradient is the sum of; 0 if nobody knows."""
        return max((watch.count for watch in self._watches), default=0)

    @property
    def cleared(self) -> bool:
        """Whether a gradient that there was at the beginning was cleared before a pass."""
        return any(watch.cleared for watch in self._watches)


class _Watch:
    """Counts the backward passes that the gradient of a parameter is the sum of."""

    def __init__(self, parameter: Any) -> None:
        # The hooks, which the parameter holds, must not keep it.
        self.parameter = weakref.ref(parameter)
        self._handles = [
            parameter.register_hook(self._before),
            parameter.register_post_accumulate_grad_hook(self._after),
        ]
        self._is_seen = False
        self._home: Home | None = None
        self._whole: Any = None  # The parameter as `fully_shard` gathers it, weakly.
        self._unsent = 0  # Backward passes that went to that one's gradient alone.
        self.begin(anew=True)

    def visit(self, known: Homes) -> None:
        parameter = self.parameter()
        home = known.get(id(parameter))
        module = home.module() if home else None
        if module is None or self._home is not None or not tree.is_sharded(parameter):
            return
        self._home = home
        self._handles.append(module.register_forward_pre_hook(self._look_for_whole))

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _look_for_whole(self, module: torch.nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return  # A graph has no hooks of tensors that are made later.
        whole = getattr(module, cast(Home, self._home).name, None)
        seen = self.parameter(), None if self._whole is None else self._whole()
        if whole is not None and all(whole is not each for each in seen):
            self._whole = weakref.ref(whole)
            self._handles.append(whole.register_post_accumulate_grad_hook(self._not_sent))

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _not_sent(self, _: Tensor) -> None:
        self._unsent += 1  # Nobody but the next synchronisation takes it away.

    def begin(self, anew: bool) -> None:
        parameter = self.parameter()
        grad = None if parameter is None else parameter.grad
        self._left = None if grad is None else Seen.of(grad)
        self._last = self._left
        self._is_new, self.cleared = True, False
        if anew or grad is None:
            self.count = 0

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _before(self, _: Tensor) -> None:
        # Also called by torch.autograd.grad, which adds nothing up.
        parameter = self.parameter()
        grad = None if parameter is None else parameter.grad
        self._is_seen = True
        self._look(grad is not None and (not self._is_new or self._is_left(grad, 0)))

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _after(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        if not self._is_seen:  # FSDP2 adds up by itself, and calls this one only.
            last = self._last is not None and self._last.grad() is grad
            self._look(last and (not self._is_new or self._is_left(grad, 1)))
            self._last = Seen.of(grad)
        self._is_seen = False
        self.count += max(1, self._unsent)
        self._unsent = 0

    def _is_left(self, grad: Tensor, writes: int) -> bool:
        return self._left is None or self._left.is_still(grad, writes)

    def _look(self, goes_on: bool) -> None:
        """Begin to count anew where the gradient was cleared, or zeroed in place."""
        if not goes_on:
            self.cleared |= self._left is not None or self.count > 0
            self.count = 0
        self._is_new = False
