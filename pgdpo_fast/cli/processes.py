"""Which of the processes that share a command's work this one is, from the environment that torchrun sets."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["Share", "share_of_environment"]


class Share(NamedTuple):
    """Rank among all processes, their number, and rank on this machine."""

    rank: int
    world_size: int
    local_rank: int


def share_of_environment() -> Share:
    """RANK, WORLD_SIZE and LOCAL_RANK; the only process where they are not set."""
    return Share(
        *(int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    )
