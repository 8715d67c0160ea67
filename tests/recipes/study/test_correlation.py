"""Kendall's tau of runs and of seeds, against its definition."""

import itertools
import math
from operator import itemgetter
from typing import NamedTuple

import pytest
import torch

from recipes.study.correlation import Rank, Ranks, pairs, plain, rank, ranks, table


def tau_b(pairs):
    """As Kendall defined it: over all pairs of pairs."""
    signs = [
        ((a > c) - (a < c), (b > d) - (b < d))
        for (a, b), (c, d) in itertools.combinations(pairs, 2)
    ]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return sum(one * other for one, other in signs) / math.sqrt(math.prod(untied))


@pytest.mark.parametrize("values", [9, 4])  # as many as there are pairs, and with ties
def test_it_is_kendalls_tau_within_an_interval(values):
    pairs = [(float(x), float(y)) for x, y in torch.randint(values, (9, 2)).tolist()]
    found = rank(pairs)
    assert found.tau == pytest.approx(tau_b(pairs))
    assert found.runs == 9
    half = 1.96 * math.sqrt(0.437 / 5)
    assert math.atanh(found.high) - math.atanh(found.tau) == pytest.approx(half)
    assert math.atanh(found.tau) - math.atanh(found.low) == pytest.approx(half)


def test_of_few_runs_or_equal_ones_nothing_is_known():
    pairs = [(float(i), float(-i)) for i in range(5)]
    assert rank(pairs) == Rank(-1, None, None, 5)
    assert rank(pairs[:4]) is None
    assert rank([(1.0, y) for _, y in pairs]) is None
    assert rank([(x, 1.0) for x, _ in pairs]) is None
    assert rank([]) is None


class Row(NamedTuple):
    """Pairs of numbers in place of a group of runs."""

    counted: list[tuple[float | None, float]]


def test_a_method_that_is_flat_and_accurate_says_nothing_of_its_seeds():
    # Rows lie apart along one diagonal, their seeds along the other.
    ahead = Row([(1.0, 90.0), (2.0, 91.0), (3.0, 92.0)])
    behind = Row([(11.0, 80.0), (12.0, 81.0), (13.0, 82.0), (None, 83.0)])
    rows = [ahead, behind, Row([(20.0, 70.0)])]
    found = ranks([pairs(row, itemgetter(0), itemgetter(1)) for row in rows])
    assert found.runs.tau < 0
    assert found.runs.runs == 6 + 1
    assert found.seeds == Rank(
        1, None, None, 5
    )  # of two rows; that of one run has no seeds


def test_seeds_that_are_as_far_from_their_means_are_equal():
    for counts in torch.randint(330, 350, (20, 4, 3, 2)).tolist():
        rows = [[(sharp / 7e6, 100 * n / 360) for sharp, n in row] for row in counts]
        exact = [
            (3 * sharp - sum(s for s, _ in row), 3 * right - sum(r for _, r in row))
            for row in counts
            for sharp, right in row
        ]
        assert ranks(rows).seeds.tau == pytest.approx(tau_b(exact))


def test_a_table_leaves_out_measures_of_which_nothing_is_known():
    known = Rank(-0.5, -0.75, 0.125, 9)
    found = {"λ1": Ranks(known, None), "trace": Ranks(None, None)}
    head, rows = table(found)
    assert head == ["", "τ, all runs", "τ, seeds of a row"]
    assert rows == [["λ1", "-0.50 (-0.75 to 0.12), n 9", "-"]]
    of_all = {"tau": -0.5, "low": -0.75, "high": 0.125, "runs": 9}
    assert str(Rank(1, None, None, 5)) == "1.00, n 5"
    assert plain(found)["λ1"] == {"runs": of_all, "seeds": None}
