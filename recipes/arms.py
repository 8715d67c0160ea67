"""Train settings of your own choice, each an arm, over several seeds, and compare them.

    python -m recipes.arms --arm "SGD: --rho 0" --arm "SAM: --rho 0.05" -- --data digits

Flags of recipes.cifar_wrn, for all arms, follow the lone --. The same command goes
on where it was ended, and one with more arms or seeds adds these.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from recipes import plots
from recipes.errors import ConfigError
from recipes.study import grid
from recipes.study.grid import Arm, Common
from recipes.study.groups import Group
from recipes.study.report import TABLES, Page, rank, side_by_side, task


@dataclass(frozen=True)
class Settings(grid.Settings):
    """Train arms. Flags of recipes.cifar_wrn follow a lone --."""

    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Label, colon, and flags of the recipe; once for each arm."""
    title: str = ""
    """Title of the report; empty is data, network and epochs."""
    times: bool = True
    """Cost of an epoch in the report; off where runs shared the machine."""
    output: Path = Path("runs/arms")


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, and report; return the exit code."""
    study = grid.Study("arms", Settings, set(), arms, page)
    return grid.conduct(study, __doc__, args)


def arms(settings: Settings, common: Common) -> list[Arm]:
    """Return all arms."""
    return [read(text, common) for text in settings.arm]


def read(text: str, common: Common) -> Arm:
    """Return the arm that a label, a colon and flags mean.

    Raises:
        ConfigError: they mean none, or the flags cannot be used.
    """
    label, colon, flags = text.partition(":")
    if not colon:
        raise ConfigError(f"--arm: expected 'label: flags', got {text!r}")
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise ConfigError(f"--arm: cannot read {text!r}: {error}") from error
    try:
        return label.strip(), common(*words)
    except ConfigError as error:
        raise ConfigError(f"{label.strip()}: {error}") from error


def page(settings: Settings, groups: Sequence[Group]) -> Page:
    """Return what is reported."""
    tables = {k: v for k, v in TABLES.items() if settings.times or k != "cost"}
    title = settings.title or task(groups[0].config)
    found = side_by_side(groups, tables, title)
    many = len(groups) > len(plots.COLOURS)  # Curves would be too many.
    return found._replace(draw=partial(rank, groups, title)) if many else found


if __name__ == "__main__":
    sys.exit(main())
