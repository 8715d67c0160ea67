"""The length of a run, predicted from the time that a gradient of a few images takes."""

import time

import torch

import samfn
from recipes.data import augment
from recipes.settings import method_expression
from recipes.train.build import Task, first_perturbed
from samfn import distributed
from samfn.gradient import evaluate

LONG_ENOUGH = 0.15  # seconds that a gradient takes from which the time of a batch is known
FORWARD = 1 / 3  # of the operations of a gradient


def predicted(task: Task, state: samfn.TrainState) -> float:
    """Return about how many seconds a whole run takes, in training and evaluation.

    The step is taken for one that is not compiled, on a CPU, which nothing else uses.

    Args:
        task: what is trained; its model trains, as in a step.
        state: where; the time does not depend on it.
    """
    config, each = task.config, seconds_an_image(task, state)
    steps = config.epochs * task.steps_per_epoch
    perturbing = steps - first_perturbed(task)
    more = (method_expression.gradients(config.method) or 2.0) - 1
    trained = (steps + more * perturbing) * config.batch_size
    splits = {split.name: len(split.labels) for split in (task.chosen_by, task.test)}
    models = 1 if config.average.ema_decay is None else 2
    seen = config.epochs * config.images.views * models * sum(splits.values())
    return each * (trained + FORWARD * seen) / distributed.size()


def seconds_an_image(task: Task, state: samfn.TrainState) -> float:
    """Time the gradient of more and more images; return that of the most, for each."""
    images, labels = (
        tensor[: task.config.batch_size]
        for tensor in (task.train_images, task.train_labels)
    )
    count = 2
    while True:
        some = augment.normalise(images[:count], task.mean, task.std)
        batch = some.contiguous(memory_format=torch.channels_last), labels[:count]
        for _ in range(2):  # The first of a shape makes its kernels.
            started = time.perf_counter()
            evaluate(task.eval_fn, state.params, state.buffers, batch)
            took = time.perf_counter() - started
        if took > LONG_ENOUGH or count >= len(images):
            return took / count
        count = min(4 * count, len(images))
