"""Which of the processes that share a command's work this one is, from the environment that torchrun sets."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from pgdpo_fast.errors import ConfigError

__all__ = ["Share", "share_of_environment"]


class Share(NamedTuple):
    """Rank among all processes, their number, and rank on this machine."""

    rank: int
    world_size: int
    local_rank: int


def share_of_environment() -> Share:
    """RANK, WORLD_SIZE and LOCAL_RANK; the only process where they are not set.

    Raises:
        ConfigError: one of them is no whole number, or the rank is none of WORLD_SIZE processes.
    """
    world_size = _number("WORLD_SIZE", alone=1, low=1)
    share = Share(_number("RANK", alone=0), world_size, _number("LOCAL_RANK", alone=0))
    if share.rank >= world_size:
        raise _wrong("RANK", share.rank, f"a rank below WORLD_SIZE={world_size}")
    return share


def _number(name: str, alone: int, low: int = 0) -> int:
    text = os.environ.get(name, str(alone))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < low:
        raise _wrong(name, repr(text), f"a whole number from {low} on")
    return int(text)


def _wrong(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"environment {name}={value}: expected {expected}; start with torchrun, which sets RANK, WORLD_SIZE and "
        "LOCAL_RANK, or unset all three"
    )
