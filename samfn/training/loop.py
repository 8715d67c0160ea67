"""A training engine that stays small: epochs, evaluation, and callbacks that decide.

`run` goes through epochs and batches; who writes these two loops out tells the callbacks as
it does. What happens beside, from a log to an average of the weights, is a callback: a
function of an event, told in turn. What callbacks must not forget they keep in
`Training.memory`, which a checkpoint takes along, so that a run that goes on from there
is the run that never stopped.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samfn.gradient import evaluate as evaluate_loss
from samfn.loss import LossFn, as_loss
from samfn.step import Metrics, TrainState
from samfn.support import checks
from samfn.support.batches import length_of, pair_of
from samfn.tree import Batch, Params

Update = Callable[..., tuple[TrainState, Metrics]]
"""(state, batch, rho=, lr=) -> (state, metrics), as `sam_update` with its options given."""
Measure = Callable[[Any, Batch], Tensor]
"""(outputs, batch) -> a value for each example, shape (examples,)."""


@dataclass
class Training:
    """Where a run stands: the one thing that engine and callbacks change."""

    state: TrainState
    step: int = 0
    """Updates so far, those skipped too: `state.step`, which would make a GPU wait."""
    epoch: int = 0
    """Epochs that are finished, with their evaluation."""
    batch: int = 0
    """Batches of the next epoch that are finished."""
    batches: int = 0
    """Batches of that epoch in all; 0 where that is not known."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What callbacks keep: JSON values, tensors, and mappings of names to tensors; or a
    function that returns one of these when a checkpoint is written."""
    row: dict[str, Any] = field(default_factory=dict)
    """What is known of the epoch that was finished last."""
    save: bool = False
    """Set it to have a checkpoint written after this step."""
    stop: str | None = None
    """Set it to end the run before its budget is spent: why."""
    untold: bool = False
    """Whether there is something that not all callbacks were told of, as where Ctrl-C came
    in the middle. `run` refuses to go on then: what callbacks average or count would lack
    it."""

    def count(self, state: TrainState) -> None:
        """Count a step that led to `state`; the callbacks are to be told."""
        self.untold = True
        self.state, self.step, self.batch = state, self.step + 1, self.batch + 1


class Start(NamedTuple):
    """An epoch begins, or goes on where the run was stopped."""

    training: Training


class Step(NamedTuple):
    """An update was taken."""

    training: Training
    batch: Batch
    metrics: Metrics


class Evaluation(NamedTuple):
    """All batches of an epoch are taken; callbacks add what they find to its row."""

    training: Training
    row: dict[str, Any]
    """Becomes `training.row`, unless a callback sets `training.stop` before."""


class Epoch(NamedTuple):
    """An epoch is finished and evaluated; `training.row` is complete."""

    training: Training


Event = Start | Step | Evaluation | Epoch
Callback = Callable[[Event], None]
Dial = float | Callable[[Training], float]
"""A number, or what it is at a point of the run, as lambda t: schedule(t.step)."""


def run(
    training: Training,
    *,
    batches: Callable[[Training], Iterable[Batch]],
    update: Update,
    rho: Dial | None = None,
    lr: Dial | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    evaluate: Callable[[Training], Mapping[str, Any]] = lambda training: {},
    callbacks: Sequence[Callback] = (),
) -> Training:
    """Train until the budget is spent, or a callback asks to stop.

    An epoch: update on every batch; evaluate; tell the callbacks. An epoch that ends early,
    since the steps are spent, is evaluated too; one that a callback stops is not counted.

    Args:
        training: where the run starts or goes on; changed. One that was stopped stays as it
            is, with a warning.
        batches: -> what is left of the epoch that `training` is in. The same order every
            time it is asked at one point, or runs that go on differ from those that did
            not stop. With a length, callbacks know which step is the last.
        update: takes a step.
        rho: radius of the perturbation. None leaves it to `update`, and so does lr.
        lr: learning rate.
        epochs: budget, counted from the start of the run.
        steps: budget in updates, counted likewise. With both, what is spent first ends it.
        evaluate: -> what goes into `training.row` beside the epoch and the step.
        callbacks: are told of every event, in their order.

    Returns:
        `training`.

    Raises:
        ValueError: there is no budget in whole numbers, an epoch has no batches, or what
            `evaluate` returns holds "epoch" or "step".
        RuntimeError: the run was left while its callbacks were told of something.
    """
    if training.untold:
        raise RuntimeError(
            f"this run was left while its callbacks were told of step {training.step}, and"
            " some were not: go on from a checkpoint, by callbacks.resume, or begin anew;"
            " to go on as it is, set training.untold = False"
        )
    if epochs is None and steps is None:
        raise ValueError("expected a budget of epochs, steps or both, got none")
    for name, budget in {"epochs": epochs, "steps": steps}.items():
        if budget is not None:
            checks.require_count(name, budget, least=0)
    if training.stop and not _spent(training, epochs, steps):
        text = f"the run has ended: {training.stop}. training.stop = None lets it go on"
        warnings.warn(text, stacklevel=2)
    both = {"rho": rho, "lr": lr}
    given = {name: dial for name, dial in both.items() if dial is not None}
    while not training.stop and not _spent(training, epochs, steps):
        left = batches(training)
        training.batches = training.batch + len(left) if isinstance(left, Sized) else 0
        tell(callbacks, Start(training))
        for batch in () if training.stop else left:
            dials = {
                n: dial(training) if callable(dial) else dial for n, dial in given.items()
            }
            state, metrics = update(training.state, batch, **dials)
            training.count(state)
            tell(callbacks, Step(training, batch, metrics))
            if training.stop or _spent(training, None, steps):
                break
        if training.stop:
            break
        if not training.batch:
            raise ValueError(f"epoch {training.epoch + 1} has no batches")
        end_epoch(training, callbacks, evaluate(training))
    return training


def end_epoch(
    training: Training,
    callbacks: Sequence[Callback],
    found: Mapping[str, Any] | None = None,
) -> None:
    """Have an epoch evaluated, whose batches are all taken, and count it.

    The callbacks are told `Evaluation`, with a row that begins with what is `found`; and
    `Epoch`, unless one of them stopped the run.

    Raises:
        ValueError: "epoch" or "step" is among what is `found`.
    """
    row = {"epoch": training.epoch + 1, "step": training.step}
    if taken := row.keys() & (found or {}).keys():
        came = checks.some(sorted(taken))
        raise ValueError(f"evaluate returned {came}: the engine's own")
    row |= found or {}
    tell(callbacks, Evaluation(training, row))
    if not training.stop:
        training.untold = True
        training.epoch, training.batch, training.row = training.epoch + 1, 0, row
        tell(callbacks, Epoch(training))


@torch.no_grad()
def evaluate(
    params: Params,
    buffers: Params,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFn,
    measures: Mapping[str, Measure] | None = None,
) -> dict[str, float]:
    """Return the mean loss over all examples, as "loss", and the mean of each measure.

    The sums stay on the device until the end. Where the criterion leaves examples out or
    weighs them, as by `ignore_index`, the mean loss is that of all batches as one, and an
    example that it leaves out counts in no measure.

    Args:
        params: where.
        buffers: what the loss function reads beside them; what it makes of them is dropped.
        batches: of any sizes.
        loss_fn: (params, buffers, batch) -> the mean loss of a batch, or with `Aux`. With
            `supervised(model, criterion)`, call `model.eval()` before and `model.train()`
            after.
        measures: by name, (outputs, batch) -> a value for each example, as `accuracy`.

    Raises:
        ValueError: there are no batches, no example in them counts in the loss, a measure
            is called "loss", or does not give a value for each example.
    """
    if "loss" in (measures or {}):
        raise ValueError('a measure is called "loss": that is the name of the mean loss')
    sums: dict[str, Tensor] = {}
    over: dict[str, Tensor] = {}
    known = as_loss(loss_fn)
    for batch in batches:
        seen = evaluate_loss(loss_fn, params, buffers, batch, wrt=())
        loss = seen.loss.double()
        part = torch.as_tensor(known.weigh(batch), dtype=torch.float64, device=loss.device)
        found = {"loss": torch.where(part > 0, part * loss, 0.0)}
        counted = {"loss": part}
        counts = known.counts(batch) if measures else None
        for name, measure in (measures or {}).items():
            values = _of_each(name, measure(seen.outputs, batch), batch).double()
            mask = torch.ones_like(values) if counts is None else counts.to(values)
            found[name] = torch.where(mask > 0, values, 0.0).sum()
            counted[name] = mask.sum()
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        over = {name: over.get(name, 0) + value for name, value in counted.items()}
    if not sums:
        raise ValueError("expected at least one batch, got none")
    if not over["loss"]:  # It would be NaN, as of a network that diverged.
        raise ValueError("expected an example that counts in the loss, got none")
    return {name: float(total / over[name]) for name, total in sums.items()}


def _of_each(name: str, values: Any, batch: Batch) -> Tensor:
    expected, came = (length_of(batch),), getattr(values, "shape", type(values).__name__)
    if not isinstance(values, Tensor) or came != expected:
        raise ValueError(
            f"the measure {name!r} must give a value for each example, shape {expected},"
            f" got {came if isinstance(came, str) else tuple(came)}"
        )
    return values


def right(outputs: Tensor, classes: Tensor) -> Tensor:
    """Return for each example whether its class has the largest score, and a finite one.

    Args:
        outputs: scores of the classes, shape (examples, classes).
        classes: the right ones, shape (examples,).
    """
    score, found = outputs.max(1)
    return (found == classes) & score.isfinite()


def accuracy(outputs: Tensor, batch: Batch) -> Tensor:
    """Return for each example 100 where the class is right, else 0; so the mean is in %.

    A largest score that is not finite is wrong.

    Args:
        outputs: scores of the classes, shape (examples, classes), of two classes or more.
        batch: (inputs, targets); targets are classes, shape (examples,) or (examples, 1),
            or their probabilities, shape (examples, classes).

    Raises:
        ValueError: outputs or targets have other shapes, as a single score has, of which
            this cannot know where the classes part.
    """
    _, targets = pair_of(batch)
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise ValueError(
            "accuracy expects scores and (inputs, targets), got a"
            f" {type(outputs).__name__} and a {type(targets).__name__}: give a measure of"
            " your own, as lambda outputs, batch: accuracy(outputs.logits, (None,"
            ' batch["labels"]))'
        )
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(
            "accuracy expects scores of shape (examples, classes), of two classes or more,"
            f" got {tuple(outputs.shape)}: for one score give a measure of your own, as"
            " lambda outputs, batch: 100.0 * ((outputs[:, 0] > 0) == batch[1])"
        )
    examples = len(outputs)
    if targets.shape == outputs.shape:
        classes = targets.argmax(1)
    elif tuple(targets.shape) in ((examples,), (examples, 1)):
        classes = targets.view(examples)
    else:
        raise ValueError(
            f"accuracy expects targets of shape ({examples},) or {tuple(outputs.shape)},"
            f" got {tuple(targets.shape)}"
        )
    return 100.0 * right(outputs, classes)


def tell(callbacks: Sequence[Callback], event: Event) -> None:
    """Call every callback, in their order."""
    event.training.untold = True
    for callback in callbacks:
        callback(event)
    event.training.untold = False


def _spent(training: Training, epochs: int | None, steps: int | None) -> bool:
    by_epochs = epochs is not None and training.epoch >= epochs
    return by_epochs or (steps is not None and training.step >= steps)
