"""What is known of clips before any is decoded: whether they are the files they were, and whether they fit.

Both looks read every file once, a few at a time in threads, and ask at every packet whether to stop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pgdpo_fast.errors import DataError, Preempted
from pgdpo_fast.storage import read_json, write_json

__all__ = ["content_hashes", "in_order", "remember_hashes", "result_of"]

T, R = TypeVar("T"), TypeVar("R")
Stop = Callable[[], bool]
READERS = 4
POLL = 0.2  # seconds between two looks at the stop signal


def result_of(future: Future[R], stop: Stop) -> R:
    """The future's result, or Preempted as soon as `stop` answers True."""
    while True:
        try:
            return future.result(timeout=POLL)
        except TimeoutError:
            if future.done():
                raise
            if stop():
                raise Preempted("stopped while waiting for a clip") from None


def in_order(items: Iterable[T], call: Callable[[T], R], stop: Stop, ahead: int = 4 * READERS) -> Iterator[R]:
    """call(item) of every item, in order, by a few threads; Preempted as soon as `stop` answers True."""
    pool, waiting = ThreadPoolExecutor(READERS), []
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= ahead:
                yield result_of(waiting.pop(0), stop)
        while waiting:
            yield result_of(waiting.pop(0), stop)
    finally:
        pool.shutdown(cancel_futures=True)


def content_hashes(
    paths: Iterable[Path], remembered: Path, stop: Stop, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[Path, str]:
    """sha256 of every file. A file whose size, inode and times are those in `remembered` is not read again.

    `progress(done, total)` is called after every file.
    """
    paths = list(dict.fromkeys(paths))
    try:
        known = read_json(remembered)
    except DataError:  # none yet, or damaged: read every file
        known = {}

    def digest(path: Path) -> str:
        try:
            if (before := known.get(_key(path))) and before[:-1] == _state(path):
                return before[-1]
            content = hashlib.sha256()
            with open(path, "rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    content.update(block)
                    if stop():
                        raise Preempted("stopped while reading clips")
            return content.hexdigest()
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror or error}; restore the clip, or read the manifest again"
            ) from None

    hashes = {}
    for path, found in zip(paths, in_order(paths, digest, stop), strict=True):
        hashes[path] = found
        progress(len(hashes), len(paths))
    return hashes


def remember_hashes(hashes: dict[Path, str], remembered: Path) -> None:
    write_json(remembered, {_key(path): [*_state(path), digest] for path, digest in hashes.items()})


def _key(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _state(path: Path) -> list[int]:
    """What changes when a file is written to or replaced, even by one of equal size and time of writing."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
