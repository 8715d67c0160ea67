"""Selection of images: an epoch skips easy ones, or prefers hard ones.

A scan, at the end of every few epochs, looks at all images without augmentation. What it
found is in `Training.memory`, and what an epoch trains on is a function of that, of the
seed and of the epoch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import samfn
from recipes.settings.config import Config
from recipes.train.batches import clean, own
from recipes.train.build import Task, generator
from samfn import distributed
from samfn.gradient import evaluate
from samfn.measure import per_example
from samfn.training import sampling
from samfn.training.loop import Training
from samfn.training.sampling import Report

COUNTS, SCORES = "easy_counts", "scores"  # tensors in `Training.memory`


def chosen(task: Task, training: Training) -> Tensor:
    """Return the indices of the images that an epoch trains on, ascending.

    All are it before the first scan, and where fewer would be left than make a batch.
    """
    how, memory = task.config.selection, training.memory
    everyone = torch.arange(len(task.train_labels))
    source = generator(task.config.seed, "selection", training.epoch)
    # A run may be resumed with another selection than it had.
    if how.select == "easy-skipped" and COUNTS in memory:
        counts, limit = memory[COUNTS].cpu(), how.easy_scans
        found = sampling.kept(counts, source, limit=limit, replay=how.easy_replay)
    elif how.select in ("loss", "sharpness") and SCORES in memory:
        found = sampling.draw(memory[SCORES].cpu(), how.select_share, source).sort().values
    else:
        return everyone
    return found if len(found) >= task.config.batch_size else everyone


def is_due(config: Config, epoch: int) -> bool:
    """Return whether a scan ends an epoch, counted from 0; the last one needs none."""
    how, done = config.selection, epoch + 1
    return how.select != "all" and done % how.select_every == 0 and done < config.epochs


def scan(
    task: Task,
    memory: Mapping[str, Any],
    state: samfn.TrainState,
    rho: float,
    stopping: Callable[[], bool],
) -> dict[str, Tensor]:
    """Look at all training images, each rank at its own; return what the run remembers.

    Args:
        task: what is trained; its model is in evaluation mode.
        memory: of the run so far.
        state: the weights to look with.
        rho: radius of the perturbation that sharpness is measured at.
        stopping: is asked before each batch.

    Raises:
        StopError: `stopping` said so.
    """
    how, given = task.config.selection, (state.params, state.buffers)
    rows = own(len(task.train_labels))
    images = clean(task, task.train_images[rows], task.train_labels[rows], stopping)
    if how.select == "loss":
        losses = per_example.losses(*given, images, loss_fn=task.eval_fn)
        return {SCORES: distributed.concatenated(losses)}
    if how.select == "sharpness":
        grown = torch.cat([*_sharpness(task, state, images, rho)])
        return {SCORES: distributed.concatenated(grown)}
    confidence = how.easy_confidence
    easy = per_example.easy(*given, images, loss_fn=task.eval_fn, confidence=confidence)
    easy = distributed.concatenated(easy)
    counts = memory.get(COUNTS, sampling.init(len(easy), task.device))
    return {COUNTS: sampling.update(counts, easy, limit=how.easy_scans)}


def summarise(task: Task, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what skipping spared a run, in words; rows are those of its metrics.

    Epochs from before a run was resumed with a selection have all images.
    """
    report = Report(len(task.train_labels), task.steps_per_epoch)
    before, training, scanning = 0, 0.0, 0.0
    for row in rows:
        trained = row.get("trained_images", report.examples)
        report = report.after(trained, row["step"] - before)
        before, training = row["step"], training + row["seconds"]
        scanning += row.get("scan_seconds", 0.0)
    saved = report.steps_saved * training / max(1, before)
    return (
        f"{report.skipped_share:.1%} of the images and {report.steps_saved:,} steps, about"
        f" {saved:.1f} s; scans took {scanning:.1f} s"
    )


def _sharpness(
    task: Task, state: samfn.TrainState, batches: Iterable[Any], rho: float
) -> Iterator[Tensor]:
    """Yield by how much the loss of each image grows from w to w + e, e of its batch."""
    params, buffers = state.params, state.buffers
    for batch in batches:
        seen = evaluate(task.eval_fn, params, buffers, batch)
        there = samfn.perturb(params, seen.grads, rho)
        low, high = (
            per_example.losses(where, buffers, [batch], loss_fn=task.eval_fn)
            for where in (params, there)
        )
        yield high - low
