"""Manifest to latent store: decode both clips of every pair, encode them and the prompt, write verified shards.

Which rows share a shard follows from the manifest and the settings alone; `filling` shares the shards over processes
and goes on after a kill. store.json names each shard when it is finished, with the pairs that were dropped from it.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import prod
from pathlib import Path

import torch

from pgdpo_fast import __version__
from pgdpo_fast.data.clips import content_hashes, in_order, remember_hashes, result_of
from pgdpo_fast.data.codec import Codec
from pgdpo_fast.data.latent_store import INDEX_FILE, SCHEMA, SHARD_NAME, SHARDS, STORE_FILE, LatentStore, read_state
from pgdpo_fast.data.limits import LIMITS, VideoLimits
from pgdpo_fast.data.manifest import Dropped, Manifest, Pair, read_manifest, write_dropped
from pgdpo_fast.data.text import TextEncoder
from pgdpo_fast.data.video import (
    VideoInfo,
    check_clip_options,
    decoder_fingerprint,
    probe_video,
    read_video,
)
from pgdpo_fast.devices import select_dtype
from pgdpo_fast.errors import ConfigError, DataError, Preempted
from pgdpo_fast.filling import STAGING, ShardFolder
from pgdpo_fast.preemption import stoppable
from pgdpo_fast.storage import (
    Shard,
    atomic_file,
    canonical_json,
    check_disk,
    make_folder,
    real_folder,
    sha256_bytes,
    sha256_file,
    write_json,
)

__all__ = ["DROPPED_FILE", "ClipRule", "encode_manifest"]

CLIPS_FILE = "clips.json"  # in staging: hashes of the clips, so that a resumed run reads only what changed
DROPPED_FILE = "dropped.jsonl"


@dataclass(frozen=True)
class ClipRule:
    """How a clip is brought to the size of the store; the arguments of `read_video`.

    `limits` decide which clips are refused, never what the frames of another look like.

    Raises:
        ConfigError: no clip could be read like this.
    """

    frames: int
    height: int
    width: int
    fps: float | None = None
    start: str = "begin"
    short: str = "error"
    limits: VideoLimits = LIMITS

    def __post_init__(self):
        check_clip_options(**vars(self))

    def read(self, path: Path, stop: Callable[[], bool] | None = None) -> torch.Tensor:
        return read_video(path, **vars(self), stop=stop)

    def probe(self, path: Path, stop: Callable[[], bool] | None = None) -> VideoInfo:
        return probe_video(path, frames=self.frames, fps=self.fps, short=self.short, limits=self.limits, stop=stop)

    def to_dict(self) -> dict:
        fps = None if self.fps is None else str(Fraction(self.fps).limit_denominator(1_000_000))
        return {
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "fps": fps,
            "start": self.start,
            "short": self.short,
        }


def encode_manifest(
    manifest: Manifest | str | os.PathLike,
    output: str | os.PathLike,
    *,
    codec: Codec,
    text: TextEncoder,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    start: str = "begin",
    short: str = "error",
    dtype: str = "fp32",
    shard_bytes: int = 256 << 20,
    strict: bool = False,
    max_dropped: float = 1.0,
    limits: VideoLimits = LIMITS,
    provenance: dict | None = None,
    progress: Callable[[int, int], None] | None = None,
    reading: Callable[[str], Callable[[int, int], None]] = lambda title: lambda done, total: None,
    tell: Callable[[str], None] = lambda text: None,
    rank: int = 0,
    world_size: int = 1,
    resume_command: str = "the same call again",
) -> LatentStore:
    """Encode every pair of a manifest into the store folder `output` and return the finished store.

    Both clips pass through `read_video` with the same frames, height, width, fps, start and short, then `codec`; the
    prompt through `text`. Tensors are stored in `dtype`. A pair with an unusable clip is dropped and listed in
    `store.dropped` and dropped.jsonl, or with `strict` is an error. Existing work in `output` made with the same
    settings, the sha256 of every clip among them, is verified, kept and continued. `progress(done, total)` is called
    after every pair; `reading(title)` returns what is called like it as the clips are hashed, and then as the headers
    of pairs are read, before the first is encoded; `tell(line)` is called for every dropped pair, for what of the clips
    8-bit frames cannot hold and for a damaged store.json that was set aside; `provenance` (paths, versions) is recorded
    but decides nothing.
    Calls of several processes, of this `rank` and `world_size` or not, share the work and return when all is done.

    Before the first pair is encoded the headers and packets of all clips are read. A larger share of the manifest's
    rows than `max_dropped` that cannot be used, ties and repeated rows not counted, is an error then, or as soon as
    decoding has brought it about.

    Raises ConfigError on a geometry the codec cannot take (before any work); DataError when the settings differ from
    the store's, naming the field, when the disk is too small, when too many pairs or all are unusable; Preempted on
    SIGTERM, SIGINT or SIGHUP, at once, with `resume_command` in its message.
    """
    if not isinstance(manifest, Manifest):
        manifest = read_manifest(manifest)
    output = Path(output).absolute()
    if not 0 <= max_dropped <= 1:
        raise ConfigError(f"max_dropped={max_dropped}; expected a share from 0 to 1")
    rule = ClipRule(frames, height, width, fps, start, short, limits)
    latent_shape = codec.latent_shape(frames, height, width)
    stored = select_dtype(dtype)
    width, more = text.shapes["text"][1], {name: list(shape) for name, shape in text.shapes.items() if name != "text"}
    pair_bytes = 2 * stored.itemsize * prod(latent_shape)
    per_shard = max(1, min(shard_bytes // pair_bytes, 1024))
    settings = {
        "codec": codec.fingerprint,
        "text": text.fingerprint,
        "clip": rule.to_dict(),
        "decoder": decoder_fingerprint(),
        "dtype": str(stored).removeprefix("torch."),
        "pairs_per_shard": per_shard,
    }
    provenance = {
        "pgdpo_fast": __version__,
        "torch": torch.__version__,
        "manifest": manifest.path.name,
        **(provenance or {}),
    }
    folder = None

    def stopped(name: str) -> str:
        done = folder.done if folder else 0
        return (
            f"stopped by {name} with {done} of {len(manifest)} pairs encoded in {output}; resume with: {resume_command}"
        )

    with stoppable(stopped) as stop:
        try:
            real_folder(output, STAGING)
            make_folder(output)
            clips = [path for pair in manifest.pairs for path in (pair.chosen, pair.rejected)]
            hashes = content_hashes(clips, output / STAGING / CLIPS_FILE, stop, reading("hashing clips"))
            settings["manifest"] = {"pairs": len(manifest), "sha256": _manifest_hash(manifest, hashes)}
            starts = range(0, len(manifest), per_shard)
            folder = ShardFolder(
                output,
                kind="store",
                description=STORE_FILE,
                files=(INDEX_FILE, DROPPED_FILE),
                shard_name=SHARD_NAME,
                read=lambda path: _read_state(path, settings),
                shards=[range(start, min(start + per_shard, len(manifest))) for start in starts],
                piece=1,
                mark=sha256_bytes(canonical_json(settings).encode()),
                stop=stop,
                tell=tell,
                progress=progress,
                holds=lambda file, items: _rows(file).issuperset(items),
            )
            job = _Job(manifest, folder, codec, lru_cache(16)(text.encode), rule, stored, strict, max_dropped, tell)
            job.find()
            todo = [manifest.pairs[index] for number in folder.missing for index in folder.shards[number]]
            text_rows = sum(text.token_count(pair.prompt) for pair in todo)
            check_disk(
                output,
                len(todo) * pair_bytes
                + text_rows * width * stored.itemsize
                + 2 * min(per_shard, len(manifest)) * pair_bytes * bool(todo),
                "encoding the remaining pairs",
            )
            job.probe(reading("reading headers of pairs"))
            if folder.done:
                folder.report()
            with folder.locked():
                if todo:
                    remember_hashes(hashes, output / STAGING / CLIPS_FILE)
                job.begin(
                    {
                        "kind": "latents",
                        "schema": SCHEMA,
                        "complete": False,
                        "settings": settings,
                        "provenance": provenance,
                        "latent_shape": list(latent_shape),
                        "text_dim": width,
                        **({"conditioning": more} if more else {}),
                        SHARDS: [],
                        "dropped": [],
                        "index": None,
                        "truncated_prompts": sum(map(text.truncates, (pair.prompt for pair in manifest.pairs))),
                    }
                )
            folder.fill(job.make, _join, rank, world_size)
            with folder.locked():
                job.finish()
        except Preempted:  # a thread that reads clips saw the signal first
            raise Preempted(stopped(stop.name)) from None
    return LatentStore(output)


def _join(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


@dataclass
class _Job:
    """One call of `encode_manifest`: what pairs are made with, and what is known of store.json."""

    manifest: Manifest
    folder: ShardFolder
    codec: Codec
    encode_text: Callable[[str], dict[str, torch.Tensor]]
    rule: ClipRule
    dtype: torch.dtype
    strict: bool
    max_dropped: float
    tell: Callable[[str], None]
    state: dict | None = None  # store.json as last read or written
    damaged: list[dict] = field(default_factory=list)  # what store.json said of shards that are not whole
    dropped: dict[int, dict] = field(default_factory=dict)  # by this process and by earlier ones

    def __post_init__(self):
        self.folder.listed, self.folder.record = self.listed, self.record

    def listed(self) -> dict[int, Shard | None]:
        """The shards that store.json names."""
        where = self.folder.path / STORE_FILE
        if self.state and where.exists():
            self.state = self.folder.read(self.folder.path)
        entries = self.state[SHARDS] if self.state else []
        return {entry["number"]: entry["file"] and Shard.listed(where, entry["file"]) for entry in entries}

    def find(self) -> None:
        """Take over the whole shards that are there."""
        with self.folder.locked():
            self.state = self.folder.described()
        self.folder.find(lost=self.state is None)
        if self.state:
            size, finished = self.state["settings"]["pairs_per_shard"], self.folder.finished
            self.damaged = [entry for entry in self.state[SHARDS] if entry["number"] not in finished]
            self.dropped = {item["index"]: item for item in self.state["dropped"] if item["index"] // size in finished}
            self.state["dropped"] = [*self.dropped.values()]

    def begin(self, new: dict) -> None:
        """Write store.json, from `new` where there is none; the caller holds the folder's lock."""
        before = self.folder.described()
        state = before or new
        entries = [entry for entry in state[SHARDS] if entry not in self.damaged]
        self.write({**state, "complete": state["complete"] and not self.damaged, SHARDS: entries}, before)
        self.list_shards(self.folder.finished)

    def record(self, number: int) -> None:
        with self.folder.locked():
            self.state = self.folder.read(self.folder.path)
            self.list_shards([number])

    def list_shards(self, numbers: Iterable[int]) -> None:
        """Name finished shards in store.json, with the pairs dropped from them."""
        entries, dropped = list(self.state[SHARDS]), list(self.state["dropped"])
        for number in {*numbers}.difference(entry["number"] for entry in entries):
            shard, items = self.folder.finished[number], self.folder.shards[number]
            rows = _rows(self.folder.path / shard.name) if shard else set()
            entries.append({"number": number, "pairs": len(items), "file": shard and shard.to_dict()})
            dropped += [self.dropped[index] for index in items if index not in rows]
        entries.sort(key=lambda entry: entry["number"])
        dropped.sort(key=lambda item: item["index"])
        self.write({**self.state, SHARDS: entries, "dropped": dropped}, self.state)

    def write(self, state: dict, before: dict | None) -> None:
        """Write store.json where it changes; pairs dropped from shards that are not listed are to be tried again."""
        size, numbers = state["settings"]["pairs_per_shard"], {entry["number"] for entry in state[SHARDS]}
        state["dropped"] = [item for item in state["dropped"] if item["index"] // size in numbers]
        self.state = state
        if state != before:
            write_json(self.folder.path / STORE_FILE, state)

    def finish(self) -> None:
        """Write the index and store.json, unless no pair could be encoded; the caller holds the folder's lock."""
        self.state = self.folder.read(self.folder.path)
        if len(self.state["dropped"]) == len(self.manifest):
            first = self.state["dropped"][0]
            raise DataError(
                f"{self.folder.path}: none of {len(self.manifest)} pairs could be encoded; first: pair {first['id']}, "
                f"{first['reason']} ({first['detail']})"
            )
        _finish(self.folder.path, self.manifest, self.state)
        self.folder.tidy()

    def all_dropped(self) -> list[dict]:
        """Every pair known to be dropped, in the manifest's order."""
        listed = {item["index"]: item for item in self.state["dropped"]} if self.state else {}
        return [item for _, item in sorted({**self.dropped, **listed}.items())]

    def probe(self, progress: Callable[[int, int], None]) -> None:
        """Read the headers and packets of the clips of missing shards, and drop the pairs that cannot be encoded."""
        staged = {path.stem.partition("-")[0] for path in self.folder.path.glob(f"{STAGING}/*/*-*")}
        missing = [index for number in self.folder.missing for index in self.folder.shards[number]]
        todo = [index for index in missing if f"{index:010d}" not in staged]
        notes: dict[str, list[Path]] = {}
        read = zip(todo, in_order(todo, self._probe_pair, self.folder.stop), strict=True)
        for number, (index, found) in enumerate(read, 1):
            progress(number, len(todo))
            if isinstance(found, _Unusable):
                self._drop(index, found)
                continue
            for path, told in found.items():
                for note in told:
                    notes.setdefault(note, []).append(path)
        for note, paths in notes.items():
            self.tell(f"note: {len(paths)} clip(s) are {note}; first: {paths[0]}")
        self._check_share()

    def _probe_pair(self, index: int) -> dict[Path, tuple[str, ...]] | _Unusable:
        pair, found = self.manifest.pairs[index], {}
        for side in ("chosen", "rejected"):
            path = getattr(pair, side)
            try:
                found[path] = self.rule.probe(path, self.folder.stop).notes
            except DataError as error:
                return _Unusable(f"{side} clip unusable", str(error))
        return found

    def _drop(self, index: int, fault: _Unusable) -> None:
        pair, (reason, detail) = self.manifest.pairs[index], fault.args
        if self.strict:
            raise DataError(f"pair {pair.id}: {reason}: {detail}")
        self.dropped[index] = {"index": index, "id": pair.id, "reason": reason, "detail": detail}
        self.tell(f"dropped: pair {pair.id}: {reason}: {detail}")

    def _check_share(self) -> None:
        faults = [*(item for item in self.manifest.dropped if item.fault), *map(_told, self.all_dropped())]
        read = len(self.manifest) + len(self.manifest.dropped)
        if len(faults) > self.max_dropped * read:
            counts = Counter(item.reason for item in faults)
            raise DataError(
                f"{self.manifest.path}: {len(faults)} of {read} rows cannot be used, more than max_dropped "
                f"{self.max_dropped:.3g} allows ({', '.join(f'{n} x {reason}' for reason, n in counts.items())}; "
                f"first: {faults[0].where}: {faults[0].detail or faults[0].reason}); repair them, or allow it with "
                f"--max-dropped {math.ceil(100 * len(faults) / read) / 100:g}"
            )

    def make(self, pieces: Sequence[range]) -> Iterator[dict[str, torch.Tensor] | None]:
        """The tensors of each pair, named by its place in the manifest; None for one that is dropped."""
        wanted = [piece.start for piece in pieces]
        with closing(_prefetched([index for index in wanted if index not in self.dropped], self._read_pair)) as read:
            for index in wanted:
                row = None
                if index not in self.dropped:
                    try:
                        row = self._encode(self.manifest.pairs[index], result_of(next(read)[1], self.folder.stop))
                    except _Unusable as fault:
                        self._drop(index, fault)
                        self._check_share()
                yield row and {f"{index:08d}.{name}": tensor for name, tensor in row.items()}

    def _read_pair(self, index: int) -> dict[str, torch.Tensor]:
        pair, clips = self.manifest.pairs[index], {}
        for side in ("chosen", "rejected"):
            try:
                clips[side] = self.rule.read(getattr(pair, side), self.folder.stop)
            except DataError as error:
                raise _Unusable(f"{side} clip unusable", str(error)) from error
        return clips

    def _encode(self, pair: Pair, clips: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        row = {side: self.codec.encode(video).to(self.dtype) for side, video in clips.items()}
        row |= {name: tensor.to(self.dtype) for name, tensor in self.encode_text(pair.prompt).items()}
        for name, tensor in row.items():
            if not torch.isfinite(tensor).all():
                raise _Unusable(f"{name} not finite once encoded", f"in {self.dtype}; encode and store in fp32")
        return row


def _told(item: dict) -> Dropped:
    """An entry of the state's list of dropped pairs, as the manifest's rows are told."""
    return Dropped(f"pair {item['id']}", item["reason"], item["detail"])


class _Unusable(Exception):
    """Why a pair cannot be encoded: a reason and its particulars."""


def _prefetched(indices: list[int], read: Callable[[int], dict], depth: int = 2) -> Iterator[tuple[int, Future]]:
    """(index, future of read(index)) in order, reading up to `depth` ahead in one other thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead: deque = deque()
        waiting = iter(indices)
        try:
            while True:
                for index in waiting:
                    ahead.append((index, pool.submit(read, index)))
                    if len(ahead) > depth:
                        break
                if not ahead:
                    return
                yield ahead.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _rows(shard: Path) -> set[int]:
    """Numbers of the rows in a whole shard."""
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return {int(key.partition(".")[0]) for key in file.keys()}


def _manifest_hash(manifest: Manifest, hashes: dict[Path, str]) -> str:
    """sha256 over what the store takes from the manifest. Clips count by relative path and content."""
    return sha256_bytes(
        canonical_json(
            [
                {**_index_row(manifest, pair), "sha256": [hashes[pair.chosen], hashes[pair.rejected]]}
                for pair in manifest.pairs
            ]
        ).encode()
    )


def _index_row(manifest: Manifest, pair: Pair) -> dict:
    def written(path: Path | None) -> str | None:
        if path is None:
            return None
        folder = manifest.clips_root
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    return {
        "id": pair.id,
        "prompt": pair.prompt,
        "negative_prompt": pair.negative_prompt,
        "weight": pair.weight,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "chosen": written(pair.chosen),
        "rejected": written(pair.rejected),
        "first_frame": written(pair.first_frame),
    }


def _read_state(output: Path, settings: dict) -> dict:
    """store.json of an earlier or a concurrent call, checked to be of the same settings."""
    state = read_state(output)
    before, now = _flat(state["settings"]), _flat(settings)
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        also = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        why = " because a row or a clip changed" if key == "manifest.sha256" else ""
        raise DataError(
            f"{output}: was made with {key}={before.get(key)!r}, now {key}={now.get(key)!r}{also}{why}; set it back, "
            "choose another output folder, or delete this one"
        )
    return state


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _finish(output: Path, manifest: Manifest, state: dict) -> None:
    """Write the index and then store.json with complete=true, the last write of all."""
    import pyarrow
    import pyarrow.parquet

    dropped = {item["index"] for item in state["dropped"]}
    rows = [
        {**_index_row(manifest, pair), "shard": index // state["settings"]["pairs_per_shard"], "row": index}
        for index, pair in enumerate(manifest.pairs)
        if index not in dropped
    ]
    text, real, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    schema = pyarrow.schema(
        [
            ("id", text),
            ("prompt", text),
            ("negative_prompt", text),
            ("weight", real),
            ("chosen_score", real),
            ("rejected_score", real),
            ("chosen", text),
            ("rejected", text),
            ("first_frame", text),
            ("shard", whole),
            ("row", whole),
        ]
    )
    with atomic_file(output / INDEX_FILE) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary)
        index = Shard(INDEX_FILE, temporary.stat().st_size, sha256_file(temporary))
    write_dropped(output / DROPPED_FILE, (*manifest.dropped, *map(_told, state["dropped"])))
    state.update(index=index.to_dict(), complete=True)
    write_json(output / STORE_FILE, state)
