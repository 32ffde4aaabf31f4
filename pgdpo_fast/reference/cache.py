"""The reference's part of the loss on disk: one row for every (pair id, draw), in safetensors shards, verified.

`cache.json` (sealed, written last) holds the fingerprint of what the rows depend on and names every other file with
its size and sha256; a shard's name ends in its own sha256. Nothing is read from a file whose bytes changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast.diffusion import Visit
from pgdpo_fast.errors import DataError
from pgdpo_fast.reference.fingerprint import check_equal
from pgdpo_fast.reference.rows import DTYPES, FORMATS, Rows, as_reference, gather, row_tensors
from pgdpo_fast.storage import Shard, check_size, laid_out, open_shard, read_json, verified

__all__ = ["SCHEMA", "Block", "Layout", "ReferenceCache"]

SCHEMA = 1  # version of the layout below and of the numbers in the rows
CACHE_FILE, INDEX_FILE = "cache.json", "index.json"
SHARD_NAME = r"shard-\d{5,}-[0-9a-f]{64}\.safetensors"
REMAKE = "set it back, or make a cache for these settings: pgdpo-fast cache-reference CONFIG --output NEW_FOLDER"


@dataclass(frozen=True)
class Block:
    """Pairs that are visited with the draws 0 .. draws - 1. Row of (ids[i], draw): draw * len(ids) + i."""

    ids: tuple[str, ...]
    draws: int

    @property
    def rows(self) -> int:
        return len(self.ids) * self.draws


@dataclass(frozen=True)
class Layout:
    """How the rows lie on disk. Depends on no process count, so work can be resumed with any.

    Attributes:
        format: see `rows`.
        granularity: of the format "errors"; "any" for the others.
        shape: (C, F, H, W) of the latents.
        dtype: the network's, "bf16" or "fp32".
        pairs_per_forward: pairs the reference saw at once; rows are those of a run that does the same, bit for bit.
        rows_per_shard: rows of every shard but a block's last.
    """

    format: str
    granularity: str
    shape: tuple[int, int, int, int]
    dtype: str
    pairs_per_forward: int
    rows_per_shard: int

    @classmethod
    def of(
        cls,
        format: str,
        granularity: str,
        shape: Sequence[int],
        dtype: str,
        pairs_per_forward: int,
        shard_bytes: int = 64 << 20,
    ) -> Layout:
        """At most `shard_bytes` and 64 forwards per shard: a shard is hashed in whole before its first row is used (40
        ms for 64 MiB), and is the unit that processes share the work by."""
        granularity = granularity if format == "errors" else "any"
        one = cls(format, granularity, tuple(shape), dtype, pairs_per_forward, pairs_per_forward)
        forwards = max(1, min(64, shard_bytes // (one.row_bytes * pairs_per_forward)))
        return replace(one, rows_per_shard=forwards * pairs_per_forward)

    def check(self) -> None:
        """Raise ValueError or TypeError for a layout that `of` never makes."""
        numbers = (*self.shape, self.pairs_per_forward, self.rows_per_shard)
        if self.format not in FORMATS or self.dtype not in DTYPES or len(self.shape) != 4 or min(numbers) < 1:
            raise ValueError(f"layout {self}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(prod(size) * dtype.itemsize for size, dtype in self.tensors.values())

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of a row."""
        return row_tensors(self.format, self.granularity, self.shape, self.dtype)

    def shards(self, blocks: Sequence[Block]) -> list[range]:
        """The rows of every shard. A block begins a new one."""
        ranges, first = [], 0
        for block in blocks:
            last = first + block.rows
            ranges += [range(at, min(at + self.rows_per_shard, last)) for at in range(first, last, self.rows_per_shard)]
            first = last
        return ranges


class ReferenceCache:
    """Read access to a finished cache; rows by (pair id, draw). Can be sent to worker processes.

    Opening checks the seals and the size of every file; a shard is hashed when its first row is wanted, or by `verify`.
    Raises DataError when the folder holds no finished cache or a file is missing, damaged or of another size.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        state = read_state(self.path)
        if not state["complete"]:
            raise DataError(
                f"{self.path}: the reference pass has not finished; run the same cache-reference command "
                "again to resume it"
            )
        where = self.path / CACHE_FILE
        with laid_out(where):
            self.fingerprint: dict[str, Any] = dict(state["fingerprint"])
            self.provenance: dict[str, Any] = dict(state["provenance"])
            self.layout = Layout(**{**state["layout"], "shape": tuple(state["layout"]["shape"])})
            self.layout.check()
            self.shards = [Shard.listed(where, shard) for shard in state["shards"]]
            index = Shard.listed(where, state["index"])
        for shard in self.shards:
            check_size(self.path, shard)
        index_file = verified(self.path, index)
        with laid_out(index_file):
            self.blocks = [Block(tuple(block["ids"]), block["draws"] + 0) for block in read_json(index_file)["blocks"]]
        self._ranges = self.layout.shards(self.blocks)
        if len(self._ranges) != len(self.shards):
            raise DataError(
                f"{self.path / CACHE_FILE}: names {len(self.shards)} shards, its index "
                f"{len(self._ranges)}; delete the folder and make the cache again"
            )
        self._tables: dict[int, Rows] = {}

    def __len__(self) -> int:
        return sum(block.rows for block in self.blocks)

    def __contains__(self, visit: Visit) -> bool:
        id, draw = visit
        _, _, draws = self._positions.get(id, (0, 0, 0))
        return 0 <= draw < draws

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    def require(self, fingerprint: Mapping[str, Any], draws: int) -> None:
        """Raise DataError unless the rows are those of `fingerprint` and cover `draws` draws of every pair of the first
        block; the message names the field, both values and what to do."""
        check_equal(self.path, self.fingerprint, fingerprint, REMAKE)
        held = self.blocks[0].draws
        if draws > held:
            raise DataError(
                f"{self.path}: holds {held} draws per pair, this run visits {draws}; make it for this many "
                "steps, or let draws repeat with training.draws_per_pair, in the cache and in training"
            )

    def rows(self, visits: Sequence[Visit], out: Rows | None = None) -> Rows:
        """Rows of a batch on the host, `[B, ...]` each; into the buffers `out` when given (see `gather`)."""
        places = [self._place(number) for number in self.numbers(visits)]
        for shard, _ in places:
            if shard not in self._tables:
                self._tables[shard] = self._read(shard)
        return gather(self._tables, places, out)

    def get(self, visits: Sequence[Visit], device: torch.device | str = "cpu"):
        """What `preference_loss` takes as its reference for a batch, see `as_reference`."""
        rows = {name: values.to(device) for name, values in self.rows(visits).items()}
        return as_reference(rows, self.layout.format)

    def table(self) -> Rows:
        """All rows in host memory, in the order of `numbers`; for the format "errors", whose rows are a few bytes."""
        shards = [self._read(number) for number in range(len(self.shards))]
        return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}

    def numbers(self, visits: Sequence[Visit]) -> list[int]:
        """Row number of every (pair id, draw); DataError for one that the cache does not hold."""
        numbers = []
        for id, draw in visits:
            first, stride, draws = self._positions.get(id, (0, 0, 0))
            if not 0 <= draw < draws:
                raise DataError(f"{self.path}: holds no draw {draw} of pair {id!r} ({draws} draws of it); {REMAKE}")
            numbers.append(first + draw * stride)
        return numbers

    def verify(self) -> None:
        """Hash every file now. Raises DataError naming the first damaged one."""
        read_state(self.path)
        for shard in self.shards:
            verified(self.path, shard)

    def _read(self, number: int) -> Rows:
        """The rows of a whole shard, memory-mapped; DataError where they are not those of the layout."""
        shard, rows = self.shards[number], len(self._ranges[number])
        handle = open_shard(self.path, shard)
        with laid_out(self.path / shard.name):
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            found = {name: (tuple(values.shape), values.dtype) for name, values in tensors.items()}
            if found != {name: ((rows, *shape), dtype) for name, (shape, dtype) in self.layout.tensors.items()}:
                raise ValueError(f"expected {rows} rows of the format {self.layout.format!r}")
        return tensors

    @cached_property
    def _positions(self) -> dict[str, tuple[int, int, int]]:
        """id -> (row of its draw 0, rows from one draw to the next, draws)."""
        positions, first = {}, 0
        for block in self.blocks:
            positions |= {id: (first + i, len(block.ids), block.draws) for i, id in enumerate(block.ids)}
            first += block.rows
        return positions

    def _place(self, number: int) -> tuple[int, int]:
        """(shard, row in it). Every shard but a block's last has `rows_per_shard` rows."""
        shard, first = 0, 0
        for block in self.blocks:
            if number < first + block.rows:
                at, row = divmod(number - first, self.layout.rows_per_shard)
                return shard + at, row
            first += block.rows
            shard += -(-block.rows // self.layout.rows_per_shard)
        raise IndexError(number)


def read_state(path: Path) -> dict[str, Any]:
    """The sealed content of cache.json, of a finished cache or one being made."""
    if not (path / CACHE_FILE).exists():
        raise DataError(f"{path}: no reference cache; make one with: pgdpo-fast cache-reference CONFIG --output {path}")
    state = read_json(path / CACHE_FILE)
    if state.get("kind") != "reference" or state.get("schema") != SCHEMA:
        raise DataError(
            f"{path}: holds {state.get('kind')!r} of schema {state.get('schema')}, expected 'reference' of "
            f"schema {SCHEMA}; make the cache again with this version, in another folder"
        )
    with laid_out(path / CACHE_FILE):
        state["complete"], state["fingerprint"].items(), state["layout"].items(), state["shards"], state["provenance"]
    return state


def layout_mapping(layout: Layout) -> dict[str, Any]:
    """A layout as plain values."""
    return {**asdict(layout), "shape": list(layout.shape)}
