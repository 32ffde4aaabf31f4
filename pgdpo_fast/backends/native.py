"""Loads the native passes of csrc/, which come with the wheel or are built on first use, and calls those of its own.

Loaded, they implement the operators of operators.py. On the CPU sums leave the passes in double, so the fold and the
objective run in double whatever the predictions are.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import build, operators  # noqa: F401  (defines what the libraries implement)
from pgdpo_fast.backends.operands import PACK_BLOCK, segment_length

SWITCHED_OFF = "switched off by PGDPO_FAST_NATIVE=0"
CUDA_CAPABILITY = (8, 0)
_operators = torch.ops.pgdpo_fast_native


class Status(NamedTuple):
    """What `pgdpo-fast doctor` shows. `reason` says why the library is not loaded, None when it is."""

    reason: str | None
    library: str | None
    instruction_set: str | None
    compiler: str | None


class _Library:
    """The loaded CPU library of this process, or why there is none; found out once."""

    def __init__(self):
        self._lock = threading.Lock()
        self._tried = False
        self.path: str | None = None
        self.reason: str | None = None

    def load(self) -> _Library:
        with self._lock:
            if not self._tried:
                self.reason = self._load()
                self._tried = True
        return self

    def _load(self) -> str | None:
        if os.environ.get("PGDPO_FAST_NATIVE") == "0":
            return SWITCHED_OFF
        try:
            path = self._find()
            torch.ops.load_library(path)
        except build.BuildError as error:
            return str(error)
        except (OSError, RuntimeError) as error:
            return f"the library {path} does not load: {str(error).splitlines()[0]}"
        self.path = str(path)
        return None

    def _find(self) -> os.PathLike:
        return build.PREBUILT if build.PREBUILT.exists() else build.cached_library()


class _CudaLibrary(_Library):
    """The same operators on CUDA; one library for all devices of this machine."""

    def _find(self) -> os.PathLike:
        devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        return build.cached_cuda_library(tuple(sorted({f"{a}{b}" for a, b in devices if (a, b) >= CUDA_CAPABILITY})))


_library, _cuda_library = _Library(), _CudaLibrary()


def unavailable(device: torch.device) -> str | None:
    """Why the native kernels cannot serve tensors on `device`, or None when they can. The first call may build them."""
    if device.type == "cpu":
        return _library.load().reason
    if device.type != "cuda":
        return f"the native kernels are for CPU and CUDA tensors, these are on {device}"
    if torch.version.hip or not torch.cuda.is_available():
        return "the native CUDA kernels need an NVIDIA GPU that torch can use; run nvidia-smi and pgdpo-fast doctor"
    capability = torch.cuda.get_device_capability(device)
    if capability < CUDA_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, CUDA_CAPABILITY))
        return f"compute capability {have} is below the {need} the native CUDA kernels need; use backend='eager'"
    return _cuda_library.load().reason


def status() -> Status:
    """The state of the library, loading (and building) it if that has not happened yet."""
    reason = _library.load().reason
    try:
        compiler = " ".join(build.compiler())
    except build.BuildError:
        compiler = None
    return Status(reason, _library.path, None if reason else _operators.instruction_set(), compiler)


def loss_and_gradients(
    tensors,
    reference_form: int,
    groups: int,
    length: int,
    anchor: bool,
    cross: bool,
    reference_errors: Tensor | None,
    weight: Tensor | None,
    posterior_scale: Tensor | None,
    kind: int,
    flags: int,
    parameters: tuple[float, ...],
    incoming: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pair_objective` and `pair_gradient` at once: loss `[]`, telemetry `[9, B, G]`, both gradients.

    On a device with compute capability 9.0 or more, operands that fit into its shared memory together are read once, in
    one cooperative launch (csrc/cuda/plan.h has the rule); else it is the launches of the two.

    Args:
        incoming: `[]` in the accumulation dtype, multiplies the gradients; None for 1.
    """
    return _operators.loss_and_gradients.default(
        *tensors,
        reference_errors,
        weight,
        posterior_scale,
        incoming,
        reference_form,
        groups,
        length,
        anchor,
        cross,
        kind,
        flags,
        parameters,
    )[:4]


def pack(tensors, format: str, out: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of the reference cache, the bytes of `PackedReference.pack`, and the reference's errors, in one pass.

    Args:
        tensors: the reference's predictions in the policy's place, and their targets.
        format: "bf16" or "fp8".
        out: where rows go, `PackedReference`'s tensors by name; for CUDA predictions also pinned host memory, which the
            kernel then writes itself. New tensors beside the predictions otherwise.

    Returns:
        The rows by name, and `[2, B]` mean squared errors.
    """
    if out is None:
        like, fp8 = tensors[0], format == "fp8"
        pairs, *video = like.shape if tensors[1] is not None else (like.shape[0] // 2, *like.shape[1:])
        rows = [like.new_empty((pairs, *video), dtype=torch.uint8 if fp8 else torch.bfloat16) for _ in "wl"]
        out = dict(zip(("chosen", "rejected"), rows, strict=True))
        if fp8:
            out |= {
                f"{name}_scale": like.new_empty((pairs, -(-rows[0][0].numel() // PACK_BLOCK)), dtype=torch.float32)
                for name in ("chosen", "rejected")
            }
    errors = _operators.pack.default(
        *tensors,
        out["chosen"],
        out["rejected"],
        out.get("chosen_scale"),
        out.get("rejected_scale"),
        segment_length(tensors[0].shape[1:], 1),
    )
    return out, errors


def gather_rows(tables: list[Tensor], rows: list[int], out: list[Tensor]) -> list[Tensor]:
    """Copy `tables[k][rows]` into `out[k]` for every k: one launch for CUDA outputs, whose tables may be pinned memory.

    Args:
        tables: `[rows, ...]` contiguous.
        rows: which rows of every table.
        out: `[len(rows), ...]` contiguous, of the tables' dtypes.
    """
    _operators.gather_rows.default(tables, rows, out)
    return out
