"""The training loop: a step, the loop over epochs and batches, and an evaluation.

All randomness is a function of the seed and the position, so that a run that stopped
anywhere goes on exactly as if it had not. What happens around the steps is in `callbacks`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

import samfn
from recipes.terminal.console import Display
from recipes.train import selection
from recipes.train.batches import augmented, clean, own
from recipes.train.build import Split, Task, first_perturbed, seed
from recipes.train.compiling import keep_compiled
from samfn import distributed
from samfn.training import loop
from samfn.training.loop import Callback, Start, Step, Training, end_epoch, tell


def fit(task: Task, training: Training, callbacks: Sequence[Callback]) -> None:
    """Train to the last epoch, or until a callback sets `training.stop`.

    `training` is where the run starts or goes on; it is changed.
    """
    config = task.config
    for epoch in range(training.epoch, config.epochs):
        images = selection.chosen(task, training)
        training.batches = len(images) // config.batch_size
        tell(callbacks, Start(training))
        if training.stop:
            return
        for batch in augmented(task, epoch, training.batch, images):
            position, place = training.step, schedule_place(task, training)
            state, metrics = step(task, training.state, position, batch, place)
            training.count(state)
            tell(callbacks, Step(training, batch, metrics))
            if training.stop:
                return
        end_epoch(training, callbacks)
        if training.stop:
            return


def step(
    task: Task,
    state: samfn.TrainState,
    position: int,
    batch: tuple[Tensor, Tensor],
    place: int | None = None,
) -> tuple[samfn.TrainState, samfn.Metrics]:
    """Take the step before which the run has taken `position`, on (images, labels).

    `place` is where in the schedules it is, as `schedule_place` says; None is `position`.
    """
    place = position if place is None else place
    draw_anew(task, position)
    return task.update(state, batch, rho=task.rho(place), lr=task.lr(place))


def draw_anew(task: Task, position: int) -> None:
    """Seed what a step draws, as for dropout; each rank draws for its own images."""
    rank = distributed.rank()
    torch.manual_seed(seed(task.config.seed, "dropout", position, *[rank] * (rank > 0)))


def schedule_place(task: Task, training: Training, back: int = 0) -> int:
    """Return where the next batch, or one `back`, is in schedules that count all images."""
    whole, batch = task.steps_per_epoch, training.batch - back
    return training.epoch * whole + batch * whole // training.batches


def prepare(task: Task, training: Training, display: Display) -> None:
    """Compile the step, where it is to be, by steps whose results are dropped.

    Where SAM begins late, a step with it and one without it are compiled.
    """
    config = task.config
    if config.arithmetic.compile != "yes" or training.epoch >= config.epochs:
        return
    batch = next(augmented(task, training.epoch))
    keep_compiled(display.warn)
    first, end = training.step, config.epochs * task.steps_per_epoch
    ahead = max(first, first_perturbed(task))
    places = {task.rho(p) != 0: p for p in (ahead if ahead < end else first, first)}
    for place in places.values():
        with display.waiting("compiling the training step"):
            step(task, training.state, 0, batch, place)


def evaluate(
    task: Task,
    state: samfn.TrainState,
    split: Split,
    stopping: Callable[[], bool] = lambda: False,
    *,
    alone: bool = False,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy, in percent, on all images of a split.

    Both are of the mean outputs of the views that --views names. Each rank looks at its own
    images, unless this one is `alone` in asking.

    Raises:
        StopError: `stopping`, which is asked before each batch, said so.
    """
    rows = slice(None) if alone else own(len(split.labels))
    labels = split.labels[rows]
    parts = clean(task, split.images[rows], labels, stopping)
    measures = {"accuracy": loop.accuracy}
    with evaluating(task.model):
        found = loop.evaluate(
            state.params, state.buffers, parts, loss_fn=task.views_fn, measures=measures
        )
    if not alone:
        found = distributed.mean(found, weight=len(labels))
    return found["loss"], found["accuracy"]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Let a model evaluate, until the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # Of those that are frozen, none trains.
            module.training = mode
