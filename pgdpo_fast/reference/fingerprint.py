"""What a reference cache is valid for: a flat mapping of everything its rows depend on, compared field by field.

A network counts by content, its configuration and the bytes of its weights, so a moved folder stays valid and a
re-uploaded revision does not; where it came from is recorded beside the fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping

from pgdpo_fast.errors import DataError
from pgdpo_fast.options import as_typed
from pgdpo_fast.storage import canonical_json, sha256_bytes

__all__ = ["architecture_digest", "check_equal"]


def architecture_digest(config: Mapping) -> str:
    """sha256 over a network's constructor arguments; entries that start with "_" say where it came from and are left
    out."""
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key[0] != "_"}
    return sha256_bytes(canonical_json(kept).encode())


def check_equal(where: object, cached: Mapping, wanted: Mapping, remedy: str) -> None:
    """Raise DataError unless two fingerprints agree, naming every differing field with both values and the remedy."""
    differing = [name for name in sorted({*cached, *wanted}) if cached.get(name) != wanted.get(name)]
    if differing:
        said = "; ".join(
            f"{name} was {_short(cached.get(name))}, is now {_short(wanted.get(name))}" for name in differing
        )
        raise DataError(f"{where}: made for other settings: {said}; {remedy}")


def _short(value: object) -> str:
    text = as_typed(value)
    return f"{text[:13]}...'" if isinstance(value, str) and len(value) == 64 else text
