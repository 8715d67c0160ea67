"""Lending other tensors to a model: put in for a while, and its own ones put back.

Everything that a forward or backward pass reads of a module is what it was lent, wherever
it is read: in the module, in hooks, in what is computed again. What the module itself holds
is the same afterwards, to the bit and to the object.
"""

import inspect
import operator
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from samfn.modules.memory import address, is_watchable, sharing
from samfn.modules.weighing import Reductions
from samfn.tree import Batch, Params

KINDS = "_parameters", "_buffers", "_modules"
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
CACHES = "_flat_weights", "_flat_weight_refs"  # of recurrent layers

WRITES = (
    "the forward pass writes to {}, which it may only read: what changes in it must be a"
    " buffer, and a constraint on weights be made by torch.nn.utils.parametrize or applied"
    " to state.params after the step"
)

BY_ANOTHER_NAME = (
    "the forward pass reaches the model's own {} by another way than the module's"
    " attribute, as a list or a closure that keeps the tensor: what a step lends the model"
    " is not there"
)


TO_HIDDEN = (
    "the forward pass writes to a tensor inside of the batch's {}, which is not copied as"
    " tuples, lists and mappings of tensors are: let it write to a copy of its own"
)

LENT_TWICE = (
    "the model's {} is lent to another pass, of another thread or around this one: give"
    " each a copy of the model"
)

VIEWS = (
    "the forward pass writes to the buffer {}, which shares memory with another buffer: a"
    " state keeps them apart, so let one be made from the other in forward"
)

# What every module has; the rest is what its own code keeps.
USUAL = vars(nn.Module()).keys()


class ImpureError(ValueError):
    """A forward pass changes or reads what no function of its arguments would."""


class Place(NamedTuple):
    """Where a module keeps a tensor."""

    name: str
    """The first of the names that the tensor has; that of `split`."""
    module: nn.Module
    kind: str
    """`_parameters` or `_buffers`, as the module calls its dict of them."""
    attribute: str
    own: Tensor

    def put(self, tensor: Tensor) -> None:
        """Let the module hold another tensor there."""
        getattr(self.module, self.kind)[self.attribute] = tensor

    def get(self) -> Any:
        """Return what it holds."""
        return getattr(self.module, self.kind)[self.attribute]


class Lender:
    """A model as it stands, to which tensors are lent.

    Args:
        model: its modules may hold others at another time; then it takes another lender.
        criterion: beside it, whose hooks count, if it is a module.
    """

    def __init__(self, model: nn.Module, criterion: Any = None) -> None:
        modules = [*model.named_modules()]
        self._standing = _Standing(model, criterion)
        self._kept = [_Kept.of(name, module) for name, module in modules]
        self.places = [*_places(modules)]
        """Where its tensors are, each place once."""
        own = {
            kind: {p.name: p.own for p in self.places if p.kind == kind} for kind in KINDS
        }
        self.parameters, self.buffers, _ = own.values()
        """What a forward pass reads, and what it may write to, too."""
        self._watched = [
            (BY_ANOTHER_NAME, p.name, p.own) for p in self.places if is_watchable(p.own)
        ]
        self._views = {name for pair in sharing(self.buffers) for name in pair}
        for name, parameter in self.parameters.items():
            if type(parameter) is Tensor and "_is_param" in vars(parameter):
                raise ImpureError(LENT_TWICE.format(name))

    def stands(self) -> bool:
        """Return whether the model has the modules, tensors and hooks that it had."""
        return self._standing.holds()

    def hooks(self) -> dict[str, list[Any]]:
        """Return the hooks that parameters have for their gradients.

        Raises:
            ValueError: one waits for the gradient to stand in `.grad`, where none will be,
                or for the gradients of the model's own tensors.
        """
        found: dict[str, list[Any]] = {}
        for name, parameter in self.parameters.items():
            own: Any = parameter
            if own._post_accumulate_grad_hooks:
                raise ValueError(
                    f"the parameter {name} has a hook that waits for its gradient in .grad,"
                    " which no function sets: remove it, and use what a step returns"
                )
            if own._backward_hooks and own.requires_grad:
                found[name] = [*own._backward_hooks.values()]
                if any(map(_waits_for_others, found[name])):
                    raise ValueError(
                        f"the parameter {name} has a hook of register_multi_grad_hook that"
                        " waits for the gradients of several tensors, which those that are"
                        " lent to the model are not: remove it, or register it in forward"
                    )
        return found

    @contextmanager
    def holding(self, given: Params) -> Iterator[None]:
        """Put tensors into the model, and its own ones back in the end.

        Raises:
            ImpureError: the structure of the model changed in the meantime.
        """
        eager = not torch.compiler.is_compiling()
        keeping: AbstractContextManager[None] = nullcontext()
        if eager:
            _require_no_cache()
            # A dry run leaves nothing behind, whatever a module remembers of a pass; nor
            # does one of evaluation, whose caches would be read at other parameters.
            dry = any(isinstance(tensor, FakeTensor) for tensor in given.values())
            if dry or not self._kept[0].module.training:
                keeping = _as_they_are(self.modules())
        whole = False
        try:
            self.put(given)
            with keeping:
                yield
            if eager:
                self._require_same()
            whole = True
        finally:
            if not eager:
                self._put_own()
            else:
                try:
                    self._take_back(whole)
                except BaseException:  # Ctrl-C in the middle of it.
                    self._take_back(False)
                    raise

    def _take_back(self, whole: bool) -> None:
        for kept in self._kept:
            if kept.cached or not whole:
                kept.put_back()
        self._put_own()

    def _put_own(self) -> None:
        for place in self.places:
            place.put(place.own)

    def modules(self) -> list[nn.Module]:
        """Return the modules of the model."""
        return [kept.module for kept in self._kept]

    def put(self, given: Params) -> None:
        """Let the model hold those of the tensors that are given."""
        for place in self.places:
            if place.name in given:
                place.put(given[place.name])

    def left(self) -> dict[str, Tensor]:
        """Return the buffers that the model holds now.

        Raises:
            ImpureError: one of them is missing, or two at the places of one.
        """
        left: dict[str, Tensor] = {}
        if not torch.compiler.is_compiling():
            self._require_same()
        for place in self.places:
            if place.kind == "_buffers":
                now = place.get()
                if place.name in self._views and now._version:  # of a copy, 0
                    raise ImpureError(VIEWS.format(place.name))
                if left.setdefault(place.name, now) is not now:
                    raise ImpureError(
                        "the forward pass gives another tensor to one of the names of"
                        f" the buffer {place.name}: change it in place"
                    )
        return left

    def _require_same(self) -> None:
        for kept in self._kept:
            kept.require_same()

    @contextmanager
    def reading(self, lent: Params, hidden: Mapping[str, list[Tensor]]) -> Iterator[None]:
        """Look whether what may only be read was written to inside.

        Args:
            lent: what the model was lent.
            hidden: what the batch holds beside what was copied of it, by what holds it.

        Raises:
            ImpureError: one of them was, or a tensor of the model itself.
        """
        watched = [(WRITES, *named) for named in lent.items() if is_watchable(named[1])]
        watched += self._watched
        watched += [(TO_HIDDEN, name, one) for name, held in hidden.items() for one in held]
        before = [(tensor._version, tensor.data_ptr()) for _, _, tensor in watched]
        yield
        after = [(tensor._version, tensor.data_ptr()) for _, _, tensor in watched]
        if after != before:
            index = [*map(operator.ne, after, before)].index(True)
            told, name, _ = watched[index]
            raise ImpureError(told.format(name))


@contextmanager
def _as_they_are(modules: list[nn.Module]) -> Iterator[None]:
    """Put back in the end what modules keep as attributes, and in lists and dicts there."""
    before = [vars(module).copy() for module in modules]
    held = [
        (value, value.copy())
        for attributes in before
        for key, value in attributes.items()
        if key not in USUAL and isinstance(value, list | dict | set)
    ]
    try:
        yield
    finally:
        try:
            _put_back(modules, before, held)
        except BaseException:  # Ctrl-C in the middle of it.
            _put_back(modules, before, held)
            raise


def _put_back(modules: list[nn.Module], before: list[Any], held: list[Any]) -> None:
    for module, attributes in zip(modules, before, strict=True):
        _become(vars(module), attributes)
    for value, old in held:
        if isinstance(value, list):
            value[:] = old
        elif isinstance(value, dict):
            _become(value, old)
        else:
            value |= old
            value &= old


def _become(value: dict[Any, Any], old: dict[Any, Any]) -> None:
    # Whole at any moment, as where Ctrl-C comes in between.
    value.update(old)
    for key in value.keys() - old.keys():
        del value[key]
    for key in old if [*value] != [*old] else ():  # as that of a cache by last use
        value[key] = value.pop(key)


def _places(modules: list[tuple[str, nn.Module]]) -> Iterator[Place]:
    """Yield where modules keep tensors.

    Of a module that has two names, and of a tensor in two places, the first name counts.
    """
    names: dict[int, str] = {}
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for attribute, own in getattr(module, kind).items():
                if own is not None:
                    full = f"{prefix}.{attribute}" if prefix else attribute
                    name = names.setdefault(id(own), full)
                    yield Place(name, module, kind, attribute, own)


class _Standing:
    """What passes, and graphs of them, take for granted of a model: all but its values.

    It is compared in every step, so it is a few flat lists.
    """

    def __init__(self, model: nn.Module, criterion: Any) -> None:
        modules = [*model.modules()]
        self._holding = [getattr(module, kind) for module in modules for kind in KINDS]
        self._parameters: list[Any] = [*model.parameters()]
        if isinstance(criterion, nn.Module):
            modules += criterion.modules()
        self._hooks = [getattr(module, kind) for module in modules for kind in HOOKS]
        everywhere = vars(nn.modules.module)
        self._hooks += [everywhere[f"_global{kind}"] for kind in HOOKS]
        self._held, self._had = self._holds(), self._has()

    def holds(self) -> bool:
        """Return whether it is as it was."""
        now = self._holds()
        same = len(now) == len(self._held) and all(map(operator.is_, now, self._held))
        return same and self._has() == self._had

    def _holds(self) -> list[Any]:
        return [*chain.from_iterable(held.values() for held in self._holding)]

    def _has(self) -> list[Any]:
        """Return which parameters are trained, and the numbers of all hooks."""
        traits: list[Any] = [*chain.from_iterable(self._hooks)]
        for p in self._parameters:
            of_grads, after = p._backward_hooks, p._post_accumulate_grad_hooks
            traits += p.requires_grad, of_grads and [*of_grads], after and [*after]
        return traits


class _Kept(NamedTuple):
    """What a module holds, beside the values of tensors, to be put back."""

    name: str
    module: nn.Module
    held: list[dict[str, Any]]
    """Its parameters, buffers and children."""
    cached: dict[str, Any]
    """What a recurrent layer remembers of its weights."""

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "_Kept":
        own = module.__dict__
        cached = {key: own[key] for key in CACHES if key in own}
        return cls(name, module, [own[kind].copy() for kind in KINDS], cached)

    def require_same(self) -> None:
        """Raise if something was added, removed or, of modules, replaced.

        Raises:
            ImpureError: says where and what.
        """
        own = self.module.__dict__
        for kind, before in zip(KINDS, self.held, strict=True):
            now = own[kind]
            if not (now or before):
                continue
            if now.keys() == before.keys() and (
                now == before  # Modules are equal to themselves.
                if kind == "_modules"
                else _missing(now) == _missing(before)
            ):
                continue
            for name in {**before, **now}:
                old, new = before.get(name), now.get(name)
                same = old is new if kind == "_modules" else (old is None) == (new is None)
                if not same:
                    where = f"{self.name}.{name}" if self.name else name
                    raise ImpureError(
                        f"the forward pass makes or replaces {where}, which the state does"
                        " not know: run a batch through the model before samfn.split, and"
                        " let forward change no more than the values of buffers"
                    )

    def put_back(self) -> None:
        """Put back what the module held."""
        own = self.module.__dict__
        own.update(self.cached)
        for kind, before in zip(KINDS, self.held, strict=True):
            if own[kind].keys() != before.keys():
                own[kind].clear()
            own[kind].update(before)


def _missing(held: dict[str, Any]) -> list[bool]:
    return [value is None for value in dict.values(held)]


def _waits_for_others(hook: Any) -> bool:
    # That of the mode "any", which is called at the first gradient, waits for none.
    return getattr(hook, "__qualname__", "").startswith("register_multi_grad_hook.")


def _require_no_cache() -> None:
    if nn.utils.parametrize._cache_enabled:
        raise RuntimeError(
            "torch.nn.utils.parametrize.cached() is open, and would hand the weights of one"
            " pass to the next: open it inside of the model's forward, or not at all"
        )


def changes_gradients(model: nn.Module) -> str | None:
    """Return the name of something whose hooks may change gradients, or None."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return name or type(module).__name__
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            return name
    return None


class ReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises before an operation writes to one of some tensors, or takes one of others."""

    def __init__(self, tensors: Params, others: Params, batch: Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {address(tensor): name for name, tensor in tensors.items()}
        self._names.pop(None, None)
        self._others = {address(tensor): name for name, tensor in others.items()}
        self._others.pop(None, None)
        self.taken = Reductions(batch)
        """Sums and means that were taken."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End the watch, and what a forward pass that failed has left switched on."""
        # So does PyTorch 2.11 inside of selective checkpoints, as long as frames are kept.
        if trace is not None and _get_current_dispatch_mode() is not self:
            traceback.clear_frames(trace)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, unless it would write."""
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (taken := self._others.get(address(leaf))):
                raise ImpureError(BY_ANOTHER_NAME.format(taken))
        for index, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[index] if index < len(args) else kwargs.get(argument.name)
            for leaf in pytree.tree_leaves(written):
                if isinstance(leaf, Tensor) and address(leaf) in self._names:
                    raise ImpureError(WRITES.format(self._names[address(leaf)]))
        result = operation(*args, **kwargs)
        self.taken.note(operation, args, result)
        return result


class _ReadOnlyByItself(ReadOnly):  # type: ignore[no-untyped-call]
    """PyTorch's wrapper, which keeps Dynamo from a mode, imports Dynamo for that."""

    __torch_dispatch__ = inspect.unwrap(ReadOnly.__torch_dispatch__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def read_only(tensors: Params, others: Params, batch: Batch) -> ReadOnly:
    """Return a watch over a forward pass: `ReadOnly`, in the form that costs less."""
    is_alone = "torch._dynamo" not in sys.modules
    return (_ReadOnlyByItself if is_alone else ReadOnly)(tensors, others, batch)
