"""Colours, dashes and markers of all pictures."""

import textwrap
from pathlib import Path
from typing import Any

from samfn.storage import files

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


def shortened(name: str, width: int = 40) -> str:
    """Return a name as it is, in lines: matplotlib reads formulas between dollars."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return textwrap.fill(shown, width).replace("$", r"\$")


def save(figure: Any, path: Path) -> None:
    """Write a picture whole, in the place of what is there, even of a link.

    Raises:
        OSError: it cannot be written; what is there is what it was.
    """
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
