"""Settings of commands: their help, their values, and the role of each on resuming."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import pairwise
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, cast

import torch
import tyro

from recipes.errors import ConfigError

Value = TypeVar("Value")
Rule = tuple[str, bool, str]
"""Name of a setting, whether its value is allowed, and what is expected of it."""


class Role(Enum):
    """The part that a setting has where a run goes on, is repeated or is compared."""

    ONE_RUN = "belongs to one run in one directory; not kept, and no study can have it"
    CALL = "belongs to one call of the command; not kept"
    FREE = "kept with the run; may be another whenever it goes on"
    ROUNDING = "changes nothing but rounding; may be another with --resume-override"
    RESULT = "changes the result; may be another with --resume-override"
    FIXED = "never another in one run: its state would not fit, or its place in the data"


KEPT = frozenset(Role) - {Role.ONE_RUN, Role.CALL}
DECIDING = frozenset({Role.RESULT, Role.FIXED})
EXACT = DECIDING | {Role.ROUNDING}


class Range(NamedTuple):
    """Values that a setting may have."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int, unit: str = "") -> Range:
    """Return the numbers from one on."""
    return Range(lambda value: value >= least, f"at least {least}{unit}")


BELOW_1 = Range(lambda value: 0 <= value < 1, "0 to below 1")
ABOVE_0_TO_1 = Range(lambda value: 0 < value <= 1, "above 0 to 1")
FROM_0 = Range(lambda value: 0 <= value < float("inf"), "a finite number of at least 0")
ABOVE_0 = Range(lambda value: 0 < value < float("inf"), "a finite number above 0")
INT64 = Range(lambda value: abs(value) < 2**63, "a number of at most 64 bits")
# Below the first, float32 has 0; of three up to the second, it has the product.
LEAST, MOST = torch.finfo(torch.float32).tiny, 1e12
FLOAT32 = Range(
    lambda value: not (0 < abs(value) < LEAST or MOST < abs(value) < float("inf")),
    f"a size of {LEAST:.1e} to {MOST:.0e}, with which float32 computes",
)


def _docstrings(cls: type) -> Iterator[tuple[str, str]]:
    (found,) = ast.parse(inspect.getsource(cls)).body
    for field, text in pairwise(cast(ast.ClassDef, found).body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str() as lines)),
            ):
                yield name, " ".join(lines.split())


class Options:
    """Settings of a command: a base of frozen dataclasses.

    A field's docstring is the help of its flag, also where a class below has another
    default.
    """

    helps: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        """Let the help show docstrings as paragraphs, without the breaks of the source."""
        cls.helps = {**cls.helps, **dict(_docstrings(cls))}
        for name, kind in cls.__annotations__.items():
            if text := cls.helps.get(name):
                cls.__annotations__[name] = Annotated[kind, tyro.conf.arg(help=text)]

    def ranges(self) -> Iterator[Rule]:
        """Yield that each value is in its range; None is where it is the default.

        Beside that, a number is one that tensors hold.
        """
        for field in dataclasses.fields(cast(Any, self)):
            value, within = getattr(self, field.name), field.metadata.get("within")
            parts = value if isinstance(value, tuple) else (value,)
            whole = (part for part in parts if isinstance(part, int))
            yield field.name, all(map(INT64.holds, whole)), INT64.expected
            if within is not None:
                optional = field.default is None
                expected = within.expected + ", or None" * optional
                holds = (optional and value is None) or within.holds(value)
                yield field.name, holds, expected
            real = (part for part in parts if isinstance(part, float))
            yield field.name, all(map(FLOAT32.holds, real)), FLOAT32.expected

    def relations(self) -> Iterator[Rule]:
        """Yield what holds of several values together."""
        return iter(())


class Group(Options):
    """Settings of a run that one part of the recipes reads.

    A field's default stands in its group alone, and the docstring of the class heads its
    panel of the help.

    Args:
        role: of all fields, but for those that say another.
        choice: the field that decides which of the others are read.
    """

    role: ClassVar[Role]
    choice: ClassVar[str]

    def __init_subclass__(cls, *, role: Role, choice: str = "") -> None:
        """Remember the role, and the choice."""
        super().__init_subclass__()
        cls.role, cls.choice = role, choice

    def unread(self) -> Iterator[Rule]:
        """Yield that nothing is given which the other values leave unread.

        Those are, of all groups, fields that the value of `choice` does not read.
        """
        for field in dataclasses.fields(cast(Any, self)):
            if readers := field.metadata.get("readers"):
                read = getattr(self, self.choice) in readers
                given = getattr(self, field.name) != field.default
                expected = f"{flag(self.choice)} {' or '.join(readers)} with it"
                yield field.name, read or not given, expected


def setting(
    default: Value,
    within: Range | None = None,
    *,
    role: Role | None = None,
    readers: tuple[str, ...] = (),
) -> Value:
    """Return a field of a group.

    Args:
        default: its value where none is given.
        within: the values that it may have; None is all of its type.
        role: its role, where it is not that of the group.
        readers: values of the group's `choice` that read it; none where all do.
    """
    metadata = {"within": within, "role": role, "readers": readers}
    return dataclasses.field(default=default, metadata=metadata)


def require(rules: Iterable[Rule], values: Mapping[str, Any]) -> None:
    """Raise unless every rule holds.

    Raises:
        ConfigError: names the flag, what was expected and what came.
    """
    for name, holds, expected in rules:
        if not holds:
            raise ConfigError(f"{flag(name)}: expected {expected}, got {values[name]!r}")


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")
