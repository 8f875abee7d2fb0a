"""Signals that ask a process to stop: SIGTERM and SIGUSR1 of a scheduler, SIGINT of Ctrl-C.

They raise `Stopped` where the program stands. Between `defer_stops` and `stop_at_once` the first one leaves a note
instead, so that the work can reach a point worth saving; a second one, some seconds later, raises `Stopped` there too.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_EXIT_CODES = tuple(128 + number for number in STOP_SIGNALS)
# A terminal's Ctrl-C and a parent's reach a child within milliseconds of each other: they count as one.
SECOND_SIGNAL_SECONDS = 2.0


class Stopped(BaseException):
    """A signal asked the process to stop.

    It is no `Exception`, so that handlers of ordinary errors let it pass, and no `KeyboardInterrupt`, which Lightning
    turns into an exit of its own.

    Attributes:
        signal: which one.
        saved: what was saved for it, for the line that the user reads; None where nothing had to be.
    """

    def __init__(self, number: int, saved: str | None = None) -> None:
        self.signal = signal.Signals(number)
        self.saved = saved
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 143, 138 or 130."""
        return 128 + self.signal


class StopRequest:
    """The note that a signal leaves after `defer_stops`: its number, or None."""

    signal: int | None = None


def _raise(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Let the stop signals raise `Stopped`; what is ignored, as Ctrl-C is in a shell's background jobs, stays so."""
    before = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
            before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_stops(request: StopRequest) -> None:
    """From now on the first stop signal is noted in `request`; a second one raises `Stopped`."""

    first = math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if time.monotonic() - first > SECOND_SIGNAL_SECONDS:
            raise Stopped(number)
        if request.signal is None:
            request.signal, first = number, time.monotonic()

    _replace_handlers(note)


def stop_at_once() -> None:
    """End what `defer_stops` began: signals raise `Stopped` again."""
    _replace_handlers(_raise)


def ignore_stops(*_: object) -> None:
    """Let this process ignore the stop signals: a loader's worker ends when its trainer does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _replace_handlers(handler: signal._HANDLER) -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
