"""Ctrl-C and termination, taken at a safe place instead of anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The user or the system asked the run to end."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Turn the first SIGINT or SIGTERM into an `Interrupted` at the next safe place; a second one acts at once.

    Yields:
        A function to call at safe places. In a thread other than the main one it never raises.
    """
    asked = threading.Event()

    def poll() -> None:
        if asked.is_set():
            raise Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield poll
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        restore()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield poll
    finally:
        restore()
