"""Manifest to latent store: decode both clips of every pair, encode them and the prompt, write verified shards.

Which rows share a shard follows from the manifest and the settings alone, and each finished row waits in `staging/`
under its own hash. So a run killed anywhere is continued by the same call, loses at most the row it was working on,
and ends with the same bytes as a run that was never interrupted.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import prod
from pathlib import Path

import torch

from pgdpo_fast import __version__
from pgdpo_fast.data.clips import content_hashes, in_order, remember_hashes, result_of
from pgdpo_fast.data.codec import Codec
from pgdpo_fast.data.latent_store import INDEX_FILE, SCHEMA, SHARD_NAME, STORE_FILE, LatentStore, read_state
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
from pgdpo_fast.errors import ConfigError, DamagedError, DataError, Preempted
from pgdpo_fast.preemption import Stopping, stoppable
from pgdpo_fast.storage import (
    Shard,
    atomic_file,
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
    verified,
    write_json,
    write_shard,
)

__all__ = ["DROPPED_FILE", "ClipRule", "encode_manifest"]

STAGING = "staging"
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
    tell: Callable[[str], None] = lambda text: None,
    resume_command: str = "the same call again",
) -> LatentStore:
    """Encode every pair of a manifest into the store folder `output` and return the finished store.

    Both clips pass through `read_video` with the same frames, height, width, fps, start and short, then `codec`; the
    prompt through `text`. Tensors are stored in `dtype`. A pair with an unusable clip is dropped and listed in
    `store.dropped` and dropped.jsonl, or with `strict` is an error. Existing work in `output` made with the same
    settings, the sha256 of every clip among them, is verified, kept and continued. `progress(done, total)` is called
    after every pair, `tell(line)` for every dropped pair, for what of the clips 8-bit frames cannot hold and
    for a damaged store.json that was set aside; `provenance` (paths, versions) is recorded but decides nothing.

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
    done = 0

    def count(now: int, total: int) -> None:
        nonlocal done
        done = now
        if progress:
            progress(now, total)

    def stopped(name: str) -> str:
        return (
            f"stopped by {name} with {done} of {len(manifest)} pairs encoded in {output}; resume with: {resume_command}"
        )

    with stoppable(stopped) as stop, exclusive_lock(output):
        try:
            remove_temporaries(output)
            real_folder(output, STAGING)
            clips = [path for pair in manifest.pairs for path in (pair.chosen, pair.rejected)]
            hashes = content_hashes(clips, output / STAGING / CLIPS_FILE, stop)
            settings["manifest"] = {"pairs": len(manifest), "sha256": _manifest_hash(manifest, hashes)}
            state = _load_state(output, settings, tell)
            known = state is not None
            state = state or {
                "kind": "latents",
                "schema": SCHEMA,
                "complete": False,
                "settings": settings,
                "provenance": provenance,
                "latent_shape": list(latent_shape),
                "text_dim": width,
                **({"conditioning": more} if more else {}),
                "groups": [],
                "dropped": [],
                "index": None,
                "truncated_prompts": sum(map(text.truncates, (pair.prompt for pair in manifest.pairs))),
            }
            job = _Job(
                manifest,
                output,
                codec,
                lru_cache(16)(text.encode),
                rule,
                stored,
                state,
                strict,
                max_dropped,
                stop,
                count,
                tell,
            )
            kept = job.verify_groups(known)
            todo = [number for number in range(-(-len(manifest) // per_shard)) if number not in kept]
            text_rows = sum(text.token_count(pair.prompt) for number in todo for pair in job.pairs(number))
            check_disk(
                output,
                sum(len(job.pairs(number)) for number in todo) * pair_bytes
                + text_rows * width * stored.itemsize
                + 2 * min(per_shard, len(manifest)) * pair_bytes * bool(todo),
                "encoding the remaining pairs",
            )
            job.probe(todo)
            job.advance(sum(len(job.pairs(number)) for number in kept))
            if todo:
                remember_hashes(hashes, output / STAGING / CLIPS_FILE)
                state["complete"] = False
                write_json(output / STORE_FILE, state)
            for number in todo:
                job.encode_group(number)
            if len(state["dropped"]) == len(manifest):
                first = state["dropped"][0]
                raise DataError(
                    f"{output}: none of {len(manifest)} pairs could be encoded; first: pair {first['id']}, "
                    f"{first['reason']} ({first['detail']})"
                )
            _finish(output, manifest, state)
        except Preempted:  # a thread that reads clips saw the signal first
            raise Preempted(stopped(stop.name)) from None
    return LatentStore(output)


@dataclass
class _Job:
    """One call of `encode_manifest`: what it works with and how far it is."""

    manifest: Manifest
    output: Path
    codec: Codec
    encode_text: Callable[[str], dict[str, torch.Tensor]]
    rule: ClipRule
    dtype: torch.dtype
    state: dict
    strict: bool
    max_dropped: float
    stop: Stopping
    progress: Callable[[int, int], None]
    tell: Callable[[str], None]
    done: int = 0
    dropped: dict[int, dict] = field(default_factory=dict)
    found: dict[int, Shard] = field(default_factory=dict)  # whole shards that lack a row: a dropped one, or for a fault

    @property
    def mark(self) -> str:
        """What a shard carries, so that one of another store is never taken for this one's."""
        return sha256_bytes(canonical_json(self.state["settings"]).encode())

    def indices(self, number: int) -> range:
        size = self.state["settings"]["pairs_per_shard"]
        return range(number * size, min((number + 1) * size, len(self.manifest)))

    def pairs(self, number: int) -> list[Pair]:
        return [self.manifest.pairs[index] for index in self.indices(number)]

    def probe(self, numbers: list[int]) -> None:
        """Read the headers and packets of the clips of these shards, and drop the pairs that cannot be encoded."""
        staged = {path.stem.partition("-")[0] for path in (self.output / STAGING).glob("*-*")}
        todo = [index for number in numbers for index in self.indices(number) if f"{index:08d}" not in staged]
        notes: dict[str, list[Path]] = {}
        for index, found in zip(todo, in_order(todo, self._probe_pair, self.stop), strict=True):
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
                found[path] = self.rule.probe(path, self.stop).notes
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
        faults = [item for item in self.manifest.dropped if item.fault] + [
            _told(item) for item in (*self.state["dropped"], *self.dropped.values())
        ]
        read = len(self.manifest) + len(self.manifest.dropped)
        if len(faults) > self.max_dropped * read:
            counts = Counter(item.reason for item in faults)
            raise DataError(
                f"{self.manifest.path}: {len(faults)} of {read} rows cannot be used, more than max_dropped "
                f"{self.max_dropped:.3g} allows ({', '.join(f'{n} x {reason}' for reason, n in counts.items())}; "
                f"first: {faults[0].where}: {faults[0].detail or faults[0].reason}); repair them, or allow it with "
                f"--max-dropped {math.ceil(100 * len(faults) / read) / 100:g}"
            )

    def verify_groups(self, known: bool) -> set[int]:
        """Numbers of the finished shards that are whole; the others leave the state, to be encoded again.

        Shards that store.json does not list, because it was lost or the writer killed before it, are found by the hash
        in their name. Without a store.json (`known`) those of another store are an error, otherwise they are removed.
        """
        where, whole, listed = self.output / STORE_FILE, [], set()
        for group in self.state["groups"]:
            try:
                if group["file"]:
                    shard = Shard.listed(where, group["file"])
                    verified(self.output, shard)
                    listed.add(shard.name)
                whole.append(group)
            except DataError:
                real_path(self.output, group["file"]["name"]).unlink(missing_ok=True)
        numbers = {group["number"] for group in whole}
        size = self.state["settings"]["pairs_per_shard"]
        self.state["dropped"] = [item for item in self.state["dropped"] if item["index"] // size in numbers]
        for path in sorted(self.output.glob("shard-*")):
            if path.name in listed or not re.fullmatch(SHARD_NAME, path.name):
                continue
            number, found = int(path.name.split("-")[1].partition(".")[0]), hashed_shard(path)
            if found and found[1] != self.mark and not known:
                raise DataError(
                    f"{path}: belongs to a store of other settings, whose store.json is lost; set them back, or choose "
                    "another output folder"
                )
            if not found or found[1] != self.mark or number in numbers or not self.indices(number):
                path.unlink()
            elif len(_rows(path)) == len(self.indices(number)):
                whole.append({"number": number, "pairs": len(self.indices(number)), "file": found[0].to_dict()})
                numbers.add(number)
            else:
                self.found[number] = found[0]
        self.state["groups"] = sorted(whole, key=lambda group: group["number"])
        return numbers

    def encode_group(self, number: int) -> None:
        """Encode the rows of one shard, write it, record it in store.json, and clear its staged rows."""
        staged, file = _staged_rows(self.output / STAGING, self.indices(number)), self.found.get(number)
        finished = _rows(self.output / file.name) if file else ()
        here = {*staged, *finished, *self.dropped}
        missing = [index for index in self.indices(number) if index not in here]
        self.advance(len(self.indices(number)) - len(missing))
        for index, clips in _prefetched(missing, self._read_pair):
            self.stop.check()
            try:
                staged[index] = self._stage(index, result_of(clips, self.stop))
            except _Unusable as fault:
                self._drop(index, fault)
                self._check_share()
            self.advance(1)

        tensors = _load(self.output / file.name) if file else {}
        for index in sorted(staged):
            tensors.update({f"{index:08d}.{name}": tensor for name, tensor in _load(staged[index]).items()})
        path = self.output / f"shard-{number:05d}.safetensors"
        whole = write_shard(path, tensors, self.mark, hashed=True) if tensors else None
        if file and file != whole:
            real_path(self.output, file.name).unlink()
        self.state["groups"] = sorted(
            [
                *self.state["groups"],
                {"number": number, "pairs": len(self.indices(number)), "file": whole and whole.to_dict()},
            ],
            key=lambda group: group["number"],
        )
        dropped = [self.dropped.pop(index) for index in self.indices(number) if index in self.dropped]
        self.state["dropped"] = sorted([*self.state["dropped"], *dropped], key=lambda item: item["index"])
        write_json(self.output / STORE_FILE, self.state)
        for path in staged.values():
            path.unlink()

    def advance(self, count: int) -> None:
        self.done += count
        if count:
            self.progress(self.done, len(self.manifest))

    def _read_pair(self, index: int) -> dict[str, torch.Tensor]:
        pair, clips = self.manifest.pairs[index], {}
        for side in ("chosen", "rejected"):
            try:
                clips[side] = self.rule.read(getattr(pair, side), self.stop)
            except DataError as error:
                raise _Unusable(f"{side} clip unusable", str(error)) from error
        return clips

    def _stage(self, index: int, clips: dict[str, torch.Tensor]) -> Path:
        """Encode one pair and leave it in staging under a name that ends in the hash of its bytes."""
        row = {side: self.codec.encode(video).to(self.dtype) for side, video in clips.items()}
        told = self.encode_text(self.manifest.pairs[index].prompt)
        row |= {name: tensor.to(self.dtype) for name, tensor in told.items()}
        for name, tensor in row.items():
            if not torch.isfinite(tensor).all():
                raise _Unusable(f"{name} not finite once encoded", f"in {self.dtype}; encode and store in fp32")
        staging = real_folder(self.output, STAGING)
        return staging / write_shard(staging / f"{index:08d}.safetensors", row, durable=False, hashed=True).name


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


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _rows(shard: Path) -> set[int]:
    """Numbers of the rows in a whole shard."""
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return {int(key.partition(".")[0]) for key in file.keys()}


def _staged_rows(staging: Path, indices: Iterable[int]) -> dict[int, Path]:
    """Rows finished by an earlier run. Half-written or damaged ones are removed; so are rows of finished shards."""
    rows = {}
    for path in sorted(staging.glob("*")) if real_folder(staging.parent, staging.name).is_dir() else ():
        if path.name == CLIPS_FILE:
            continue
        index = path.stem.partition("-")[0]
        if index.isdigit() and int(index) > max(indices):
            continue
        if index.isdigit() and int(index) in indices and hashed_shard(path):
            rows[int(index)] = path
        elif path.is_symlink() or not path.is_dir():
            path.unlink()
    return rows


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


def _load_state(output: Path, settings: dict, tell: Callable[[str], None]) -> dict | None:
    """The store.json of an earlier run with the same settings; None in a new folder and where it is damaged."""
    where = real_path(output, STORE_FILE)
    if where.exists():
        try:
            state = read_state(output)
        except DamagedError as error:
            tell(f"{error}; set aside as {set_aside(where).name}, the whole shards are found by their hashes")
    if not where.exists():
        foreign = [path.name for path in output.iterdir() if not _ours(path.name)]
        if foreign:
            raise DataError(
                f"{output}: not empty and no store (it holds {sorted(foreign)[0]}); choose another output folder"
            )
        return None
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


def _ours(name: str) -> bool:
    fixed = "|".join(map(re.escape, (STAGING, INDEX_FILE, DROPPED_FILE, ".lock")))
    return bool(re.fullmatch(rf"{fixed}|\..+\.tmp|{STORE_FILE}\.damaged.*|{SHARD_NAME}", name))


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
    shutil.rmtree(output / STAGING, ignore_errors=True)
