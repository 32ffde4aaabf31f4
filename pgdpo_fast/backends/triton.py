"""The operators of operators.py as launches of the Triton kernels.

On a CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 was set before import. One launch table for all devices
so far; no device has been measured that asks for another.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import constant_when_compiled
from pgdpo_fast.backends.operands import (
    PACK_BLOCK,
    Coefficients,
    ElementMeans,
    Operands,
    PairNumbers,
    PairRows,
    Plan,
    Side,
    Telemetry,
    pair_rows,
)
from pgdpo_fast.backends.operators import gradients_like, triton_library, with_bundles
from pgdpo_fast.objectives import Epilogue, GroupErrors, Parameters


class Launch(NamedTuple):
    """Elements a program handles at a time, and its warps: 1024 / (32 * 4) = 8 bfloat16 = one 128-bit load a thread."""

    block: int = 1024
    warps: int = 4


DEFAULT_LAUNCH = Launch()
# Partial sums a program of the folds adds up at a time, over one group or, where groups have fewer, several; its warps;
# and the losses the last one adds at a time. 512 are all chunks of a video (MAX_CHUNKS): one trip to memory.
FOLD_PARTS, FOLD_WARPS, FOLD_LOSSES = 512, 4, 128
# Of the pass that rewrites elements' gradients. Without a stated limit the assembler spills a few registers to make
# room for more blocks; 96 hold it on every target.
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


_resident: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def _parameters(epilogue: Epilogue, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The objective's numbers on the device, copied there once and kept for good: another stream or a captured graph
    may read them at any time. A capture must not copy from the host: numbers it is the first to use are filled in by
    kernels of the graph, all others cost no launch."""
    key = tuple(epilogue.parameters), dtype, device
    if (held := _resident.get(key)) is not None:
        return held
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        filled = torch.empty(len(key[0]), dtype=dtype, device=device)
        for place, value in enumerate(key[0]):
            filled[place].fill_(value)
        return filled
    return _resident.setdefault(key, torch.tensor(key[0], dtype=dtype, device=device))


def _terms(epilogue: Epilogue) -> int:
    """Formulas added up in a sum of objectives."""
    return len(epilogue.parameters) // len(Parameters._fields)


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _alignment(length: int) -> int:
    """Largest power of two up to 16 that divides `length`: what the compiler may assume of a segment's start."""
    return min(length & -length, 16)


def _segments(x: PairRows, length: int) -> int:
    return -(-x.numel // length)


def _lanes(x: PairRows) -> int:
    """Values one thread loads at a time: 128 bits of the predictions' dtype."""
    return 16 // x.policy.chosen.element_size()


def _arguments(x: PairRows, plan: Plan):
    """The operands as the kernels take them, and the switches common to all passes. What is absent is never read."""
    from pgdpo_fast.kernels import pair

    absent = Side(x.policy.chosen, x.policy.chosen)
    reference, scale = x.reference or absent, x.reference_scale or absent
    noise, weight = absent.chosen if x.noise is None else x.noise, x.latent_weight
    latent_weight = pair.LATENT_WEIGHT_NONE
    if weight is not None:
        each = weight.shape[1:].numel() == x.numel
        latent_weight = pair.LATENT_WEIGHT_EACH if each else pair.LATENT_WEIGHT_SHARED
    operands = pair.Operands(
        pw_ptr=x.policy.chosen,
        pl_ptr=x.policy.rejected,
        yw_ptr=x.target.chosen,
        yl_ptr=x.target.rejected,
        noise_ptr=noise,
        qw_ptr=reference.chosen,
        ql_ptr=reference.rejected,
        sw_ptr=scale.chosen,
        sl_ptr=scale.rejected,
        target_scale_ptr=absent.chosen if x.target_scale is None else x.target_scale,
        latent_weight_ptr=absent.chosen if weight is None else weight,
        weight_length=0 if weight is None else weight.shape[2],
        weight_span=0 if weight is None else x.numel // weight.shape[1],
        pw_stride=x.policy.chosen.stride(0),
        pl_stride=x.policy.rejected.stride(0),
        yw_stride=x.target.chosen.stride(0),
        yl_stride=x.target.rejected.stride(0),
        noise_stride=0 if x.noise is None else noise.stride(0),
        qw_stride=0 if x.reference is None else reference.chosen.stride(0),
        ql_stride=0 if x.reference is None else reference.rejected.stride(0),
        sw_stride=0 if x.reference_scale is None else scale.chosen.stride(0),
        sl_stride=0 if x.reference_scale is None else scale.rejected.stride(0),
        latent_weight_stride=0 if weight is None else weight.stride(0),
    )
    switches = dict(
        REFERENCE=int(plan.reference_form),
        SHARED_TARGET=x.shared_target,
        TARGET_BUILT=x.noise is not None,
        LATENT_WEIGHT=latent_weight.value,
        PACK_BLOCK=PACK_BLOCK,
        COMPUTE=_triton_dtype(x.compute_dtype),
        ALIGN=_alignment(plan.length),
        BLOCK=DEFAULT_LAUNCH.block,
        num_warps=DEFAULT_LAUNCH.warps,
        enable_fp_fusion=True,
    )
    return operands, switches


class Partial(NamedTuple):
    """What the programs of a pass leave for the fold."""

    sums: Tensor  # [planes, B, segments] in the accumulation dtype
    arrived: Tensor  # [1] int32, zero once the pass is over: programs of the fold count themselves there


def _partial(x: PairRows, plan: Plan, planes: int) -> Partial:
    shape = (planes, x.pairs, _segments(x, plan.length))
    # One allocation; the sums start 16 bytes in or more, as aligned as they would be alone.
    room = torch.empty(4 + math.prod(shape), dtype=x.compute_dtype, device=x.policy.chosen.device)
    return Partial(room[4:].view(shape), room[:1].view(torch.int32)[:1])


def _fold_launch(groups: int, segments: int) -> tuple[int, dict[str, Any]]:
    """Rows a program of the folds takes, and its switches: both follow from the video's shape alone."""
    parts = -(-segments // groups)
    width = min(1 << (parts - 1).bit_length(), FOLD_PARTS)
    rows = FOLD_PARTS // width
    return rows, dict(ROWS=rows, FOLD=width, num_warps=FOLD_WARPS, enable_fp_fusion=True)


def partial_sums(x: PairRows, plan: Plan) -> Partial:
    """Sums over every segment; planes are the fields of `GroupErrors`."""
    from pgdpo_fast.kernels.pair import pair_errors_kernel

    operands, switches = _arguments(x, plan)
    partial = _partial(x, plan, len(GroupErrors._fields))
    with _guard(partial.sums.device):
        pair_errors_kernel[(_segments(x, plan.length), x.pairs)](
            operands,
            partial_ptr=partial.sums,
            arrived_ptr=partial.arrived,
            pairs=x.pairs,
            n=x.numel,
            seg_len=plan.length,
            groups=plan.groups,
            consecutive=plan.consecutive,
            ANCHOR=plan.anchor,
            CROSS=plan.cross,
            ANCHOR_REJECTED=plan.anchor_rejected,
            LANES=_lanes(x),
            **switches,
        )
    return partial


def fold(partial: Tensor, groups: int, count: int) -> Tensor:
    """Partial sums `[7, B, segments]` as means over each group, `[7, B, G]`, always added in the same order."""
    from pgdpo_fast.kernels.pair import fold_means_kernel

    statistics, pairs, segments = partial.shape
    out = partial.new_empty((statistics, pairs, groups))
    rows, switches = _fold_launch(groups, segments)
    with _guard(partial.device):
        fold_means_kernel[(-(-pairs * groups // rows),)](
            partial_ptr=partial,
            out_ptr=out,
            rows=pairs * groups,
            segments=segments,
            groups=groups,
            count=count,
            COMPUTE=_triton_dtype(partial.dtype),
            **switches,
        )
    return out


def _numbers(reference_errors: Tensor | None, numbers: PairNumbers, epilogue: Epilogue, absent: Tensor):
    """The numbers of a call as the kernels take them. What is absent is never read."""
    from pgdpo_fast.kernels import pair

    return pair.Numbers(
        reference_error_ptr=absent if reference_errors is None else reference_errors,
        weight_ptr=absent if numbers.weight is None else numbers.weight,
        posterior_scale_ptr=absent if numbers.posterior_scale is None else numbers.posterior_scale,
        beta_scale_ptr=absent if numbers.beta_scale is None else numbers.beta_scale,
        params_ptr=_parameters(epilogue, absent.dtype, absent.device),
    )


def fold_objective(
    partial: Partial,
    groups: int,
    count: int,
    gaps: bool,
    reference_errors: Tensor | None,
    numbers: PairNumbers,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums to loss `[]`, `Telemetry` `[9, B, G]` and `Coefficients` `[4, B, G]` in one launch."""
    from pgdpo_fast.kernels.pair import fold_kernel

    sums = partial.sums
    _, pairs, segments = sums.shape
    loss = sums.new_empty(())
    telemetry = sums.new_empty((len(Telemetry._fields), pairs, groups))
    coefficients = sums.new_empty((len(Coefficients._fields), pairs, groups))
    rows, switches = _fold_launch(groups, segments)
    with _guard(sums.device):
        fold_kernel[(-(-pairs * groups // rows),)](
            _numbers(reference_errors, numbers, epilogue, sums),
            partial_ptr=sums,
            loss_ptr=loss,
            telemetry_ptr=telemetry,
            coefficient_ptr=coefficients,
            arrived_ptr=partial.arrived,
            rows=pairs * groups,
            segments=segments,
            groups=groups,
            count=count,
            KIND=epilogue.kind,
            FLAGS=epilogue.flags,
            TERMS=_terms(epilogue),
            GAPS=gaps,
            REFERENCE_ERRORS=reference_errors is not None,
            WEIGHTED=numbers.weight is not None,
            BETA_SCALED=numbers.beta_scale is not None,
            COMPUTE=_triton_dtype(sums.dtype),
            WIDTH=FOLD_LOSSES,
            **switches,
        )
    return loss, telemetry, coefficients


def pair_errors(operands: Operands, plan: Plan) -> Tensor:
    x = pair_rows(operands)
    return fold(partial_sums(x, plan).sums, plan.groups, x.numel // plan.groups)


def pair_objective(
    operands: Operands, reference_errors: Tensor | None, numbers: PairNumbers, plan: Plan, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    x = pair_rows(operands)
    gaps = x.reference is not None or reference_errors is not None
    count = x.numel // plan.groups
    return fold_objective(partial_sums(x, plan), plan.groups, count, gaps, reference_errors, numbers, epilogue)


def pair_gradient(operands: Operands, coefficients: Tensor, incoming: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    from pgdpo_fast.kernels.pair import pair_gradient_kernel

    x = pair_rows(operands)
    gradients = gradients_like(operands)
    chosen, rejected = _halves(*gradients)
    arguments, switches = _arguments(x, plan)
    with _guard(chosen.device):
        pair_gradient_kernel[(_segments(x, plan.length), x.pairs)](
            gw_ptr=chosen,
            gl_ptr=rejected,
            operands=arguments,
            coefficient_ptr=coefficients,
            incoming_ptr=incoming,
            gw_stride=chosen.stride(0),
            gl_stride=rejected.stride(0),
            pairs=x.pairs,
            groups=plan.groups,
            n=x.numel,
            seg_len=plan.length,
            consecutive=plan.consecutive,
            ANCHOR=plan.anchor,
            ANCHOR_REJECTED=plan.anchor_rejected,
            **switches,
        )
    return gradients


def pair_elements(
    operands: Operands, numbers: PairNumbers, plan: Plan, epilogue: Epilogue, outer: bool, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from pgdpo_fast.kernels.element import OUTER_SUMS, SUMS, fold_elements_kernel

    x = pair_rows(operands)
    gradients = gradients_like(operands, with_gradients)
    partial = _partial(x, plan, (OUTER_SUMS if outer else SUMS).value)
    sums, segments = partial.sums, partial.sums.shape[-1]
    loss, means = sums.new_empty(()), sums.new_empty((len(ElementMeans._fields), x.pairs))
    telemetry = sums.new_empty((len(Telemetry._fields), x.pairs, 1))
    _launch_elements(
        x,
        numbers,
        plan,
        epilogue,
        outer,
        means=means,
        incoming=None,
        partial=partial,
        gradients=_halves(*gradients) if with_gradients else None,
        speculative=False,
    )
    rows, switches = _fold_launch(1, segments)
    with _guard(sums.device):
        fold_elements_kernel[(-(-x.pairs // rows),)](
            partial_ptr=sums,
            weight_ptr=sums if numbers.weight is None else numbers.weight,
            beta_scale_ptr=sums if numbers.beta_scale is None else numbers.beta_scale,
            params_ptr=_parameters(epilogue, sums.dtype, sums.device),
            loss_ptr=loss,
            telemetry_ptr=telemetry,
            mean_ptr=means,
            arrived_ptr=partial.arrived,
            pairs=x.pairs,
            segments=segments,
            n=x.numel,
            FLAGS=epilogue.flags if outer else 0,
            OUTER=outer,
            GAPS=x.reference is not None,
            WEIGHTED=numbers.weight is not None,
            BETA_SCALED=numbers.beta_scale is not None,
            COMPUTE=_triton_dtype(sums.dtype),
            WIDTH=FOLD_LOSSES,
            **switches,
        )
    return loss, telemetry, means, *gradients


def pair_elements_gradient(
    operands: Operands,
    numbers: PairNumbers,
    means: Tensor,
    incoming: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    plan: Plan,
    epilogue: Epilogue,
    outer: bool,
    speculative: bool,
) -> None:
    _launch_elements(
        pair_rows(operands),
        numbers,
        plan,
        epilogue,
        outer,
        means=means,
        incoming=incoming,
        partial=None,
        gradients=_halves(chosen, rejected),
        speculative=speculative,
    )


def _halves(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and rejected rows of a gradient that may be one stacked tensor."""
    if rejected.numel():
        return chosen, rejected
    first, second = chosen.chunk(2)
    return first, second


def _launch_elements(
    x: PairRows,
    numbers: PairNumbers,
    plan: Plan,
    epilogue: Epilogue,
    outer: bool,
    *,
    means: Tensor,
    incoming: Tensor | None,
    partial: Partial | None,
    gradients: tuple[Tensor, Tensor] | None,
    speculative: bool,
) -> None:
    from pgdpo_fast.kernels.element import pair_elements_kernel

    operands, switches = _arguments(x, plan)
    absent = x.policy.chosen
    chosen, rejected = gradients or (absent, absent)
    with _guard(absent.device):
        pair_elements_kernel[(_segments(x, plan.length), x.pairs)](
            gw_ptr=chosen,
            gl_ptr=rejected,
            operands=operands,
            weight_ptr=absent if numbers.weight is None else numbers.weight,
            posterior_scale_ptr=absent if numbers.posterior_scale is None else numbers.posterior_scale,
            beta_scale_ptr=absent if numbers.beta_scale is None else numbers.beta_scale,
            params_ptr=_parameters(epilogue, x.compute_dtype, absent.device),
            mean_ptr=means,
            incoming_ptr=absent if incoming is None else incoming,
            partial_ptr=absent if partial is None else partial.sums,
            arrived_ptr=absent if partial is None else partial.arrived,
            gw_stride=chosen.stride(0),
            gl_stride=rejected.stride(0),
            pairs=x.pairs,
            n=x.numel,
            seg_len=plan.length,
            KIND=epilogue.kind,
            FLAGS=epilogue.flags,
            TERMS=_terms(epilogue),
            ANCHOR=plan.anchor,
            OUTER=outer,
            WITH_SUMS=partial is not None,
            GRADS=gradients is not None,
            INCOMING=incoming is not None,
            SPECULATIVE=speculative,
            WEIGHTED=numbers.weight is not None,
            BETA_SCALED=numbers.beta_scale is not None,
            LANES=_lanes(x),
            maxnreg=REWRITE_REGISTERS if partial is None and not outer else None,
            **switches,
        )


def _triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


for _run in (pair_errors, pair_objective, pair_gradient, pair_elements, pair_elements_gradient):
    triton_library.impl(_run.__name__, with_bundles(_run), "CompositeExplicitAutograd")
