"""The operators of operators.py as launches of the Triton kernels.

On a CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 was set before import. One launch table for all devices
so far; no device has been measured that asks for another.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import constant_when_compiled
from pgdpo_fast.backends.operands import PACK_BLOCK, Operands, gather
from pgdpo_fast.backends.operators import gradient_like, triton_library


class Launch(NamedTuple):
    """Elements a program handles at a time, and its warps: 1024 / (32 * 4) = 8 bfloat16 = one 128-bit load a thread."""

    block: int = 1024
    warps: int = 4


DEFAULT_LAUNCH = Launch()
# Without a stated limit the assembler spills a few registers to make room for more blocks than the one there is.
FOLD_LAUNCH = dict(ROWS=8, FOLD=128, num_warps=8, maxnreg=128, enable_fp_fusion=True)
# The same of the pass that rewrites elements' gradients: 96 registers hold it without a spill on every target.
REWRITE_REGISTERS = 96


@constant_when_compiled
def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors on `device`, or None when it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); run: pip install 'triton>=3.6'"
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            return "triton has no CPU backend; set TRITON_INTERPRET=1 before the first import to run its interpreter"
        return _interpreter_reason(triton.__version__)
    if device.type != "cuda":
        return f"the kernels are written for CUDA devices, the tensors are on {device}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"compute capability {capability} is below the 8.0 the kernels need"


def _interpreter_reason(version: str) -> str | None:
    """The interpreter of triton 3.6 turns arrays of one element into numbers, which numpy 2.4 refuses."""
    try:
        numpy = metadata.version("numpy")
    except metadata.PackageNotFoundError:
        return "Triton's interpreter needs numpy; run: pip install numpy"
    if version.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"the interpreter of triton {version} needs numpy < 2.4, this is {numpy}; run: pip install 'numpy<2.4'"
    return None


def _parameters(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The objective's numbers on the device. A CUDA graph must not copy from the host: there, kernels fill them in."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        filled = torch.zeros(8, dtype=dtype, device=device)
        for place, value in enumerate(values):
            filled[place].fill_(value)
        return filled
    return _copied_parameters(values, dtype, device)


@lru_cache(maxsize=256)
def _copied_parameters(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor((*values, *[0.0] * (8 - len(values))), dtype=dtype, device=device)


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _alignment(length: int) -> int:
    """Largest power of two up to 16 that divides `length`: what the compiler may assume of a segment's start."""
    return min(length & -length, 16)


def _segments(x: Operands, length: int) -> int:
    return -(-x.numel // length)


def _lanes(x: Operands) -> int:
    """Values one thread loads at a time: 128 bits of the predictions' dtype."""
    return 16 // x.policy.chosen.element_size()


def _rows(side, fallback: Tensor) -> tuple:
    """(chosen, rejected, chosen row stride, rejected row stride); an absent operand is never read."""
    if side is None:
        return fallback, fallback, 0, 0
    return side.chosen, side.rejected, side.chosen.stride(0), side.rejected.stride(0)


def _arguments(x: Operands, reference_form: int):
    """Pointers, strides and switches common to the error and the gradient kernel."""
    pw, pl, pw_stride, pl_stride = _rows(x.policy, x.policy.chosen)
    yw, yl, yw_stride, yl_stride = _rows(x.target, pw)
    qw, ql, qw_stride, ql_stride = _rows(x.reference, pw)
    sw, sl, sw_stride, sl_stride = _rows(x.reference_scale, pw)
    noise, noise_stride = (pw, 0) if x.noise is None else (x.noise, x.noise.stride(0))
    pointers = (pw, pl, yw, yl, noise, qw, ql, sw, sl)
    strides = (pw_stride, pl_stride, yw_stride, yl_stride, noise_stride, qw_stride, ql_stride, sw_stride, sl_stride)
    switches = dict(
        REFERENCE=reference_form,
        SHARED_TARGET=x.shared_target,
        TARGET_BUILT=x.noise is not None,
        PACK_BLOCK=PACK_BLOCK,
        COMPUTE=_triton_dtype(x.compute_dtype),
        BLOCK=DEFAULT_LAUNCH.block,
        num_warps=DEFAULT_LAUNCH.warps,
        enable_fp_fusion=True,
    )
    return pointers, strides, pw if x.target_scale is None else x.target_scale, switches


def partial_sums(x: Operands, reference_form: int, length: int, anchor: bool, cross: bool) -> Tensor:
    """Sums over every segment, `[6, B, segments]` in the accumulation dtype."""
    from pgdpo_fast.kernels.pair import STATISTICS, pair_errors_kernel

    segments = _segments(x, length)
    pointers, strides, target_scale, switches = _arguments(x, reference_form)
    partial = torch.empty((STATISTICS, x.pairs, segments), dtype=x.compute_dtype, device=pointers[0].device)
    with _guard(partial.device):
        pair_errors_kernel[(segments, x.pairs)](
            *pointers,
            target_scale,
            partial,
            *strides,
            x.pairs,
            x.numel,
            length,
            ANCHOR=anchor,
            CROSS=cross,
            ALIGN=_alignment(length),
            LANES=_lanes(x),
            **switches,
        )
    return partial


def fold(partial: Tensor, groups: int, count: int) -> Tensor:
    """Partial sums `[6, B, segments]` as means over each group, `[6, B, G]`, always added in the same order."""
    from pgdpo_fast.kernels.pair import fold_kernel

    statistics, pairs, parts = partial.shape
    out = partial.new_empty((statistics, pairs, groups))
    with _guard(partial.device):
        fold_kernel[(1,)](
            partial,
            partial,
            partial,
            partial,
            partial,
            out,
            out,
            out,
            pairs * groups,
            parts,
            groups,
            count,
            KIND=-1,
            FLAGS=0,
            GAPS=False,
            REFERENCE_ERRORS=False,
            WEIGHTED=False,
            COMPUTE=_triton_dtype(partial.dtype),
            **FOLD_LAUNCH,
        )
    return out


def fold_objective(
    partial: Tensor,
    groups: int,
    count: int,
    gaps: bool,
    reference_errors: Tensor | None,
    weight: Tensor | None,
    posterior_scale: Tensor | None,
    kind: int,
    flags: int,
    parameters: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums to loss `[]`, telemetry `[9, B, G]` and gradient coefficients `[3, B, G]` in one launch."""
    from pgdpo_fast.kernels.pair import TELEMETRY, fold_kernel

    _, pairs, parts = partial.shape
    loss = partial.new_empty(())
    telemetry = partial.new_empty((TELEMETRY, pairs, groups))
    coefficients = partial.new_empty((3, pairs, groups))
    with _guard(partial.device):
        fold_kernel[(1,)](
            partial,
            partial if reference_errors is None else reference_errors,
            partial if weight is None else weight,
            partial if posterior_scale is None else posterior_scale,
            _parameters(tuple(parameters), partial.dtype, partial.device),
            loss,
            telemetry,
            coefficients,
            pairs * groups,
            parts,
            groups,
            count,
            KIND=kind,
            FLAGS=flags,
            GAPS=gaps,
            REFERENCE_ERRORS=reference_errors is not None,
            WEIGHTED=weight is not None,
            COMPUTE=_triton_dtype(partial.dtype),
            **FOLD_LAUNCH,
        )
    return loss, telemetry, coefficients


def pair_errors(*args):
    *tensors, reference_form, groups, length, anchor, cross = args
    x = gather(*tensors)
    return fold(partial_sums(x, reference_form, length, anchor, cross), groups, x.numel // groups)


def pair_objective(*args):
    (
        *tensors,
        reference_errors,
        weight,
        posterior_scale,
        reference_form,
        groups,
        length,
        anchor,
        cross,
        kind,
        flags,
        parameters,
    ) = args
    x = gather(*tensors)
    gaps = x.reference is not None or reference_errors is not None
    partial = partial_sums(x, reference_form, length, anchor, cross)
    return fold_objective(
        partial, groups, x.numel // groups, gaps, reference_errors, weight, posterior_scale, kind, flags, parameters
    )


def pair_gradient(*args):
    from pgdpo_fast.kernels.pair import pair_gradient_kernel

    *tensors, coefficients, incoming, reference_form, groups, length, anchor = args
    x = gather(*tensors)
    gradients = gradient_like(tensors[0]), gradient_like(tensors[1])
    chosen, rejected = _halves(*gradients)
    pointers, strides, target_scale, switches = _arguments(x, reference_form)
    with _guard(chosen.device):
        pair_gradient_kernel[(_segments(x, length), x.pairs)](
            chosen,
            rejected,
            *pointers,
            target_scale,
            coefficients,
            incoming,
            chosen.stride(0),
            rejected.stride(0),
            *strides,
            x.pairs,
            groups,
            x.numel,
            length,
            ANCHOR=anchor,
            ALIGN=_alignment(length),
            **switches,
        )
    return gradients


def pair_elements(*args):
    from pgdpo_fast.kernels.element import ELEMENT_MEANS, ELEMENT_SUMS, fold_elements_kernel
    from pgdpo_fast.kernels.pair import TELEMETRY

    *tensors, weight, posterior_scale, reference_form, length, kind, flags, parameters, outer, with_gradients = args
    x = gather(*tensors)
    gradients = tuple(map(gradient_like, tensors[:2] if with_gradients else (None, None)))
    segments, device = _segments(x, length), x.policy.chosen.device
    partial = torch.empty((ELEMENT_SUMS, x.pairs, segments), dtype=x.compute_dtype, device=device)
    loss, means = partial.new_empty(()), partial.new_empty((ELEMENT_MEANS, x.pairs))
    telemetry = partial.new_empty((TELEMETRY, x.pairs, 1))
    _launch_elements(
        x,
        reference_form,
        length,
        weight,
        posterior_scale,
        kind,
        flags,
        parameters,
        outer,
        means=means,
        incoming=None,
        partial=partial,
        gradients=_halves(*gradients) if with_gradients else None,
        speculative=False,
    )
    with _guard(device):
        fold_elements_kernel[(1,)](
            partial,
            partial if weight is None else weight,
            _parameters(tuple(parameters), partial.dtype, device),
            loss,
            telemetry,
            means,
            x.pairs,
            segments,
            x.numel,
            OUTER=outer,
            GAPS=x.reference is not None,
            WEIGHTED=weight is not None,
            COMPUTE=_triton_dtype(partial.dtype),
            **FOLD_LAUNCH,
        )
    return loss, telemetry, means, *gradients


def pair_elements_gradient(*args):
    (
        *tensors,
        weight,
        posterior_scale,
        means,
        incoming,
        chosen,
        rejected,
        reference_form,
        length,
        kind,
        flags,
        parameters,
        outer,
        speculative,
    ) = args
    _launch_elements(
        gather(*tensors),
        reference_form,
        length,
        weight,
        posterior_scale,
        kind,
        flags,
        parameters,
        outer,
        means=means,
        incoming=incoming,
        partial=None,
        gradients=_halves(chosen, rejected),
        speculative=speculative,
    )


def _halves(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and rejected rows of a gradient that may be one stacked tensor."""
    return (chosen, rejected) if rejected.numel() else chosen.chunk(2)


def _launch_elements(
    x,
    reference_form,
    length,
    weight,
    posterior_scale,
    kind,
    flags,
    parameters,
    outer,
    *,
    means,
    incoming,
    partial,
    gradients,
    speculative,
):
    from pgdpo_fast.kernels.element import pair_elements_kernel

    pointers, strides, target_scale, switches = _arguments(x, reference_form)
    absent = pointers[0]
    gw, gl = gradients or (absent, absent)
    with _guard(absent.device):
        pair_elements_kernel[(_segments(x, length), x.pairs)](
            gw,
            gl,
            *pointers,
            target_scale,
            absent if weight is None else weight,
            absent if posterior_scale is None else posterior_scale,
            _parameters(tuple(parameters), x.compute_dtype, absent.device),
            means,
            absent if incoming is None else incoming,
            absent if partial is None else partial,
            gw.stride(0),
            gl.stride(0),
            *strides,
            x.pairs,
            x.numel,
            length,
            KIND=kind,
            FLAGS=flags,
            OUTER=outer,
            SUMS=partial is not None,
            GRADS=gradients is not None,
            INCOMING=incoming is not None,
            SPECULATIVE=speculative,
            WEIGHTED=weight is not None,
            ALIGN=_alignment(length),
            LANES=_lanes(x),
            maxnreg=REWRITE_REGISTERS if partial is None and not outer else None,
            **switches,
        )


def _triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


for _run in (pair_errors, pair_objective, pair_gradient, pair_elements, pair_elements_gradient):
    triton_library.impl(_run.__name__, _run, "CompositeExplicitAutograd")
