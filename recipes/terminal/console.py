"""Output in the terminal: the one module that knows rich.

Where the output is no terminal, the same rows are plain lines, and nothing moves.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

from recipes.terminal.legible import legible

TICK = 0.25  # seconds between two looks at the loss; each makes a GPU wait once
COLUMNS = (
    ("epoch", 9),
    ("loss", 8),
    ("train %", 8),
    ("test %", 8),
    ("lr", 9),
    ("rho", 9),
    ("‖grad‖", 8),
    ("seconds", 8),
)


def open_standard_streams() -> None:
    """Let nothing else become standard input, output or error where one was closed."""
    for handle, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It takes the lowest number that is free.
        if getattr(sys, name) is None:
            stream = open(handle, "w" if handle else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def write_to_nobody(stream: IO[str]) -> None:
    """Drop what a stream still writes: the rest of its buffer would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class QuietConsole(Console):
    """A console that falls silent when nobody reads it any more, or its disk is full."""

    def shown(self, text: str) -> str:
        """Return text as the console's encoding has it."""
        return legible(text, self.encoding)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Print nothing from now on; rich would end the program."""
        self.quiet = True
        write_to_nobody(self.file)


class Display:
    """Prints a run's banner, progress, epochs and summary."""

    def __init__(self, console: QuietConsole | None = None) -> None:
        self._console = console or QuietConsole(highlight=False)
        self._errors = QuietConsole(highlight=False, stderr=True)

    def say(self, text: str) -> None:
        """Print one plain line."""
        self._print(line(text))

    def warn(self, text: str) -> None:
        """Print one line about what went wrong and was dealt with, to standard error."""
        self._errors.print(f"[bold yellow]warning[/] {line(text)}", soft_wrap=True)

    def fail(self, text: str) -> None:
        """Print one line about what went wrong, to the standard error."""
        self._errors.print(f"[bold red]error[/] {line(text)}", soft_wrap=True)

    def _print(self, markup: str) -> None:
        # A terminal wraps between words; a file or pipe keeps the line whole.
        self._console.print(markup, soft_wrap=not self._console.is_terminal)

    def facts(self, title: str, facts: dict[str, str]) -> None:
        """Print a titled list of names and values."""
        shown = self._console.shown
        facts = {shown(name): shown(value) for name, value in facts.items()}
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            grid.add_row(plain(name), plain(value))
        panel = Panel(grid, title=title, title_align="left", expand=False)
        if self._console.is_terminal:
            self._console.print(panel)
            return
        self.say(title)
        width = max(map(len, facts))
        for name, value in facts.items():
            self.say(f"  {name:<{width}}  {value}")

    def track(self, items: Iterable[Any], total: int, text: str) -> Iterable[Any]:
        """Yield the items, with a bar that shows how far they are."""
        return track(
            items,
            text,
            total,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: names in its first column, numbers in the others.

        A table too wide for the terminal is transposed; if that is no help, each ± goes on
        its own line.
        """
        lines: list[Sequence[str]] = [
            [self._console.shown(cell) for cell in line] for line in (columns, *rows)
        ]
        if not self._console.is_terminal:
            widths = _widths(lines)
            for name, *cells in lines:
                sides = (f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
                self.say("  ".join((f"{name:<{widths[0]}}", *sides)))
            return
        turned: list[Sequence[str]] = [*zip(*lines, strict=True)]
        if not self._fits(lines) and self._fits(turned):
            lines = turned
        elif not self._fits(lines):
            sign = self._console.shown("±")
            lines = [
                [text.replace(f" {sign} ", f"\n{sign} ") for text in line] for line in lines
            ]
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        for place, column in enumerate(lines[0]):
            side: Literal["left", "right"] = "right" if place else "left"
            table.add_column(plain(column), justify=side, overflow="fold")
        for line in lines[1:]:
            table.add_row(*map(plain, line))
        self._console.print(table)
        self.say("")

    def _fits(self, lines: Sequence[Sequence[str]]) -> bool:
        return sum(width + 3 for width in _widths(lines)) <= self._console.width

    @contextmanager
    def counting(
        self, total: float, text: str, done: float = 0
    ) -> Iterator[Callable[..., None]]:
        """Show a bar; yield what is called when one more of the total is done.

        Args:
            total: what there is to do.
            text: what is done.
            done: what was done before.

        Yields:
            A function that is called when one more is done, or with their number.
        """
        bar = Progress(
            TextColumn(plain(text)),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task("", total=total)
            bar.update(task, completed=done)
            yield lambda more=1: bar.advance(task, more)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something takes its time, and at the end how much it took."""
        started = time.monotonic()
        clock = Progress(
            SpinnerColumn("line" if self._console.options.ascii_only else "dots"),
            TextColumn(plain(text)),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        if not self._console.is_terminal:
            self.say(f"{text} ...")
        with clock:
            clock.add_task("", total=None)
            yield
        self.say(f"{text} took {time.monotonic() - started:.1f} s")

    @contextmanager
    def training(self, epochs: int, steps: int, done: int) -> Iterator["Live"]:
        """Show progress while training goes on.

        Args:
            epochs: in the whole run.
            steps: in an epoch.
            done: steps that were taken before, where a run is resumed.
        """
        bar = Progress(
            *self._bar(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        header = "".join(f"{name:>{width}}" for name, width in COLUMNS)
        self._row(f"[bold]{header}[/]")
        live = Live(self._console, bar, epochs, steps, done, self._row)
        with bar:
            yield live

    def _bar(self) -> tuple[ProgressColumn, ...]:
        """Return what is shown of the run under way."""
        return (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )

    def _row(self, markup: str) -> None:
        """Print a line of the table of epochs."""
        self._console.print(markup, soft_wrap=True)

    def brief(self, about: str) -> "Display":
        """Return a display for one run of many, which says `about` of which."""
        return _Brief(self._console, about)


class _Brief(Display):
    """Shows of a run what moves and what goes wrong, and leaves no other line behind."""

    def __init__(self, console: QuietConsole, about: str) -> None:
        super().__init__(console)
        self._about = about

    def say(self, text: str) -> None:
        """Print nothing."""

    def facts(self, title: str, facts: dict[str, str]) -> None:
        """Print nothing."""

    def warn(self, text: str) -> None:
        """Print one line about what went wrong and was dealt with, and where."""
        super().warn(f"{self._about}: {text}")

    def fail(self, text: str) -> None:
        """Print one line about what went wrong, and where."""
        super().fail(f"{self._about}: {text}")

    def _row(self, markup: str) -> None:
        pass

    def _bar(self) -> tuple[ProgressColumn, ...]:
        return (
            # A column is a format, in which braces mean something.
            TextColumn(plain(self._about).replace("{", "{{").replace("}", "}}")),
            BarColumn(20),
            TextColumn("epoch {task.fields[epoch]}, loss {task.fields[loss]:.3f},"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )


class Silent(Display):
    """Shows nothing but what ends the run, as the ranks do that are not the first."""

    def __init__(self, about: str) -> None:
        super().__init__(QuietConsole(quiet=True))
        self._about = about

    def warn(self, text: str) -> None:
        """Print nothing; the first rank says it."""

    def fail(self, text: str) -> None:
        """Print one line about what went wrong, and where."""
        super().fail(f"{self._about}: {text}")


class Live:
    """The moving part of the display while training goes on."""

    def __init__(
        self,
        console: Console,
        bar: Progress,
        epochs: int,
        steps: int,
        done: int,
        row: Callable[[str], None],
    ) -> None:
        self._console, self._bar, self._row = console, bar, row
        self._epochs, self._steps = epochs, steps
        self._next = time.monotonic() + TICK
        self._task: TaskID = bar.add_task(
            "",
            total=epochs * steps,
            completed=done,
            epoch=f"{done // steps + 1}/{epochs}",
            loss=float("nan"),
            rate=0.0,
        )

    def due(self) -> bool:
        """Return whether it is time to show something again."""
        return self._console.is_terminal and time.monotonic() >= self._next

    def step(self, epoch: int, done: int, loss: float, rate: float) -> None:
        """Show how far an epoch is; `rate` in images per second."""
        self._next = time.monotonic() + TICK
        self._bar.update(
            self._task,
            completed=epoch * self._steps + done,
            epoch=f"{epoch + 1}/{self._epochs}",
            loss=loss,
            rate=rate,
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        cells = (
            f"{row['epoch']}/{self._epochs}",
            f"{row['train_loss']:.4f}",
            f"{row['train_accuracy']:.2f}",
            f"{row['test_accuracy']:.2f}",
            f"{row['lr']:.2e}",
            f"{row['rho']:.3g}",
            f"{row['grad_norm']:.3f}",
            f"{row['seconds']:.1f}",
        )
        text = "".join(
            f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)
        )
        if row["skipped_steps"]:
            text += f"  {row['skipped_steps']} steps skipped, not finite"
        self._row(text)


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, cells)) for cells in zip(*lines, strict=True)]


def plain(text: str) -> str:
    """Return text that a terminal shows and does not obey: no markup, no control codes."""
    shown = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return escape("".join(shown))


def line(text: str) -> str:
    """Return text as `plain` does, in one line whatever names stand in it."""
    return plain(text).replace("\n", r"\n")


def duration(seconds: float) -> str:
    """Return a time with its unit."""
    if seconds < 99.5:
        return f"{seconds:.{0 if seconds > 9.95 else 1}f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"
