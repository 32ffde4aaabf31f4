"""SIGTERM as a question the long loops ask, so that they stop between two pieces of work and never inside a write."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["sigterm_watch"]


@contextmanager
def sigterm_watch() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM is noted instead of killing the process; the yielded function says whether it came.

    Outside the main thread, where Python allows no handlers, the answer stays False.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)
