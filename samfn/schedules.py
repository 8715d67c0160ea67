"""Schedules: pure functions from the index of a step to a value, for lr and for rho.

A schedule takes the step as an int, counted from 0, and returns a float.
"""

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Return the schedule that always gives `value`."""
    return lambda step: value


def cosine(peak: float, steps: int, final: float = 0.0) -> Schedule:
    """Return half a cosine from `peak` at step 0 to `final` at `steps`.

    value(t) = final + (peak - final) * (1 + cos(pi * t / steps)) / 2

    Raises:
        ValueError: `steps` is not positive.

    Source:
        Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    _require_positive(steps)

    def value(step: int) -> float:
        progress = min(step, steps) / steps
        return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

    return value


def step_decay(
    peak: float,
    steps: int,
    milestones: Sequence[float] = (0.3, 0.6, 0.8),
    factor: float = 0.2,
) -> Schedule:
    """Return `peak` times `factor` once for every milestone that has passed.

    Args:
        peak: value before the first milestone.
        steps: length of the whole schedule.
        milestones: fractions of `steps`, each in [0, 1].
        factor: what each milestone multiplies with.

    Raises:
        ValueError: `steps` is not positive, or a milestone lies outside [0, 1].

    Source:
        The defaults are the 60, 120 and 160 of 200 epochs and the factor 0.2 of
        Zagoruyko and Komodakis, 2016, arXiv:1605.07146, section 3.
    """
    _require_positive(steps)
    if outside := [m for m in milestones if not 0 <= m <= 1]:
        raise ValueError(f"milestones are fractions of the steps, got {outside}")

    def value(step: int) -> float:
        passed = sum(step >= milestone * steps for milestone in milestones)
        return float(peak * factor**passed)

    return value


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Return `schedule` with its first `steps` values ramped up linearly.

    value(t) = schedule(t) * min(1, (t + 1) / steps)

    The ramp multiplies and does not shift: the schedule ends when it did before.
    """
    if steps < 0:
        raise ValueError(f"a warm-up takes 0 or more steps, got {steps}")
    if steps == 0:
        return schedule
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


def _require_positive(steps: int) -> None:
    if steps <= 0:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
