"""A folder of encoded pairs: latents of both clips and the prompt embedding, memory-mapped, read in any order by id.

`store.json` (sealed) names the settings everything was made with and the size and sha256 of every other file. A shard
is hashed in full before its first row is handed out by this process, so damage is an error and never a tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch

from pgdpo_fast.data.manifest import Dropped
from pgdpo_fast.errors import DataError
from pgdpo_fast.storage import (
    Shard,
    canonical_json,
    check_size,
    laid_out,
    open_shard,
    read_json,
    sha256_bytes,
    verified,
)

__all__ = ["SCHEMA", "Example", "LatentStore"]

SCHEMA = 1  # version of the layout below
STORE_FILE, INDEX_FILE = "store.json", "index.parquet"
SHARDS = "groups"  # the key of store.json that lists the shards, as every version has written it
SHARD_NAME = r"shard-\d{5,}(-[0-9a-f]{64})?\.safetensors"  # without the hash in stores of 0.1.0


@dataclass(frozen=True)
class Example:
    """One pair as the trainer sees it: fp32 latents [C, F, H, W] of both clips and, by name, what the network is told.

    `conditioning` always has "text", the fp32 prompt embedding [L, D].
    """

    id: str
    prompt: str
    chosen: torch.Tensor
    rejected: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    weight: float = 1.0


class LatentStore:
    """Read access to a finished store. Cheap to open: sizes are checked at once, hashes when a shard is first used.

    The hash check costs one pass over each shard per process (1-2 GB/s); damage that strikes after it, while the file
    is mapped, is not seen. Instances can be sent to worker processes. Raises DataError when the folder is no store,
    its encoding has not finished, or a file is missing, of the wrong size or changed.
    """

    def __init__(self, path: str | os.PathLike):
        import pyarrow.parquet

        self.path = Path(path).absolute()
        if not self.path.is_dir():
            raise DataError(
                f"{self.path}: no such store; make one with: pgdpo-fast encode --manifest <file> --output {self.path}"
            )
        where = self.path / STORE_FILE
        self.metadata = read_state(self.path)
        if not self.metadata["complete"]:
            done = sum(shard["pairs"] for shard in self.metadata[SHARDS])
            raise DataError(
                f"{self.path}: encoding has not finished ({done} of {self.settings['manifest']['pairs']} pairs); "
                "run the same encode command again to resume it"
            )
        self._shards = [
            Shard.listed(where, shard["file"]) if shard["file"] else None for shard in self.metadata[SHARDS]
        ]
        self._index = Shard.listed(where, self.metadata["index"])
        for shard in filter(None, self._shards):
            check_size(self.path, shard)
        index = verified(self.path, self._index)
        with laid_out(where):
            if [shard["number"] for shard in self.metadata[SHARDS]] != list(range(len(self._shards))):
                raise ValueError("its shards are not numbered in order")
        with laid_out(index):
            rows = pyarrow.parquet.read_table(index).to_pylist()
            for row in rows:
                if not 0 <= row["shard"] < len(self._shards) or self._shards[row["shard"]] is None:
                    raise ValueError(f"pair {row['id']!r} lies in shard {row['shard']}, which there is not")
                row["prompt"], row["weight"], int(row["row"])
        self._rows = {row["id"]: row for row in rows}
        self._handles: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Example]:
        return map(self.get, self.ids)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}}

    @property
    def ids(self) -> list[str]:
        """Pair ids in manifest order."""
        return list(self._rows)

    @cached_property
    def kin(self) -> dict[str, str]:
        """Of every pair the smallest id among those it is tied to by a prompt or a clip, directly or through others."""
        parent: dict[object, object] = {}

        def root(node: object) -> object:
            while (above := parent.setdefault(node, node)) != node:
                parent[node] = node = parent[above]
            return node

        for id, row in self._rows.items():
            for key in (("prompt", row["prompt"]), ("clip", row["chosen"]), ("clip", row["rejected"])):
                parent[root(key)] = root(("id", id))
        smallest: dict[object, str] = {}
        for id in sorted(self._rows):
            smallest.setdefault(root(("id", id)), id)
        return {id: smallest[root(("id", id))] for id in self._rows}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of every clip's latents."""
        return tuple(self.metadata["latent_shape"])

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of `Example.conditioning` by name; -1 stands for a number of rows that varies."""
        more = self.metadata.get("conditioning", {})
        return {"text": (-1, self.metadata["text_dim"]), **{name: tuple(shape) for name, shape in more.items()}}

    @property
    def fps(self) -> float | None:
        """Frames per second of every clip; None where each kept its source's own."""
        fps = self.settings["clip"]["fps"]
        return None if fps is None else float(Fraction(fps))

    @property
    def settings(self) -> dict:
        """Codec, text encoder, sampling of frames, decoder and manifest: all that decides the content."""
        return self.metadata["settings"]

    @property
    def dropped(self) -> list[Dropped]:
        """Pairs of the manifest that could not be encoded."""
        return [Dropped(f"pair {item['id']}", item["reason"], item["detail"]) for item in self.metadata["dropped"]]

    @property
    def fingerprint(self) -> str:
        """sha256 over the settings and the hashes of shards and index: equal exactly when the content is."""
        content = [self.settings, [shard and shard.sha256 for shard in self._shards], self.metadata["index"]["sha256"]]
        return sha256_bytes(canonical_json(content).encode())

    @property
    def bytes(self) -> int:
        """Size of shards and index on disk."""
        return sum(shard.bytes for shard in filter(None, self._shards)) + self._index.bytes

    def row(self, id: str) -> dict:
        """What the index knows of a pair, without touching tensors: prompt, weight, scores, file names."""
        try:
            return self._rows[id]
        except KeyError:
            raise DataError(
                f"{self.path}: holds no pair {id!r}; it has {len(self)} pairs, the first is "
                f"{next(iter(self._rows), None)!r}"
            ) from None

    def text_rows(self) -> dict[str, int]:
        """Rows of every pair's text embedding, from the shards' headers alone. Raises DataError on a damaged one."""
        from safetensors import SafetensorError, safe_open

        places: dict[int, list[dict]] = {}
        for row in self._rows.values():
            places.setdefault(row["shard"], []).append(row)
        counts = {}
        for number, rows in places.items():
            shard = self._shards[number]
            try:
                with safe_open(check_size(self.path, shard), "pt") as file:
                    for row in rows:
                        counts[row["id"]] = file.get_slice(f"{row['row']:08d}.text").get_shape()[0]
            except (OSError, SafetensorError, IndexError):
                verified(self.path, shard)
                with laid_out(self.path / shard.name):
                    raise
        return counts

    def get(self, id: str) -> Example:
        """One pair. Raises DataError for an unknown id or a damaged shard."""
        row = self.row(id)
        handle = self._handle(row["shard"])
        with laid_out(self.path / self._shards[row["shard"]].name):
            tensors = {
                name: handle.get_tensor(f"{row['row']:08d}.{name}").float()
                for name in ("chosen", "rejected", *self.conditioning)
            }
            wanted = {"chosen": self.shape, "rejected": self.shape, **self.conditioning}
            for name, shape in wanted.items():
                found = tuple(tensors[name].shape)
                if len(found) != len(shape) or any(n not in (-1, have) for n, have in zip(shape, found, strict=True)):
                    raise ValueError(f"{name} of pair {id!r} is {list(found)}, the store holds {list(shape)}")
        chosen, rejected = tensors.pop("chosen"), tensors.pop("rejected")
        return Example(id, row["prompt"], chosen, rejected, tensors, row["weight"])

    def verify(self) -> None:
        """Hash every file now. Raises DataError naming the first damaged one."""
        for shard in filter(None, self._shards):
            verified(self.path, shard)
        verified(self.path, self._index)

    def _handle(self, number: int):
        if number not in self._handles:
            self._handles[number] = open_shard(self.path, self._shards[number])
        return self._handles[number]


def read_state(path: Path) -> dict:
    """The sealed content of store.json, of a finished store or one being made, with everything in it that is read."""
    where = path / STORE_FILE
    state = read_json(where)
    if state.get("kind") != "latents" or state.get("schema") != SCHEMA:
        raise DataError(
            f"{path}: holds {state.get('kind')!r} of schema {state.get('schema')}, expected 'latents' of "
            f"schema {SCHEMA}; make it with this version, in another folder"
        )
    with laid_out(where):
        state["settings"]["manifest"]["pairs"], state["truncated_prompts"] + 0
        state["settings"]["pairs_per_shard"] + 0, state["text_dim"] + 0
        for shape in state.get("conditioning", {}).values():
            tuple(map(int, shape))
        if len(tuple(map(int, state["latent_shape"]))) != 4:
            raise ValueError("latent_shape is not of four numbers")
        for shard in state[SHARDS]:
            shard["number"] + shard["pairs"]
            if shard["file"] and not re.fullmatch(SHARD_NAME, Shard.listed(where, shard["file"]).name):
                raise ValueError(f"{shard['file']['name']!r} is no shard")
        if state["complete"]:
            Shard.listed(where, state["index"])
        for item in state["dropped"]:
            item["index"] + 0, item["id"], item["reason"], item["detail"]
    return state
