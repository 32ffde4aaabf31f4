"""The `pgdpo-fast` command: one thin module per job, each a dataclass of its flags with a `run` method.

Command modules import nothing heavy at import time, so `--help` stays instant; `run` imports what it needs.
Errors raised on purpose end as one line on stderr and the exit code of their class (`pgdpo_fast.errors`).
"""

from __future__ import annotations

import errno
import inspect
import shlex
import sys
import textwrap
import traceback
from importlib import import_module
from io import BufferedWriter, FileIO, TextIOWrapper
from tempfile import NamedTemporaryFile

from pgdpo_fast import __version__
from pgdpo_fast.errors import ConfigError, DataError, OutOfMemoryError, PgdpoError
from pgdpo_fast.options import did_you_mean
from pgdpo_fast.preemption import stoppable
from pgdpo_fast.printable import printable

DATA, MEMORY, INTERNAL = DataError.exit_code, OutOfMemoryError.exit_code, 70  # EX_SOFTWARE of sysexits.h

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
    argv = sys.argv[1:] if argv is None else argv
    command_line = shlex.join(["pgdpo-fast", *argv])
    try:
        with stoppable(lambda name: f"stopped by {name}; go on with: {command_line}"):
            return _run(argv)
    except PgdpoError as error:
        return _failed(error, error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}; check the path, its permissions and the disk", DATA)
    except MemoryError as error:
        return _failed(f"out of memory ({str(error) or 'on the host'}); lower the size of what is asked for", MEMORY)
    except Exception as error:
        with NamedTemporaryFile("w", prefix="pgdpo-fast-", suffix=".txt", delete=False, errors="replace") as file:
            file.write(f"{command_line}\n\n{traceback.format_exc()}")
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return _failed(f"{what}; this is a fault of pgdpo-fast, please report it with {file.name}", INTERNAL)


def _run(argv: list[str]) -> int:
    try:
        from pgdpo_fast.cli.flags import read_flags
    except ImportError:
        raise ConfigError("the command line needs the train extra; run: pip install 'pgdpo-fast[train]'") from None
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        raise ConfigError(f"no command {argv[0]!r}{hint}")
    return read_flags(_command(argv[0]), f"pgdpo-fast {argv[0]}", argv[1:]).run() or 0


def script() -> int:
    """`main` for the installed command, whose output outlives its terminal: see `_Outliving`."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            raw = _Outliving(descriptor, "w", closefd=False)
            options = {"encoding": stream.encoding, "errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, TextIOWrapper(BufferedWriter(raw), **options))
    return main()


class _Outliving(FileIO):
    """A stream that goes on without a reader: a closed terminal or pipe must not end a run before it has saved."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):
                return len(data)
            raise


def _failed(message: object, exit_code: int) -> int:
    print(f"error: {printable(str(message))}", file=sys.stderr)
    return exit_code


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
        "5 out of memory, 70 a fault of this program, 75 stopped by SIGTERM, Ctrl-C or a closed terminal with its",
        "state saved. The same signal again ends it at once.",
    ]
    return "\n".join(lines)
