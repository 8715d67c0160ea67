"""Pictures of training: what a run, or several, did by epoch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from recipes.plots.style import (
    COLOUR_MAP,
    COLOURS,
    DASHES,
    MARKERS,
    MISSING,
    SPLITS,
    save,
    shortened,
)


def curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy over the epochs, of training and test."""
    marker = "o" if len(rows) < 40 else None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for split, (name, colour) in SPLITS.items():
            # A run may have gone on with an average, or without.
            known = {r["epoch"]: r[key] for r in rows if (key := f"{split}_{what}") in r}
            if known:
                values = [*known.values()]
                label = f"{name}: {values[-1]:.4g}"
                axes.plot([*known], values, color=colour, label=label, marker=marker, ms=3)
        axes.set_xlabel("epoch")
        axes.legend(frameon=False, title="last epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel("loss")
    right.set_ylabel("accuracy (%)")
    figure.suptitle(title, fontsize=11)
    save(figure, path)
    plt.close(figure)


def layers(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw what each layer did, epoch by epoch: rows of a monitored run.

    Epochs of other layers than the last one's are left out.
    """
    names = [*rows[-1]["layers"]["weight"]]
    rows = [row for row in rows if row["layers"]["weight"].keys() == {*names}]
    epochs = [row["epoch"] for row in rows]

    def of(what: str) -> Tensor:
        columns = [[row["layers"][what][name] for name in names] for row in rows]
        return torch.tensor(columns, dtype=torch.float64).T

    angle = of("cosine").clamp(-1, 1).acos().rad2deg()
    panels = (
        ("gradient norm", torch.log10(of("gradient"))),
        ("update / weight, norms", torch.log10(of("update") / of("weight"))),
        ("angle of clean and perturbed gradient (°)", angle),
    )
    height = 1.6 + 0.13 * len(names)
    figure, grid = plt.subplots(
        1, 3, figsize=(12, height), layout="constrained", sharey=True
    )
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
    for axes, (what, values) in zip(grid, panels, strict=True):
        shown = values.where(values.isfinite(), math.nan)
        axes.set_facecolor(MISSING)
        image = axes.imshow(
            shown.numpy(),
            aspect="auto",
            extent=extent,
            cmap=COLOUR_MAP,
            interpolation="nearest",
        )
        power = None if values is angle else lambda x, _: f"{10.0**x:.2g}"
        figure.colorbar(image, ax=axes, format=power).ax.tick_params(labelsize=7)
        axes.set_title(what, fontsize=9)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].set_yticks(range(len(names)), names, fontsize=6)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
    plt.close(figure)


class Curve(NamedTuple):
    """Measurements of a run at the end of each epoch."""

    x: Mapping[str, Sequence[float]]
    """Abscissas by the label of their axis."""
    y: Mapping[str, Sequence[float]]
    """Ordinates by the label of their axis."""


def side_by_side(curves: Mapping[str, Sequence[Curve]], path: Path, title: str) -> None:
    """Draw runs against each other: a row for each y, a column for each x.

    A name has one colour, dash and marker. Runs of one name are thin lines, and their mean,
    as far as all of them go, is a thick one.

    Args:
        curves: runs by name, each with one epoch at least; all have the same axes.
        path: of the picture.
        title: above all.
    """
    (first, *_), *_ = curves.values()
    size = 1 + 3.9 * len(first.x), 1.2 + 2.9 * len(first.y) + 0.2 * len(curves)
    figure, grid = plt.subplots(
        len(first.y),
        len(first.x),
        figsize=size,
        layout="constrained",
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for axes, y in zip(grid, first.y, strict=True):
        for place, x in zip(axes, first.x, strict=True):
            for number, (name, runs) in enumerate(curves.items()):
                _draw_runs(place, number, shortened(name), [(r.x[x], r.y[y]) for r in runs])
            place.grid(alpha=0.25)
            place.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(y)
    for place, x in zip(grid[-1], first.x, strict=True):
        place.set_xlabel(x)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, frameon=False, handlelength=4
    )
    figure.suptitle(shortened(title, 90), fontsize=11)
    save(figure, path)
    plt.close(figure)


def _draw_runs(
    axes: Axes,
    number: int,
    name: str,
    runs: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> None:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    epochs = min(len(x) for x, _ in runs)
    if len(runs) > 1:
        for x, y in runs:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
    x, y = (
        [sum(values) / len(runs) for values in zip(*(r[i] for r in runs), strict=False)]
        for i in (0, 1)
    )
    every = max(1, epochs // 6)
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=dash,
        linewidth=1.8,
        marker=MARKERS[number % len(MARKERS)],
        markersize=4.5,
        # Not all at the same places, so that none hides another.
        markevery=(min(number, epochs - 1) % every, every),
        label=name,
    )
