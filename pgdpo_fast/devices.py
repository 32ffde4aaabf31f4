"""The devices and dtypes a user may name, and the one place where a name becomes one."""

from __future__ import annotations

import torch

from pgdpo_fast.errors import ConfigError
from pgdpo_fast.options import did_you_mean, wrong

__all__ = ["DTYPES", "select_device", "select_dtype"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def select_device(name: str, key: str = "device") -> torch.device:
    """The device called `name`: cpu, cuda, cuda:N, or for "auto" a GPU where there is one.

    Raises:
        ConfigError: no such device here; the message calls the setting `key`.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise wrong(key, name, "auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}={name!r}: no CUDA device is visible; use cpu, or check the driver")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key}={name!r}: expected an index below {torch.cuda.device_count()}, the number of visible CUDA devices"
        )
    return device


def select_dtype(name: str, key: str = "dtype") -> torch.dtype:
    """The dtype called `name` in `DTYPES`; ConfigError, calling the setting `key`, for any other name."""
    if name not in DTYPES:
        hint = f"; did you mean {_LONG[name]!r}?" if name in _LONG else did_you_mean(name, DTYPES)
        raise wrong(key, name, f"one of {', '.join(DTYPES)}{hint}")
    return DTYPES[name]
