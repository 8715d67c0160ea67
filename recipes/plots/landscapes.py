"""Pictures of the loss around what runs have learned."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from recipes.plots.style import COLOUR_MAP, COLOURS, GREY, MISSING, WIDE, save, shortened
from samfn.measure.landscape import Line, Plane


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
        axes.set_title(f"{shortened(name)}\n{notes[name]}{grey}", fontsize=9)
        below = figure.add_subplot(2, count, 1 + count + i, projection="3d")
        _surface(below, plane, scale)
    bar = figure.colorbar(fill, ax=upper, ticks=scale.levels, format=scale.label)
    bar.set_label("loss", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
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
        left.plot(line.at, line.loss, color=colour, label=shortened(name))
    left.set_xlabel("ρ, the distance along SAM's perturbation")
    left.legend(frameon=False, fontsize=9)
    _scale_losses(left, [line.loss for line in ascents.values()])
    if way is not None:
        start, end = ascents
        right.plot(way.at, way.loss, color=GREY)
        for where, colour in ((0, COLOURS[0]), (-1, COLOURS[1])):
            right.plot(way.at[where], way.loss[where], "o", color=colour)
        right.set_xlabel(shortened(f"from {start} (0) to {end} (1)", 50))
        _scale_losses(right, [way.loss])
    figure.suptitle(title, fontsize=11)
    save(figure, path)
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
