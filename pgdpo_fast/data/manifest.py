"""Preference pairs on disk: JSONL, CSV or parquet with `id, prompt, chosen, rejected`, and other projects' layouts.

A row is used or it is dropped with a reason that reaches the user; nothing disappears. Faults of the whole file
(unknown columns, one id for two different pairs) are errors, faults of one row (a missing clip, a tie) drop that row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.options import choice, did_you_mean
from pgdpo_fast.storage import atomic_file

__all__ = [
    "CRITERIA",
    "FORMATS",
    "Dropped",
    "Manifest",
    "Pair",
    "read_manifest",
    "used_dropped_table",
    "write_dropped",
    "write_manifest",
]

FORMATS = ("plain", "videoalign", "videodpo")
CRITERIA = ("majority", "VQ", "MQ", "TA", "Overall")
REQUIRED = ("prompt", "chosen", "rejected")
OPTIONAL = ("id", "negative_prompt", "first_frame", "chosen_score", "rejected_score", "weight")
VIDEOALIGN_COLUMNS = ("path_A", "path_B", "prompt")
VIDEOALIGN_LABELS = ("VQ", "MQ", "TA", "Overall")


@dataclass(frozen=True)
class Pair:
    """One preference example: a prompt, the clip people preferred and the one they did not.

    Paths are absolute. `weight` multiplies the pair's loss. Scores, when known, satisfy chosen > rejected.
    """

    id: str
    prompt: str
    chosen: Path
    rejected: Path
    weight: float = 1.0
    negative_prompt: str = ""
    first_frame: Path | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None


@dataclass(frozen=True)
class Dropped:
    """A row that is not used: where it stands (`file:line` or `pair <id>`), why, and the particulars.

    `fault` is False for rows that a sound manifest holds too: ties, and a pair that is listed again.
    """

    where: str
    reason: str
    detail: str = ""
    fault: bool = True


@dataclass(frozen=True)
class Manifest:
    """The usable pairs of a manifest in file order, every dropped row, and notes on what was read and not used."""

    path: Path
    format: str
    pairs: tuple[Pair, ...]
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def summary(self) -> dict:
        """`{"read": rows, "used": pairs, "dropped": {reason: count}}`."""
        reasons = Counter(item.reason for item in self.dropped)
        return {"read": len(self.pairs) + len(self.dropped), "used": len(self.pairs), "dropped": dict(reasons)}


class _Drop(Exception):
    """Leaves the handling of one row with a reason and particulars."""


def read_manifest(
    path: str | os.PathLike, *, format: str | None = None, criterion: str = "majority", strict: bool = False
) -> Manifest:
    """Read a manifest and check every row.

    `path` is a .jsonl, .csv or .parquet file, VideoDPO's pair.json, or the folder that holds it. Relative clip paths
    are resolved against the manifest's folder. A row without `id` gets a hash of its content, stable across machines.

    `format` is detected from the columns unless given: "plain"; "videoalign" (columns path_A, path_B, prompt and the
    labels VQ, MQ, TA, Overall = A | B | same; `criterion` picks one label, or "majority" of VQ, MQ and TA, in which
    "same" abstains); "videodpo" (pair.json + metadata.json, video1 preferred).

    With `strict`, the first dropped row is a DataError. Raises DataError when the file is missing or malformed, has
    unknown or missing columns, gives one id to different pairs, or has no usable row; ConfigError on a bad argument.
    """
    if format is not None:
        choice("format", format, FORMATS)
    choice("criterion", criterion, CRITERIA)
    path = Path(path).absolute()
    if path.is_dir():
        if not (path / "pair.json").is_file():
            raise DataError(
                f"{path}: a folder without pair.json; give a .jsonl, .csv or .parquet manifest, or a VideoDPO "
                "folder with pair.json and metadata.json"
            )
        path = path / "pair.json"
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; expected a .jsonl, .csv or .parquet file")

    suffix = path.suffix.lower()
    if suffix == ".json" or format == "videodpo":
        if format not in (None, "videodpo"):
            raise DataError(
                f"{path}: a .json file can only be VideoDPO's pair.json, and format={format!r} was asked for; "
                "write plain manifests as .jsonl, .csv or .parquet"
            )
        format, rows, notes = "videodpo", *_videodpo_rows(path)
    else:
        records = list(_read_records(path, suffix))
        columns = list(dict.fromkeys(name for _, record in records for name in record))
        if not records:
            raise DataError(f"{path}: no rows; expected one pair per row with {', '.join(REQUIRED)}")
        detected = "videoalign" if set(VIDEOALIGN_COLUMNS[:2]) <= set(columns) else "plain"
        format = format or detected
        if format == "videoalign":
            rows, notes = _videoalign_rows(path, records, columns, criterion)
        else:
            _check_columns(path, columns)
            rows, notes = records, []
    manifest = _check_rows(path, format, rows, notes)
    if strict and manifest.dropped:
        first = manifest.dropped[0]
        raise DataError(
            f"{first.where}: {first.reason}{f' ({first.detail})' if first.detail else ''}; {len(manifest.dropped)} "
            "row(s) would be dropped; repair them or read without strict"
        )
    if not manifest.pairs:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in manifest.summary()["dropped"].items())
        raise DataError(
            f"{path}: none of {len(manifest.dropped)} rows is usable ({reasons}; first: "
            f"{manifest.dropped[0].where} {manifest.dropped[0].detail}); repair the manifest"
        )
    return manifest


def write_manifest(path: str | os.PathLike, pairs: list[Pair] | tuple[Pair, ...]) -> Path:
    """Write pairs as a plain JSONL manifest, atomically.

    Clips under the manifest's folder are written relative to it.
    """
    path = Path(path).absolute()
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"{path}: plain manifests are written as .jsonl; change the file name")

    def written(file: Path | None) -> str | None:
        if file is None:
            return None
        file = Path(file).absolute()
        return file.relative_to(path.parent).as_posix() if file.is_relative_to(path.parent) else str(file)

    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for pair in pairs:
            row = {
                "id": pair.id,
                "prompt": pair.prompt,
                "chosen": written(pair.chosen),
                "rejected": written(pair.rejected),
                "negative_prompt": pair.negative_prompt or None,
                "first_frame": written(pair.first_frame),
                "chosen_score": pair.chosen_score,
                "rejected_score": pair.rejected_score,
                "weight": None if pair.weight == 1.0 else pair.weight,
            }
            file.write(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")
    return path


def write_dropped(path: Path, dropped: Sequence[Dropped]) -> None:
    """Write rows that are not used as JSON lines of where, reason and detail; no file when there are none."""
    if not dropped:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for item in dropped:
            row = {"where": item.where, "reason": item.reason, "detail": item.detail}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def used_dropped_table(manifest: Manifest, examples: int = 3):
    """A rich table of rows used and dropped, by reason, with up to `examples` rows of each reason spelt out."""
    from rich.table import Table

    summary = manifest.summary()
    table = Table(
        title=f"{manifest.path.name}: {summary['used']} of {summary['read']} pairs used", title_justify="left"
    )
    table.add_column("outcome", no_wrap=True)
    table.add_column("pairs", justify="right")
    table.add_column("for example", overflow="fold")
    table.add_row("used", str(summary["used"]), "")
    for reason, count in sorted(summary["dropped"].items(), key=lambda item: -item[1]):
        rows = [item for item in manifest.dropped if item.reason == reason]
        lines = [f"{item.where}{f': {item.detail}' if item.detail else ''}" for item in rows[:examples]]
        if count > examples:
            lines.append(f"and {count - examples} more")
        table.add_row(f"dropped: {reason}", str(count), "\n".join(lines))
    return table


def _read_records(path: Path, suffix: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row, empty values left out."""

    def present(row: dict) -> dict:
        return {key: value for key, value in row.items() if value is not None and value != ""}

    if suffix in (".jsonl", ".ndjson"):
        with open(path, encoding="utf-8-sig") as file:
            try:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(
                            f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); expected one "
                            "object per line"
                        ) from None
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{number}: a {type(row).__name__}; expected one object per line")
                    yield f"{path.name}:{number}", present(row)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text ({error.reason}); save the manifest as UTF-8") from None
    elif suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                reader = csv.DictReader(file, restkey="")
                for row in reader:
                    where = f"{path.name}:{reader.line_num}"
                    if "" in row and row[""]:
                        raise DataError(
                            f"{path}:{reader.line_num}: more values than the header has columns; quote fields "
                            "that contain commas"
                        )
                    yield where, present(row)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text ({error.reason}); save the manifest as UTF-8") from None
            except csv.Error as error:
                raise DataError(f"{path}: not CSV ({error}); expected a header and one pair per row") from None
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        for number, row in enumerate(rows):
            yield f"{path.name} row {number}", present(row)
    else:
        raise DataError(f"{path}: suffix {suffix or 'none'} is not a manifest's; expected .jsonl, .csv or .parquet")


def _check_columns(path: Path, columns: list[str]) -> None:
    known = REQUIRED + OPTIONAL
    for name in columns:
        if name not in known:
            hint = did_you_mean(name, known, cutoff=0.5) or "; remove it."
            raise DataError(f"{path}: unknown column {name!r}{hint} Known columns: {', '.join(known)}")
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise DataError(
            f"{path}: column(s) {', '.join(missing)} missing, found {', '.join(columns)}; a pair needs "
            f"{', '.join(REQUIRED)}"
        )


def _videoalign_rows(path: Path, records, columns: list[str], criterion: str):
    """Plain rows of a VideoAlign CSV: one preferred clip per criterion, 'same' is no preference."""
    for name in VIDEOALIGN_COLUMNS:
        if name not in columns:
            raise DataError(
                f"{path}: column {name!r} missing, found {', '.join(columns)}; a VideoAlign table has "
                f"{', '.join(VIDEOALIGN_COLUMNS)} and labels {', '.join(VIDEOALIGN_LABELS)}"
            )
    labels = [criterion] if criterion != "majority" else [name for name in ("VQ", "MQ", "TA") if name in columns]
    if not labels or labels[0] not in columns:
        raise DataError(
            f"{path}: no label column for criterion {criterion!r}, found {', '.join(columns)}; choose another "
            f"criterion of {', '.join(CRITERIA)}"
        )
    used = {*VIDEOALIGN_COLUMNS, *labels, "id", "negative_prompt", "first_frame", "weight"}
    ignored = [name for name in columns if name not in used]
    notes = [f"columns read but not used: {', '.join(ignored)}"] if ignored else []
    return [(where, _videoalign_row(row, labels)) for where, row in records], notes


def _videoalign_row(row: dict, labels: list[str]) -> dict | _Drop:
    given = {name: str(row.get(name, "")).strip() for name in labels}
    shown = " ".join(f"{name}={value or '(empty)'}" for name, value in given.items())
    votes = Counter(value.upper() if len(value) == 1 else value.lower() for value in given.values())
    if unknown := [value for value in votes if value not in ("A", "B", "same", "")]:
        return _Drop("label is not A, B or same", f"{shown}: {unknown[0]!r}")
    if votes["A"] == votes["B"]:
        return _Drop("tie: no preferred clip", shown)
    first, second = ("path_A", "path_B") if votes["A"] > votes["B"] else ("path_B", "path_A")
    kept = {name: row[name] for name in ("id", "prompt", "negative_prompt", "first_frame", "weight") if name in row}
    return {**kept, "chosen": row.get(first), "rejected": row.get(second)}


def _videodpo_rows(path: Path):
    """Plain rows of VideoDPO's pair.json, whose video1 (preferred) and video2 index the clips of metadata.json.

    metadata.json is a list of {"basic": {"clip_path", "score"?}, "misc": {"frame_caption": [prompt]}}. A clip is looked
    up where it says, then as <folder>/<last two parts of its path>, since released files carry their author's paths.
    """
    metadata_path = path.with_name("metadata.json")
    values = []
    for file in (path, metadata_path):
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{file}: missing; a VideoDPO folder has pair.json and metadata.json") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{file}: not JSON ({error}); a VideoDPO folder has pair.json and metadata.json") from None
        if not isinstance(value, list):
            raise DataError(f"{file}: a {type(value).__name__}; expected VideoDPO's list of objects")
        values.append(value)
    pairs, clips = values

    def clip(pair: dict, key: str) -> tuple[str, float | None]:
        index = pair.get(key)
        if type(index) is not int or not 0 <= index < len(clips):
            raise _Drop(f"{key} is not an index into metadata.json", f"{index!r} of {len(clips)} clips")
        basic = clips[index].get("basic", {}) if isinstance(clips[index], dict) else {}
        if not isinstance(basic, dict) or not basic.get("clip_path"):
            raise _Drop("metadata.json names no clip_path", f"clip {index}")
        recorded = Path(str(basic["clip_path"]))
        near = path.parent / Path(*recorded.parts[-2:])
        found = near if not (path.parent / recorded).exists() and near.exists() else recorded
        return str(found), basic.get("score")

    rows = []
    for number, pair in enumerate(pairs):
        where = f"{path.name}[{number}]"
        try:
            if not isinstance(pair, dict):
                raise _Drop("not an object", repr(pair)[:60])
            (chosen, chosen_score), (rejected, rejected_score) = clip(pair, "video1"), clip(pair, "video2")
            prompt = pair.get("frame_caption", "")
            row = {
                "prompt": prompt[0] if isinstance(prompt, list) and prompt else prompt,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_score": chosen_score,
                "rejected_score": rejected_score,
            }
            rows.append((where, {key: value for key, value in row.items() if value is not None}))
        except _Drop as drop:
            rows.append((where, drop))
    extra = sorted(
        {key for pair in pairs if isinstance(pair, dict) for key in pair}
        - {"video1", "video2", "frame_caption", "label"}
    )
    notes = ["video1 is taken as the preferred clip; `label` is not read, as in VideoDPO's own loader"]
    if extra:
        notes.append(f"fields read but not used: {', '.join(extra)} (VideoDPO's pair weight is not a manifest weight)")
    return rows, notes


def _check_rows(path: Path, format: str, rows, notes: list[str]) -> Manifest:
    pairs: dict[str, tuple[str, Pair]] = {}
    dropped = []
    for where, row in rows:
        try:
            if isinstance(row, _Drop):
                raise row
            pair = _pair(path.parent, row)
            if pair.id in pairs:
                first, other = pairs[pair.id]
                if other != pair:
                    raise DataError(
                        f"{path}: id {pair.id!r} names two different pairs ({first} and {where}); ids key the "
                        "caches, give each pair its own"
                    )
                raise _Drop("same pair again", f"already at {first}")
            pairs[pair.id] = where, pair
        except _Drop as drop:
            expected = drop.args[0].startswith("tie: ") or drop.args[0] == "same pair again"
            dropped.append(Dropped(where, *drop.args, fault=not expected))
    return Manifest(path, format, tuple(pair for _, pair in pairs.values()), tuple(dropped), tuple(notes))


def _pair(folder: Path, row: dict) -> Pair:
    def text(name: str) -> str:
        value = row.get(name, "")
        if not isinstance(value, str):
            raise _Drop(f"{name} is not text", repr(value)[:60])
        return value.strip()

    def number(name: str) -> float | None:
        value = row.get(name)
        if value is None:
            return None
        try:
            result = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            result = math.nan
        if not math.isfinite(result):
            raise _Drop(f"{name} is not a finite number", repr(value)[:60])
        return result

    def clip(name: str) -> Path:
        file = Path(os.path.normpath(folder / text(name)))
        if not file.is_file():
            raise _Drop(f"{name} file missing", str(file))
        if file.stat().st_size == 0:
            raise _Drop(f"{name} file empty", str(file))
        return file

    for name in REQUIRED:
        if not text(name):
            raise _Drop(f"{name} empty")
    chosen, rejected = clip("chosen"), clip("rejected")
    if chosen.samefile(rejected):
        raise _Drop("chosen and rejected are the same file", str(chosen))
    chosen_score, rejected_score = number("chosen_score"), number("rejected_score")
    if (chosen_score is None) != (rejected_score is None):
        raise _Drop("only one of chosen_score and rejected_score given")
    if chosen_score is not None and chosen_score <= rejected_score:
        tie = chosen_score == rejected_score
        raise _Drop(
            "tie: scores are equal" if tie else "rejected_score is higher than chosen_score",
            f"{chosen_score:g} against {rejected_score:g}",
        )
    weight = number("weight")
    if weight is not None and weight < 0:
        raise _Drop("weight is negative", f"{weight:g}")
    return Pair(
        id=str(row["id"]).strip() if str(row.get("id", "")).strip() else _row_id(row),
        prompt=text("prompt"),
        chosen=chosen,
        rejected=rejected,
        weight=1.0 if weight is None else weight,
        negative_prompt=text("negative_prompt"),
        first_frame=clip("first_frame") if text("first_frame") else None,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )


def _row_id(row: dict) -> str:
    """16 hex digits that depend on the row's prompt and paths as written, so they survive moving the data set."""
    content = json.dumps([str(row.get(name, "")) for name in (*REQUIRED, "negative_prompt", "first_frame")])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
