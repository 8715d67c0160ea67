"""Pictures of a run: the one module that knows matplotlib."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

from recipes.rundir import Row

matplotlib.use("agg")  # Draw into files, also where there is no screen.

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY = "#2f6fb0", "#d9742b", "#8a8a8a"
SPLITS = {
    "train": ("train", GREY),
    "test": ("test", BLUE),
    "ema_test": ("test, average", "#3f8f4f"),
    "validation": ("validation", ORANGE),
    "ema_validation": ("validation, average", "#8b5fb0"),
}
COLOURS = (ORANGE, BLUE, "#3f8f4f", "#8b5fb0", GREY)


def curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw loss and accuracy over the epochs, of training and test."""
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 40 else None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for split, (name, colour) in SPLITS.items():
            if f"{split}_{what}" in rows[0]:
                values = [row[f"{split}_{what}"] for row in rows]
                label = f"{name}: {values[-1]:.4g}"
                axes.plot(epochs, values, color=colour, label=label, marker=marker, ms=3)
        axes.set_xlabel("epoch")
        axes.legend(frameon=False, title="last epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel("loss")
    right.set_ylabel("accuracy (%)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def comparison(
    series: Mapping[str, Sequence[Sequence[float]]], path: Path, title: str
) -> None:
    """Draw test accuracy over the epochs: one colour a label, one thin line a seed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for colour, (label, runs) in zip(cycle(COLOURS), series.items(), strict=False):
        epochs = range(1, len(runs[0]) + 1)
        mean = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        for values in runs:
            axes.plot(epochs, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(
            epochs, mean, color=colour, linewidth=2, label=f"{label}: {mean[-1]:.1f} %"
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, title="last epoch, mean")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def ranking(
    last: Mapping[str, Sequence[float]],
    best: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
) -> None:
    """Draw test accuracy of the last and the best epoch: one row a label, by the last."""
    labels = sorted(last, key=lambda label: sum(last[label]))
    figure, axes = plt.subplots(
        figsize=(7.2, 1.2 + 0.28 * len(labels)), layout="constrained"
    )
    kinds = (("best epoch", best, GREY, "D", "none"), ("last epoch", last, BLUE, "o", BLUE))
    for name, values, colour, marker, fill in kinds:
        means = [sum(values[label]) / len(values[label]) for label in labels]
        ends = [
            [mean - min(values[label]) for label, mean in zip(labels, means, strict=True)],
            [max(values[label]) - mean for label, mean in zip(labels, means, strict=True)],
        ]
        axes.errorbar(
            means,
            range(len(labels)),
            xerr=ends,
            fmt=marker,
            color=colour,
            markerfacecolor=fill,
            markersize=5,
            linewidth=1,
            label=name,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("test accuracy (%), mean, lowest and highest seed")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
