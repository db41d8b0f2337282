"""Who takes a signal, for as long as a block lasts.

Only the main thread can say, and nobody where a library outside Python takes it: there nothing changes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.getsignal gives it


@contextmanager
def handled(number: signal.Signals, handler: Handler) -> Iterator[None]:
    """Within this block a signal is taken so; a process that begins in it ignores what is ignored here."""
    foreign = signal.getsignal(number) is None  # which Python could not put back
    if foreign or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def deferred(number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Within this block, which is to be short, a signal waits until the end.

    For libraries that turn a KeyboardInterrupt on its way through them into an error of their own: whoever takes that
    error for a mistake in a file goes on, and Ctrl-C is lost.
    """
    came: list[int] = []
    try:
        with handled(number, lambda *_: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(number)
