"""SIGINT, SIGTERM, SIGHUP and SIGUSR1, and what they ask of a run.

While a run trains, a handler only takes a note, which the loop reads between two steps.
Before and after that nothing can be lost, and all but SIGUSR1 end the program at once; once
it is about to end, another Ctrl-C alone does.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

AGAIN = 1.0  # seconds after which a second Ctrl-C is meant; some come in pairs


class Stopped(BaseException):
    """A signal ended the program; `number` tells which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Signals that came since the start."""

    def __init__(self) -> None:
        self.stop: int | None = None
        """The signal that asks to end, if one does."""
        self._save = self._deferred = self._raised = False
        self._asked = 0.0

    def take_save(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait until somebody reads `stop`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal, or raise if there is nobody to read it."""
        if number == signal.SIGUSR1:
            self._save = True
            return
        heeded = self.stop is not None and not self._raised
        if heeded and number != signal.SIGINT:
            return  # torchrun tells each rank, as soon as one of them has ended.
        if not self._deferred:
            self.stop, self._raised = number, True  # Should something swallow it.
            raise Stopped(number)
        now = time.monotonic()
        if self.stop is None:
            self.stop, self._asked = number, now
            # Nothing else may be printed here: this runs in the middle of anything.
            text = b"\nstopping after this step; Ctrl-C again stops at once\n"
            _write_error(text)
        elif number == signal.SIGINT and now - self._asked > AGAIN:
            raise Stopped(number)


@contextlib.contextmanager
def watched() -> Iterator[Signals]:
    """Handle the signals until the end; outside of the main thread, none come."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup wants it to be
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_error(text: bytes) -> None:
    with contextlib.suppress(OSError):  # Perhaps nobody reads it.
        os.write(2, text)
