"""The progress line of commands that work through a known number of items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["rows_progress"]


@contextmanager
def rows_progress(console, title: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar with count, time and time left on `console`; yields the function to call with (done, total)."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
