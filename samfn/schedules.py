"""Schedules: pure functions from the index of a step to a value, for lr and for rho.

A schedule takes the step as an int, counted from 0, and returns a float. One that ends
stays at its last value. Values at which it begins or ends are finite, or a ValueError.
"""

import math
from collections.abc import Callable, Sequence

from samfn.support import checks

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Return the schedule that always gives `value`."""
    checks.require_finite(value=value)
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """Return a straight line from `start` at step 0 to `end` at `steps`.

    value(t) = end + (start - end) * (1 - t / steps)

    Raises:
        ValueError: `steps` is not positive.
    """
    return polynomial(start, steps, power=1.0, final=end)


def polynomial(peak: float, steps: int, power: float = 0.9, final: float = 0.0) -> Schedule:
    """Return a power of the steps that are left, from `peak` at step 0 to `final`.

    value(t) = final + (peak - final) * (1 - t / steps) ** power

    Args:
        peak: value at step 0.
        steps: where `final` is reached.
        power: above 0. 1 is a straight line, below 1 the fall comes late.
        final: value at `steps`.

    Raises:
        ValueError: `steps` or `power` is not positive.

    Source:
        The "poly" policy of Chen et al., 2017, arXiv:1706.05587, section 4.1, with its 0.9.
    """
    _require_positive(steps)
    checks.require_finite(peak=peak, final=final)
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power}")

    def value(step: int) -> float:
        left = 1 - min(step, steps) / steps
        return float(final + (peak - final) * left**power)

    return value


def cosine(peak: float, steps: int, final: float = 0.0) -> Schedule:
    """Return half a cosine from `peak` at step 0 to `final` at `steps`.

    value(t) = final + (peak - final) * (1 + cos(pi * t / steps)) / 2

    Raises:
        ValueError: `steps` is not positive.

    Source:
        Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    _require_positive(steps)
    checks.require_finite(peak=peak, final=final)
    return lambda step: _half_cosine(peak, final, min(step, steps) / steps)


def warm_restarts(
    peak: float, period: int, growth: int = 1, final: float = 0.0
) -> Schedule:
    """Return `cosine` again and again, each time from `peak`.

    value(t) = final + (peak - final) * (1 + cos(pi * s / length)) / 2

    with s the steps since the last start. It has no end.

    Args:
        peak: value at each start.
        period: length of the first cosine, in steps.
        growth: how many times as long as the one before each further one is.
        final: what each cosine falls to, one step after its last.

    Raises:
        ValueError: `period` or `growth` is no whole number of at least 1.

    Source:
        Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5; one of their settings
        is a first period of 10 epochs and a growth of 2.
    """
    checks.require_finite(peak=peak, final=final)
    for name, number in (("period", period), ("growth", growth)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number}")

    def value(step: int) -> float:
        since, length = step, period
        while since >= length:
            since, length = since - length, length * growth
        return _half_cosine(peak, final, since / length)

    return value


def one_cycle(
    peak: float,
    steps: int,
    warm: float = 0.3,
    start_factor: float = 25.0,
    final_factor: float = 1e4,
) -> Schedule:
    """Return half a cosine up to `peak`, and half a cosine down to almost nothing.

    From start = peak / start_factor at step 0 to peak at step warm * steps - 1, and from
    there to start / final_factor at the last step, steps - 1.

    Args:
        peak: largest value.
        steps: length of the whole schedule.
        warm: share of the steps on the way up, in [0, 1).
        start_factor: how far below the peak it starts; at least 1.
        final_factor: how far below the start it ends; at least 1.

    Raises:
        ValueError: `steps` is not positive, or another argument out of its range.

    Source:
        Smith and Topin, 2017, arXiv:1708.07120; two half cosines and the default numbers
        as in `torch.optim.lr_scheduler.OneCycleLR`, whose momentum cycles too.
    """
    _require_positive(steps)
    if not 0 <= warm < 1:
        raise ValueError(f"warm is a share in [0, 1), got {warm}")
    checks.require_finite(peak=peak)
    if not (start_factor >= 1 and final_factor >= 1):
        raise ValueError(
            "expected start_factor and final_factor of at least 1, got"
            f" {start_factor} and {final_factor}"
        )
    start, top = peak / start_factor, warm * steps - 1

    def value(step: int) -> float:
        if step < top:
            return _half_cosine(start, peak, step / top)
        fallen = (min(step, steps - 1) - top) / ((1 - warm) * steps)
        return _half_cosine(peak, start / final_factor, fallen)

    return value


def multi_step(peak: float, milestones: Sequence[int], factor: float = 0.2) -> Schedule:
    """Return `peak` times `factor` once for every milestone that has passed.

    Args:
        peak: value before the first milestone.
        milestones: steps, each the first with the next value.
        factor: what each milestone multiplies with; 0.2 as in `step_decay`.

    Raises:
        ValueError: a milestone is negative, or no whole number.
    """
    checks.require_finite(peak=peak, factor=factor)
    if wrong := [m for m in milestones if not isinstance(m, int) or m < 0]:
        raise ValueError(f"milestones are whole numbers of steps, got {wrong}")
    passed_at = tuple(milestones)

    def value(step: int) -> float:
        passed = sum(step >= milestone for milestone in passed_at)
        return float(peak * factor**passed)

    return value


def step_decay(
    peak: float,
    steps: int,
    milestones: Sequence[float] = (0.3, 0.6, 0.8),
    factor: float = 0.2,
) -> Schedule:
    """Return `multi_step` with milestones that are shares of the whole schedule.

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
    return multi_step(peak, [checks.rounded_up(m, steps) for m in milestones], factor)


def proportional(
    lr: Schedule, *, lr_max: float, lr_min: float = 0.0, peak: float, final: float
) -> Schedule:
    """Return the schedule of rho that goes with that of the learning rate.

    value(t) = final + (peak - final) * (lr(t) - lr_min) / (lr_max - lr_min)

    Args:
        lr: the schedule to follow.
        lr_max: learning rate where the value is `peak`.
        lr_min: learning rate where the value is `final`.
        peak: value at `lr_max`.
        final: value at `lr_min`.

    Raises:
        ValueError: `lr_max` is not above `lr_min`.

    Source:
        Zhuang et al., 2022, arXiv:2203.08065; the ProportionScheduler of
        github.com/juntang-zhuang/GSAM.
    """
    checks.require_finite(lr_max=lr_max, lr_min=lr_min, peak=peak, final=final)
    if not lr_max > lr_min:
        raise ValueError(f"lr_max must be above lr_min, got {lr_max} and {lr_min}")
    return lambda step: final + (peak - final) * ((lr(step) - lr_min) / (lr_max - lr_min))


def stable_decay(
    peak: float, steps: int, cooldown: float = 0.2, final: float = 0.0
) -> Schedule:
    """Return `peak`, and at the end a straight line from it down to `final`.

    value(t) = final + (peak - final) * min(1, (steps - t) / n), n = round(cooldown * steps)

    With `warmup` around it, this is the warmup-stable-decay schedule (WSD).

    Args:
        peak: value until the last n steps begin.
        steps: where `final` is reached.
        cooldown: share of the steps in which it falls, above 0 to 1.
        final: value at `steps`.

    Raises:
        ValueError: `steps` is not positive, or `cooldown` is no such share.

    Source:
        Hu et al., 2024, arXiv:2404.06395, where the fall is exponential; the straight line
        is the linear cooldown of Haegele et al., 2024, arXiv:2405.18392, figure 2.
    """
    checks.require_finite(peak=peak, final=final)
    length = _last(cooldown, steps, "cooldown")

    def value(step: int) -> float:
        left = max(0, steps - step) / length
        return float(final + (peak - final) * min(1.0, left))

    return value


def triangle(
    peak: float, steps: int, rise: float = 0.23, start: float = 0.0, final: float = 0.0
) -> Schedule:
    """Return a straight line from `start` up to `peak`, and another one down to `final`.

    value(t) = start + (peak - start) * t / n for t < n, then
    final + (peak - final) * (steps - t) / (steps - n), with n = int(rise * steps)

    Args:
        peak: value at step n.
        steps: where `final` is reached.
        rise: share of the steps on the way up, at least 0 and below 1.
        start: value at step 0, unless n is 0.
        final: value at `steps`.

    Raises:
        ValueError: `steps` is not positive, or `rise` is no such share.

    Source:
        Jordan, 2024, arXiv:2404.00498, github.com/KellerJordan/cifar10-airbench: 0.23, from
        0.2 of the peak to 0.07 of it.
    """
    _require_positive(steps)
    checks.require_finite(peak=peak, start=start, final=final)
    if not 0 <= rise < 1:
        raise ValueError(f"rise is a share in [0, 1), got {rise}")
    top = int(rise * steps)

    def value(step: int) -> float:
        if step < top:
            return start + (peak - start) * step / top
        left = (steps - min(step, steps)) / (steps - top)
        return final + (peak - final) * left

    return value


def tail(rho: float | Schedule, steps: int, share: float = 0.3, ramp: int = 0) -> Schedule:
    """Return the schedule of SAM at the end: 0, and `rho` in the last steps.

    value(t) = 0 for t < t0, then rho(t) * min(1, (t - t0 + 1) / ramp), with
    t0 = steps - round(share * steps)

    The 0 is the number, so that until t0 a step is the base optimizer's, of one gradient,
    and a run takes 1 + share gradients a step instead of 2. With the same `share` as
    cooldown, `stable_decay` begins to fall at t0, too. A method whose steps differ, as
    `looksam(k)`, perturbs first where its own turn comes, up to k - 1 steps later.

    Args:
        rho: radius at the end, or a schedule of it.
        steps: length of the whole schedule.
        share: of the steps that perturb, above 0 to 1.
        ramp: steps over which the radius rises to rho.

    Raises:
        ValueError: `steps` is not positive, `share` is no such share, or `ramp` negative.

    Source:
        Zhou et al., 2025, arXiv:2410.10373, by which SAM in the last epochs finds nearly
        the minima of SAM throughout.
    """
    start = tail_start(steps, share)
    schedule = rho if callable(rho) else constant(rho)
    if not 0 <= ramp < math.inf:
        raise ValueError(f"a ramp takes 0 or more steps, got {ramp}")

    def value(step: int) -> float:
        if step < start:
            return 0.0
        return schedule(step) * min(1.0, (step - start + 1) / max(1, ramp))

    return value


def tail_start(steps: int, share: float) -> int:
    """Return t0 of `tail`, the first step that perturbs.

    Raises:
        ValueError: as `tail`.
    """
    return steps - _last(share, steps, "share")


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Return `schedule` with its first `steps` values ramped up linearly.

    value(t) = schedule(t) * min(1, (t + 1) / steps)

    The ramp multiplies and does not shift: the schedule ends when it did before.
    """
    if not 0 <= steps < math.inf:
        raise ValueError(f"a warm-up takes 0 or more steps, got {steps}")
    if steps == 0:
        return schedule
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _last(share: float, steps: int, name: str) -> int:
    """Return how many steps this share of them is, at least one."""
    _require_positive(steps)
    if not 0 < share <= 1:
        raise ValueError(f"{name} is a share above 0 to 1, got {share}")
    return max(1, round(share * steps))


def _require_positive(steps: int) -> None:
    if not 0 < steps < math.inf:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
