"""SIGTERM, SIGINT and SIGHUP (a scheduler, Ctrl-C, a closed terminal) as one orderly end: save, say how to resume.

The first signal raises in the main thread at once, wherever it is, so that nobody waits for a clip, a forward or a
hash; files are whole or absent at any moment. Where several things must change together, `deferred` holds it back. Long
loops ask besides, because Python drops what is raised while it collects garbage, and raises nothing in other threads.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pgdpo_fast.errors import Preempted

__all__ = ["Stop", "Stopping", "check_stop", "stoppable"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_entered: list[Stopping] = []  # of the `stoppable` blocks that have not been left, the innermost last


class Stop(BaseException):
    """A signal came. Not an Exception, so that no library takes it for a failure of its own."""


class Stopping:
    """What is known of signals within a `stoppable` block. Calling it says whether one came."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._held_back = 0

    def __call__(self) -> bool:
        return self.name is not None

    def check(self) -> None:
        """Raise Stop if a signal came."""
        if self.name is not None:
            raise Stop(self.name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal is only noted; Stop is raised at its end."""
        self._held_back += 1
        try:
            yield
        finally:
            self._held_back -= 1
        if not self._held_back:
            self.check()

    def _receive(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.name is None:
            self.name = name
            if not self._held_back:
                raise Stop(name)
        elif self.name == name and number != signal.SIGHUP:  # of a closed terminal shell and kernel both send one
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress line may have hidden the cursor
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def check_stop() -> None:
    """Raise Stop if a signal came to the innermost `stoppable` block, in any thread, and nothing holds it back."""
    if _entered and _entered[-1].name is not None and not _entered[-1]._held_back:
        raise Stop(_entered[-1].name)


@contextmanager
def stoppable(message: Callable[[str], str], saves: bool = False) -> Iterator[Stopping]:
    """Within the block the first SIGTERM, SIGINT or SIGHUP raises Stop in the main thread, which leaves as Preempted.

    The same SIGTERM or SIGINT again ends the process at once. A signal that the process was started to ignore (nohup, a
    shell's background job) stays ignored. Outside the main thread, where Python allows no handlers, nothing is changed.

    Args:
        message: of the Preempted error, given the signal's name: what was kept, and how to go on.
        saves: the block itself saves after Stop, so that an error of it counts. Otherwise what leaves the block after a
            signal is taken for Stop: compiled libraries turn it into errors of their own.
    """
    stopping, previous = Stopping(), {}
    _entered.append(stopping)
    try:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    if signal.getsignal(number) not in (signal.SIG_IGN, None):
                        previous[number] = signal.getsignal(number)
                        signal.signal(number, stopping._receive)
            yield stopping
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    except BaseException as error:
        if stopping.name is None or isinstance(error, Preempted) or (saves and not isinstance(error, Stop)):
            raise
        raise Preempted(message(stopping.name)) from None
    finally:
        _entered.remove(stopping)
