"""The flags of a command line as the command's dataclass; what does not fit is one line, like every other error.

tyro reads them. What it says of a misfit is a box of many lines, from which the fault is read here: tyro's structured
events are private to it.
"""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import MISSING, fields
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import tyro

from pgdpo_fast.errors import ConfigError
from pgdpo_fast.options import LONGEST_SHOWN, close_to, did_you_mean, type_name

__all__ = ["read_flags"]


def read_flags(command: type, prog: str, args: Sequence[str]) -> Any:
    """`command` made from its flags. `--help` is printed and ends in SystemExit(0).

    Args:
        command: a dataclass whose fields are flags. prog: what it is called as, "pgdpo-fast train".

    Raises:
        ConfigError: a flag is unknown or missing, or a value is none of its flag's.
    """
    options = {"prog": prog, "args": args, "description": inspect.getdoc(command)}
    options |= {"return_unknown_args": True, "config": (tyro.conf.FlagCreatePairsOff,)}
    made, rest = None, []
    try:
        with _captured() as said:
            made, rest = tyro.cli(command, **options)
    except SystemExit as stopped:
        if not stopped.code:
            tyro.cli(command, **options)  # the help again, for the terminal
            raise
    if made is not None and not rest:
        return made
    fault = _fault(command, prog, args, rest, said.getvalue())
    raise ConfigError(fault if fault.endswith("?") else f"{fault}; see {prog} --help")


@contextmanager
def _captured() -> Iterator[StringIO]:
    """What is printed within the block, in lines of any length, without colours and box drawing."""
    before, said = os.environ.get("COLUMNS"), StringIO()
    os.environ["COLUMNS"] = "1000000"
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield said
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _fault(command: type, prog: str, args: Sequence[str], rest: Sequence[str], said: str) -> str:
    """What is wrong, in the order in which a person would put it right."""
    flags = _flags(command)
    for token in args:
        name = token.partition("=")[0]
        if re.match("--?[A-Za-z]", name) and name.replace("_", "-") not in flags:
            close = close_to(name.strip("-"), [flag.strip("-") for flag in flags])
            hint = f"; did you mean '--{close}'?" if close else ""
            return f"{name[:LONGEST_SHOWN]}: no flag of {prog}{hint}"
    if rest:
        return f"{rest[0][:LONGEST_SHOWN]!r}: {prog} takes no further argument here"
    rows = [line.strip() for line in said.splitlines()[2:]]  # without the title and the line under it
    rows = list(takewhile(lambda row: not re.fullmatch("-{3,}", row), rows))  # below are the help texts
    told = " ".join(row for row in rows if row)
    if told.startswith("Missing from"):
        return f"{' and '.join(_missing(command, rows))}: required by {prog} and not given"
    if found := re.match(r"Missing value for argument '(?:[^']*/)?([^']+)'", told):
        return f"{found[1]}: expected {_expected(command, found[1])} after it"
    if found := re.match(r"invalid choice '(.*)' for argument '(?:[^']*/)?([^']+)'\. Expected one of \((.*)\)", told):
        choices = re.findall("'([^']+)'", found[3])
        given = found[1][:LONGEST_SHOWN]
        return f"{found[2]} {given}: expected one of {', '.join(choices)}{did_you_mean(given, choices)}"
    if found := re.match(r"Error parsing (?:\S*/)?(--[\w-]+):", told):
        return f"{_as_given(found[1], args)}: expected {_expected(command, found[1])}"
    return told[:LONGEST_SHOWN]


def _flags(command: type) -> Mapping[str, str]:
    """The name of the field behind every flag, short ones and --help too; positional arguments have none."""
    flags = {"--help": "", "-h": ""}
    for name, kind in typing.get_type_hints(command, include_extras=True).items():
        marks = getattr(kind, "__metadata__", ())
        if tyro.conf.Positional not in marks:
            flags["--" + name.replace("_", "-")] = name
            flags |= {alias: name for mark in marks for alias in getattr(mark, "aliases", None) or ()}
    return flags


def _missing(command: type, rows: Sequence[str]) -> Iterator[str]:
    """Names of the required arguments that the rows list."""
    named = {name: flag for flag, name in _flags(command).items() if flag.startswith("--")}
    for item in fields(command):
        if item.default is MISSING and item.default_factory is MISSING:
            flag = named.get(item.name)
            if any(re.search(rf"(^|\s){flag}\s", row) if flag else row.isupper() for row in rows):
                yield flag or item.name.upper()


def _expected(command: type, flag: str) -> str:
    """A value of this flag, for people."""
    kind = typing.get_type_hints(command)[_flags(command)[flag]]
    kinds = [member for member in typing.get_args(kind) if member is not type(None)]
    kind = kinds[0] if type(None) in typing.get_args(kind) else kind
    return "a path" if kind is Path else type_name(kind)


def _as_given(flag: str, args: Sequence[str]) -> str:
    """The last use of a flag with its values, as it was typed."""
    last = max(at for at, token in enumerate(args) if token.partition("=")[0].replace("_", "-") == flag)
    values = takewhile(lambda token: not re.match("--?[A-Za-z]", token), args[last + 1 :])
    return " ".join([args[last], *values])[:LONGEST_SHOWN]
