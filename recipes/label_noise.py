"""Train with wrong labels, with several methods and seeds: who learns them by heart?

    python -m recipes.label_noise -- --preset digits-noise
    python -m recipes.label_noise --noise 0 0.4 --methods sgd "sam 0.1 0.2" "asam 2"

Flags of recipes.cifar_wrn, for all runs, follow the lone --. The same command goes on where
it was ended, and one with more noise, methods or seeds adds these. Of several rhos, each
noise has the best in the table, by the images that --validation holds out; their labels are
wrong as often with --noisy-validation. The default rhos are for the digits.

Source:
    Foret et al., 2021, arXiv:2010.01412, table 4: CIFAR-10 with 20, 40, 60 and 80 % noise.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from recipes import plots
from recipes.errors import ConfigError
from recipes.study import grid
from recipes.study.grid import Arm, Common
from recipes.study.groups import (
    MISSING,
    Group,
    best,
    best_of,
    last,
    number,
    series_of,
    summary,
)
from recipes.study.report import Page, Table, about, judge, task

SGD = "sgd"
Found = dict["Method", dict[float, Group]]
"""What is reported of each method, by share of noise."""


@dataclass(frozen=True)
class Settings(grid.Settings):
    """Train with wrong labels. Flags of recipes.cifar_wrn follow a lone --."""

    noise: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Shares of the training labels that are wrong, 0 to 1."""
    # As tuned on the digits; bench/results has more of them.
    methods: tuple[str, ...] = ("sgd", "sam 0.2", "asam 2", "momentum_sam 3")
    """sgd, or a method as --method of the recipe has it, and its rho, or several. Flags of
    the recipe may follow, as in "sam 0.4 --sam-last 0.3"."""
    output: Path = Path("runs/label-noise")


class Method(NamedTuple):
    """What trains in a row of the table."""

    method: str
    rhos: tuple[float, ...]
    flags: tuple[str, ...] = ()

    def label(self, *rhos: float) -> str:
        """Return how it is called, with one rho or several."""
        radii = ", rho " + " ".join(map(number, rhos)) if any(rhos) else ""
        name = self.method if radii else "SGD"
        return " ".join([name + radii, *self.flags])

    def arm(self, rho: float, share: float) -> str:
        """Return the label of its arm with a rho, at a share of noise."""
        return f"{self.label(rho)}, noise {number(share)}"


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, and report; return the exit code."""
    varied = {"rho", "method", "label_noise"}
    study = grid.Study("label_noise", Settings, varied, arms, page)
    return grid.conduct(study, __doc__, args)


def arms(settings: Settings, common: Common) -> list[Arm]:
    """Return all arms, by noise, method and rho."""
    methods = [(method, common(*method.flags)) for method in map(read, settings.methods)]
    return [
        (
            method.arm(rho, share),
            config.replace(method=method.method, rho=rho, label_noise=share),
        )
        for share in settings.noise
        for method, config in methods
        for rho in method.rhos
    ]


def read(text: str) -> Method:
    """Return what "sgd", or a method, its rhos and flags, means.

    Raises:
        ConfigError: it means nothing.
    """
    named, dashes, rest = text.strip().partition(" --")
    try:
        flags = tuple(shlex.split(dashes + rest))
    except ValueError as error:
        raise ConfigError(f"--methods: cannot read {text!r}: {error}") from error
    if named.strip() == SGD:
        return Method("sam", (0.0,), flags)
    words, rhos = named.split(), list[float]()
    while words and (rho := _number(words[-1])) is not None:
        rhos.insert(0, rho)
        words.pop()
    method = " ".join(words)
    if not (method and rhos) or not all(0 < rho < float("inf") for rho in rhos):
        raise ConfigError(
            f'--methods: expected sgd, or a method and a rho above 0 as "sam 0.2", or'
            f" several, got {text!r}"
        )
    return Method(method, tuple(rhos), flags)


def _number(word: str) -> float | None:
    """Return a word as a number, or None if it is none."""
    try:
        return float(word)
    except ValueError:
        return None


def found_of(settings: Settings, groups: Sequence[Group]) -> Found:
    """Return the arm of each method at each noise, of several rhos that of the best."""
    by_name, found = {group.name: group for group in groups}, Found()
    for method in map(read, settings.methods):
        for share in sorted(settings.noise):
            names = [method.arm(rho, share) for rho in method.rhos]
            if arms := [by_name[name] for name in names if name in by_name]:
                found.setdefault(method, {})[share] = best_of(arms) or arms[0]
    return found


def page(settings: Settings, groups: Sequence[Group]) -> Page:
    """Return what is reported."""
    title = f"Wrong labels: {task(groups[0].config.replace(label_noise=0.0))}"
    text = f"{about(groups)} Columns are the share of training labels that are wrong."
    found = found_of(settings, groups)
    if any(len(method.rhos) > 1 for method in found):
        text += f" Of several ρ, each noise has the best by {judge(groups[0].config)}."
    parts = {"accuracy": (text, table(found))}
    return Page(title, groups, parts, partial(draw, found, title))


def table(found: Found) -> Table:
    """Return rows of each method, last and best epoch, with a cell for each noise.

    A method with several rhos has another, which says the best.
    """
    shares = sorted({share for arms in found.values() for share in arms})
    rows = []
    for method, arms in found.items():
        name = method.label(*method.rhos)
        for epoch, value in (("last", last), ("best", best)):
            cells = [summary(arms[s], value) if s in arms else MISSING for s in shares]
            rows.append([name, epoch, *cells])
        if len(method.rhos) > 1:
            cells = [number(arms[s].config.rho) if s in arms else MISSING for s in shares]
            rows.append([name, "ρ", *cells])
    heads = [f"{number(round(100 * share, 10))} %" for share in shares]
    return ["method", "epoch", *heads], rows


def draw(found: Found, title: str, path: Path) -> bool:
    """Draw accuracy against noise."""
    series = {method.label(*method.rhos): series_of(arms) for method, arms in found.items()}
    plots.label_noise(series, path, title)
    return True


if __name__ == "__main__":
    sys.exit(main())
