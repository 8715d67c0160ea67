import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samfn import schedules


@given(st.integers(1, 500), st.floats(1e-3, 10))
def test_cosine_is_that_of_pytorch(steps, peak):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ours = schedules.cosine(peak, steps)
    for step in range(min(steps, 20)):
        assert math.isclose(
            ours(step), theirs.get_last_lr()[0], rel_tol=1e-9, abs_tol=1e-12
        )
        optimizer.step()
        theirs.step()


def test_cosine_ends_at_its_final_value_and_stays_there():
    schedule = schedules.cosine(1.0, 10, final=0.1)
    assert schedule(0) == 1.0
    assert schedule(10) == schedule(25) == pytest.approx(0.1)


def test_step_decay_multiplies_at_each_milestone():
    schedule = schedules.step_decay(0.1, 200)
    around = (0, 59, 60, 119, 120, 159, 160, 199)
    values = [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    assert [schedule(step) for step in around] == pytest.approx(values)


def test_warmup_ramps_and_then_leaves_the_schedule_alone():
    schedule = schedules.warmup(schedules.cosine(1.0, 100), 4)
    base = schedules.cosine(1.0, 100)
    assert [schedule(t) / base(t) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedules.warmup(base, 0) is base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.cosine(1.0, 0), "at least one step, got 0"),
        (lambda: schedules.step_decay(1.0, -1), "at least one step, got -1"),
        (lambda: schedules.step_decay(1.0, 9, [30]), r"fractions .* got \[30\]"),
        (lambda: schedules.warmup(schedules.constant(1.0), -1), "0 or more .* got -1"),
    ],
)
def test_bad_lengths_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
