"""Which launch a call of the Triton kernels gets, and the table of those a device has been measured to want.

The table is `launches.json` beside this file, so that a wheel has it. It has no entry yet: every call gets the default.
`make gpu` makes it of measurements.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pgdpo_fast.errors import ConfigError

TABLE = Path(__file__).with_name("launches.json")
FORMS = ("two-pass", "stream")
SETTING = "PGDPO_FAST_FORM"
# "auto": as the table says. For tests and benchmarks one form can be forced, here or in the environment.
FORM = os.environ.get(SETTING, "auto")


class Launch(NamedTuple):
    """Elements a program handles at a time, and its warps: 1024 / (32 * 4) = 8 bfloat16 = one 128-bit load a thread.

    Sample and frame granularity have two forms, of equal bits: "two-pass" reads predictions and targets again for the
    gradients, when backward runs; "stream" makes them in forward, from the second-level cache (kernels/stream.py).
    `ahead` is how many bytes of predictions and targets the stream's errors run ahead of its gradients, beyond a pair;
    `programs` how many there are for each multiprocessor.
    """

    block: int = 1024
    warps: int = 4
    form: str = "two-pass"
    ahead: int = 12 << 20
    programs: int = 8


class Key(NamedTuple):
    """What a launch depends on."""

    architecture: int  # compute capability, 90 for 9.0
    granularity: str
    reference: str  # the name of a ReferenceForm, in lower case
    dtype: str  # of the predictions, "bfloat16"
    elements: int  # of a video; an entry holds from this size on
    pairs: int  # B; an entry holds from this many on


class Entry(NamedTuple):
    """A launch that was measured to be faster than the default, and how much."""

    key: Key
    launch: Launch
    device: str  # its name, as torch gives it
    ratio: float  # its time over the default's


def _refuse(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path}: {what}; measure again with `make gpu` or take the entry out")


def read(path: Path = TABLE) -> tuple[Entry, ...]:
    """The entries of a table.

    Raises:
        ConfigError: a field is missing or unknown, a form or number is impossible, or `block` or `warps`, on which the
            bits of a sum depend, depend on the number of pairs.
    """
    entries = []
    for row in json.loads(path.read_text())["entries"]:
        try:
            entry = Entry(Key(**row["key"]), Launch(**row["launch"]), row["device"], float(row["ratio"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _refuse(path, f"{row!r} is no entry ({error})") from error
        if entry.launch.form not in FORMS:
            raise _refuse(path, f"form={entry.launch.form!r}: expected {' or '.join(map(repr, FORMS))}")
        if entry.launch.warps not in (1, 2, 4, 8, 16) or entry.launch.block not in (2**k for k in range(5, 14)):
            raise _refuse(path, f"block={entry.launch.block}, warps={entry.launch.warps}: expected powers of two")
        if not 0 < entry.ratio:
            raise _refuse(path, f"ratio={entry.ratio}: expected a positive number")
        entries.append(entry)
    for entry in entries:
        alone = _best(entries, entry.key._replace(pairs=1)) or Launch()
        if (alone.block, alone.warps) != (entry.launch.block, entry.launch.warps):
            raise _refuse(path, f"{entry.key}: block and warps are not those of one pair")
    return tuple(entries)


def combine(before: Iterable[Entry], measured: Iterable[Entry]) -> list[Entry]:
    """The table that gives every key of `measured` its launch, with no entry that says what a smaller size does.

    Args:
        before: entries to keep, but for kinds of call (all of a key but its size) that were measured again.
        measured: a launch for every key, the default where nothing was faster; all keys of one size with one block.
    """
    measured = sorted(measured)
    again = {entry.key[:4] for entry in measured}
    entries = [entry for entry in before if entry.key[:4] not in again]
    for entry in measured:
        if (_best(entries, entry.key) or Launch()) != entry.launch:
            entries.append(entry)
    return entries


def write(entries: Iterable[Entry], path: Path = TABLE) -> None:
    """Write a table that `read` takes, in the order of its keys; it appears whole or not at all."""
    rows = [
        {"key": e.key._asdict(), "launch": e.launch._asdict(), "device": e.device, "ratio": e.ratio}
        for e in sorted(entries)
    ]
    from pgdpo_fast.storage import atomic_file  # for measuring alone: the loss is imported without it

    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps({"entries": rows}, indent=1) + "\n")


def _best(entries: Iterable[Entry], key: Key) -> Launch | None:
    """The launch of the entry for the largest video and most pairs that `key` reaches, None where there is none."""
    fitting = [
        e for e in entries if e.key[:4] == key[:4] and e.key.elements <= key.elements and e.key.pairs <= key.pairs
    ]
    return max(fitting, key=lambda e: (e.key.elements, e.key.pairs)).launch if fitting else None


@lru_cache(maxsize=1)
def _table() -> tuple[Entry, ...]:
    return read()


@lru_cache(maxsize=1024)
def find(key: Key) -> Launch | None:
    """The launch of the table for `key`, None where it has none."""
    return _best(_table(), key)


def form(launch: Launch) -> str:
    """The form of a call with this launch: its own, or the one forced.

    Raises:
        ConfigError: FORM is none.
    """
    if FORM == "auto":
        return launch.form
    if FORM not in FORMS:
        raise ConfigError(f"{SETTING}={FORM!r}: expected 'auto', {' or '.join(map(repr, FORMS))}")
    return FORM
