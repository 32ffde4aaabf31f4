"""Fill a reference cache: one forward after the other, by any number of processes, resumable at any kill.

Which rows share a forward and a shard follows from the settings alone. A process claims a shard (a lock the system
releases when it dies), leaves each finished forward in `staging/` under its own hash, and joins them to a shard whose
name ends in its hash. So processes started together or later share the work, a dead one's shard is taken over, and a
kill loses at most the forward it was in.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast import __version__
from pgdpo_fast.errors import DataError, Preempted
from pgdpo_fast.preemption import sigterm_watch
from pgdpo_fast.reference.cache import (
    CACHE_FILE,
    INDEX_FILE,
    REMAKE,
    SCHEMA,
    Block,
    Layout,
    ReferenceCache,
    layout_mapping,
    read_state,
)
from pgdpo_fast.reference.fingerprint import check_equal
from pgdpo_fast.reference.rows import Rows, check_finite
from pgdpo_fast.storage import (
    Shard,
    canonical_json,
    check_disk,
    exclusive_lock,
    sha256_bytes,
    sha256_file,
    write_json,
    write_shard,
)

__all__ = ["build_cache"]

STAGING = "staging"
POLL_SECONDS = 0.1


def build_cache(
    path: str | os.PathLike,
    *,
    fingerprint: Mapping[str, Any],
    blocks: Sequence[Block],
    layout: Layout,
    compute: Callable[[Sequence[tuple[str, int]]], Rows],
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
    resume_command: str = "the same call again",
) -> ReferenceCache:
    """Compute what is missing of a cache and return it finished.

    Args:
        path: folder of the cache; new, or with finished work of the same fingerprint and layout, which is verified and
            kept. A finished cache of the same pairs with more draws is returned as it is.
        fingerprint: flat mapping of plain values, everything the rows depend on.
        blocks: pairs and their draws; ids must not repeat.
        compute: rows `[B, ...]` of up to `layout.pairs_per_forward` (pair id, draw).
        provenance: recorded (where weights came from, versions), decides nothing.
        progress: called with (rows finished, rows in all) after every forward and shard.
        rank, world_size: of this process, to start on shards the others do not start on. All return when all is done.

    Raises:
        DataError: the folder holds another cache (naming the field), or the disk is full; finished work stays.
        NonFiniteError: a row is not finite; nothing of its forward is kept.
        Preempted: SIGTERM came; the message holds `resume_command`.
    """
    ids = [id for block in blocks for id in block.ids]
    if len(set(ids)) < len(ids):
        raise ValueError("blocks: expected every pair id once")
    path = Path(path).absolute()
    if (larger := _larger(path, fingerprint, blocks, layout)) is not None:
        return larger
    with sigterm_watch() as stop:
        job = _Job(path, dict(fingerprint), list(blocks), layout, compute, stop, progress, resume_command)
        job.open(dict(provenance or {}))
        numbers = range(len(job.ranges))
        order = [*numbers[rank::world_size], *(number for number in numbers if number % world_size != rank)]
        job.run(order)
        job.finish()
    return ReferenceCache(path)


def _larger(
    path: Path, fingerprint: Mapping[str, Any], blocks: Sequence[Block], layout: Layout
) -> ReferenceCache | None:
    """The finished cache in `path` if it has all rows of `blocks` and more draws; DataError if it is damaged."""
    try:
        cache = ReferenceCache(path)
    except DataError:
        return None  # new, unfinished or broken: the job's to find out
    if (cache.fingerprint, cache.layout) != (dict(fingerprint), layout):
        return None
    if [block.ids for block in cache.blocks] != [block.ids for block in blocks]:
        return None
    more = [held.draws - asked.draws for held, asked in zip(cache.blocks, blocks, strict=True)]
    if min(more) < 0 or max(more) == 0:
        return None
    cache.verify()
    return cache


@dataclass
class _Job:
    path: Path
    fingerprint: dict[str, Any]
    blocks: list[Block]
    layout: Layout
    compute: Callable[[Sequence[tuple[str, int]]], Rows]
    stop: Callable[[], bool]
    progress: Callable[[int, int], None] | None
    resume_command: str

    def __post_init__(self):
        self.ranges = self.layout.shards(self.blocks)
        self.keys = [(id, draw) for block in self.blocks for draw in range(block.draws) for id in block.ids]
        self.index = {"blocks": [{"ids": list(block.ids), "draws": block.draws} for block in self.blocks]}
        identity = [self.fingerprint, layout_mapping(self.layout), self.index]
        # every shard carries it, so that one from another cache is never taken for this one's
        self.identity = sha256_bytes(canonical_json(identity).encode())
        self.finished: dict[int, Shard] = {}
        self.current = 0  # rows finished of the shard being worked on

    # -- the folder

    def open(self, provenance: dict[str, Any]) -> None:
        """Make the folder this job's, or check that it is; find what is finished; check the disk for the rest."""
        with self._locked():
            self._state()
        for number in range(len(self.ranges)):
            if self._find(number):
                shutil.rmtree(self._staging(number), ignore_errors=True)
        self.report()
        missing = len(self.keys) - self._rows_finished()
        if missing:
            check_disk(
                self.path,
                (missing + self.layout.rows_per_shard) * self.layout.row_bytes,
                f"the reference cache ({missing} rows of {self.layout.row_bytes} bytes)",
            )
        with self._locked():
            state, index = self._state(), self._write_index()
            if state is None or state["complete"] and state["shards"] != self._listed():
                write_json(
                    self.path / CACHE_FILE,
                    {
                        "kind": "reference",
                        "schema": SCHEMA,
                        "complete": False,
                        "fingerprint": self.fingerprint,
                        "layout": layout_mapping(self.layout),
                        "index": index,
                        "shards": [],
                        "provenance": {"pgdpo_fast": __version__, "torch": torch.__version__, **provenance},
                    },
                )

    def _state(self) -> dict[str, Any] | None:
        """cache.json of an earlier or a concurrent call, checked to be of the same cache; None in a new folder."""
        if (self.path / CACHE_FILE).exists():
            state = read_state(self.path)
            check_equal(self.path, state["fingerprint"], self.fingerprint, REMAKE)
            check_equal(self.path, state["layout"], layout_mapping(self.layout), REMAKE)
            return state
        foreign = sorted(item.name for item in self.path.iterdir() if not _ours(item.name))
        if foreign:
            raise DataError(
                f"{self.path}: not empty and no reference cache (it holds {foreign[0]}); choose another output folder"
            )
        return None

    def _listed(self) -> list[dict[str, Any]] | None:
        """The finished shards as cache.json lists them; None while one is missing."""
        if len(self.finished) < len(self.ranges):
            return None
        return [self.finished[number].to_dict() for number in range(len(self.ranges))]

    def _write_index(self) -> dict[str, Any]:
        write_json(self.path / INDEX_FILE, self.index)
        file = self.path / INDEX_FILE
        return Shard(INDEX_FILE, file.stat().st_size, sha256_file(file)).to_dict()

    def _find(self, number: int) -> bool:
        """Whether shard `number` is finished; damaged or foreign files under its number are removed."""
        if number in self.finished:
            return True
        for file in sorted(self.path.glob(f"shard-{number:05d}-*.safetensors")):
            if _whole(file, self.identity):
                self.finished[number] = Shard(file.name, file.stat().st_size, _named_digest(file))
                return True
            file.unlink(missing_ok=True)
        return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder's lock, waited for: its holder is about to let go."""
        with ExitStack() as stack:
            while True:
                self._check_stop()
                try:
                    stack.enter_context(exclusive_lock(self.path))
                    break
                except DataError:
                    time.sleep(POLL_SECONDS)
            yield

    # -- the work

    def run(self, order: Sequence[int]) -> None:
        """Work on whatever no other process works on until every shard is finished."""
        todo = [number for number in order if number not in self.finished]
        while todo:
            idle = True
            for number in todo:
                self._check_stop()
                with ExitStack() as claim:
                    if not self._claim(number, claim):
                        continue
                    idle = False
                    if not self._find(number):
                        self.finished[number] = self._make(number)
                    shutil.rmtree(self._staging(number), ignore_errors=True)
                self.current = 0
                self.report()
            todo = [number for number in todo if number not in self.finished]
            if todo and idle:
                time.sleep(POLL_SECONDS)

    def _claim(self, number: int, stack: ExitStack) -> bool:
        """Lock a shard's staging folder until `stack` closes; False while another process holds it."""
        try:
            stack.enter_context(exclusive_lock(self._staging(number)))
        except (DataError, FileNotFoundError):  # the folder vanishes when its holder is done
            return False
        except OSError as error:
            raise DataError(
                f"{self.path}: could not be written ({error.strerror or error}); free space or fix the "
                "folder's permissions, then run the same command again"
            ) from error
        return True

    def _make(self, number: int) -> Shard:
        """Compute the forwards of a shard that are not in staging yet, and join all of them."""
        staging, rows, size = self._staging(number), self.ranges[number], self.layout.pairs_per_forward
        starts = range(rows.start, rows.stop, size)
        staged = _staged(staging, starts, self.identity)
        for start in starts:
            if start not in staged:
                self._check_stop()
                keys = self.keys[start : min(start + size, rows.stop)]
                values = self.compute(keys)
                check_finite(values, keys)
                name = f"{start:010d}"
                file = write_shard(staging / f"{name}.safetensors", values, self.identity, durable=False)
                staged[start] = (staging / file.name).replace(staging / f"{name}-{file.sha256}.safetensors")
            self.current = min(start + size, rows.stop) - rows.start
            self.report()
        parts = [_load(staged[start]) for start in starts]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shard = write_shard(staging / "joined.safetensors", joined, self.identity)
        name = f"shard-{number:05d}-{shard.sha256}.safetensors"
        os.replace(staging / shard.name, self.path / name)
        return Shard(name, shard.bytes, shard.sha256)

    def finish(self) -> None:
        """Write cache.json with every shard, the last write of all. Who gets here first does it."""
        with self._locked():
            state = read_state(self.path)
            if not state["complete"] or state["shards"] != self._listed():
                write_json(self.path / CACHE_FILE, {**state, "complete": True, "shards": self._listed()})
            with suppress(OSError):  # another process may be looking into its last claim
                (self.path / STAGING).rmdir()

    def _staging(self, number: int) -> Path:
        return self.path / STAGING / f"{number:05d}"

    def _rows_finished(self) -> int:
        return sum(len(self.ranges[number]) for number in self.finished) + self.current

    def report(self) -> None:
        if self.progress:
            self.progress(self._rows_finished(), len(self.keys))

    def _check_stop(self) -> None:
        if self.stop():
            raise Preempted(
                f"stopped by SIGTERM with {self._rows_finished()} of {len(self.keys)} rows in {self.path}; "
                f"resume with: {self.resume_command}"
            )


def _ours(name: str) -> bool:
    return name in (STAGING, INDEX_FILE, ".lock") or name.endswith(".tmp") or name.startswith("shard-")


def _named_digest(file: Path) -> str:
    return file.stem.rpartition("-")[2]


def _whole(file: Path, identity: str) -> bool:
    """Whether a file has the hash its name ends in and was made for the cache `identity`."""
    from safetensors import SafetensorError, safe_open

    try:
        if sha256_file(file) != _named_digest(file):
            return False
        with safe_open(file, "pt") as handle:
            return (handle.metadata() or {}).get("description") == identity
    except (FileNotFoundError, SafetensorError):
        return False


def _staged(staging: Path, starts: Sequence[int], identity: str) -> dict[int, Path]:
    """Forwards that an earlier process finished, by first row; half-written and foreign files are removed."""
    staged = {}
    for file in sorted(staging.iterdir()):
        start = file.name.partition("-")[0]
        if start.isdigit() and int(start) in starts and _whole(file, identity):
            staged[int(start)] = file
        elif file.name != ".lock":
            file.unlink()
    return staged


def _load(file: Path) -> Rows:
    from safetensors.torch import load_file

    return load_file(file)
