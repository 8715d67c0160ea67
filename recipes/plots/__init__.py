"""Pictures: the one package that knows matplotlib."""

import matplotlib

matplotlib.use("agg")  # Draw into files, also where there is no screen.

from matplotlib import pyplot as plt

from recipes.plots.comparisons import Series, correlation, label_noise, ranking, sweep
from recipes.plots.epochs import Curve, curves, layers, side_by_side
from recipes.plots.landscapes import Scale, lines, surfaces
from recipes.plots.style import COLOURS, STYLES

__all__ = [
    "COLOURS",
    "STYLES",
    "Curve",
    "Scale",
    "Series",
    "correlation",
    "curves",
    "label_noise",
    "layers",
    "lines",
    "plt",
    "ranking",
    "side_by_side",
    "surfaces",
    "sweep",
]
