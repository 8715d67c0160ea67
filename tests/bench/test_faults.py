"""The fast tier of `python -m bench.faults`: every fault that is a loop, a few times."""

import pytest

from bench.faults.rows import ROWS
from bench.faults.soak import never, soak

TRIALS = {"F1": 4, "F2": 33, "F4": 10, "F6": 1000, "F9": 4, "F20": 1, "F21": 2}
TRIALS |= {"F42": 3, "F43": 12, "F44": 2, "F45": 500, "F46": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_nothing_is_lost_whatever_happens(tmp_path, name):
    (row,) = (row for row in ROWS if row.name == name)
    outcome = row.run(TRIALS[name], tmp_path)
    assert outcome.failures == ()
    assert outcome.landed == outcome.trials >= TRIALS[name]


@pytest.mark.slow
def test_nothing_is_lost_in_a_while_of_anything(tmp_path):
    outcome = soak(30, tmp_path)
    assert outcome.failures == ()
    assert outcome.trials


def test_a_fault_that_never_happens_in_an_hour_is_a_failure():
    happened = {"kill": 3, "rot": 0}
    assert never(happened, 30) == []
    assert never(happened, 3600) == ["rot never happened"]


def test_the_rows_are_those_of_the_matrix():
    numbers = [int(row.name[1:]) for row in ROWS]
    assert numbers == [*range(1, 47)]
