"""Train with wrong labels, with several methods and seeds: who learns them by heart?

    python -m recipes.label_noise -- --data digits
    python -m recipes.label_noise --noise 0 0.4 --methods sgd "every(sam, 5) 1"

Flags of recipes.cifar_wrn, for all runs, follow the lone --. The same command goes
on where it was ended, and one with more noise, methods or seeds adds these. The defaults
are for the digits; for other data, `recipes.sweep -- --label-noise 0.4` finds good rhos.

Source:
    Foret et al., 2021, arXiv:2010.01412, table 4: CIFAR-10 with 20, 40, 60 and 80 % noise.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recipes import plots
from recipes.errors import ConfigError
from recipes.study import grid
from recipes.study.grid import Arm, Common
from recipes.study.groups import Group, arranged, best, last, number, series_of, summary
from recipes.study.report import Page, Table, about, task

SGD = "sgd"


@dataclass(frozen=True)
class Settings(grid.Settings):
    """Train with wrong labels. Flags of recipes.cifar_wrn follow a lone --."""

    noise: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Shares of the training labels that are wrong, 0 to 1."""
    # As tuned on the digits; bench/results/methods_digits_2026-11-21.md has more of them.
    methods: tuple[str, ...] = ("sgd", "sam 0.2", "asam 2", "momentum_sam 3")
    """sgd, or a method as --method of the recipe has it, a space, and its rho."""
    output: Path = Path("runs/label-noise")


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, and report; return the exit code."""
    varied = {"rho", "method", "label_noise"}
    study = grid.Study("label_noise", Settings, varied, arms, page)
    return grid.conduct(study, __doc__, args)


def arms(settings: Settings, common: Common) -> list[Arm]:
    """Return all arms, by noise and method."""
    methods, config = [read(text) for text in settings.methods], common()
    return [
        (
            f"{label(method, rho)}, noise {number(share)}",
            config.replace(method=method, rho=rho, label_noise=share),
        )
        for share in settings.noise
        for method, rho in methods
    ]


def read(text: str) -> tuple[str, float]:
    """Return the method and the rho that "sgd", or a method and its rho, means.

    Raises:
        ConfigError: it means nothing.
    """
    if text.strip() == SGD:
        return "sam", 0.0
    method, _, last_word = text.strip().rpartition(" ")
    try:
        rho = float(last_word)
    except ValueError:
        rho = 0.0
    if not 0 < rho < float("inf"):
        raise ConfigError(
            f'--methods: expected sgd, or a method and a rho above 0 as "sam 0.2",'
            f" got {text!r}"
        )
    return method.strip(), rho


def label(method: str, rho: float) -> str:
    """Return what a method is called."""
    return f"{method}, rho {number(rho)}" if rho else "SGD"


def by_method(groups: Sequence[Group]) -> dict[str, dict[float, Group]]:
    """Return the arms by method and noise."""
    return arranged(
        groups, lambda c: label(c.method, c.rho), lambda c: c.images.label_noise
    )


def page(settings: Settings, groups: Sequence[Group]) -> Page:
    """Return what is reported."""
    title = f"Wrong labels: {task(groups[0].config.replace(label_noise=0.0))}"
    text = f"{about(groups)} Columns are the share of training labels that are wrong."
    parts = {"accuracy": (text, table(groups))}
    return Page(title, groups, parts, partial(draw, groups, title))


def table(groups: Sequence[Group]) -> Table:
    """Return two rows for each method, last and best epoch, with a cell for each noise."""
    found = by_method(groups)
    shares = sorted({share for arms in found.values() for share in arms})
    rows = [
        [method, epoch, *(summary(arms[share], value) for share in shares)]
        for method, arms in found.items()
        for epoch, value in (("last", last), ("best", best))
    ]
    return ["method", "epoch", *(f"{number(100 * share)} %" for share in shares)], rows


def draw(groups: Sequence[Group], title: str, path: Path) -> bool:
    """Draw accuracy against noise."""
    series = {method: series_of(arms) for method, arms in by_method(groups).items()}
    plots.label_noise(series, path, title)
    return True


if __name__ == "__main__":
    sys.exit(main())
