"""Calls the native CPU passes of csrc/. The library comes with the wheel or is built on first use.

Sums leave the passes in double, so the fold and the objective run in double whatever the predictions are.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import build
from pgdpo_fast.backends.operands import Operands, segments

SWITCHED_OFF = "switched off by PGDPO_FAST_NATIVE=0"
TELEMETRY, ELEMENT_MEANS = 9, 4


class Status(NamedTuple):
    """What `pgdpo-fast doctor` shows. `reason` says why the library is not loaded, None when it is."""

    reason: str | None
    library: str | None
    instruction_set: str | None
    compiler: str | None


class _Library:
    """The loaded library of this process, or why there is none; found out once."""

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
            path = build.PREBUILT if build.PREBUILT.exists() else build.cached_library()
            torch.ops.load_library(path)
            torch.ops.pgdpo_fast_native.instruction_set()
        except build.BuildError as error:
            return str(error)
        except (OSError, RuntimeError) as error:
            return f"the library {path} does not load: {str(error).splitlines()[0]}"
        self.path = str(path)
        return None


_library = _Library()


def unavailable(device: torch.device) -> str | None:
    """Why the native library cannot serve tensors on `device`, or None when it can. The first call may build it."""
    if device.type != "cpu":
        return f"the native kernels are for CPU tensors, these are on {device}"
    return _library.load().reason


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


class PartialSums(NamedTuple):
    """Sums over every segment, `[6, B, segments]` in double, and the dtype in which their means are to be given."""

    sums: Tensor
    dtype: torch.dtype


def partial_sums(x: Operands, reference_form: int, groups: int, anchor: bool, cross: bool) -> PartialSums:
    """The sums of all statistics over every segment, one pass over the operands."""
    arguments = _arguments(x, reference_form, groups)
    sums = torch.empty((6, x.pairs, arguments[-2]), dtype=torch.float64)
    torch.ops.pgdpo_fast_native.errors(*arguments, anchor and reference_form != 0, cross, sums)
    return PartialSums(sums, x.compute_dtype)


def fold(partial: PartialSums, groups: int, count: int) -> Tensor:
    """Partial sums as means over each group, `[6, B, G]`, always added in the same order."""
    means = torch.empty((*partial.sums.shape[:2], groups), dtype=partial.dtype)
    torch.ops.pgdpo_fast_native.fold(partial.sums, groups, count, means)
    return means


def fold_objective(partial: PartialSums, groups: int, count: int, gaps: bool, reference_errors: Tensor | None,
                   weight: Tensor | None, posterior_scale: Tensor | None, kind: int, flags: int,
                   parameters: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums to loss `[]`, telemetry `[9, B, G]` and gradient coefficients `[3, B, G]`."""
    pairs = partial.sums.shape[1]
    loss = torch.empty((), dtype=partial.dtype)
    telemetry, coefficients = loss.new_empty((TELEMETRY, pairs, groups)), loss.new_empty((3, pairs, groups))
    torch.ops.pgdpo_fast_native.fold_objective(
        partial.sums, groups, count, gaps, reference_errors, weight, posterior_scale, kind, flags, parameters,
        loss, telemetry, coefficients)
    return loss, telemetry, coefficients


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
    loss = torch.empty((), dtype=x.compute_dtype)
    telemetry, means = loss.new_empty((TELEMETRY, x.pairs, 1)), loss.new_empty((ELEMENT_MEANS, x.pairs))
    torch.ops.pgdpo_fast_native.element_objective(
        *_arguments(x, reference_form, 1), weight, posterior_scale, kind, flags, parameters, outer,
        gradients is not None, loss, telemetry, means, *(gradients or (loss, loss)))
    return loss, telemetry, means


def element_gradients(x: Operands, reference_form: int, weight: Tensor | None, posterior_scale: Tensor | None,
                      kind: int, flags: int, parameters: tuple[float, ...], outer: bool, means: Tensor,
                      incoming: Tensor, chosen: Tensor, rejected: Tensor, speculative: bool) -> None:
    """Write both gradients; with `speculative` they are already there for an incoming gradient of 1."""
    torch.ops.pgdpo_fast_native.element_gradients(
        *_arguments(x, reference_form, 1), weight, posterior_scale, kind, flags, parameters, outer, speculative, means,
        incoming, chosen, rejected)
