"""Pictures of a run: the one module that knows matplotlib."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor

from samfn.measure.landscape import Line, Plane

matplotlib.use("agg")  # Draw into files, also where there is no screen.

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator

BLUE, ORANGE, GREY = "#2f6fb0", "#d9742b", "#8a8a8a"
SPLITS = {
    "train": ("train", GREY),
    "test": ("test", BLUE),
    "ema_test": ("test, average", "#3f8f4f"),
    "validation": ("validation", ORANGE),
    "ema_validation": ("validation, average", "#8b5fb0"),
}
COLOURS = (ORANGE, BLUE, "#3f8f4f", "#8b5fb0", GREY)
Style = tuple[str, str]  # colour and marker
# Colours of Okabe and Ito, which those who see few colours tell apart.
STYLES: tuple[Style, ...] = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#56b4e9", "v"),
    ("#e69f00", "P"),
    ("#000000", "X"),
)
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"  # for those who see few colours
MISSING = "#dddddd"  # what is not finite
COLOUR_MAP = "viridis"  # for those, too, who see few colours
WIDE = 30  # Losses that differ by more than this factor are drawn by their logarithm.


def curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
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


class Series(NamedTuple):
    """Accuracies of a method in percent, at each place one for each seed."""

    last: Mapping[float, Sequence[float]]
    """Of the last epoch, by rho or share of noise."""
    best: Mapping[float, Sequence[float]]
    """Of the best epoch."""


def sweep(
    series: Mapping[str, Series],
    base: Series | None,
    path: Path,
    title: str,
) -> None:
    """Draw test accuracy against rho: last epoch on the left, best epoch on the right.

    Args:
        series: by method; rho is above 0, since the axis is logarithmic.
        base: at a rho of 0; drawn as a band across.
        path: of the picture.
        title: above all.
    """
    figure, pair = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True)
    rhos = sorted({rho for one in series.values() for rho in one.last})
    for index, (axes, name) in enumerate(zip(pair, Series._fields, strict=True)):
        if base is not None and base[index][0.0]:
            mean, deviation = _spread(base[index][0.0])
            axes.axhline(mean, color=GREY, linestyle=":", label="ρ 0")
            axes.axhspan(mean - deviation, mean + deviation, color=GREY, alpha=0.2, lw=0)
        for style, (label, one) in zip(cycle(STYLES), series.items(), strict=False):
            _error_bars(axes, one[index], style, label=_text(label))
        axes.set_xscale("log")
        axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("ρ, the radius of the perturbation")
        axes.set_title(f"{name} epoch", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    pair[0].set_ylabel("test accuracy (%)")
    pair[0].legend(frameon=False, fontsize=9)
    figure.suptitle(_text(title, 90), fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label_noise(series: Mapping[str, Series], path: Path, title: str) -> None:
    """Draw test accuracy against the share of wrong labels, of last and best epoch.

    Args:
        series: by method, at shares in 0 to 1.
        path: of the picture.
        title: above all.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for style, (label, one) in zip(cycle(STYLES), series.items(), strict=False):
        _error_bars(axes, one.last, style, label=_text(label))
        _error_bars(axes, one.best, style, linestyle="--", markerfacecolor="white")
    shares = sorted({share for one in series.values() for share in one.last})
    axes.set_xticks(shares, [f"{100 * share:g}" for share in shares])
    axes.set_xlabel("training labels that are wrong (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.plot([], [], color=GREY, label="last epoch")
    axes.plot([], [], color=GREY, linestyle="--", label="best epoch")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_text(title, 80), fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _error_bars(
    axes: Axes, points: Mapping[float, Sequence[float]], style: Style, **options: Any
) -> None:
    """Draw means and standard deviations, where there is any value."""
    at = sorted(where for where, values in points.items() if values)
    spreads = [_spread(points[where]) for where in at]
    means, deviations = [mean for mean, _ in spreads], [width for _, width in spreads]
    colour, marker = style
    options = {"markersize": 5, "linewidth": 1.5, "capsize": 3} | options
    axes.errorbar(at, means, yerr=deviations, color=colour, marker=marker, **options)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation; of one value, 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation


def layers(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw what each layer did, epoch by epoch: rows of a monitored run."""
    epochs = [row["epoch"] for row in rows]
    names = [*rows[0]["layers"]["weight"]]

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
    figure.savefig(path, dpi=150)
    plt.close(figure)


def surfaces(
    planes: Mapping[str, Plane], notes: Mapping[str, str], path: Path, title: str
) -> None:
    """Draw loss landscapes side by side, as contours above and surfaces below.

    All have one scale of colours and one of heights, logarithmic where losses differ
    widely; what is not finite stays empty.

    Args:
        planes: by the name of what is drawn.
        notes: a line for each of the names.
        path: of the picture.
        title: above all.
    """
    scale, count = Scale.of([plane.loss for plane in planes.values()]), len(planes)
    # Beside axes in three dimensions it leaves too little for labels on the left.
    layout = ConstrainedLayoutEngine(rect=(0.03, 0, 0.96, 1))
    figure = plt.figure(figsize=(1.6 + 3.5 * count, 7.2), layout=layout)
    upper = [figure.add_subplot(2, count, 1 + i) for i in range(count)]
    for i, (axes, (name, plane)) in enumerate(zip(upper, planes.items(), strict=True)):
        fill = _contours(axes, plane, scale)
        grey = "" if plane.loss.isfinite().all() else "; grey: not finite"
        axes.set_title(f"{_text(name)}\n{notes[name]}{grey}", fontsize=9)
        below = figure.add_subplot(2, count, 1 + count + i, projection="3d")
        _surface(below, plane, scale)
    bar = figure.colorbar(fill, ax=upper, ticks=scale.levels, format=scale.label)
    bar.set_label("loss", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def lines(ascents: Mapping[str, Line], way: Line | None, path: Path, title: str) -> None:
    """Draw the loss along SAM's perturbation, and between two solutions if that is known.

    Args:
        ascents: against rho, by the name of what is drawn.
        way: from the first of them to the second, its loss at 0 to 1.
        path: of the picture.
        title: above all.
    """
    count = 1 if way is None else 2
    figure, grid = plt.subplots(
        1, count, figsize=(4.8 * count, 3.8), layout="constrained", squeeze=False
    )
    left, right = grid[0, 0], grid[0, -1]
    for colour, (name, line) in zip(cycle(COLOURS), ascents.items(), strict=False):
        left.plot(line.at, line.loss, color=colour, label=_text(name))
    left.set_xlabel("ρ, the distance along SAM's perturbation")
    left.legend(frameon=False, fontsize=9)
    _scale_losses(left, [line.loss for line in ascents.values()])
    if way is not None:
        start, end = ascents
        right.plot(way.at, way.loss, color=GREY)
        for where, colour in ((0, COLOURS[0]), (-1, COLOURS[1])):
            right.plot(way.at[where], way.loss[where], "o", color=colour)
        right.set_xlabel(_text(f"from {start} (0) to {end} (1)", 50))
        _scale_losses(right, [way.loss])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Scale(NamedTuple):
    """One scale for all losses that are compared: what their heights and colours mean."""

    logarithmic: bool
    """Whether a height is the logarithm, of base 10, of a loss, or the loss."""
    levels: list[float]
    """Heights of contours, ascending; the ends hold all finite losses."""

    @classmethod
    def of(cls, losses: Sequence[Tensor]) -> "Scale":
        """Return the scale that holds all finite losses."""
        every = torch.cat([loss.flatten() for loss in losses])
        every = every[every.isfinite()] if every.isfinite().any() else torch.ones(1)
        low, high = every.min().item(), every.max().item()
        if high - low <= 1e-6 * abs(high):
            low, high = low - 0.5, high + 0.5
        if not 0 <= WIDE * low < high:
            return cls(False, [*MaxNLocator(14).tick_values(low, high)])
        # Fitted to the last digit a loss is 0, which has no logarithm.
        low = max(every[every > 0].min().item(), 1e-6 * high)
        ticks = torch.as_tensor(LogLocator(subs=(1, 2, 5)).tick_values(low, high))
        start, end = int((ticks <= low).sum()) - 1, int((ticks < high).sum()) + 1
        return cls(True, ticks[start:end].log10().tolist())

    def heights(self, losses: Tensor) -> Tensor:
        """Return the heights of losses, NaN where these are not finite."""
        finite = losses.where(losses.isfinite(), math.nan)
        heights = torch.log10(finite) if self.logarithmic else finite
        return heights.clamp(min=self.levels[0])

    def label(self, height: float, position: Any = None) -> str:
        """Return the loss of a height as text."""
        return f"{10**height if self.logarithmic else height:.4g}"


def _contours(axes: Axes, plane: Plane, scale: Scale) -> ContourSet:
    heights = scale.heights(plane.loss).T
    axes.set_facecolor(MISSING)
    fill = axes.contourf(plane.at, plane.at2, heights, scale.levels, cmap=COLOUR_MAP)
    edges = axes.contour(
        plane.at,
        plane.at2,
        heights,
        scale.levels,
        colors="white",
        linewidths=0.5,
        negative_linestyles="solid",
    )
    axes.clabel(edges, fmt=scale.label, fontsize=6)
    axes.plot(0, 0, "+", color="white")
    axes.set_aspect("equal")
    _label_directions(axes, " (norms of a filter)")
    return fill


def _surface(axes: Any, plane: Plane, scale: Scale) -> None:
    x, y = torch.meshgrid(plane.at, plane.at2, indexing="ij")
    low, high = scale.levels[0], scale.levels[-1]
    axes.plot_surface(
        x.numpy(),
        y.numpy(),
        scale.heights(plane.loss).numpy(),
        rcount=len(x),
        ccount=len(y),
        vmin=low,
        vmax=high,
        cmap=COLOUR_MAP,
        edgecolor="white",
        linewidth=0.15,
    )
    axes.set_zlim(low, high)
    axes.zaxis.set_major_locator(MaxNLocator(5, integer=scale.logarithmic))
    axes.zaxis.set_major_formatter(scale.label)
    axes.set_zlabel("loss", fontsize=8)
    _label_directions(axes)


def _label_directions(axes: Axes, unit: str = "") -> None:
    axes.set_xlabel(f"direction 1{unit}", fontsize=8)
    axes.set_ylabel(f"direction 2{unit}", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=7)


def _scale_losses(axes: Axes, losses: Sequence[Tensor]) -> None:
    if Scale.of(losses).logarithmic:
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _text(name: str, width: int = 40) -> str:
    """Return a name as it is, in lines: matplotlib reads formulas between dollars."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return textwrap.fill(shown, width).replace("$", r"\$")


class Curve(NamedTuple):
    """What was measured of a run at the end of each epoch."""

    x: Mapping[str, Sequence[float]]
    """Where, by the label of an axis."""
    y: Mapping[str, Sequence[float]]
    """What, by the label of an axis."""


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
                _draw_runs(place, number, _text(name), [(r.x[x], r.y[y]) for r in runs])
            place.grid(alpha=0.25)
            place.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(y)
    for place, x in zip(grid[-1], first.x, strict=True):
        place.set_xlabel(x)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, frameon=False, handlelength=4
    )
    figure.suptitle(_text(title, 90), fontsize=11)
    figure.savefig(path, dpi=150)
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
