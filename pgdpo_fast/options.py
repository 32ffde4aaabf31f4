"""How a setting is declared, how a value given for one is checked, and what is said of a name nobody knows.

Every check of the package ends here: settings of a configuration, hyper-parameters of objectives and processes, columns
of a manifest, commands. A failure says what came, what was expected and, for a misspelling, what was probably meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

from pgdpo_fast.errors import ConfigError

__all__ = [
    "DECISIONS",
    "build",
    "choice",
    "close_to",
    "convert",
    "did_you_mean",
    "flag",
    "integer",
    "number",
    "setting",
    "type_name",
    "wrong",
]

# What a setting decides: the numbers of a run; those of its reference too; or only when, where and how fast.
DECISIONS = ("numbers", "reference", "nothing")
LONGEST_SHOWN = 400  # characters of a value in a message


def setting(
    default: Any,
    help: str,
    *,
    decides: Literal["numbers", "reference", "nothing"],
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    content: str | None = None,
) -> Any:
    """A dataclass field that is a setting: its help text, its bounds, and what it decides.

    Args:
        decides: "numbers", those of the run but not of its reference; "reference", both; "nothing", neither. Run
            identity, cache fingerprint and sweep key follow from it.
        minimum, above: for numbers, the smallest allowed value or an exclusive lower bound. maximum: the largest.
        content: the setting says only where something is, such as the "weights", whose content is what decides.
    """
    if decides not in DECISIONS:
        raise wrong("decides", decides, f"one of {', '.join(DECISIONS)}")
    bounds = {"minimum": minimum, "above": above, "maximum": maximum}
    metadata = {"help": help, "decides": decides, **bounds, "content": content}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def wrong(where: str, value: Any, expected: str) -> ConfigError:
    """The error for a value that is not what was expected; a long one is cut."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no numbers of more than 4300 digits
        shown = "(thousands of digits)"
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
    return ConfigError(f"{where}={shown}: expected {expected}")


def close_to(given: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name a misspelt one probably stands for."""
    by_letters = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(given).lower(), by_letters, n=1, cutoff=cutoff)
    return by_letters[found[0]] if found else None


def did_you_mean(given: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a sentence about an unknown name: "; did you mean 'x'?", or nothing when no known name is close."""
    close = close_to(given, known, cutoff)
    return f"; did you mean {close!r}?" if close else ""


def choice(where: str, value: Any, known: Iterable[str]) -> str:
    """`value` if it is one of the `known` words, else ConfigError."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise wrong(where, value, f"one of {', '.join(known)}{did_you_mean(value, known)}")
    return value


def number(
    where: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    limit: float = sys.float_info.max,
    kind: str = "a finite number",
) -> float:
    """`value` as a float between the bounds, else ConfigError.

    open_low, open_high: the bound itself is not allowed. limit: the largest magnitude that counts as finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= limit:
        raise wrong(where, value, kind)
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        if high < math.inf:
            expected = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        else:
            expected = f"a number above {low:g}" if open_low else f"at least {low:g}"
        raise wrong(where, value, expected)
    return float(value)


def integer(where: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """`value` if it is an int in [low, high], else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(where, value, f"an integer from {low} to {high}")
    return value


def flag(where: str, value: Any) -> bool:
    """`value` if it is a bool, else ConfigError."""
    if not isinstance(value, bool):
        raise wrong(where, value, "true or false")
    return value


def build(
    section: str, registry: Mapping[str, tuple[type, Mapping[str, Any]]], name: Any, options: Mapping[str, Any]
) -> Any:
    """Construct `registry[name]`, a (dataclass, default options) pair, with `options` on top of its defaults.

    Raises:
        ConfigError: the name or an option is unknown, or the dataclass refuses a value.
    """
    constructor, defaults = registry[choice(f"{section}.name", name, sorted(registry))]
    known = [item.name for item in dataclasses.fields(constructor)]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"{section}.{key}: {name} takes {', '.join(known) or 'no settings'}{did_you_mean(key, known)}"
            )
    return constructor(**{**defaults, **options})


# -- values by the type of their field


def convert(where: str, value: Any, kind: Any, bounds: Mapping[str, Any]) -> Any:
    """`value` as the type `kind` of a field whose metadata are `bounds`. Nothing but int -> float is converted.

    Raises:
        ConfigError: it is something else, or out of bounds.
    """
    try:
        value = _as(value, kind)
    except TypeError:
        raise wrong(where, value, type_name(kind)) from None
    minimum, above = bounds.get("minimum"), bounds.get("above")
    bound, most = minimum if above is None else above, bounds.get("maximum")
    if value is not None and bound is not None:
        number(where, value, bound, math.inf if most is None else most, open_low=above is not None)
    return value


def _as(value: Any, kind: Any) -> Any:
    """`value` as `kind`, else TypeError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (kind in (None, type(None)) and value is None):
        return value
    if origin in (types.UnionType, typing.Union):
        for member in arguments:
            try:
                return _as(value, member)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == word and type(value) is type(word) for word in arguments):
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise TypeError
        kinds: Sequence[Any] = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_as(item, kind) for item, kind in zip(value, kinds, strict=True))
    if (origin or kind) is list:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_as(item, *arguments or (Any,)) for item in value]
    if (origin or kind) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: _as(item, arguments[1] if arguments else Any) for key, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise TypeError from None
        if math.isfinite(value):
            return value
    elif kind is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return value
    elif kind in (str, bool) and isinstance(value, kind):
        return value
    raise TypeError


def as_typed(value: Any) -> str:
    """A setting's value as a person would type it: 500 for the 500.0 that a number becomes."""
    return repr(int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value)


def type_name(kind: Any) -> str:
    """A type for people: "a whole number", "one of lora, full"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(kind) for kind in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if (origin or kind) in (tuple, list):
        length = f" of length {len(arguments)}" if origin is tuple and arguments[-1] is not ... else ""
        return f"a list of {_many(arguments[0])}{length}" if arguments else "a list"
    if (origin or kind) is dict:
        return "a mapping"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(kind) or f"a {getattr(kind, '__name__', kind)}, which no file can hold"


def _many(kind: Any) -> str:
    plural = {str: "text", int: "whole numbers", float: "numbers", dict: "mappings"}
    return plural.get(typing.get_origin(kind) or kind) or type_name(kind)
