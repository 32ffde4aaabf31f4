"""Preference pairs on disk: JSONL, CSV or parquet with `id, prompt, chosen, rejected`, and other projects' layouts.

A row is used or it is dropped with a reason that reaches the user; nothing disappears. Faults of the whole file
(unknown columns, one id for two different pairs) are errors, faults of one row (a missing clip, a tie) drop that row.
"""

from __future__ import annotations

import csv
import filecmp
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.options import choice, close_to
from pgdpo_fast.preemption import check_stop
from pgdpo_fast.printable import printable
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
    root: Path | None = None

    @property
    def clips_root(self) -> Path:
        """The folder that relative clip paths start at."""
        return self.root or self.path.parent

    def __len__(self) -> int:
        return len(self.pairs)

    def summary(self) -> dict:
        """`{"read": rows, "used": pairs, "dropped": {reason: count}}`."""
        reasons = Counter(item.reason for item in self.dropped)
        return {"read": len(self.pairs) + len(self.dropped), "used": len(self.pairs), "dropped": dict(reasons)}


class _Drop(Exception):
    """Leaves the handling of one row with a reason and particulars."""


def read_manifest(
    path: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    format: str | None = None,
    criterion: str | None = None,
    strict: bool = False,
) -> Manifest:
    """Read a manifest and check every row.

    `path` is a .jsonl, .csv or .parquet file, VideoDPO's pair.json, or the folder that holds it. Relative clip paths
    are resolved against `root`, by default the manifest's folder; "~" is the home folder in all of them. A row without
    `id` gets a hash of its content, stable across machines.

    `format` is detected from the columns unless given: "plain"; "videoalign" (columns path_A, path_B, prompt and the
    labels VQ, MQ, TA, Overall = A | B | same; `criterion` picks one label, or "majority", the default, of VQ, MQ and
    TA, in which "same" abstains); "videodpo" (pair.json + metadata.json, video1 preferred).

    Two rows of one prompt that prefer the same two clips the other way round are dropped, both; so is a pair whose two
    clips have the same bytes.

    With `strict`, the first dropped row is a DataError. Raises DataError when the file is missing or malformed, has
    unknown, missing or repeated columns, gives one id to different pairs, or has no usable row or no weight above zero;
    ConfigError on a bad argument, or `criterion` for a manifest that has none.
    """
    if format is not None:
        choice("format", format, FORMATS)
    if criterion is not None:
        choice("criterion", criterion, CRITERIA)
    path = _expanded(path)
    root = None if root is None else _expanded(root)
    if root is not None and not root.is_dir():
        raise ConfigError(f"root={str(root)!r}: no such folder; expected the one that clip paths start at")
    if path.is_dir():
        if not (path / "pair.json").is_file():
            raise DataError(
                f"{path}: a folder without pair.json; give a .jsonl, .csv or .parquet manifest, or a VideoDPO "
                "folder with pair.json and metadata.json"
            )
        path = path / "pair.json"
    if not _is_file(path):
        raise DataError(f"{path}: no such manifest; expected a .jsonl, .csv or .parquet file")

    suffix = path.suffix.lower()
    if suffix == ".json" or format == "videodpo":
        if format not in (None, "videodpo"):
            raise DataError(
                f"{path}: a .json file can only be VideoDPO's pair.json, and format={format!r} was asked for; "
                "write plain manifests as .jsonl, .csv or .parquet"
            )
        format, rows, notes = "videodpo", *_videodpo_rows(path, root or path.parent)
    else:
        records = list(_read_records(path, suffix))
        columns = list(dict.fromkeys(name for _, record in records for name in record))
        if not records:
            raise DataError(f"{path}: no rows; expected one pair per row with {', '.join(REQUIRED)}")
        detected = "videoalign" if set(VIDEOALIGN_COLUMNS[:2]) <= set(columns) else "plain"
        format = format or detected
        if format == "videoalign":
            rows, notes = _videoalign_rows(path, records, columns, criterion or "majority")
        else:
            _check_columns(path, records, columns)
            rows, notes = records, []
    if criterion is not None and format != "videoalign":
        raise ConfigError(
            f"criterion={criterion!r}: only a VideoAlign table has labels to choose from, and {path.name} is {format}; "
            "leave it out"
        )
    manifest = _check_rows(path, root, format, rows, notes)
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
    weightless = sum(pair.weight == 0 for pair in manifest.pairs)
    if weightless == len(manifest):
        raise DataError(f"{path}: every pair has weight 0, so nothing would be learnt; give some a weight above zero")
    if weightless:
        manifest = replace(manifest, notes=(*manifest.notes, f"{weightless} pair(s) have weight 0 and teach nothing"))
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
    from rich.text import Text

    summary = manifest.summary()
    name = printable(manifest.path.name)
    table = Table(title=Text(f"{name}: {summary['used']} of {summary['read']} pairs used"), title_justify="left")
    table.add_column("outcome", no_wrap=True)
    table.add_column("pairs", justify="right")
    table.add_column("for example", overflow="fold")
    table.add_row("used", str(summary["used"]), "")
    for reason, count in sorted(summary["dropped"].items(), key=lambda item: -item[1]):
        rows = [item for item in manifest.dropped if item.reason == reason]
        lines = [printable(f"{item.where}{f': {item.detail}' if item.detail else ''}") for item in rows[:examples]]
        if count > examples:
            lines.append(f"and {count - examples} more")
        table.add_row(Text(f"dropped: {reason}"), str(count), Text("\n".join(lines)))
    return table


def _expanded(path: str | os.PathLike) -> Path:
    return Path(os.path.expanduser(path)).absolute()


def _is_file(path: Path) -> bool:
    """Path.is_file, and False too for a name that the file system cannot hold or that may not be looked at."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _json(text: str | bytes):
    """json.loads, where a key given twice and nesting beyond Python's limit are ValueErrors too."""

    def once(items: list[tuple]) -> dict:
        if twice := [key for key, count in Counter(key for key, _ in items).items() if count > 1]:
            raise ValueError(f"key {twice[0]!r} is given twice")
        return dict(items)

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read_records(path: Path, suffix: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row, empty values left out."""
    readers = {".jsonl": _jsonl_records, ".ndjson": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
    if suffix not in readers:
        raise DataError(f"{path}: suffix {suffix or 'none'} is not a manifest's; expected .jsonl, .csv or .parquet")
    try:
        for where, row in readers[suffix](path):
            check_stop()
            yield where, {key: value for key, value in row.items() if value is not None and value != ""}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save the manifest as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _json(line)
            except ValueError as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{path}:{number}: not JSON ({reason}); expected one object per line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a {type(row).__name__}; expected one object per line")
            yield f"{path.name}:{number}", row


def _csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file)
            header = next(reader, [])
            _check_header(path, header)
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{path}:{reader.line_num}: {'more' if len(values) > len(header) else 'fewer'} values "
                        f"({len(values)}) than the header has columns ({len(header)}); quote fields that contain "
                        "commas, and leave none out"
                    )
                yield f"{path.name}:{reader.line_num}", dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: not CSV ({error}); expected a header and one pair per row") from None


def _check_header(path: Path, header: list[str]) -> None:
    known = {*REQUIRED, *OPTIONAL, *VIDEOALIGN_COLUMNS}
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: column {twice[0]!r} is given twice; keep one")
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and len(known & {part.strip() for part in header[0].split(separator)}) > 1:
            raise DataError(f"{path}: its columns are separated by {name}; save it with commas")
    if header and not known & set(header):
        raise DataError(
            f"{path}: the first line names no column of a manifest ({', '.join(header)[:80]}); expected a header with "
            f"{', '.join(REQUIRED)}"
        )


def _parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{path}: column {twice[0]!r} is given twice; keep one")
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(rows):
        yield f"{path.name} row {number}", row


def _check_columns(path: Path, records: list[tuple[str, dict]], columns: list[str]) -> None:
    known = REQUIRED + OPTIONAL
    missing = [name for name in REQUIRED if name not in columns]
    for name in columns:
        if name not in known:
            near = close_to(name, known, cutoff=0.5)
            if near and not any(name in row and near in row for _, row in records):
                hint = f"; did you mean {near!r}?"
            else:
                hint = f"; rename it if it holds the {' or '.join(missing)}." if missing else "; remove it."
            raise DataError(f"{path}: unknown column {name!r}{hint} Known columns: {', '.join(known)}")
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


def _videodpo_rows(path: Path, root: Path):
    """Plain rows of VideoDPO's pair.json, whose video1 (preferred) and video2 index the clips of metadata.json.

    metadata.json is a list of {"basic": {"clip_path", "score"?}, "misc": {"frame_caption": [prompt]}}. A clip is looked
    up where it says, then as <folder>/<last two parts of its path>, since released files carry their author's paths.
    """
    metadata_path = path.with_name("metadata.json")
    values = []
    for file in (path, metadata_path):
        try:
            value = _json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{file}: missing; a VideoDPO folder has pair.json and metadata.json") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from None
        except ValueError as error:
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
        near = root / Path(*recorded.parts[-2:])
        found = near if not _is_file(root / recorded) and _is_file(near) else recorded
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


def _check_rows(path: Path, root: Path | None, format: str, rows, notes: list[str]) -> Manifest:
    pairs: dict[str, tuple[str, Pair]] = {}
    dropped = []
    for where, row in rows:
        check_stop()
        try:
            if isinstance(row, _Drop):
                raise row
            pair = _pair(root or path.parent, row)
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
    for where, pair in _contradictions(list(pairs.values())):
        del pairs[pair.id]
        dropped.append(Dropped(where, "another row of the prompt prefers the same clips the other way round", pair.id))
    return Manifest(path, format, tuple(pair for _, pair in pairs.values()), tuple(dropped), tuple(notes), root)


def _contradictions(pairs: list[tuple[str, Pair]]) -> list[tuple[str, Pair]]:
    """(where, pair) of the rows that cancel one another out, in order."""
    said = {(pair.prompt, pair.chosen, pair.rejected) for _, pair in pairs}
    return [(where, pair) for where, pair in pairs if (pair.prompt, pair.rejected, pair.chosen) in said]


def _pair(folder: Path, row: dict) -> Pair:
    def text(name: str) -> str:
        value = row.get(name, "")
        if not isinstance(value, str):
            raise _Drop(f"{name} is not text", repr(value)[:60])
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _Drop(f"{name} holds half a character", ascii(value)[:60])
        return value.strip()

    def number(name: str) -> float | None:
        value = row.get(name)
        if value is None:
            return None
        try:
            result = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if not math.isfinite(result):
            raise _Drop(f"{name} is not a finite number", repr(value)[:60])
        return result

    def clip(name: str) -> Path:
        file = Path(os.path.normpath(folder / os.path.expanduser(text(name))))
        if not _is_file(file):
            raise _Drop(f"{name} file missing", str(file))
        if file.stat().st_size == 0:
            raise _Drop(f"{name} file empty", str(file))
        return file

    id = row.get("id", "")
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise _Drop("id is not text or a whole number", repr(id)[:60])
    if isinstance(id, str):
        id = text("id")
    for name in REQUIRED:
        if not text(name):
            raise _Drop(f"{name} empty")
    chosen, rejected = clip("chosen"), clip("rejected")
    if chosen.samefile(rejected):
        raise _Drop("chosen and rejected are the same file", str(chosen))
    if chosen.stat().st_size == rejected.stat().st_size and filecmp.cmp(chosen, rejected, shallow=False):
        raise _Drop("chosen and rejected hold the same bytes", f"{chosen} and {rejected}")
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
        id=(str(id) if abs(id) < 1 << 64 else hex(id)) if isinstance(id, int) else id or _row_id(row),
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
