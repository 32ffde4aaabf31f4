"""Calls the native passes of csrc/. The libraries come with the wheel or are built on first use.

Errors, fold and objective are one call into C++, the gradients another. On the CPU sums leave the passes in double, so
the fold and the objective run in double whatever the predictions are.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import build
from pgdpo_fast.backends.operands import PACK_BLOCK, Operands, segments

SWITCHED_OFF = "switched off by PGDPO_FAST_NATIVE=0"
STATISTICS, TELEMETRY, ELEMENT_MEANS = 6, 9, 4
CUDA_CAPABILITY = (8, 0)


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
    """The CUDA operators, which share the CPU library's schemas; one library for all devices of this machine."""

    def _load(self) -> str | None:
        return _library.load().reason or super()._load()

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
    return Status(reason, _library.path, None if reason else torch.ops.pgdpo_fast_native.instruction_set(), compiler)


def _arguments(x: Operands, reference_form: int, groups: int) -> tuple:
    """What every operator starts with, in the order of csrc/native.cpp."""
    cut = segments(x.policy.chosen.shape[1:], groups)
    return (*x.policy, *x.target, x.noise, x.target_scale, *(x.reference or (None, None)),
            *(x.reference_scale or (None, None)), reference_form, groups, cut.segments, cut.length)


def statistics(x: Operands, reference_form: int, groups: int, anchor: bool, cross: bool) -> Tensor:
    """Means of all statistics over each group, `[6, B, G]`."""
    means = _empty(x, STATISTICS, x.pairs, groups)
    torch.ops.pgdpo_fast_native.statistics(*_arguments(x, reference_form, groups), anchor, cross, means)
    return means


def objective(x: Operands, reference_form: int, groups: int, anchor: bool, cross: bool, reference_errors: Tensor | None,
              weight: Tensor | None, posterior_scale: Tensor | None, kind: int, flags: int,
              parameters: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[]`, telemetry `[9, B, G]` and gradient coefficients `[3, B, G]`.

    Args:
        reference_errors: `[2, B, G]`, weight: `[B, G]`, posterior_scale: `[B]`, in the accumulation dtype.
    """
    out = _empty(x), _empty(x, TELEMETRY, x.pairs, groups), _empty(x, 3, x.pairs, groups)
    torch.ops.pgdpo_fast_native.objective(
        *_arguments(x, reference_form, groups), anchor, cross, *_contiguous(reference_errors, weight, posterior_scale),
        kind, flags, parameters, *out)
    return out


def loss_and_gradients(x: Operands, reference_form: int, groups: int, anchor: bool, cross: bool,
                       reference_errors: Tensor | None, weight: Tensor | None, posterior_scale: Tensor | None,
                       kind: int, flags: int, parameters: tuple[float, ...], incoming: Tensor | None = None,
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`objective` and `gradients` at once: loss `[]`, telemetry `[9, B, G]`, both gradients `[B, ...]`.

    On a device with compute capability 9.0 or more, operands that fit into its shared memory together are read once, in
    one cooperative launch (csrc/cuda_plan.h has the rule); else it is the launches of the two.

    Args:
        incoming: `[]` in the accumulation dtype, multiplies the gradients; None for 1.
    """
    gradient = tuple(torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in x.policy)
    out = _empty(x), _empty(x, TELEMETRY, x.pairs, groups), _empty(x, 3, x.pairs, groups)
    torch.ops.pgdpo_fast_native.loss_and_gradients(
        *_arguments(x, reference_form, groups), anchor, cross, *_contiguous(reference_errors, weight, posterior_scale),
        kind, flags, parameters, *out, incoming, *gradient)
    return *out[:2], *gradient


def _empty(x: Operands, *shape: int) -> Tensor:
    return x.policy.chosen.new_empty(shape, dtype=x.compute_dtype)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def gradients(x: Operands, reference_form: int, groups: int, anchor: bool, coefficients: Tensor, incoming: Tensor,
              chosen: Tensor, rejected: Tensor) -> None:
    """Write the gradients by both predictions into `chosen` and `rejected`, each `[B, ...]` with contiguous rows."""
    torch.ops.pgdpo_fast_native.gradients(
        *_arguments(x, reference_form, groups), anchor, coefficients, incoming, chosen, rejected)


def element_objective(x: Operands, reference_form: int, weight: Tensor | None, posterior_scale: Tensor | None,
                      kind: int, flags: int, parameters: tuple[float, ...], outer: bool,
                      gradients: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Every element its own group: loss `[]`, telemetry `[9, B, 1]`, means of gamma, P, 1 - gamma and I `[4, B]`.

    `gradients`, when given, is filled with both gradients for an incoming gradient of 1, in the same pass.
    """
    loss, telemetry, means = _empty(x), _empty(x, TELEMETRY, x.pairs, 1), _empty(x, ELEMENT_MEANS, x.pairs)
    torch.ops.pgdpo_fast_native.element_objective(
        *_arguments(x, reference_form, 1), *_contiguous(weight, posterior_scale), kind, flags, parameters, outer,
        gradients is not None, loss, telemetry, means, *(gradients or (loss, loss)))
    return loss, telemetry, means


def element_gradients(x: Operands, reference_form: int, weight: Tensor | None, posterior_scale: Tensor | None,
                      kind: int, flags: int, parameters: tuple[float, ...], outer: bool, means: Tensor,
                      incoming: Tensor, chosen: Tensor, rejected: Tensor, speculative: bool) -> None:
    """Write both gradients; with `speculative` they are already there for an incoming gradient of 1."""
    torch.ops.pgdpo_fast_native.element_gradients(
        *_arguments(x, reference_form, 1), *_contiguous(weight, posterior_scale), kind, flags, parameters, outer,
        speculative, means, incoming, chosen, rejected)


def pack(x: Operands, format: str, out: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of the reference cache, the bytes of `PackedReference.pack`, and the reference's errors, in one pass.

    Args:
        x: the reference's predictions in the policy's place, and their targets.
        format: "bf16" or "fp8".
        out: where rows go, `PackedReference`'s tensors by name; for CUDA predictions also pinned host memory, which the
            kernel then writes itself. New tensors beside the predictions otherwise.

    Returns:
        The rows by name, and `[2, B]` mean squared errors.
    """
    if out is None:
        like, fp8 = x.policy.chosen, format == "fp8"
        rows = [torch.empty(like.shape, dtype=torch.uint8 if fp8 else torch.bfloat16, device=like.device) for _ in "wl"]
        out = dict(zip(("chosen", "rejected"), rows, strict=True))
        if fp8:
            out |= {f"{name}_scale": like.new_empty((x.pairs, -(-x.numel // PACK_BLOCK)), dtype=torch.float32)
                    for name in ("chosen", "rejected")}
    means = _empty(x, STATISTICS, x.pairs, 1)
    torch.ops.pgdpo_fast_native.pack(*_arguments(x, 0, 1), out["chosen"], out["rejected"], out.get("chosen_scale"),
                                     out.get("rejected_scale"), means)
    return out, means[:2, :, 0]


def gather_rows(tables: list[Tensor], rows: list[int], out: list[Tensor]) -> list[Tensor]:
    """Copy `tables[k][rows]` into `out[k]` for every k: one launch for CUDA outputs, whose tables may be pinned memory.

    Args:
        tables: `[rows, ...]` contiguous.
        rows: which rows of every table.
        out: `[len(rows), ...]` contiguous, of the tables' dtypes.
    """
    torch.ops.pgdpo_fast_native.gather_rows(tables, rows, out)
    return out
