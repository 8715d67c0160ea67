"""Which of Dynamo's guards a graph keeps: those that can fail.

Before each call Dynamo looks at everything that the graph was traced from. Of a step, that
is also the code of samfn and of torch.func, which do not change, and what samfn notes of a
model, which `CompiledUpdate` compares itself: of eight layers, 823 of 1,415 guards.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from samfn.modules.lending import Lender

CODE = ModuleType, FunctionType, BuiltinFunctionType, type

# As Dynamo names what it found: by the module whose global variables it is one of, or
# without one among those of the function that is compiled, which is one of samfn.
OF_SAMFN = re.compile(r"(dict\()?G\['(?!__)|(dict\()?G\['__import_samfn(_dot_|'\])")
OF_PRIVATE = re.compile(r"(dict\()?G\['__import_torch_dot_(_|utils_dot__pytree)")
NOTES = "_lender", "_params", "_buffers", "_hooks"


def with_own_guards(
    how: Mapping[str, Any], noted: Callable[[], Collection[object]]
) -> dict[str, Any]:
    """Return arguments of `torch.compile` with an option that leaves such guards out.

    Args:
        how: arguments; a filter of guards among its options is the user's, and stays.
        noted: -> the `Loss.standing()` of those loss functions that are asked, before each
            call, whether their models stand as they did.
    """

    def keep(guards: Sequence[Any]) -> list[bool]:
        known = {id(one) for one in noted()}
        notes = tuple(
            guard.name.removesuffix("_lender") + name
            for guard in guards
            if guard.name.endswith("._lender")
            and isinstance(guard.value, Lender)
            and id(guard.value) in known
            for name in NOTES
        )
        return [not (_is_of_code(guard) or _is_noted(guard, notes)) for guard in guards]

    return {**how, "options": {"guard_filter_fn": keep, **(how.get("options") or {})}}


def _is_of_code(guard: Any) -> bool:
    """Return whether it looks at samfn's code, or at private functions of PyTorch."""
    if guard.guard_type == "DUPLICATE_INPUT":  # of two names, of which one may be a user's
        return isinstance(guard.value, ModuleType) and guard.is_global
    if OF_SAMFN.match(guard.name):  # In whose modules PyTorch's variables are found, too.
        return ".torch." not in guard.name
    return bool(OF_PRIVATE.match(guard.name)) and isinstance(guard.value, CODE)


def _is_noted(guard: Any, notes: tuple[str, ...]) -> bool:
    """Return whether it looks at what was noted of a model, and not at the model."""
    own = guard.name.startswith(notes) and "].module" not in guard.name
    return own and guard.guard_type != "DUPLICATE_INPUT"
