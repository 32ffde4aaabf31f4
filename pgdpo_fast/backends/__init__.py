"""Which backend computes the loss, and why. This floor alone knows about devices.

`eager` is plain torch and always works; `triton` and `native` compute the same numbers in fused passes.
"""

from __future__ import annotations

import torch

from pgdpo_fast.errors import BackendUnavailable

NAMES = ("triton", "native", "eager")


def unavailable(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot serve tensors on `device`, or None when it can."""
    if name == "eager":
        return None
    if name == "triton":
        from pgdpo_fast.backends import triton

        return triton.unavailable(device)
    return "the native extension is not part of this build"


def select(name: str, device: torch.device) -> str:
    """The backend to use: `name` itself when it can run here, the fastest that can for "auto".

    Raises:
        BackendUnavailable: a backend asked for by name cannot run here; nothing falls back silently.
        ValueError: no such backend.
    """
    if name == "auto":
        # The interpreter is a checking tool, thousands of times slower than torch: never chosen on its own.
        return "triton" if device.type == "cuda" and unavailable("triton", device) is None else "eager"
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: expected 'auto', {', '.join(map(repr, NAMES))}")
    reason = unavailable(name, device)
    if reason is not None:
        raise BackendUnavailable(f"backend={name!r} cannot run on {device}: {reason}")
    return name
