"""The `pgdpo-fast` command: one thin module per job, each a dataclass of its flags with a `run` method.

Command modules import nothing heavy at import time, so `--help` stays instant; `run` imports what it needs.
Errors raised on purpose end as one line on stderr and the exit code of their class (`pgdpo_fast.errors`).
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module

from pgdpo_fast.errors import ConfigError, PgdpoError

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
    """Run one command and return its exit code (0 ok, 2 config, 3 data, 4 non-finite, 5 out of memory, 75 preempted)."""
    try:
        import tyro
    except ImportError:
        print("error: the command line needs the train extra; run: pip install 'pgdpo-fast[train]'", file=sys.stderr)
        return ConfigError.exit_code
    argv = sys.argv[1:] if argv is None else argv
    # Load the chosen command alone when one is named; all of them only for the overview.
    names = [argv[0]] if argv and argv[0] in COMMANDS else list(COMMANDS)
    classes = {name: getattr(import_module(f"{__name__}.{COMMANDS[name][0]}"), COMMANDS[name][1]) for name in names}
    try:
        if len(names) == 1:
            command = tyro.cli(classes[names[0]], prog=f"pgdpo-fast {names[0]}", args=argv[1:],
                               description=inspect.getdoc(classes[names[0]]))
        else:
            command = tyro.extras.subcommand_cli_from_dict(classes, prog="pgdpo-fast", args=argv, description=__doc__)
        return command.run() or 0
    except PgdpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
