"""The `pgdpo-fast` command: one thin module per job, each a dataclass of its flags with a `run` method.

Command modules import nothing heavy at import time, so `--help` stays instant; `run` imports what it needs.
Errors raised on purpose end as one line on stderr and the exit code of their class (`pgdpo_fast.errors`).
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from importlib import import_module

from pgdpo_fast import __version__
from pgdpo_fast.errors import ConfigError, PgdpoError
from pgdpo_fast.options import did_you_mean
from pgdpo_fast.printable import printable

# verb -> (module under pgdpo_fast.cli, class in it), in the order the help lists them
COMMANDS = {
    "demo": ("demo", "Demo"),
    "encode": ("encode", "Encode"),
    "plan": ("plan", "Plan"),
    "cache-reference": ("cache_reference", "CacheReference"),
    "train": ("train", "Train"),
    "sweep": ("sweep", "Sweep"),
    "report": ("report", "Report"),
    "bench": ("bench", "Bench"),
    "doctor": ("doctor", "Doctor"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or the one of the error's class."""
    try:
        import tyro
    except ImportError:
        print("error: the command line needs the train extra; run: pip install 'pgdpo-fast[train]'", file=sys.stderr)
        return ConfigError.exit_code
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        print(f"error: no command {argv[0]!r}{hint}", file=sys.stderr)
        return ConfigError.exit_code
    command_class = _command(argv[0])
    try:
        command = tyro.cli(
            command_class,
            prog=f"pgdpo-fast {argv[0]}",
            args=argv[1:],
            description=inspect.getdoc(command_class),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        return command.run() or 0
    except PgdpoError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _command(verb: str) -> type:
    module, name = COMMANDS[verb]
    return getattr(import_module(f"{__name__}.{module}"), name)


def _overview() -> str:
    """Every command with the first sentence of its help."""
    lines = [
        "Preference optimization of video diffusion models, fused and exact.",
        "",
        "usage: pgdpo-fast COMMAND [flags]",
        "",
    ]
    for verb in COMMANDS:
        first = inspect.getdoc(_command(verb)).split("\n\n")[0].replace("\n", " ")
        lines += textwrap.wrap(first, 100, initial_indent=f"  {verb:<17}", subsequent_indent=" " * 19)
    lines += [
        "",
        "pgdpo-fast COMMAND --help explains one. Exit codes: 0 ok, 2 configuration, 3 data, 4 non-finite,",
        "5 out of memory, 75 stopped by SIGTERM with its state saved.",
    ]
    return "\n".join(lines)
