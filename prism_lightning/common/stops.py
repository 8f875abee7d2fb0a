"""Signals that request a stop: SIGTERM and SIGUSR1 of a scheduler, SIGINT of Ctrl-C.

A signal raises `Stopped` at once. Between `defer_stops` and `stop_at_once` the first signal is only recorded, so that
the work can reach a point where it saves its state. A second one, at least two seconds later, raises `Stopped`.
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
# A terminal's Ctrl-C and a parent's reach a child within milliseconds of each other and count as one.
SECOND_SIGNAL_SECONDS = 2.0


class Stopped(BaseException):
    """A signal requested a stop.

    It is no `Exception`, so that handlers of ordinary errors do not catch it. It is no `KeyboardInterrupt`, since
    Lightning exits by itself on that.

    Attributes:
        signal: the signal.
        saved: what was saved before the stop, for the message to the user; None where nothing was.
    """

    def __init__(self, number: int, saved: str | None = None) -> None:
        self.signal = signal.Signals(number)
        self.saved = saved
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """Exit code as in a shell: 128 plus the signal's number, which gives 143, 138 or 130."""
        return 128 + self.signal


class StopRequest:
    """Record of a stop signal after `defer_stops`: the signal's number, or None."""

    signal: int | None = None


def _raise(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Make the stop signals raise `Stopped`; ignored ones, such as Ctrl-C in a shell's background job, stay ignored."""
    earlier_handlers = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None stands for a handler that is not Python's.
            earlier_handlers[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


def defer_stops(request: StopRequest) -> None:
    """Record the next stop signal in `request` instead of raising `Stopped`; a second one raises it."""

    first_time = math.inf

    def record(number: int, frame: FrameType | None) -> None:
        nonlocal first_time
        if time.monotonic() - first_time > SECOND_SIGNAL_SECONDS:
            raise Stopped(number)
        if request.signal is None:
            request.signal, first_time = number, time.monotonic()

    _replace_handlers(record)


def stop_at_once() -> None:
    """Make stop signals raise `Stopped` again, after `defer_stops`."""
    _replace_handlers(_raise)


def ignore_stops(*_: object) -> None:
    """Make this process ignore the stop signals: a data loader's worker ends when its trainer does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _replace_handlers(handler: signal._HANDLER) -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
