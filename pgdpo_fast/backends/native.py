"""Loads the native libraries of csrc/, which come with the wheel or are built on first use.

The CPU library implements the operators of the loss (operators.py) and packs rows of the reference cache; its sums
leave the passes in double, so the fold and the objective run in double whatever the predictions are. The CUDA library
packs rows, into pinned host memory if wanted, and brings the rows of a batch back; the loss on CUDA is Triton's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import build, operators  # noqa: F401  (defines what the libraries implement)
from pgdpo_fast.backends.operands import Operands, segment_length

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
        return build.PREBUILT if self._comes_built() else self._of_machine().get()

    def _of_machine(self) -> build.Library:
        return build.cpu_library()

    def seconds_to_build(self) -> float | None:
        """How long `load` would spend on building, None where it would not try."""
        if self._tried or os.environ.get("PGDPO_FAST_NATIVE") == "0" or self._comes_built():
            return None
        try:
            library = self._of_machine()
            return library.seconds if library.is_to_be_built() else None
        except (build.BuildError, OSError):
            return None

    def _comes_built(self) -> bool:
        return build.PREBUILT.exists()


class _CudaLibrary(_Library):
    """`pack` and `gather_rows` on CUDA; one library for all devices of this machine."""

    def _of_machine(self) -> build.Library:
        devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        return build.cuda_library(tuple(sorted({f"{a}{b}" for a, b in devices if (a, b) >= CUDA_CAPABILITY})))

    def _comes_built(self) -> bool:
        return False


_library, _cuda_library = _Library(), _CudaLibrary()


def unavailable(device: torch.device) -> str | None:
    """Why the native loss cannot serve tensors on `device`, or None when it can. The first call may build it."""
    if device.type == "cpu":
        return _library.load().reason
    if device.type == "cuda":
        return "the native loss is for CPU tensors; use backend='triton'"
    return f"the native loss is for CPU tensors, these are on {device}; use backend='eager'"


def rows_unavailable(device: torch.device) -> str | None:
    """Why `pack` cannot serve predictions on `device`, or None when it can. The first call may build the library."""
    if device.type != "cuda":
        return unavailable(device)
    return _unfit_for_rows(device) or _cuda_library.load().reason


def _unfit_for_rows(device: torch.device) -> str | None:
    if torch.version.hip or not torch.cuda.is_available():
        return "the kernels of the reference cache need an NVIDIA GPU that torch can use; run nvidia-smi"
    capability = torch.cuda.get_device_capability(device)
    if capability < CUDA_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, CUDA_CAPABILITY))
        return f"compute capability {have} is below the {need} the kernels of the reference cache need"
    return None


def seconds_to_build(device: torch.device) -> float | None:
    """How long the first use on `device` would spend on building its library, None where none would be built."""
    if device.type == "cuda":
        return None if _unfit_for_rows(device) else _cuda_library.seconds_to_build()
    return _library.seconds_to_build() if device.type == "cpu" else None


def load(device: torch.device) -> tuple[str | None, str | None]:
    """Load, after building it if need be, the library of `device` ("cpu" or "cuda"): its path, or why there is none."""
    if device.type == "cuda" and (reason := _unfit_for_rows(device)):
        return None, reason
    library = (_cuda_library if device.type == "cuda" else _library).load()
    return library.path, library.reason


def status() -> Status:
    """The state of the library, loading (and building) it if that has not happened yet."""
    reason = _library.load().reason
    try:
        compiler = " ".join(build.compiler())
    except build.BuildError:
        compiler = None
    return Status(reason, _library.path, None if reason else _operators.instruction_set(), compiler)


_in_flight: list[tuple[torch.cuda.Event, list[Tensor]]] = []
_in_flight_lock = threading.Lock()


def _keep(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Hold the host memory among `tensors` until work queued on `device` so far is done: a kernel that was given its
    address is unknown to torch, which would hand freed pinned memory to the next one who asks."""
    host = [x for x in tensors if x.device.type == "cpu"]
    if device.type != "cuda" or not host:
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    with _in_flight_lock:
        _in_flight[:] = [held for held in _in_flight if not held[0].query()]
        _in_flight.append((event, host))


def pack(operands: Operands, out: Mapping[str, Tensor]) -> None:
    """Rows of the reference cache, the bytes of `PackedReference.pack`, in one pass.

    Args:
        operands: the reference's predictions in the policy's place, and their targets.
        out: where rows go, `PackedReference`'s tensors by name: chosen and rejected `[B, ...]` bfloat16, or uint8 with
            chosen_scale and rejected_scale `[B, ceil(N / 128)]` float32. On the predictions' device; for CUDA
            predictions also pinned host memory, which the kernel writes itself, to be read once the current stream has
            come that far.
    """
    _operators.pack.default(
        *operands,
        chosen=out["chosen"],
        rejected=out["rejected"],
        chosen_scale=out.get("chosen_scale"),
        rejected_scale=out.get("rejected_scale"),
        length=segment_length(operands.policy.shape[1:]),
    )
    _keep(list(out.values()), operands.policy.device)


def gather_rows(tables: Sequence[Tensor], rows: Sequence[int], out: Sequence[Tensor]) -> None:
    """Copy `tables[k][rows]` into `out[k]` for every k, in one launch for up to four tables and 64 rows.

    Args:
        tables: `[rows, ...]` contiguous, on the outputs' device or in pinned host memory.
        rows: which rows of every table.
        out: `[len(rows), ...]` contiguous CUDA tensors of the tables' dtypes.
    """
    _operators.gather_rows.default(list(tables), list(rows), list(out))
    _keep(tables, out[0].device)
