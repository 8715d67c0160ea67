"""Objects that hold tensors where trees of PyTorch do not look: mapped, and put back."""

import copy
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

DEEP = 4
# What keeps something is near: of one object, and in all, so many are looked at.
MANY, ALL = 100, 10000
LEAVES = Tensor, str, bytes, type, int, float, complex, ModuleType, type(None)
NUMBERS = int, float, complex, str, Tensor, type(None)  # Set anew by who counts.
CONTAINERS = list, set, deque, MutableMapping
# What has attributes, and is a part of the program rather than data.
PROGRAM = str, bytes, type, nn.Module, ModuleType, FunctionType, MethodType


def inside(value: Any, depth: int = DEEP) -> Iterator[Tensor]:
    """Yield the tensors that an object keeps, in its attributes and what they hold."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, PROGRAM):
        if isinstance(value, Mapping):
            held: Any = value.values()
        elif isinstance(value, list | tuple | set):
            held = value
        else:
            held = _attributes(value).values()
        for each in held:
            yield from inside(each, depth - 1)


def mapped(function: Callable[[Tensor], Tensor], tree: Any, depth: int = DEEP) -> Any:
    """Return a tree with its tensors mapped, and copies of the objects that hold some."""
    return pytree.tree_map(partial(_mapped, function, depth), tree)


def _mapped(function: Callable[[Tensor], Tensor], depth: int, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if leaf is None or next(inside(leaf, depth), None) is None:
        return leaf
    copied: Any = copy.copy(leaf)
    for name, held in _attributes(leaf).items():
        object.__setattr__(copied, name, mapped(function, held, depth - 1))
    if isinstance(leaf, dict):  # A class of its own, which the tree does not know.
        copied.update(mapped(function, dict(leaf), depth - 1))
    elif isinstance(leaf, list):
        copied[:] = mapped(function, [*leaf], depth - 1)
    elif isinstance(leaf, set):
        return {mapped(function, held, depth - 1) for held in leaf}
    return copied


@contextmanager
def as_it_was(function: Any) -> Iterator[None]:
    """Put back in the end what a function keeps between its calls, as `remembered`."""
    put_back = remembered(function)
    try:
        yield
    finally:
        put_back()


def remembered(function: Any) -> Callable[[], bool]:
    """Return what puts back all that a function, or data, keeps, and tells if it changed.

    Variables of its closure and of its module that it names, what it is a method of, and
    the attributes, lists, sets and mappings that these hold; those of their classes, too.
    """
    before = [(put, get, get()) for get, put in _held(function, {})]

    def put_back() -> bool:
        changed = False
        for put, get, old in reversed(before):
            if not _same(old, get()):
                put(old)
                changed = True
        return changed

    return put_back


def tensors_kept(function: Any) -> list[Tensor]:
    """Return the tensors that a function, or data, keeps, where `remembered` looks."""
    found: dict[int, Tensor] = {}
    for get, _ in _held(function, {}):
        held = get()
        several = held.values() if isinstance(held, MutableMapping) else held
        for each in several if isinstance(held, CONTAINERS) else [held]:
            if isinstance(each, Tensor):
                found[id(each)] = each
    return [*found.values()]


Held = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How to get a copy of what is held in one place, and how to put it back."""


def _held(value: Any, seen: dict[int, Any]) -> Iterator[Held]:
    if id(value) in seen or len(seen) > ALL or isinstance(value, LEAVES):
        return
    seen[id(value)] = value
    if _package(value) == "torch" and not isinstance(value, nn.Module):
        return  # What PyTorch keeps for itself, as caches, is its own.
    within: list[Any] = []
    if isinstance(value, FunctionType):
        yield from _of_variables(value, within)
    elif isinstance(value, MethodType):
        within = [value.__self__, value.__func__]
    elif isinstance(value, partial):
        within = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, tuple):
        within = [*value]
    elif isinstance(value, CONTAINERS) and hasattr(value, "copy"):
        yield partial(_copied, value), partial(_refilled, value)
        within = [*(value.values() if isinstance(value, MutableMapping) else value)]
    if _package(value) == "samfn" and hasattr(value, "users"):  # What users gave to it.
        within.append(value.users)
    elif hasattr(value, "__dict__") and not isinstance(value, FunctionType):
        yield vars(value).copy, partial(_refilled, vars(value))
        children = value.modules() if isinstance(value, nn.Module) else ()
        within += [*vars(value).values(), *children]
        yield from _of_class(type(value), within)
    for each in within[:MANY]:
        yield from _held(each, seen)


def _of_variables(function: FunctionType, within: list[Any]) -> Iterator[Held]:
    """Yield the variables of a function, and put into a list what they hold."""
    for cell in function.__closure__ or ():
        if cell != CellType():  # one that has no value yet
            yield (
                partial(getattr, cell, "cell_contents"),
                partial(setattr, cell, "cell_contents"),
            )
            within.append(cell.cell_contents)
    known = {} if _package(function) == "samfn" else function.__globals__
    for name in function.__code__.co_names:
        if name in known and not isinstance(known[name], ModuleType | type):
            yield partial(known.get, name), partial(known.__setitem__, name)
            within.append(known[name])
    within += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _of_class(kind: type, within: list[Any]) -> Iterator[Held]:
    """Yield what a class and its bases hold, and put into a list what their methods do."""
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in {"torch", *sys.stdlib_module_names}:
            continue
        for name, held in vars(owner).items():
            if isinstance(held, (FunctionType, *CONTAINERS)):
                within.append(held)
            elif isinstance(held, NUMBERS) and not name.startswith("__"):
                yield partial(getattr, owner, name), partial(setattr, owner, name)


def _package(value: Any) -> str:
    owner = value if isinstance(value, FunctionType) else type(value)
    return (owner.__module__ or "").partition(".")[0]


def _copied(container: Any) -> Any:
    # To ask a mapping for an item may make one, as of the activations of transformers.
    mapping = isinstance(container, MutableMapping)
    return dict(container.items()) if mapping else container.copy()


def _refilled(container: Any, old: Any) -> None:
    container.clear()
    container.extend(old) if hasattr(container, "extend") else container.update(old)


def _same(old: Any, new: Any) -> bool:
    """Return whether two copies, or values, are the same objects."""
    if old is new or type(old) is not type(new) or isinstance(old, Tensor):
        return old is new
    if isinstance(old, MutableMapping):
        return [*old] == [*new] and all(map(operator.is_, old.values(), new.values()))
    if isinstance(old, list | deque):
        return len(old) == len(new) and all(map(operator.is_, old, new))
    return isinstance(old, set) and {*map(id, old)} == {*map(id, new)}


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes that hold data, those in slots of a dataclass, too."""
    named = {f.name for f in fields(value)} if is_dataclass(value) else set()
    slots = {name: getattr(value, name) for name in named if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}
