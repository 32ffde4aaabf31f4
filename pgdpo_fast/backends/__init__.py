"""Which backend computes the loss, and why. This floor alone knows about devices.

`eager` is plain torch and always works; `triton` (CUDA) and `native` (CPU) compute the same numbers in fused passes.
"""

from __future__ import annotations

import warnings

import torch

from pgdpo_fast.errors import BackendUnavailable

NAMES = ("triton", "native", "eager")


def constant_when_compiled(function):
    """`torch.compiler.assume_constant_result`, which itself would load the compiler (1 s) at import."""
    function._dynamo_marked_constant = True
    return function


def unavailable(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot serve tensors on `device`, or None when it can."""
    if name == "eager":
        return None
    if name == "triton":
        from pgdpo_fast.backends import triton

        return triton.unavailable(device)
    return _native_reason(device.type, device.index)


_native_loaded: set[tuple[str, int | None]] = (
    set()
)  # devices whose native kernels are there: this is asked at every call of the loss


@constant_when_compiled
def _native_reason(device_type: str, index: int | None) -> str | None:
    if (device_type, index) in _native_loaded:
        return None
    from pgdpo_fast.backends import native

    reason = native.unavailable(torch.device(device_type) if index is None else torch.device(device_type, index))
    if reason is None:
        _native_loaded.add((device_type, index))
    return reason


def packs_natively(name: str, device: torch.device) -> bool:
    """Whether rows of the reference cache are packed on `device` in one native pass, for the backend `name`; else in
    plain torch, to the same bytes.

    Raises:
        BackendUnavailable: a backend asked for by name cannot run here.
        ValueError: no such backend.
    """
    if device.type != "cuda" or name == "eager":
        return select(name, device) == "native"
    from pgdpo_fast.backends import native

    reason = native.rows_unavailable(device)
    if name == "native" and reason is not None:
        raise BackendUnavailable(f"backend={name!r} cannot pack on {device}: {reason}")
    if name != "native":
        select(name, device)
    return reason is None


@constant_when_compiled
def _cpu_default() -> str:
    """The native kernels where they can be had, else torch, with one warning unless that was asked for."""
    reason = _native_reason("cpu", None)
    if reason is None:
        return "native"
    from pgdpo_fast.backends.native import SWITCHED_OFF

    if reason != SWITCHED_OFF:
        warn_once(
            f"the loss runs in plain torch on the CPU, about ten times slower than it could: {reason}. "
            "PGDPO_FAST_NATIVE=0 or backend='eager' silences this."
        )
    return "eager"


_warned: set[str] = set()


@constant_when_compiled
def warn_once(message: str) -> None:
    """A RuntimeWarning that a process shows once; where a graph is compiled, while it is."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)


def select(name: str, device: torch.device) -> str:
    """The backend to use: `name` itself when it can run here, the fastest that can for "auto".

    Raises:
        BackendUnavailable: a backend asked for by name cannot run here; nothing falls back silently.
        ValueError: no such backend.
    """
    if name == "auto":
        # The interpreter is a checking tool, thousands of times slower than torch: never chosen on its own.
        if device.type == "cpu":
            return _cpu_default()
        return "triton" if device.type == "cuda" and unavailable("triton", device) is None else "eager"
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: expected 'auto', {', '.join(map(repr, NAMES))}")
    reason = unavailable(name, device)
    if reason is not None:
        raise BackendUnavailable(f"backend={name!r} cannot run on {device}: {reason}")
    return name
