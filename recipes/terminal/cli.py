"""The beginning and end of every command: standard streams, signals, and exit codes."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import tyro

import samfn
from recipes.errors import (
    DIVERGED,
    NOT_WRITTEN,
    OUT_OF_MEMORY,
    RANK_LOST,
    WRONG_INPUT,
    ConfigError,
    DataError,
    DivergedError,
    Failed,
)
from recipes.terminal.console import (
    Display,
    Silent,
    open_standard_streams,
    write_to_nobody,
)
from recipes.terminal.hardware import lacks_memory, lacks_threads
from recipes.terminal.legible import replace_what_streams_lack
from recipes.terminal.signals import Signals, Stopped, watched
from samfn import distributed

EXPECTED = (
    ConfigError,
    DataError,
    OSError,
    DivergedError,
    samfn.NonFiniteError,
    Stopped,
    Failed,
)


Kind = TypeVar("Kind")


def parsed(kind: type[Kind], **options: Any) -> Kind:
    """Return what the command line asks for, as `tyro.cli` does.

    Help that nobody reads to its end, as of `--help | head`, ends without an error.

    Raises:
        SystemExit: the command line is wrong, or asks for help.
        OSError: the help cannot be written.
    """
    args = sys.argv[1:] if options.get("args") is None else options["args"]
    open_standard_streams()
    streams = (sys.stdout, sys.stderr)
    try:
        try:
            found: Kind = tyro.cli(kind, **options)
            return found
        finally:
            for stream in streams:
                stream.flush()
    except OSError as error:
        for stream in streams:
            try:
                stream.flush()
            except OSError:
                write_to_nobody(stream)
        if not isinstance(error, BrokenPipeError):
            raise
        raise SystemExit(0 if {"-h", "--help"} & {*args} else WRONG_INPUT) from None


def run(
    body: Callable[[Display, Signals], int],
    left: str = "nothing was saved since the last checkpoint",
    *,
    ranks: bool = False,
) -> int:
    """Call the body of a command; return its exit code, or that of what it raises.

    Expected errors end in one line on standard error, all others in a traceback.

    Args:
        body: of the command.
        left: the message about what is left when a signal ends it.
        ranks: whether it can be one of several processes that torchrun starts.
    """
    open_standard_streams()
    replace_what_streams_lack()
    try:
        rank = distributed.rank()
    except ValueError as error:
        Display().fail(str(error))
        return WRONG_INPUT
    display = Silent(f"rank {rank}") if rank else Display()
    if distributed.launched() and not ranks:
        display.fail("this command runs in one process: start it without torchrun")
        return WRONG_INPUT
    try:
        with watched() as signals:
            try:
                return body(display, signals)
            except EXPECTED:
                raise
            except Exception as error:
                if signals.stop is None:
                    raise
                # C code, as that of pictures, turns what a signal raises into anything.
                raise Stopped(signals.stop) from error
    except Failed as error:
        return error.code
    except (Exception, Stopped) as error:
        if (known := _ending(error, left)) is None:
            raise
        code, message = known
        display.fail(message)
        return code


def _ending(error: Exception | Stopped, left: str) -> tuple[int, str] | None:
    """Return the exit code and the line that end a command; None for what is a fault."""
    match error:
        case samfn.CheckpointWriteError():
            gone = os.strerror(errno.ENOENT) in str(error)
            before = "was it deleted, or moved?" if gone else "checkpoints before are whole"
            return NOT_WRITTEN, f"{error}; {before}"
        case samfn.ExportError():
            return NOT_WRITTEN, str(error)
        case distributed.RanksDifferError():
            return RANK_LOST, f"{error}; the last checkpoint is older"
        case MemoryError() | RuntimeError():
            return _ending_of_the_machine(error)
        case ConfigError() | DataError() | OSError():
            return WRONG_INPUT, str(error)
        case ValueError() if "embedded null" in str(error):
            return WRONG_INPUT, "a path holds a NUL character, which no file's name does"
        case DivergedError() | samfn.NonFiniteError():
            return DIVERGED, str(error)
        case Stopped():
            return 128 + error.number, f"{error} ended this; {left}"
    return None


def _ending_of_the_machine(error: MemoryError | RuntimeError) -> tuple[int, str] | None:
    """Return how a lack of memory, threads or ranks ends a command."""
    if "EADDRINUSE" in str(error):
        return WRONG_INPUT, "MASTER_PORT is in use by another program: choose another"
    if distributed.is_lost(error):
        text = "another rank ended, or did not answer in time; torchrun ends all"
        return RANK_LOST, text
    if lacks_threads(error):
        text = f"{error}: expected memory for its stack, and ulimit -u above it"
        return OUT_OF_MEMORY, text
    if lacks_memory(error):
        about = f" {error}" if isinstance(error, MemoryError) and str(error) else ""
        return OUT_OF_MEMORY, f"out of memory{about}{peak()}"
    return None


def peak() -> str:
    """Return how much memory of a GPU was taken at most, as part of a sentence."""
    if torch.cuda.is_available():
        return f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the peak"
    return ""
