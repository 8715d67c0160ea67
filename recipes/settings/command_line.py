"""The command line: what is asked for, as text says it. No data, device or network."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from recipes.errors import ConfigError
from recipes.roles import flag
from recipes.settings.config import SETTINGS, Config, over
from recipes.settings.presets import preset_of
from recipes.settings.saved import CONFIG_FILE, read_toml, without_minus
from recipes.terminal import cli

PROGRAM = "python -m recipes.cifar_wrn"


class Asked(NamedTuple):
    """The request of a command, in which "auto" is not resolved yet."""

    values: dict[str, Any]
    """Settings that were given: those of a TOML file, and over them those of flags.
    What of the file these leave unread is left out."""
    preset: str
    """Preset of the other settings. "auto" depends on the images."""
    run: Path | None
    """The run to go on with, or one of its checkpoints."""


def parse(
    args: Sequence[str] | None = None, *, program: str = PROGRAM, base: str = "auto"
) -> Asked:
    """Read the command line and the TOML file that it names.

    No data are read, no device is asked for, and no connection is opened.

    Args:
        args: flags; None takes those that the program was called with.
        program: the command in its help.
        base: the preset where none is named.

    Raises:
        ConfigError: a preset or a key of the file is not among what is allowed.
        SystemExit: the command line is wrong, or asks for help.
    """
    args = sys.argv[1:] if args is None else args
    default = Config.of({"preset": base} | preset_of(base))
    flat = (tyro.conf.OmitArgPrefixes,)
    options = {"prog": program, "args": args, "default": default, "config": flat}
    values = cli.parsed(Config, **options).flat()
    flags = {name: without_minus(values[name]) for name in _named(args)}
    for name, value in flags.items():
        if "\0" in str(value):
            raise ConfigError(
                f"{flag(name)}: expected a text without NUL, got {str(value)!r}"
            )
    run = _to_resume(flags, base)
    given = over(read_toml(flags["config"]) if flags.get("config") else {}, flags)
    preset = given.get("preset", base)
    preset_of(preset)
    return Asked(given, preset, run)


def _named(args: Sequence[str]) -> list[str]:
    """Return the settings that flags name, among arguments that could be read."""
    flags = [arg.partition("=")[0] for arg in args if arg.startswith("--") and arg != "--"]
    names = [name.removeprefix("--").replace("-", "_") for name in flags]
    return [name if name in SETTINGS else name.removeprefix("no_") for name in names]


def _to_resume(flags: dict[str, Any], base: str) -> Path | None:
    """Return the run to go on with, if there is one."""
    run, output = flags.get("resume"), flags.get("output")
    if not flags.get("auto_resume"):
        own = {"preset": base, "config": None, "output": None}
        for name in own if run else ():
            if flags.get(name, own[name]) != own[name]:
                raise ConfigError(f"--{name}: a run is resumed with its own, drop it")
        return run
    if run is not None:
        raise ConfigError("--auto-resume: expected --output with it, and no --resume")
    if output is None:
        raise ConfigError("--auto-resume: expected --output with it")
    return output if (output / CONFIG_FILE).exists() else None
