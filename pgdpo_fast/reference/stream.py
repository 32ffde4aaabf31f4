"""Brings cached rows to where the loss runs before it asks: disk to host in another thread, host to device beside it.

Two scalars per row (format "errors") live on the device as one table. Predictions are read ahead from the memory-mapped
shards; for a GPU they pass through pinned slots and a side stream, in one launch, so neither the disk nor the bus is
waited for while a step computes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pgdpo_fast.diffusion import Visit
from pgdpo_fast.loss import PackedReference, ReferenceErrors
from pgdpo_fast.reference.cache import ReferenceCache
from pgdpo_fast.reference.rows import Rows, as_reference, bring, gather

__all__ = ["RowStream"]

Visits = Sequence[Visit]


@dataclass
class _Slot:
    """Pinned host rows, and the event after which the device has taken them."""

    rows: Rows
    taken: torch.cuda.Event


class RowStream:
    """Rows of `cache` on `device`, batch by batch, up to `depth` batches of at most `pairs` pairs ahead.

    `waited` counts the seconds `take` stood waiting for the disk or the host.
    """

    def __init__(self, cache: ReferenceCache, device: torch.device | str = "cpu", *, pairs: int, depth: int = 2):
        self.cache, self.device, self.pairs, self.depth = cache, torch.device(device), pairs, depth
        self.waited = 0.0
        self._lock, self._ahead = threading.Lock(), OrderedDict[tuple, Future]()
        self._table = self._pool = None
        if cache.layout.format == "errors":
            self._table = {name: rows.to(self.device) for name, rows in cache.table().items()}
            return
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reference-rows")
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)
            self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
            for _ in range(2):  # one is filled while the other is copied
                rows = {
                    name: torch.empty((pairs, *shape), dtype=dtype, pin_memory=True)
                    for name, (shape, dtype) in cache.layout.tensors.items()
                }
                self._slots.put(_Slot(rows, torch.cuda.Event()))

    def prefetch(self, visits: Visits) -> None:
        """Start bringing the rows of a coming batch. With `depth` batches ahead nothing happens: `take` will read."""
        with self._lock:
            if self._pool is not None and tuple(visits) not in self._ahead and len(self._ahead) < self.depth:
                self._ahead[tuple(visits)] = self._pool.submit(self._fetch, list(visits))

    def take(self, visits: Visits) -> ReferenceErrors | tuple[torch.Tensor, torch.Tensor] | PackedReference:
        """The reference of a batch on the device, ready for the current stream.

        Raises:
            DataError: the cache does not hold one of the rows, or its file is damaged.
        """
        if self._table is not None:
            numbers = self.cache.numbers(visits)
            if self.device.type == "cuda":
                return as_reference(bring(self._table, numbers, self.device), "errors")
            return as_reference(gather([self._table], [(0, number) for number in numbers]), "errors")
        with self._lock:
            future = self._ahead.pop(tuple(visits), None) or self._pool.submit(self._fetch, list(visits))
        began = time.perf_counter()
        rows, arrived = future.result()
        self.waited += time.perf_counter() - began
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for values in rows.values():
                values.record_stream(current)
        return as_reference(rows, self.cache.layout.format)

    def close(self) -> None:
        """Forget what was read ahead and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fetch(self, visits: Visits) -> tuple[Rows, torch.cuda.Event | None]:
        if self.device.type != "cuda":
            return {name: rows.to(self.device) for name, rows in self.cache.rows(visits).items()}, None
        slot = self._slots.get()
        try:
            slot.taken.synchronize()
            host = self.cache.rows(visits, out=slot.rows)
            with torch.cuda.stream(self._side):
                rows = bring(host, range(len(visits)), self.device)
                slot.taken = torch.cuda.Event()  # a new one: the batch keeps waiting on this copy, not on a later one
                slot.taken.record(self._side)
            return rows, slot.taken
        finally:
            self._slots.put(slot)
