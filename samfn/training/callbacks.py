"""Callbacks of `samfn.training.loop`: averages, Lookahead, patience, checkpoints.

Each function here returns a callback, and keeps what it must not forget in
`Training.memory` under its own name.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from samfn import distributed, tree
from samfn.step import TrainState, require_finite
from samfn.storage.checkpoint import restore
from samfn.storage.checkpoints import SCORE, Checkpoints, Found
from samfn.support import checks
from samfn.training.averaging import moving_average
from samfn.training.loop import Callback, Epoch, Evaluation, Event, Start, Step, Training
from samfn.tree import Params

EMA = "ema"
LOOKAHEAD = "lookahead"
PATIENCE = "early_stopping"
SWAD, EPOCH, AVERAGE = "swad", "swad_epoch", "swad_average"
MEMORY = "memory."  # before the names under which a checkpoint holds what is kept


def ema(decay: float, *, start: int = 0) -> Callback:
    """Keep an exponential moving average of parameters and buffers.

    a <- decay a + (1 - decay) w after every step, a = w until the step `start`

    `ema_of` gives it to `evaluate`; `copy_ema` puts it into the state. Counters among the
    buffers are those of the state.

    Args:
        decay: share of the old average, at least 0 and below 1; 0.9999 in ml-cvnets, whose
            momentum is one minus it, 0.999 for runs of some thousand steps.
        start: steps before the average begins.

    Source:
        Polyak and Juditsky, 1992, SIAM J. Control Optim. 30(4), in the exponential form.
    """
    checks.require_below_one("decay", decay)

    def callback(event: Event) -> None:
        if isinstance(event, Step):
            training, now = event.training, _together(event.training.state)
            if training.step <= start or EMA not in training.memory:
                training.memory[EMA] = {name: t.clone() for name, t in now.items()}
            else:
                training.memory[EMA] = _owned(training.memory[EMA], now, decay)

    return callback


def ema_of(training: Training) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the averages of parameters and buffers; before a step, those of the state."""
    state = training.state
    average = training.memory.get(EMA) or _together(state)
    # Checkpoints do not keep the order of names, and floating-point sums depend on it.
    params = {name: average[f"params/{name}"] for name in state.params}
    return params, {name: average[f"buffers/{name}"] for name in state.buffers}


def require_average(training: Training) -> None:
    """Raise unless averages, if there are any, are of these parameters and buffers.

    Those are the average of `ema` and the slow weights of `lookahead`.

    Raises:
        ValueError: names, shapes or dtypes are others; says which.
    """
    for name in (EMA, LOOKAHEAD):
        if name in training.memory:
            _require_average(training.memory[name], _together(training.state))


def _require_average(average: Any, state: Params) -> None:
    if not isinstance(average, Mapping):
        raise ValueError(f"expected an average by name, got a {type(average).__name__}")
    checks.require_same_names(state, average, names="the state and its average")
    for name, tensor in state.items():
        if (shape := getattr(average[name], "shape", None)) != tensor.shape:
            raise ValueError(
                f"expected an average of {name} of shape {[*tensor.shape]}, got {shape}"
            )
        if (dtype := average[name].dtype) != tensor.dtype:
            raise ValueError(
                f"expected an average of {name} of {tensor.dtype}, got {dtype}"
            )


def copy_ema(epoch: int) -> Callback:
    """Continue from the average of `ema` after an epoch, counted from 1.

    Parameters and buffers become the average; the optimizer keeps its memory.
    """
    checks.require_count("epoch", epoch)

    def callback(event: Event) -> None:
        if isinstance(event, Epoch) and event.training.epoch == epoch:
            params, buffers = ema_of(event.training)
            copied = {name: t.clone() for name, t in params.items()}
            event.training.state = event.training.state._replace(
                params=copied, buffers={name: t.clone() for name, t in buffers.items()}
            )

    return callback


def lookahead(
    decay: float | Callable[[int], float], *, every: int = 5, last: int | None = None
) -> Callback:
    """Let slow weights follow the weights, which go on from them (Lookahead).

    s <- d s + (1 - d) w;  w <- s,  after every `every` steps, and w <- s after the last

    The slow weights s begin as the weights before the first step. Buffers are averaged as
    parameters are; counters among them are the state's. The optimizer keeps its memory.

    Args:
        decay: d, the share of the slow weights that stays, at least 0 and below 1; or what
            it is after so many steps. 0.5 in the paper, as 1 - alpha.
        every: steps from one look to the next, at least 1; 5 and 10 in the paper.
        last: steps in the whole run. None leaves the end to be as any other step.

    Raises:
        ValueError: `decay` is no such share; when told of a step before the start of any
            epoch.

    Source:
        Zhang et al., 2019, arXiv:1907.08610, algorithm 1. There no buffers are averaged;
        they are in github.com/KellerJordan/cifar10-airbench, whose decay grows.
    """
    checks.require_count("every", every)
    if not callable(decay):
        checks.require_below_one("decay", decay)
    at = decay if callable(decay) else lambda step: decay

    def callback(event: Event) -> None:
        training, memory = event.training, event.training.memory
        now = _together(training.state)
        if LOOKAHEAD not in memory:
            if isinstance(event, Step):
                raise ValueError(
                    "lookahead: expected Start before the first Step, with the weights that"
                    " it goes back to: tell the callbacks when an epoch begins"
                )
            memory[LOOKAHEAD] = {name: t.clone() for name, t in now.items()}
        if not isinstance(event, Step):
            return
        looks = training.step % every == 0
        if looks:
            memory[LOOKAHEAD] = _owned(memory[LOOKAHEAD], now, at(training.step))
        if looks or training.step == last:
            training.state = _moved(training.state, memory[LOOKAHEAD])

    return callback


def _moved(state: TrainState, to: Params) -> TrainState:
    """Return a state with copies of these parameters and buffers, but for counters."""
    params = {name: to[f"params/{name}"].clone() for name in state.params}
    buffers = {
        name: to[f"buffers/{name}"].clone() if own.is_floating_point() else own
        for name, own in state.buffers.items()
    }
    return state._replace(params=params, buffers=buffers)


def swad(
    metric: str, *, converge: int = 3, overfit: int = 6, tolerance: float = 1.3
) -> Callback:
    """Average the weights of all steps in the valley of a validation loss (SWAD).

    mean over the epochs first to last of the mean weights of their steps

    The first is the first epoch whose loss is the least of `converge` from it on. Of these
    losses the mean, times `tolerance`, is the bar: the last is the last epoch that is not
    above it before `overfit` in a row are, which end the run. `swad_of` gives the average,
    as that of `training.memory["swad"]` tells. Batch statistics are not averaged: take them
    anew by `samfn.reestimated`. What may still count is kept by epochs, at most
    `converge` or `overfit` of them.

    Args:
        metric: name in `training.row` of the loss, lower is better; not of what trains.
        converge: epochs, at least 1.
        overfit: epochs, at least 1.
        tolerance: at least 1.

    Source:
        Cha et al., 2021, arXiv:2102.08604, algorithm 1; numbers as in
        github.com/khanrc/swad, where an epoch is what lies between two evaluations. Its
        code also averages up to two epochs before the first, where they are not above the
        bar, and then the first twice; of a valley that it finds before `overfit` epochs
        have passed, it counts some several times. Here each of the paper's counts once.
    """
    checks.require_count("converge", converge)
    checks.require_count("overfit", overfit)
    if not tolerance >= 1:
        raise ValueError(f"tolerance must be at least 1, got {tolerance}")

    def close(training: Training, kept: dict[str, Any]) -> None:
        """Let an epoch wait until a loss tells that it is in the valley."""
        memory, waiting = training.memory, kept["waiting"]
        loss = _told(training, metric, SWAD)
        if kept["bar"] is None and waiting and not loss >= waiting[0]:
            waiting.clear()  # None before a new least begins the valley.
        if kept["bar"] is None and not math.isfinite(loss):
            return
        waiting.append(loss)
        memory[f"{SWAD}_{len(waiting)}"] = memory.pop(EPOCH)
        if kept["bar"] is None and len(waiting) == converge:
            kept["bar"] = tolerance * sum(waiting) / converge
            kept["first"] = training.epoch - converge + 1
        if kept["bar"] is not None:
            _take(training, kept)
            kept["over"] = len(waiting) >= overfit

    def callback(event: Event) -> None:
        training = event.training
        fresh: dict[str, Any] = {"first": None, "last": None, "epochs": 0, "steps": 0}
        fresh |= {"waiting": [], "bar": None, "over": False}
        kept = training.memory.setdefault(SWAD, fresh)
        if isinstance(event, Step):
            now = _together(training.state._replace(buffers={}))
            _add(training, EPOCH, now, kept["steps"])
            kept["steps"] += 1
        elif isinstance(event, Epoch):
            close(training, kept)
            kept["steps"] = 0
        if kept["over"]:  # Also of a run that ended so, and is resumed.
            training.stop = f"{metric} is above the valley for {overfit} epochs"

    return callback


def _take(training: Training, kept: dict[str, Any]) -> None:
    """Average those of the waiting epochs that a loss below the bar follows, or is of."""
    memory, waiting = training.memory, kept["waiting"]
    inside = [place for place, loss in enumerate(waiting, 1) if loss <= kept["bar"]]
    taken = max(inside, default=0)
    for place in range(1, taken + 1):
        _add(training, AVERAGE, memory.pop(f"{SWAD}_{place}"), kept["epochs"])
        kept["epochs"] += 1
        kept["last"] = kept["first"] + kept["epochs"] - 1
    del waiting[:taken]
    for place in range(1, len(waiting) + 1):
        if taken:
            memory[f"{SWAD}_{place}"] = memory.pop(f"{SWAD}_{place + taken}")


def _add(training: Training, name: str, new: Params, count: int) -> None:
    """Add to a running mean of so many mappings, in memory of its own."""
    mean, memory = training.memory.get(name), training.memory
    if not count or mean is None:
        memory[name] = {key: leaf.clone() for key, leaf in new.items()}
    else:
        memory[name] = _owned(mean, new, count / (count + 1))


def swad_of(training: Training) -> dict[str, Tensor]:
    """Return the parameters that `swad` averaged; before a valley, those of the state."""
    average = training.memory.get(AVERAGE) or _together(training.state)
    return {name: average[f"params/{name}"] for name in training.state.params}


def early_stopping(metric: str, patience: int, *, higher: bool = True) -> Callback:
    """End the run after `patience` epochs without a new best value in `training.row`.

    Args:
        metric: name in the row.
        patience: epochs, at least 1. An equal value is no new best, and neither is NaN.
        higher: whether higher is better.
    """
    checks.require_count("patience", patience)

    def callback(event: Event) -> None:
        training = event.training
        best, waited = training.memory.get(PATIENCE, [None, 0])
        if isinstance(event, Epoch):
            value = _told(training, metric, PATIENCE) * (1 if higher else -1)
            better = value > best if best is not None else not math.isnan(value)
            best, waited = (value, 0) if better else (best, waited + 1)
            training.memory[PATIENCE] = [best, waited]
        if waited >= patience:  # Also of a run that ended so, and is resumed.
            training.stop = f"no better {metric} for {patience} epochs"

    return callback


def finite(in_a_row: int = 50, *, every: int = 16) -> Callback:
    """Raise `NonFiniteError` where so many steps in a row were skipped, also between looks.

    Args:
        in_a_row: steps, at least 1.
        every: steps of an epoch between two looks, each of which makes a GPU wait. The
            last step is looked at too.
    """
    checks.require_count("in_a_row", in_a_row)
    checks.require_count("every", every)
    worst: Tensor | None = None  # since the last look

    def callback(event: Event) -> None:
        nonlocal worst
        training, now = event.training, event.training.state.skipped_in_a_row
        worst = now.clone() if worst is None else torch.maximum(worst, now)
        due = training.batch % every == 0 or training.batch == training.batches
        if isinstance(event, Evaluation) or (isinstance(event, Step) and due):
            state = training.state._replace(skipped_in_a_row=worst)
            worst = None
            require_finite(state, in_a_row=in_a_row)

    return callback


class Store(Protocol):
    """Where checkpoints go: `Checkpoints`, or what writes with them."""

    def save(self, state: TrainState, **about: Any) -> Any:
        """As `Checkpoints.save`."""


def saving(
    checkpoints: Store,
    *,
    score: str | Mapping[str, str] | None = None,
    every: int | None = None,
    **metadata: Any,
) -> Callback:
    """Write a checkpoint after every epoch, with all that `resume` needs.

    In the middle of an epoch, one is written where `training.save` or `training.stop` asks
    for it. Callbacks that set these or change `training.memory` come before this one, so
    that what they did in the same event is saved. Of several ranks, whose states must be
    the same, the first writes; of states of DTensors, all do.

    Args:
        checkpoints: where to, and how many stay.
        score: name in `training.row` of what the best are chosen by, higher is better; or
            several, by the names that `Checkpoints.best` knows them by.
        every: steps after which one is written besides, in the middle of an epoch.
        metadata: goes along, as in `samfn.save`.
    """
    columns = {SCORE: score} if isinstance(score, str) else score or {}

    def callback(event: Event) -> None:
        training, ended = event.training, isinstance(event, Epoch)
        last = training.batch == training.batches  # Then that of the epoch comes soon.
        regular = every is not None and training.step % every == 0 and not last
        asked = isinstance(event, Step) and (training.save or regular)
        if isinstance(event, Start) or not (ended or asked or training.stop):
            return
        training.save = False
        kept = to_metadata(training)
        distributed.require_alike(training.state)
        if distributed.rank() == distributed.FIRST or _is_sharded(training.state):
            named = columns.items() if ended else ()
            scores = {
                name: float(_told(training, column, "saving")) for name, column in named
            }
            checkpoints.save(training.state, score=scores or None, **kept, **metadata)

    return callback


def resume(checkpoints: Checkpoints, training: Training) -> bool:
    """Go on where the newest checkpoint that is whole was written, if there is one.

    Args:
        checkpoints: where `saving` wrote.
        training: as for a new run; changed.

    Returns:
        Whether there was one.
    """
    found = agreed(checkpoints.latest, training.state)
    if found is not None:
        vars(training).update(vars(from_metadata(found.state, found.metadata)))
    return found is not None


def agreed(find: Callable[[TrainState], Found | None], like: TrainState) -> Found | None:
    """Read the same checkpoint on all ranks: the one that `find` gives on the first.

    Only there may it set damaged ones aside, as `Checkpoints.latest` does. Of a state
    of DTensors each rank reads its own parts.
    """
    if _is_sharded(like):
        return find(like)
    first = distributed.rank() == distributed.FIRST
    found = find(like) if first else None
    path = distributed.from_first(found and str(found.path))
    if first or path is None:
        return found
    return Found(Path(path), *restore(path, like))


def to_metadata(training: Training) -> dict[str, Any]:
    """Return what a checkpoint must hold of a run beside its state."""
    place = {name: getattr(training, name) for name in ("step", "epoch", "batch")}
    kept = {
        f"{MEMORY}{name}": value() if callable(value) else value
        for name, value in training.memory.items()
    }
    return {"progress": place, "row": training.row, **kept}


def from_metadata(state: TrainState, metadata: dict[str, Any]) -> Training:
    """Return a run where it stood, from a state and what `to_metadata` said.

    Raises:
        KeyError, TypeError: the metadata are not those of a run.
    """
    place, like = metadata["progress"], _together(state)
    memory = {
        name.removeprefix(MEMORY): _placed(value, state.step, like)
        for name, value in metadata.items()
        if name.startswith(MEMORY)
    }
    return Training(
        state=state,
        step=int(state.step),
        epoch=place["epoch"],
        batch=place["batch"],
        memory=memory,
        row=metadata.get("row", {}),
    )


def _placed(value: Any, usual: Tensor, like: Params) -> Any:
    """Put tensors where the state is, those of its names with its strides too.

    A file holds no strides, and a convolution rounds differently with others.
    """
    if isinstance(value, dict):
        return {name: _placed(v, like.get(name, usual), like) for name, v in value.items()}
    if isinstance(value, Tensor) and value.shape == usual.shape:
        return torch.empty_like(usual, dtype=value.dtype).copy_(value)
    return value.to(usual.device) if isinstance(value, Tensor) else value


def _told(training: Training, metric: str, what: str) -> float:
    """Return what is known of an epoch.

    Raises:
        ValueError: nothing has that name.
    """
    if metric not in training.row:
        raise ValueError(
            f"{what}: expected {metric!r} in the row of the epoch, got"
            f" {checks.some([*training.row])}: let `evaluate` return it"
        )
    value: float = training.row[metric]
    return value


def _is_sharded(state: TrainState) -> bool:
    return tree.any_sharded(state.params.values())


def _together(state: TrainState) -> dict[str, Tensor]:
    named = {f"params/{name}": tensor for name, tensor in state.params.items()}
    return named | {f"buffers/{name}": tensor for name, tensor in state.buffers.items()}


def _owned(average: Params, now: Params, decay: float) -> dict[str, Tensor]:
    """Return the moved average in memory of its own, which a compiled step never writes."""
    moved = moving_average(average, now, decay)
    return {name: t.clone() if t is now[name] else t for name, t in moved.items()}
