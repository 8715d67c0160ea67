"""Whether a measure orders runs as their test accuracies do: Kendall's rank correlation.

As Jiang et al. ask of measures of generalisation (arXiv:1912.02178): over all runs, and
among those that differ in the seed alone, whom no setting makes both flat and accurate.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from recipes.study.groups import MISSING, Group, Value, levelled

Pairs = Sequence[tuple[float, float]]
"""(measure, accuracy) of each run."""

FEWEST = 5  # The interval is of n - 4.
WIDTH = 1.96  # standard errors to both sides of a 95 % interval
VARIANCE = 0.437  # times 1 / (n - 4), of artanh tau; Fieller, Hartley and Pearson, 1957

EXPLAINED = (
    "Kendall's τ between a measure and the test accuracy of the same epochs, with its 95 %"
    " interval: -1 where the sharper run is always the worse, 0 where one says nothing of"
    " the other. Over all runs that can be compared, and over seeds alone, where each"
    " number is taken less the mean of its row."
)


class Rank(NamedTuple):
    """Kendall's tau of runs, and its interval of 95 %; of a perfect order there is none."""

    tau: float
    low: float | None
    high: float | None
    runs: int
    """Of as many runs, less a row's mean for each row but one, if means are taken off."""

    def __str__(self) -> str:
        """Return it as a table shows it."""
        within = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.tau:.2f}{within}, n {self.runs}"


class Ranks(NamedTuple):
    """How a measure orders runs; None where they are too few, or all alike."""

    runs: Rank | None
    seeds: Rank | None


def rank(pairs: Pairs, lost: int = 0) -> Rank | None:
    """Return the rank correlation of pairs: tau_b, so that equal ones count for neither.

    tanh(artanh tau ± 1.96 sqrt(0.437 / (n - 4))) is the interval, with n - `lost` for n.
    """
    count = len(pairs) - lost
    if count < FEWEST or any(len({*side}) == 1 for side in zip(*pairs, strict=True)):
        return None
    # It is slow to import, and a report is written once.
    from scipy.stats import kendalltau

    tau = round(float(kendalltau(*zip(*pairs, strict=True)).statistic), 12)
    if abs(tau) == 1:
        return Rank(tau, None, None, count)
    reach = WIDTH * math.sqrt(VARIANCE / (count - 4))
    low, high = (math.tanh(math.atanh(tau) + sign * reach) for sign in (-1, 1))
    return Rank(tau, low, high, count)


def ranks(rows: Collection[Pairs]) -> Ranks:
    """Return how a measure orders the runs of rows, and the seeds of each."""
    sides = zip(*(pair for row in rows for pair in row), strict=True)
    sizes = [max(map(abs, side)) or 1.0 for side in sides]
    alone = [pair for row in rows if len(row) > 1 for pair in _less_its_mean(row, sizes)]
    means = sum(len(row) > 1 for row in rows)
    return Ranks(
        rank([pair for row in rows for pair in row]), rank(alone, max(means - 1, 0))
    )


def pairs(group: Group, measure: Value, accuracy: Value) -> Pairs:
    """Return both numbers of the runs of a group that have both."""
    return [
        (float(one), float(other))
        for run in group.counted
        if (one := measure(run)) is not None and (other := accuracy(run)) is not None
    ]


def _less_its_mean(row: Pairs, sizes: Sequence[float]) -> Pairs:
    """Return pairs less those of their means, levelled by the sizes of both numbers."""
    middle = [math.fsum(side) / len(row) for side in zip(*row, strict=True)]
    return [
        (levelled(one - middle[0], sizes[0]), levelled(other - middle[1], sizes[1]))
        for one, other in row
    ]


def table(found: Mapping[str, Ranks]) -> tuple[list[str], list[list[str]]]:
    """Return the table of measures by their heads; those of which nothing is known lack."""
    known = {head: each for head, each in found.items() if any(each)}
    rows = [
        [head, *(str(r) if r else MISSING for r in each)] for head, each in known.items()
    ]
    return ["", "τ, all runs", "τ, seeds of a row"], rows


def plain(found: Mapping[str, Ranks]) -> dict[str, Any]:
    """Return what a data file holds of it."""
    return {
        name: {key: r and r._asdict() for key, r in each._asdict().items()}
        for name, each in found.items()
    }
