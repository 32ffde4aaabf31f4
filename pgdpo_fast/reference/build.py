"""Fill a reference cache: one forward after the other, by any number of processes, resumable at any kill.

Which rows share a forward and a shard follows from the settings alone; `filling` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast import __version__
from pgdpo_fast.diffusion import Visit
from pgdpo_fast.errors import DataError
from pgdpo_fast.filling import ShardFolder
from pgdpo_fast.preemption import stoppable
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
from pgdpo_fast.storage import Shard, canonical_json, check_disk, sha256_bytes, sha256_file, write_json

__all__ = ["build_cache"]


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
    visits = [Visit(id, draw) for block in blocks for draw in range(block.draws) for id in block.ids]
    index = {"blocks": [{"ids": list(block.ids), "draws": block.draws} for block in blocks]}
    folder = None

    def stopped(name: str) -> str:
        return (
            f"stopped by {name} with {folder.done if folder else 0} of {len(visits)} rows in {path}; "
            f"resume with: {resume_command}"
        )

    def read(path: Path) -> dict[str, Any]:
        state = read_state(path)
        check_equal(path, state["fingerprint"], dict(fingerprint), REMAKE)
        check_equal(path, state["layout"], layout_mapping(layout), REMAKE)
        return state

    def make(pieces: Sequence[range]) -> Iterator[Rows]:
        for piece in pieces:
            asked = visits[piece.start : piece.stop]
            rows = compute(asked)
            check_finite(rows, asked)
            yield rows

    with stoppable(stopped) as stop:
        if (larger := _larger(path, fingerprint, blocks, layout)) is not None:
            return larger
        folder = ShardFolder(
            path,
            kind="reference cache",
            description=CACHE_FILE,
            files=(INDEX_FILE,),
            shard_name=SHARD_NAME,
            read=read,
            shards=layout.shards(blocks),
            piece=layout.pairs_per_forward,
            mark=sha256_bytes(canonical_json([dict(fingerprint), layout_mapping(layout), index]).encode()),
            stop=stop,
            tell=tell,
            progress=progress,
        )
        with folder.locked():
            lost = folder.described() is None and any(path.glob(f"{CACHE_FILE}.damaged*"))
        folder.find(lost)
        folder.report()
        if missing := folder.total - folder.done:
            check_disk(
                path,
                (missing + layout.rows_per_shard) * layout.row_bytes,
                f"the reference cache ({missing} rows of {layout.row_bytes} bytes)",
            )
        with folder.locked():
            _begin(folder, fingerprint, layout, index, dict(provenance or {}))
        folder.fill(make, _join, rank, world_size)
        with folder.locked():  # who gets here first does it
            state = folder.read(path)
            if not state["complete"] or state["shards"] != _listing(folder):
                write_json(path / CACHE_FILE, {**state, "complete": True, "shards": _listing(folder)})
            folder.tidy()
    return ReferenceCache(path)


def _begin(
    folder: ShardFolder, fingerprint: Mapping[str, Any], layout: Layout, index: dict, provenance: dict[str, Any]
) -> None:
    """Write the index and cache.json, unless that is there and still true."""
    state, where = folder.described(), folder.path / INDEX_FILE
    if state and state["complete"]:
        folder.find(False)  # another process may just have finished it
    write_json(where, index)
    if state is None or state["complete"] and state["shards"] != _listing(folder):
        write_json(
            folder.path / CACHE_FILE,
            {
                "kind": "reference",
                "schema": SCHEMA,
                "complete": False,
                "fingerprint": dict(fingerprint),
                "layout": layout_mapping(layout),
                "index": Shard(INDEX_FILE, where.stat().st_size, sha256_file(where)).to_dict(),
                "shards": [],
                "provenance": {"pgdpo_fast": __version__, "torch": torch.__version__, **provenance},
            },
        )


def _listing(folder: ShardFolder) -> list[dict[str, Any]] | None:
    """The finished shards as cache.json lists them; None while one is missing."""
    if folder.missing:
        return None
    return [folder.finished[number].to_dict() for number in range(len(folder.shards))]


def _join(parts: Sequence[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
