"""From what a command asks for to the settings of its run, where nothing is "auto".

One setting is left to where the network is there to be counted: whether to compile, which
`recipes.train.compiling` decides.
"""

import difflib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.data.sources import Source, choose_source, root_of
from recipes.errors import ConfigError
from recipes.models import networks
from recipes.roles import EXACT, Role
from recipes.settings.command_line import PROGRAM, Asked, parse
from recipes.settings.config import (
    SETTINGS,
    Config,
    changes,
    over,
    plain_values,
    require_model,
    validate,
)
from recipes.settings.groups import DTYPES
from recipes.settings.presets import FAST, PRESETS, preset_of
from recipes.settings.saved import of_file
from recipes.terminal.hardware import emulated
from samfn.compiled import missing_compiler

WEIGHTS = ("none", "default")  # beside files
Say = Callable[[str], None]


def configure(
    args: Sequence[str] | None = None,
    say: Say = lambda line: None,
    *,
    program: str = PROGRAM,
    base: str = "auto",
) -> Config:
    """Return the settings that a command line comes to; see `parse` and `resolve`."""
    return resolve(parse(args, program=program, base=base), say)


def resolve(asked: Asked, say: Say = lambda line: None) -> Config:
    """Return the settings of a run that begins or goes on.

    Images are looked for, and CIFAR-10 downloaded where there are none, but nothing is
    read.

    Args:
        asked: what the command asks for.
        say: is given a line about where the images come from, and one about a precision
            that this machine has no instructions for.

    Returns:
        The settings, valid. The source of the images, its directory, the device, the preset
        and the precision are what they came to, and never "auto".

    Raises:
        ConfigError: a value is not among what is allowed; says which and what is.
        DataError: there are no images where they should be.
    """
    config = _begun(asked, say) if asked.run is None else _resumed(asked, asked.run)
    precision, device = config.arithmetic.precision, config.device
    if emulated(DTYPES[precision], device):
        say(
            f"{precision} is emulated on this CPU: expect it to be many times slower than"
            " float32"
        )
    return config


def _begun(asked: Asked, say: Say) -> Config:
    """Return the settings of a new run."""
    config = Config.of(preset_of(asked.preset) | asked.values)
    require_model(config.model)
    if asked.preset == "auto" and networks.is_published(config.model):
        asked = asked._replace(preset="finetune")
        config = Config.of(preset_of(asked.preset) | asked.values)
    _require_fitting(config)
    completed = partial(_completed, asked, choose_device(config.device))
    source, origin = choose_source(config.data, config.data_dir, check=completed)
    say(origin)
    return completed(source)


def _completed(asked: Asked, device: torch.device, source: Source) -> Config:
    """Return the settings of a new run on these images and this device."""
    preset = asked.preset
    if preset == "auto":
        preset = _suitable(asked.values.get("model"), device, source)
    values = over(PRESETS[preset], asked.values)
    config = Config.of(values)
    published = networks.is_published(config.model)
    if preset == "finetune" and source == "folder" and published:
        config = Config.of({"image_size": networks.photographs(config.model).side} | values)
    slow = device.type == "cpu" and (preset not in FAST or emulated(DTYPES["bf16"], device))
    fast = "float32" if slow else "bf16"
    precision = config.arithmetic.precision
    config = config.replace(
        preset=preset,
        data=source,
        data_dir=None if source == "digits" else root_of(config.data_dir),
        weights=_absolute(config.network.weights),
        device=str(device),
        precision=fast if precision == "auto" else precision,
    )
    _require_weights(config.network.weights)
    validate(config)
    _require_loggers(config.recording.log)
    return config


def _suitable(model: str | None, device: torch.device, source: Source) -> str:
    """Return the preset that "auto" is, of a network that was named or none."""
    if source == "digits":
        return "digits"
    if model is not None and networks.is_airbench(model):
        return model
    if device.type != "cpu":
        return "davda54"
    return "small" if model is None and source != "folder" else "small-wrn"


def _resumed(asked: Asked, run: Path) -> Config:
    """Return the settings of a run, which flags may repeat, and some of them change."""
    values, given = of_file(run), asked.values
    before = Config.of(values)
    if given.get("auto_resume"):  # Its command repeats all that it said at first.
        given = over(preset_of(asked.preset), given)
    config = Config.of(over(values, given))
    unresolved = _unresolved(config)
    resolved = {n: value for n, value in before.flat().items() if n in unresolved}
    resolved |= {"resume": run, "weights": _absolute(config.network.weights)}
    config = config.replace(**resolved)
    require_same_settings(plain_values(before), config)
    validate(config)
    if not config.call.eval_only:  # The run's own are left out where they are missing.
        _require_loggers({*config.recording.log} - {*before.recording.log})
    _require_fitting(config)
    root = None if config.data == "digits" else root_of(config.data_dir)
    return config.replace(data_dir=root, device=str(choose_device(config.device)))


def _unresolved(config: Config) -> set[str]:
    """Return the settings that do not say what they come to, but for the device."""
    found = {n for n, value in config.flat().items() if value == "auto"}
    names = {n for n in found if SETTINGS[n].default == "auto"} - {"device"}
    compiles = config.arithmetic.compile == "yes"
    if compiles and missing_compiler(choose_device(config.device)):
        names.add("compile")
    return names


def require_same_settings(before: Mapping[str, Any], config: Config) -> None:
    """Raise unless a run may go on with other settings than it had.

    Args:
        before: those it had, as `plain_values` gives them.
        config: those it is to go on with.

    Raises:
        ConfigError: lists what differs, of what may never differ, or else of what needs
            `resume_override`.
    """
    changed = changes(before, plain_values(config), EXACT)
    if fixed := [text for n, text in changed.items() if SETTINGS[n].role is Role.FIXED]:
        raise ConfigError(f"--resume: no run can go on so: {'; '.join(fixed)}")
    if changed and not config.call.resume_override:
        listed = "; ".join(changed.values())
        raise ConfigError(
            f"--resume: the run had other settings: {listed}; --resume-override goes on"
            " with these"
        )


def choose_device(name: str) -> torch.device:
    """Return the named device, or for auto the best that there is.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device(
            "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # A meta tensor has no value.
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {name!r} cannot be used: {error}") from error
    return device


def _absolute(weights: str) -> str:
    # Unlike `Path.resolve`, this takes a loop of links for a path.
    return weights if weights in WEIGHTS else os.path.realpath(weights)


def _require_weights(weights: str) -> None:
    if weights not in WEIGHTS and not Path(weights).is_file():
        close = difflib.get_close_matches(Path(weights).name, WEIGHTS, 1)
        hint = f"; close to it: {close[0]}" if close else ""
        raise ConfigError(
            f"--weights: expected none, default or a file, got {weights}{hint}"
        )


def _require_loggers(names: Iterable[str]) -> None:
    """Raise unless the packages of loggers are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            missing = f'{name} is not installed: pip install -e ".[{name}]"'
            raise ConfigError(f"--log: {missing}")


def _require_fitting(config: Config) -> None:
    """Raise where a setting of the data is missing, or would have no effect."""
    if config.data == "folder" and config.data_dir is None:
        raise ConfigError(
            "--data-dir: expected the directory of your images, which holds train/<class>/*"
            " and test/<class>/*, got none"
        )
    if config.images.image_size is not None and config.data not in ("auto", "folder"):
        raise ConfigError(f"--image-size: only folders are resized, not {config.data}")
    if config.data_dir is not None and config.data == "digits":
        raise ConfigError("--data-dir: digits come with scikit-learn, not from a directory")
