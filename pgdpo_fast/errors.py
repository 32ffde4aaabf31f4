"""Every failure a user can cause or meet, each with the exit code the command line returns for it.

A message says what was given, what was expected and what to do next, in one line.
"""

__all__ = [
    "BackendUnavailable",
    "BusyError",
    "ConfigError",
    "DamagedError",
    "DataError",
    "KernelTimeout",
    "DerivativeError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PgdpoError",
    "Preempted",
]


class PgdpoError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class ConfigError(PgdpoError, ValueError):
    """A configuration key, command-line flag or hyper-parameter is unknown, mistyped or impossible."""

    exit_code = 2


class BackendUnavailable(ConfigError):
    """A backend was asked for by name and cannot run here; the message carries the reason."""


class DerivativeError(PgdpoError, RuntimeError):
    """A derivative the fused backends do not have: a second one, one in forward mode, one by torch.func."""


class DataError(PgdpoError, ValueError):
    """A manifest, video, store, cache or checkpoint is missing, damaged or does not fit."""

    exit_code = 3


class BusyError(DataError):
    """Another process is writing in the folder."""


class DamagedError(DataError):
    """A file's bytes are not those that were written."""


class NonFiniteError(PgdpoError, ArithmeticError):
    """A loss, gradient or error became NaN or infinite; nothing was updated."""

    exit_code = 4


class KernelTimeout(PgdpoError, RuntimeError):
    """A kernel gave up a wait that no healthy launch makes; the message names the setting that avoids it."""


class OutOfMemoryError(PgdpoError, MemoryError):
    """Device or host memory ran out; the message says what used it and which setting lowers it."""

    exit_code = 5


class Preempted(PgdpoError):
    """The process was asked to stop (SIGTERM, SIGINT, SIGHUP); state was saved and the message says how to resume."""

    exit_code = 75
