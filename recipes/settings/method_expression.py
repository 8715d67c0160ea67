"""Expressions of `--method`, over the methods and combinators of samfn.

"asam(eta=0.1)" or "every(on_parameters(sam, norm_layers), 5)" are read as Python would read
them, and nothing else is: only the names below, numbers, strings and lists of them. A
method that is named without arguments is called with its defaults.
"""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import samfn
from samfn import methods

Makers = Mapping[str, Callable[..., samfn.Method]]

MAKERS: Makers = {
    name: function
    for name in methods.__all__
    if inspect.isfunction(function := getattr(methods, name))
    # --monitor watches; and no text names a loss function.
    and name not in ("two_pass", "watched", "ascent_on", "on_loss")
    and inspect.signature(function).return_annotation is samfn.Method
}
# Arguments that are functions themselves, or directions.
FUNCTIONS: dict[str, Any] = {
    "preconditioned": methods.preconditioned(),
} | {
    name: getattr(samfn, name)
    for name in (
        "everything",
        "named_weight",
        "perturb",
        "perturb_adaptive",
        "perturb_fisher",
        "perturb_spectral",
        "perturb_layerwise",
    )
}
# Which of them an argument may be, by its name.
SELECTORS = ("everything", "named_weight")
FITTING = {
    "direction": ("preconditioned",),
    "adapts": SELECTORS,
    "metric": tuple(n for n in FUNCTIONS if n not in ("preconditioned", *SELECTORS)),
}


def parse(text: str, *, steps: int, norm_layers: Sequence[str]) -> samfn.Method:
    """Return the method that an expression means.

    Args:
        text: the expression.
        steps: what "steps" means in it, the steps of the whole run; an argument of that
            name need not be given.
        norm_layers: what "norm_layers" means in it, as `samfn.norm_parameters` gives.

    Raises:
        ValueError: it means none; says which part.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {text!r}: {getattr(error, 'msg', error)}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("cannot read so deep an expression") from error
    known = {"steps": steps, "norm_layers": tuple(norm_layers), **FUNCTIONS}
    try:
        method = _value(tree, known)
    except RecursionError as error:
        raise ValueError("cannot read so deep an expression") from error
    except TypeError as error:  # As for arguments that a function does not have.
        raise ValueError(f"{text}: {error}") from error
    if not isinstance(method, samfn.Method):
        raise ValueError(f"{text} is no method, expected {_choices()}")
    return method


def gradients(text: str) -> float | None:
    """Return the gradients of a batch that a step of a method takes, on average.

    Args:
        text: the expression, one that `parse` takes.

    Returns:
        `samfn.Method.gradients`; None, too, where it depends on the steps of the whole run.
    """
    if "steps" in _names(text):
        return None
    return parse(text, steps=1, norm_layers=("any",)).gradients


def counts_steps(text: str) -> bool:
    """Return whether a method depends on the steps of the whole run."""
    names = _names(text)
    return "steps" in names or any(map(_takes_steps, names & MAKERS.keys()))


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def _takes_steps(name: str) -> bool:
    return next(iter(inspect.signature(MAKERS[name]).parameters), None) == "steps"


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if value >= 2**63:
            raise ValueError("expected numbers of at most 64 bits in it")
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(
            op=ast.USub(), operand=ast.Constant(value=int() | float()) as operand
        ):
            return -_value(operand, known)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, known) for part in parts]
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Name(id=name) if name in MAKERS:
            return _call(name, [], {}, known)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name in MAKERS and all(keyword.arg for keyword in keywords):
                named = {str(k.arg): _value(k.value, known) for k in keywords}
                return _call(name, [_value(arg, known) for arg in args], named, known)
    raise ValueError(f"{ast.unparse(node)} is not known, expected {_choices()}")


def _call(
    name: str, args: list[Any], named: dict[str, Any], known: Mapping[str, Any]
) -> samfn.Method:
    signature = inspect.signature(MAKERS[name])
    if _takes_steps(name) and not args:
        named = {"steps": known["steps"], **named}
    for argument, value in signature.bind_partial(*args, **named).arguments.items():
        fitting = FITTING.get(argument)
        if fitting and not any(value is FUNCTIONS[choice] for choice in fitting):
            raise ValueError(f"{name}: expected {argument} to be {' or '.join(fitting)}")
    return MAKERS[name](*args, **named)


def _choices() -> str:
    return f"one of {', '.join(MAKERS)}, or one around another as every(sam, 5)"
