import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_optimizer import ProportionScheduler
from torch.optim import lr_scheduler as torchs

from samfn import schedules

lengths = st.integers(1, 120)
peaks = st.floats(1e-3, 10)


def close(one, other):
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def of_pytorch(make, peak, steps):
    """Yield the learning rates of a scheduler, one for each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make(optimizer)
    for _ in range(steps):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


# Ours of peak and length, and theirs of an optimizer and the same.
PAIRS = {
    "cosine": (schedules.cosine, lambda o, peak, n: torchs.CosineAnnealingLR(o, n)),
    "cosine to a value": (
        lambda peak, n: schedules.cosine(peak, n, final=0.01),
        lambda o, peak, n: torchs.CosineAnnealingLR(o, n, eta_min=0.01),
    ),
    "polynomial": (
        schedules.polynomial,
        lambda o, peak, n: torchs.PolynomialLR(o, n, power=0.9),
    ),
    "polynomial of power 2": (
        lambda peak, n: schedules.polynomial(peak, n, power=2.0),
        lambda o, peak, n: torchs.PolynomialLR(o, n, power=2.0),
    ),
    "linear up": (
        lambda peak, n: schedules.linear(peak / 4, peak, n),
        lambda o, peak, n: torchs.LinearLR(o, 1 / 4, 1.0, n),
    ),
    "linear down": (
        lambda peak, n: schedules.linear(peak, peak / 10, n),
        lambda o, peak, n: torchs.LinearLR(o, 1.0, 1 / 10, n),
    ),
    "multi-step": (
        lambda peak, n: schedules.multi_step(peak, (n // 2, n // 3, n // 2), 0.3),
        lambda o, peak, n: torchs.MultiStepLR(o, [n // 2, n // 3, n // 2], 0.3),
    ),
    "step decay": (
        schedules.step_decay,
        lambda o, peak, n: torchs.MultiStepLR(
            o, [math.ceil(share * n) for share in (0.3, 0.6, 0.8)], 0.2
        ),
    ),
    "warm restarts": (
        lambda peak, n: schedules.warm_restarts(peak, n // 3 + 1),
        lambda o, peak, n: torchs.CosineAnnealingWarmRestarts(o, n // 3 + 1),
    ),
    "warm restarts that grow, to a value": (
        lambda peak, n: schedules.warm_restarts(peak, n // 9 + 1, 2, final=0.01),
        lambda o, peak, n: torchs.CosineAnnealingWarmRestarts(o, n // 9 + 1, 2, 0.01),
    ),
    "one cycle": (
        schedules.one_cycle,
        lambda o, peak, n: torchs.OneCycleLR(o, peak, n, cycle_momentum=False),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@given(peaks, lengths)
def test_every_step_is_that_of_pytorch(name, peak, steps):
    ours, theirs = PAIRS[name]
    values = of_pytorch(lambda optimizer: theirs(optimizer, peak, steps), peak, steps)
    schedule = ours(peak, steps)
    assert all(close(schedule(step), value) for step, value in enumerate(values))


@given(peaks, lengths, st.floats(0, 0.95), st.floats(1, 99), st.floats(1, 1e5))
def test_one_cycle_takes_the_numbers_of_pytorch(peak, steps, warm, start, final):
    assume(warm * steps != 1)  # where theirs divides by zero
    values = of_pytorch(
        lambda optimizer: torchs.OneCycleLR(
            optimizer,
            peak,
            steps,
            pct_start=warm,
            div_factor=start,
            final_div_factor=final,
            cycle_momentum=False,
        ),
        peak,
        steps,
    )
    schedule = schedules.one_cycle(peak, steps, warm, start, final)
    assert all(close(schedule(step), value) for step, value in enumerate(values))


# Of start, end and length, from one to the other.
WAYS = {
    "cosine": lambda start, end, n: schedules.cosine(start, n, end),
    "linear": schedules.linear,
    "polynomial": lambda start, end, n: schedules.polynomial(start, n, final=end),
    "polynomial of power 3": lambda start, end, n: schedules.polynomial(start, n, 3.0, end),
}


@pytest.mark.parametrize("name", WAYS)
@given(st.floats(0, 10), st.floats(0, 10), lengths)
def test_a_way_goes_straight_from_one_value_to_the_other_and_stays(name, start, end, n):
    schedule = WAYS[name](start, end, n)
    values = [schedule(step) for step in range(n + 3)]
    assert close(values[0], start)
    assert values[n:] == [end] * 3
    sign, rounding = 1 if end > start else -1, 1e-14
    assert all(sign * (b - a) >= -rounding for a, b in pairwise(values))
    low, high = min(start, end), max(start, end)
    assert low - rounding <= min(values) <= max(values) <= high + rounding


@given(peaks, st.integers(8, 500), st.floats(0.3, 0.9))
def test_one_cycle_rises_once_and_falls_once(peak, steps, warm):
    schedule = schedules.one_cycle(peak, steps, warm)
    values = [schedule(step) for step in range(steps)]
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert abs(top - (warm * steps - 1)) <= 1
    assert max(values) <= peak * (1 + 1e-12)
    assert close(values[0], peak / 25)
    assert close(values[-1], peak / 25 / 1e4)
    assert schedule(steps) == schedule(10 * steps) == values[-1]


@given(peaks, st.integers(1, 9), st.integers(1, 4))
def test_warm_restarts_are_cosines_one_after_the_other(peak, period, growth):
    schedule, start = schedules.warm_restarts(peak, period, growth), 0
    for number in range(4):
        length = period * growth**number
        cosine = schedules.cosine(peak, length)
        for step in range(length):
            assert schedule(start + step) == cosine(step)
        start += length


def test_one_cycle_without_a_rise_starts_at_its_peak():
    assert schedules.one_cycle(0.4, 10, warm=0.1)(0) == 0.4


@given(peaks, lengths, st.floats(0.1, 0.9))
def test_multi_step_changes_at_its_milestones_and_nowhere_else(peak, steps, factor):
    milestones = [steps, 2 * steps]
    schedule = schedules.multi_step(peak, milestones, factor)
    milestones.clear()  # What was given is read once.
    pairs = enumerate(pairwise(schedule(step) for step in range(3 * steps)), 1)
    falls = {step: after / before for step, (before, after) in pairs if after != before}
    assert falls.keys() == {steps, 2 * steps} - {3 * steps}
    assert all(close(fall, factor) for fall in falls.values())


@given(peaks, st.integers(1, 300), st.lists(st.floats(0, 1), max_size=4))
def test_step_decay_is_multi_step_at_shares_of_the_whole(peak, steps, shares):
    schedule = schedules.step_decay(peak, steps, shares, 0.5)
    for step in range(steps):
        passed = sum(step >= round(share * steps, 9) for share in shares)
        assert schedule(step) == peak * 0.5**passed


@pytest.mark.parametrize(("share", "steps"), [(0.07, 100), (0.55, 100), (0.28, 25)])
def test_a_share_that_is_a_whole_number_of_steps_is_that_number(share, steps):
    schedule = schedules.step_decay(1.0, steps, (share,), 0.5)
    assert [schedule(step) for step in range(steps)].count(1.0) == round(share * steps)


def test_step_decay_multiplies_at_each_milestone():
    schedule = schedules.step_decay(0.1, 200)
    around = (0, 59, 60, 119, 120, 159, 160, 199)
    values = [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    assert [schedule(step) for step in around] == pytest.approx(values)


@given(peaks, lengths, st.floats(0, 0.1), st.floats(0, 0.5))
def test_a_proportional_rho_is_that_of_pytorch_optimizer(peak, steps, final, share):
    lr_min = share * peak
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = torchs.CosineAnnealingLR(optimizer, steps, eta_min=lr_min)
    theirs = ProportionScheduler(scheduler, peak, lr_min, max_value=0.5, min_value=final)
    lr = schedules.cosine(peak, steps, lr_min)
    ours = schedules.proportional(lr, lr_max=peak, lr_min=lr_min, peak=0.5, final=final)
    for step in range(steps):
        assert math.isclose(ours(step), theirs.get_lr(), rel_tol=1e-9, abs_tol=1e-9)
        optimizer.step()
        scheduler.step()
        theirs.step()


def test_a_proportional_rho_follows_lr_through_warm_up_to_its_end():
    lr = schedules.warmup(schedules.linear(0.1, 0.0, 100), 4)
    rho = schedules.proportional(lr, lr_max=0.1, peak=0.2, final=0.05)
    expected = [0.05 + 1.5 * lr(step) for step in range(120)]
    assert [rho(step) for step in range(120)] == pytest.approx(expected)
    assert rho(0) < rho(3) > rho(50) > rho(100) == 0.05


@pytest.mark.parametrize(("share", "start"), [(0.3, 7), (1.0, 0), (0.42, 6), (1e-9, 9)])
def test_sam_begins_where_a_stable_learning_rate_begins_to_fall(share, start):
    rho = schedules.tail(0.05, 10, share)
    assert [rho(t) for t in range(12)] == [0.0] * start + [0.05] * (12 - start)
    lr = schedules.stable_decay(0.1, 10, share, 0.01)
    falls = [t for t in range(10) if lr(t + 1) < lr(t)]
    assert falls == [*range(start, 10)]
    assert (lr(0), lr(10), lr(99)) == (0.1, pytest.approx(0.01), pytest.approx(0.01))
    line = [lr(t) - lr(t + 1) for t in falls]
    assert line == pytest.approx([line[0]] * len(line))


def test_a_tail_rises_to_a_schedule_of_its_own():
    inner = schedules.linear(0.4, 0.0, 10)
    rho = schedules.tail(inner, 10, 0.5, ramp=3)
    expected = [0.0] * 5 + [inner(5) / 3, inner(6) * 2 / 3, inner(7), inner(8), inner(9)]
    assert [rho(t) for t in range(10)] == pytest.approx(expected)
    assert type(rho(0)) is float


@given(peaks, st.integers(1, 300), st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_a_triangle_is_two_straight_lines_that_meet_at_its_peak(
    peak, steps, rise, start, final
):
    schedule, top = schedules.triangle(peak, steps, rise, start, final), int(rise * steps)
    values = [schedule(step) for step in range(steps + 3)]
    assert close(values[top], peak)
    assert close(values[0], start if top else peak)
    assert values[steps:] == [final] * 3
    for line in (values[: top + 1], values[top : steps + 1]):
        falls = [a - b for a, b in pairwise(line)]
        assert falls == pytest.approx(falls[:1] * len(falls), abs=1e-9)


def test_the_triangle_of_airbench_has_its_peak_after_23_percent():
    schedule = schedules.triangle(1.5, 480, start=0.3, final=0.105)
    values = [schedule(step) for step in (0, 55, 110, 295, 480)]
    assert values == pytest.approx([0.3, 0.9, 1.5, 0.8025, 0.105])


def test_warmup_ramps_and_then_leaves_the_schedule_alone():
    schedule = schedules.warmup(schedules.cosine(1.0, 100), 4)
    base = schedules.cosine(1.0, 100)
    assert [schedule(t) / base(t) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedules.warmup(base, 0) is base


RHO = {"peak": 0.1, "final": 0.0}
NAN = math.nan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.cosine(1.0, 0), "at least one step, got 0"),
        (lambda: schedules.linear(1.0, 0.0, 0), "at least one step, got 0"),
        (lambda: schedules.polynomial(1.0, -3), "at least one step, got -3"),
        (lambda: schedules.polynomial(1.0, 9, 0), "power must be above 0, got 0"),
        (lambda: schedules.warm_restarts(1.0, 0), "period must be .* least 1, got 0"),
        (lambda: schedules.warm_restarts(1.0, 9, 0), "growth must be .* 1, got 0"),
        (lambda: schedules.warm_restarts(1.0, 9, 1.5), "whole number .* got 1.5"),
        (lambda: schedules.one_cycle(1.0, 0), "at least one step, got 0"),
        (lambda: schedules.one_cycle(1.0, 9, 1.0), r"in \[0, 1\), got 1.0"),
        (lambda: schedules.one_cycle(1.0, 9, start_factor=0.5), "1, got 0.5 and 10000"),
        (lambda: schedules.one_cycle(1.0, 9, final_factor=0), "1, got 25.0 and 0"),
        (lambda: schedules.multi_step(1.0, [3, -1]), r"whole numbers .* got \[-1\]"),
        (lambda: schedules.multi_step(1.0, [0.3, 6]), r"whole numbers .* got \[0.3\]"),
        (lambda: schedules.step_decay(1.0, -1), "at least one step, got -1"),
        (lambda: schedules.step_decay(1.0, 9, [30]), r"fractions .* got \[30\]"),
        (
            lambda: schedules.proportional(abs, lr_max=0.1, lr_min=0.1, **RHO),
            "lr_max must be above lr_min, got 0.1 and 0.1",
        ),
        (lambda: schedules.warmup(schedules.constant(1.0), -1), "0 or more .* got -1"),
        (lambda: schedules.tail(0.1, 10, 0.3, -1), "0 or more .* got -1"),
        (lambda: schedules.tail(0.1, 10, 0.0), "share is .* above 0 to 1, got 0.0"),
        (lambda: schedules.tail(0.1, 0), "at least one step, got 0"),
        (lambda: schedules.stable_decay(0.1, 9, 1.5), "cooldown is .* 1, got 1.5"),
        (lambda: schedules.triangle(1.0, 0), "at least one step, got 0"),
        (lambda: schedules.triangle(1.0, 9, 1.0), r"in \[0, 1\), got 1.0"),
        (lambda: schedules.constant(NAN), "value must be finite, got nan"),
        (lambda: schedules.linear(NAN, 0.0, 9), "peak must be finite, got nan"),
        (lambda: schedules.polynomial(1.0, 9, final=NAN), "final must be finite, got nan"),
        (lambda: schedules.cosine(1.0, NAN), "at least one step, got nan"),
        (lambda: schedules.cosine(math.inf, 9), "peak must be finite, got inf"),
        (lambda: schedules.warm_restarts(1.0, 9, final=NAN), "final must be finite"),
        (lambda: schedules.one_cycle(NAN, 9), "peak must be finite, got nan"),
        (lambda: schedules.one_cycle(1.0, 9, final_factor=NAN), "1, got 25.0 and nan"),
        (lambda: schedules.multi_step(1.0, [3], NAN), "factor must be finite, got nan"),
        (lambda: schedules.step_decay(NAN, 9), "peak must be finite, got nan"),
        (
            lambda: schedules.proportional(abs, lr_max=math.inf, **RHO),
            "lr_max must be finite, got inf",
        ),
        (lambda: schedules.stable_decay(1.0, 9, final=NAN), "final must be finite"),
        (lambda: schedules.triangle(1.0, 9, start=NAN), "start must be finite, got nan"),
        (lambda: schedules.tail(NAN, 9), "value must be finite, got nan"),
        (lambda: schedules.tail(0.1, 9, ramp=NAN), "0 or more .* got nan"),
        (lambda: schedules.warmup(abs, NAN), "0 or more .* got nan"),
    ],
)
def test_numbers_that_make_no_schedule_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
