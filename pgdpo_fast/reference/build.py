"""Fill a reference cache: one forward after the other, by any number of processes, resumable at any kill.

Which rows share a forward and a shard follows from the settings alone. A process claims a shard (a lock the system
releases when it dies), leaves each finished forward in `staging/` under its own hash, and joins them to a shard whose
name ends in its hash. So processes started together or later share the work, a dead one's shard is taken over, and a
kill loses at most the forward it was in.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast import __version__
from pgdpo_fast.diffusion import Visit
from pgdpo_fast.errors import BusyError, DamagedError, DataError
from pgdpo_fast.preemption import Stopping, stoppable
from pgdpo_fast.reference.cache import (
    CACHE_FILE,
    INDEX_FILE,
    REMAKE,
    SCHEMA,
    SHARD_NAME,
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
    hashed_shard,
    real_folder,
    real_path,
    remove_temporaries,
    set_aside,
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
    compute: Callable[[Sequence[Visit]], Rows],
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda text: None,
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
        compute: rows `[B, ...]` of up to `layout.pairs_per_forward` visits.
        provenance: recorded (where weights came from, versions), decides nothing.
        progress: called with (rows finished, rows in all) after every forward and shard.
        tell: called with lines a person should read.
        rank, world_size: of this process, to start on shards the others do not start on. All return when all is done.

    Raises:
        DataError: the folder holds another cache (naming the field), or the disk is full; finished work stays.
        NonFiniteError: a row is not finite; nothing of its forward is kept.
        Preempted: SIGTERM, SIGINT or SIGHUP came; the message holds `resume_command`.
    """
    ids = [id for block in blocks for id in block.ids]
    if len(set(ids)) < len(ids):
        raise ValueError("blocks: expected every pair id once")
    path = Path(path).absolute()
    job = _Job(path, dict(fingerprint), list(blocks), layout, compute, progress, tell)

    def stopped(name: str) -> str:
        return (
            f"stopped by {name} with {job.rows_finished()} of {len(job.visits)} rows in {path}; "
            f"resume with: {resume_command}"
        )

    with stoppable(stopped) as job.stopping:
        if (larger := _larger(path, fingerprint, blocks, layout)) is not None:
            return larger
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
    compute: Callable[[Sequence[Visit]], Rows]
    progress: Callable[[int, int], None] | None
    tell: Callable[[str], None]
    stopping: Stopping = field(default_factory=Stopping)

    def __post_init__(self):
        self.ranges = self.layout.shards(self.blocks)
        self.visits = [Visit(id, draw) for block in self.blocks for draw in range(block.draws) for id in block.ids]
        self.index = {"blocks": [{"ids": list(block.ids), "draws": block.draws} for block in self.blocks]}
        depends = [self.fingerprint, layout_mapping(self.layout), self.index]
        # every shard carries it, so that one from another cache is never taken for this one's
        self.mark = sha256_bytes(canonical_json(depends).encode())
        self.finished: dict[int, Shard] = {}
        self.lost = False  # whether what cache.json said is unknown because it is damaged
        self.current = 0  # rows finished of the shard being worked on

    # -- the folder

    def open(self, provenance: dict[str, Any]) -> None:
        """Make the folder this job's, or check that it is; find what is finished; check the disk for the rest."""
        with self._locked():
            remove_temporaries(self.path, CACHE_FILE, INDEX_FILE)
            self.lost = self._state() is None and any(self.path.glob(f"{CACHE_FILE}.damaged*"))
        for number in range(len(self.ranges)):
            if self._find(number):
                shutil.rmtree(self._staging(number), ignore_errors=True)
        self.report()
        missing = len(self.visits) - self.rows_finished()
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
        """cache.json of an earlier or a concurrent call, checked to be of the same cache; None in a new folder and
        where it is damaged."""
        where = real_path(self.path, CACHE_FILE)
        real_folder(self.path, STAGING)
        state = None
        if where.exists():
            try:
                state = read_state(self.path)
            except DamagedError as error:
                self.tell(f"{error}; set aside as {set_aside(where).name}, the whole shards are found by their hashes")
        if state:
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
        """Whether shard `number` is finished; damaged files under its number are removed, and so are those of an
        earlier extent of this cache. Where cache.json is damaged, other whole shards are an error."""
        if number in self.finished:
            return True
        for file in sorted(self.path.glob(f"shard-{number:05d}-*.safetensors")):
            found = hashed_shard(file)
            if found and found[1] == self.mark:
                self.finished[number] = found[0]
                return True
            if found and self.lost:
                raise DataError(
                    f"{file}: belongs to a cache of other settings, whose cache.json is damaged; set them back, or "
                    "choose another output folder"
                )
            file.unlink(missing_ok=True)
        return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder's lock, waited for: its holder is about to let go."""
        with ExitStack() as stack:
            while True:
                self.stopping.check()
                try:
                    stack.enter_context(exclusive_lock(self.path))
                    break
                except BusyError:
                    time.sleep(POLL_SECONDS)
            yield

    # -- the work

    def run(self, order: Sequence[int]) -> None:
        """Work on whatever no other process works on until every shard is finished."""
        todo = [number for number in order if number not in self.finished]
        while todo:
            idle = True
            for number in todo:
                self.stopping.check()
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
        except BusyError:
            return False
        return True

    def _make(self, number: int) -> Shard:
        """Compute the forwards of a shard that are not in staging yet, and join all of them."""
        staging, rows, size = self._staging(number), self.ranges[number], self.layout.pairs_per_forward
        starts = range(rows.start, rows.stop, size)
        staged = _staged(staging, starts, self.mark)
        for start in starts:
            if start not in staged:
                self.stopping.check()
                visits = self.visits[start : min(start + size, rows.stop)]
                values = self.compute(visits)
                check_finite(values, visits)
                target = staging / f"{start:010d}.safetensors"
                staged[start] = staging / write_shard(target, values, self.mark, False, hashed=True).name
            self.current = min(start + size, rows.stop) - rows.start
            self.report()
        parts = [_load(staged[start]) for start in starts]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shard = write_shard(staging / "joined.safetensors", joined, self.mark)
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
        return real_folder(self.path, f"{STAGING}/{number:05d}")

    def rows_finished(self) -> int:
        return sum(len(self.ranges[number]) for number in self.finished) + self.current

    def report(self) -> None:
        if self.progress:
            self.progress(self.rows_finished(), len(self.visits))


def _ours(name: str) -> bool:
    return bool(re.fullmatch(rf"{STAGING}|{INDEX_FILE}|\.lock|\..+\.tmp|{CACHE_FILE}\.damaged.*|{SHARD_NAME}", name))


def _staged(staging: Path, starts: Sequence[int], mark: str) -> dict[int, Path]:
    """Forwards that an earlier process finished, by first row; half-written and foreign files are removed."""
    staged = {}
    for file in sorted(staging.iterdir()):
        start = file.name.partition("-")[0]
        found = hashed_shard(file) if start.isdigit() and int(start) in starts else None
        if found and found[1] == mark:
            staged[int(start)] = file
        elif file.name != ".lock" and (file.is_symlink() or not file.is_dir()):
            file.unlink()
    return staged


def _load(file: Path) -> Rows:
    from safetensors.torch import load_file

    return load_file(file)
