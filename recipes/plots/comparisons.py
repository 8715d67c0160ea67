"""Pictures of many runs: settings against each other, against rho, against label noise."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from recipes.plots.style import BLUE, GREY, STYLES, Style, save, shortened


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
        # Of equal values it is exactly theirs, which a quotient of the sum may not be.
        means = [statistics.mean(values[label]) for label in labels]
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
    save(figure, path)
    plt.close(figure)


class Series(NamedTuple):
    """Accuracies of a method in percent, at each place one for each seed."""

    last: Mapping[float, Sequence[float]]
    """Accuracies of the last epoch, by rho or share of noise."""
    best: Mapping[float, Sequence[float]]
    """Accuracies of the best epoch."""


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
            _error_bars(axes, one[index], style, label=shortened(label))
        axes.set_xscale("log")
        axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("ρ, the radius of the perturbation")
        axes.set_title(f"{name} epoch", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    pair[0].set_ylabel("test accuracy (%)")
    pair[0].legend(frameon=False, fontsize=9)
    figure.suptitle(shortened(title, 90), fontsize=11)
    save(figure, path)
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
        _error_bars(axes, one.last, style, label=shortened(label))
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
    figure.suptitle(shortened(title, 80), fontsize=11)
    save(figure, path)
    plt.close(figure)


def correlation(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    title: str,
) -> None:
    """Draw measures against test accuracy: a panel a measure, a point a run.

    Args:
        points: (measure, accuracy in percent) of runs, by their row, by measure. The axis
            of a measure is logarithmic where all are above 0.
        path: of the picture.
        title: above all.
    """
    columns = min(4, len(points))
    rows = -(-len(points) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns, 2.4 * rows + 0.8),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    panels = [*grid.flat]
    for axes, (measure, of) in zip(panels, points.items(), strict=False):
        for (colour, marker), (label, found) in zip(
            cycle(STYLES), of.items(), strict=False
        ):
            x, y = zip(*found, strict=True) if found else ((), ())
            axes.scatter(x, y, s=24, color=colour, marker=marker, label=shortened(label))
        if all(x > 0 for found in of.values() for x, _ in found):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.12g}")
            axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.set_xlabel(measure, fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(points) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)", fontsize=9)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(shortened(title, 90), fontsize=11)
    save(figure, path)
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
