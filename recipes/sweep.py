"""Train with several methods at several rho, with several seeds; find the best rho.

    python -m recipes.sweep --output runs/sweep -- --data digits --epochs 20
    python -m recipes.sweep --rhos 0 0.1 1 --methods sam "asam(0.01)" -- --validation 0.1

Flags of recipes.cifar_wrn, for all runs, follow the lone --. A rho of 0 is SGD,
and is run once for all methods. The same command goes on where it was ended, and one with
more rhos, methods or seeds adds these.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from recipes import plots
from recipes.errors import ConfigError
from recipes.study import grid
from recipes.study.grid import Arm, Common
from recipes.study.groups import (
    Group,
    arranged,
    best,
    best_of,
    chosen,
    last,
    number,
    series_of,
    summary,
)
from recipes.study.report import Page, Table, about, judge, task
from recipes.train.running import name


@dataclass(frozen=True)
class Settings(grid.Settings):
    """Train at several rho. Flags of recipes.cifar_wrn follow a lone --."""

    # The grid of Foret et al., 2021, arXiv:2010.01412, table 6.
    rhos: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    """Radii of the perturbation. 0 is the plain optimizer."""
    methods: tuple[str, ...] = ("sam",)
    """Methods, as --method of the recipe takes them."""
    output: Path = Path("runs/sweep")


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, and report; return the exit code."""
    study = grid.Study("sweep", Settings, {"rho", "method"}, arms, page)
    return grid.conduct(study, __doc__, args)


def arms(settings: Settings, common: Common) -> list[Arm]:
    """Return all arms: rho 0 first, if it is asked for, then by method and rho.

    Raises:
        ConfigError: no rho is above 0.
    """
    if not any(settings.rhos):
        raise ConfigError(f"--rhos: expected one above 0, got {settings.rhos}")
    config, rhos = common(), sorted(settings.rhos)
    plain = replace(config, method="sam", rho=0.0)
    return [(name(plain), plain) for rho in rhos if rho == 0] + [
        (f"{method}, rho {number(rho)}", replace(config, method=method, rho=rho))
        for method in settings.methods
        for rho in rhos
        if rho != 0
    ]


def page(settings: Settings, groups: Sequence[Group]) -> Page:
    """Return what is reported."""
    title = f"Accuracy by ρ: {task(groups[0].config)}"
    remarks = [
        f"best rho of {method}, by {judge(groups[0].config)}: {found}"
        for method, found in best_rhos(groups).items()
    ]
    parts = {"accuracy": (about(groups), table(groups))}
    return Page(title, groups, parts, partial(draw, groups, title), remarks)


def table(groups: Sequence[Group]) -> Table:
    """Return a row for each arm."""
    columns = {"last epoch": last, "best epoch": best}
    columns |= {"validation": chosen} if groups[0].config.images.validation else {}
    rows = [
        [
            group.config.method if group.config.rho else group.name,
            number(group.config.rho),
            *(summary(group, value) for value in columns.values()),
        ]
        for group in groups
    ]
    return ["method", "ρ", *columns], rows


def by_method(groups: Sequence[Group]) -> dict[str, dict[float, Group]]:
    """Return the arms with a rho above 0, by method and rho."""
    above = [group for group in groups if group.config.rho]
    return arranged(above, lambda config: config.method, lambda config: config.rho)


def best_rhos(groups: Sequence[Group]) -> dict[str, str]:
    """Return the best rho of each method by its best epoch, and how well it does.

    The split counts that chose the epoch. A rho at which a run diverged is none; among
    equal ones, it is the smallest.
    """
    found = {}
    for method, arms in by_method(groups).items():
        if (group := best_of([*arms.values()])) is None:
            found[method] = "none"
        else:
            found[method] = f"{number(group.config.rho)} ({summary(group, best)} %)"
    return found


def draw(groups: Sequence[Group], title: str, path: Path) -> bool:
    """Draw accuracy against rho."""
    series = {method: series_of(arms) for method, arms in by_method(groups).items()}
    plain = [series_of({0.0: group}) for group in groups if not group.config.rho]
    plots.sweep(series, plain[0] if plain else None, path, title)
    return True


if __name__ == "__main__":
    sys.exit(main())
