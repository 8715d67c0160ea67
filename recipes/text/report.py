"""What the banner and the closing summary say of a run."""

from collections.abc import Sequence

from recipes.text.settings import ADAPTER, name
from recipes.text.task import Task
from recipes.train.directory import Row, RunDirectory
from recipes.train.running import late
from samfn import schedules


def perturbed(task: Task) -> str:
    """Return in which steps the weights are perturbed, if not in all or none; else ""."""
    settings = task.settings
    if settings.rho == 0 or settings.sam_last == 1:
        return ""
    return late(schedules.tail_start(task.steps, settings.sam_last), task.steps)


def describe(task: Task) -> dict[str, str]:
    """Return what the banner says of a run."""
    settings, data = task.settings, task.data
    counts = {True: 0, False: 0}
    for parameter_name, parameter in task.model.named_parameters():
        counts["lora_" in parameter_name] += parameter.numel()
    return {
        "text": f"{'source code of Python' if settings.text is None else settings.text},"
        f" {len(data.train):,} sequences of {settings.length} tokens to train on,"
        f" {len(data.test):,} to test on",
        "model": f"{settings.model}, {counts[False]:,} parameters and adapters of rank"
        f" {settings.rank} with {counts[True]:,}",
        "method": name(settings) + (f": {when}" if (when := perturbed(task)) else ""),
        "training": f"{settings.epochs} epochs of {task.steps_per_epoch} steps, batch"
        f" {settings.batch_size}, AdamW, lr {settings.lr:g}",
    }


def summarise(task: Task, run: RunDirectory, rows: Sequence[Row]) -> dict[str, str]:
    """Return what the closing summary says of a run and its epochs."""
    last, best = rows[-1], min(rows, key=lambda row: row["test_loss"])
    each = sum(row["seconds"] for row in rows) / max(1, sum(row["steps"] for row in rows))
    when = {"perturbed": said} if (said := perturbed(task)) else {}
    return {
        "last epoch": f"test loss {last['test_loss']:.4f}, token accuracy"
        f" {last['test_accuracy']:.2f} %",
        "lowest loss": f"test loss {best['test_loss']:.4f} in epoch {best['epoch']}",
        **when,
        "cost": f"{1000 * each:.0f} ms a step, {last['peak_mebibytes']:,.0f} MiB at most",
        "files": str(run.path),
        "adapters": str(run.path / ADAPTER),
        "picture": str(run.curves),
    }
