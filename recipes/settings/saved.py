"""Settings in files: those of a run, which it keeps, and TOML files that people write."""

import contextlib
import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import tomli_w

from recipes.errors import ConfigError
from recipes.roles import KEPT
from recipes.settings.config import SETTINGS, Config, of_roles, plain_values, validate
from samfn.storage import files

CONFIG_FILE = "config.toml"
# Names of files are bytes; those of them that are no UTF-8 stand in it as they are.
AS_TOML = {"encoding": "utf-8", "errors": "surrogateescape"}


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file.

    Raises:
        ConfigError: no such file, no TOML, or a key or type that `Config` does not have.
    """
    try:
        values = tomllib.loads(files.read_text(path, AS_TOML["errors"]))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # Python reads no number of 5,000 digits.
        raise ConfigError(f"{path} is no TOML: {error}") from error
    known = of_roles(SETTINGS, KEPT)
    if unknown := sorted(values.keys() - known.keys()):
        close = difflib.get_close_matches(unknown[0], known, 3)
        hint = f"; close to {unknown[0]}: {', '.join(close)}" if close else ""
        raise ConfigError(f"{path} has unknown settings: {', '.join(unknown)}{hint}")
    return {key: _typed(path, key, value) for key, value in values.items()}


def to_toml(config: Config) -> str:
    """Return what a run trains as the text of a file, with which `--config` repeats it."""
    return plain_toml(plain_values(config))


def plain_toml(values: Mapping[str, Any]) -> str:
    """Return the same of settings as `plain_values` gives them."""
    # With all settings named, a preset would only bring back what was turned off.
    kept = of_roles({**values, "preset": "none"}, KEPT)
    written = {name: value for name, value in kept.items() if value is not None}
    return "# Settings of a run; what is absent is off.\n" + tomli_w.dumps(written)


def of_run(path: Path) -> Config:
    """Return the settings of the run that `path` is, or is a checkpoint of.

    Raises:
        ConfigError: there is no run, or a setting is not among what is allowed.
    """
    config = Config.of(of_file(path))
    validate(config)
    return config


def of_file(path: Path) -> dict[str, Any]:
    """Return what the run that `path` is, or is a checkpoint of, wrote of its settings.

    Raises:
        ConfigError: there is no run, or it does not say its data and its precision.
    """
    file = run_of(path) / CONFIG_FILE
    if path.is_file() and not file.exists():
        raise ConfigError(
            f"expected the directory of a run, or one of its checkpoints, got {path}"
        )
    values = read_toml(file)
    for name in ("data", "precision"):
        if values.get(name, "auto") == "auto":
            raise ConfigError(f"{file} is none that a run wrote: it does not say {name}")
    return values


def run_of(path: Path) -> Path:
    """Return the directory of the run that `path` is, or is a checkpoint of."""
    if not path.is_file():
        return path
    folder = path.parent
    if folder.name in ("", ".."):  # `parent` would not lead above these.
        folder = Path(os.path.realpath(folder))
    return folder.parent


def without_minus(value: Any) -> Any:
    """Return what a setting has, but 0 in place of -0, which is another text.

    Two runs are compared by their texts.
    """
    if isinstance(value, tuple):
        return tuple(map(without_minus, value))
    return value + 0.0 if isinstance(value, float) else value


def _typed(path: Path, key: str, value: Any) -> Any:
    """Return the value of a TOML key as its field wants it."""
    expected = SETTINGS[key].kind
    union = get_origin(expected) is UnionType
    kinds = [k for k in (get_args(expected) if union else (expected,)) if k is not NoneType]
    for kind in kinds:
        with contextlib.suppress(TypeError):
            return _as(kind, value)
    names = " or ".join(map(_named, kinds))
    raise ConfigError(f"{path}: {key} cannot be {value!r}, expected {names}")


def _as(kind: Any, value: Any) -> Any:
    """Return a TOML value as one of a kind, or raise TypeError."""
    if isinstance(value, str) and "\0" in value:  # which no path has
        raise TypeError
    if isinstance(value, str):  # the reverse of `plain_values`
        value = os.fsdecode(value.encode("utf-8", "surrogateescape"))
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as(get_args(kind)[0], item) for item in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    # Whole numbers will do for floats, but true is no number.
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits and value not in (get_args(kind) if get_origin(kind) is Literal else ()):
        raise TypeError
    return _real(value) if kind is float else value


def _real(value: Any) -> Any:
    """Return a number as a float; one that no float holds stays, and no range has it."""
    with contextlib.suppress(OverflowError):
        return without_minus(float(value))
    return value


def _named(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_named(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return str(kind.__name__)
