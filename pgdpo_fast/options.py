"""Validation shared by the diffusion dataclasses: numbers, choices, and construction by name from a configuration file.

Every failure is a ConfigError that says what came, what was expected and, for a misspelling, what was probably meant.
"""

import dataclasses
import difflib
import math

from pgdpo_fast.errors import ConfigError


def unknown(kind, given, known):
    """A ConfigError for a name that is not one of `known`, with the closest known name if there is one."""
    known = sorted(known)
    close = difflib.get_close_matches(str(given), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"unknown {kind} {given!r}, expected one of {', '.join(known)}{hint}")


def choice(owner, field, value, known):
    """`value` if it is one of `known`, else ConfigError."""
    if not isinstance(value, str) or value not in known:
        raise unknown(f"{owner}.{field}", value, known)
    return value


def real(owner, field, value, expected, valid):
    """`value` as a finite float for which `valid(value)` holds, else ConfigError saying what was `expected`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not valid(value):
        raise ConfigError(f"{owner}.{field}={value!r}: expected {expected}")
    return float(value)


def integer(owner, field, value, low, high):
    """`value` if it is an int in [low, high], else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{owner}.{field}={value!r}: expected an integer from {low} to {high}")
    return value


def flag(owner, field, value):
    """`value` if it is a bool, else ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}.{field}={value!r}: expected true or false")
    return value


def build(kind, registry, name, options):
    """Construct `registry[name]`, a (dataclass, default options) pair, with `options` on top of its defaults."""
    if not isinstance(name, str) or name not in registry:
        raise unknown(kind, name, registry)
    constructor, defaults = registry[name]
    fields = [field.name for field in dataclasses.fields(constructor)]
    for option in options:
        if option not in fields:
            if not fields:
                raise ConfigError(f"unknown option {option!r} of {kind} {name!r}, which takes none")
            raise unknown(f"option of {kind} {name!r}:", option, fields)
    return constructor(**{**defaults, **options})
