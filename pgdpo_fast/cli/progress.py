"""The progress of commands that work through a known number of items.

A bar where a person looks on. Under nohup or a scheduler plain lines, because a log has no place to draw in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

__all__ = ["PlainProgress", "rows_progress"]

SECONDS = 15.0  # between two plain lines: four per minute keep the log of a day's work below 6000 lines


class PlainProgress:
    """Lines with count, rate, items dropped and time left: the first item's, one every `SECONDS`, and the last's.

    Attributes:
        dropped: items that cannot be used, counted by the command; told where there are any.
    """

    def __init__(self, title: str, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.title, self.write, self.clock, self.dropped = title, write, clock, 0
        self.began = self.told = clock()
        self.first: int | None = None  # items that an earlier call had finished
        self.done: int | None = None  # as last told

    def __call__(self, done: int, total: int) -> None:
        now = self.clock()
        begins = self.first is None
        if self.first is None:
            self.first, self.began = done, now
        if done == self.done or not (begins or done >= total or now - self.told >= SECONDS):
            return
        self.told, self.done = now, done
        worked, seconds = done - self.first, now - self.began
        parts = [f"{done} of {total} ({done / total:.0%})" if total else "0 of 0"]
        if worked and seconds > 0:
            rate = worked / seconds
            parts.append(f"{rate:.3g} per second" if rate >= 1 else f"{1 / rate:.3g} s each")
            parts.append(f"{timedelta(seconds=round((total - done) / rate))} left")
        parts += [f"{self.dropped} dropped"] * bool(self.dropped)
        self.write(f"{self.title}: {', '.join(parts)}")

    def before(self, title: str) -> PlainProgress:
        """The progress of work that comes before this, shown where this is."""
        return PlainProgress(title, self.write, self.clock)


@contextmanager
def rows_progress(console, title: str, shown: bool = True) -> Iterator[PlainProgress]:
    """Progress on `console`; yields what to call with (done, total). On a terminal a bar, else `PlainProgress`."""
    from rich import progress as rich

    def write(line: str) -> None:
        if shown:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    plain = PlainProgress(title, write)
    if not (shown and console.is_terminal):
        yield plain
        return
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bar:
        yield _Bar(bar, title)


class _Bar(PlainProgress):
    def __init__(self, bar, title: str):
        super().__init__(title, bar.console.print)
        self.bar, self.task = bar, bar.add_task(title, total=None)

    def before(self, title: str) -> PlainProgress:
        return _Bar(self.bar, title)

    def __call__(self, done: int, total: int) -> None:
        title = f"{self.title} ({self.dropped} dropped)" if self.dropped else self.title
        self.bar.update(self.task, description=title, completed=done, total=total)
