"""The operators of operators.py as launches of the Triton kernels.

On a CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 was set before import. Block sizes and forms come from
launches.py.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.backends import constant_when_compiled, launches
from pgdpo_fast.backends.launches import Key, Launch
from pgdpo_fast.backends.operands import (
    PACK_BLOCK,
    Call,
    Coefficients,
    ElementMeans,
    Operands,
    PairNumbers,
    PairRows,
    Reduction,
    ReferenceForm,
    Side,
    Telemetry,
    pair_rows,
)
from pgdpo_fast.backends.operators import gradients_like, triton_library, with_bundles
from pgdpo_fast.errors import KernelTimeout
from pgdpo_fast.objectives import (
    FLAG_SAFEGUARD_BATCH,
    TERM_FLAG_BITS,
    TERM_LIMIT,
    Epilogue,
    GroupErrors,
    Parameters,
)

DEFAULT_LAUNCH = Launch()
INTERPRETER = (0, 0)  # its compute capability, where launches are looked up
# Partial sums a program of the folds adds up at a time, over one group or, where groups have fewer, several, and the
# losses the last one adds at a time. 512 are all segments of a video (MAX_SEGMENTS): one trip to memory.
FOLD_PARTS, FOLD_LOSSES = 512, 128
# How often a program of the stream looks for its coefficients before it gives up. A look takes about a microsecond and
# a pair some ten: these are seconds. And its programs on a device that does not say how many multiprocessors it has.
STREAM_POLLS, STREAM_PROGRAMS = 1 << 22, 4
# Three blocks of 128 threads with it; without a stated limit some objectives spill on one target or another.
STREAM_REGISTERS = 168
# What the stream tells the caches: of predictions and targets, until their gradients are made, and of all else.
STREAM_KEEP, STREAM_PASS = "evict_last", "evict_first"
# The same of the two-pass form, which says nothing until a device has shown it to help, and whether its gradients begin
# where the errors ended.
TWO_PASS_KEEP, TWO_PASS_PASS, BACKWARDS = "", "", True
# Of the error pass and of the one that rewrites elements' gradients. Without a stated limit the assembler spills a few
# registers on sm_100 to make room for more blocks. This one is four blocks of 128 threads and takes nothing away:
# float32 calls need at most 123 and get what they need, so that most have more blocks; float64 fits in 128 unspilt.
PASS_REGISTERS = 128


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


def _launch(x: PairRows, reduction: Reduction, elements: bool = False) -> Launch:
    policy = x.policy.chosen
    on_gpu = policy.device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(policy.device) if on_gpu else INTERPRETER
    key = Key(
        architecture=10 * major + minor,
        granularity="element" if elements else "frame" if reduction.groups > 1 else "sample",
        reference=ReferenceForm(reduction.reference_form).name.lower(),
        dtype=str(policy.dtype).removeprefix("torch."),
        elements=x.numel,
        pairs=x.pairs,
    )
    return launches.find(key) or DEFAULT_LAUNCH


def streams(call: Call, epilogue: Epilogue) -> bool:
    """Whether a call of sample or frame granularity makes its gradients in forward, in one launch. Compiled graphs,
    which must not depend on a size, do so only where it is forced; an objective whose coefficients need sums over the
    whole batch never does, since gradients of a pair would have to wait for the last one.

    Raises:
        ConfigError: the form asked for is none.
    """
    if any(epilogue.flags >> TERM_FLAG_BITS * term & FLAG_SAFEGUARD_BATCH for term in range(TERM_LIMIT)):
        return False
    launch = DEFAULT_LAUNCH if torch.compiler.is_compiling() else _launch(pair_rows(call.operands), call.reduction)
    return launches.form(launch) == "stream"


def _arguments(x: PairRows, reduction: Reduction, launch: Launch):
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
        REFERENCE=int(reduction.reference_form),
        SHARED_TARGET=x.shared_target,
        TARGET_BUILT=x.noise is not None,
        LATENT_WEIGHT=latent_weight.value,
        PACK_BLOCK=PACK_BLOCK,
        COMPUTE=_triton_dtype(x.compute_dtype),
        ALIGN=_alignment(reduction.length),
        BLOCK=launch.block,
        num_warps=launch.warps,
        enable_fp_fusion=True,
    )
    return operands, switches


class Partial(NamedTuple):
    """What the programs of a pass leave for the fold."""

    sums: Tensor  # [planes, B, segments] in the accumulation dtype
    arrived: Tensor  # [1] int32, zero once the pass is over: programs of the fold count themselves there


def _partial(x: PairRows, reduction: Reduction, planes: int) -> Partial:
    shape = (planes, x.pairs, _segments(x, reduction.length))
    # One allocation; the sums start 16 bytes in or more, as aligned as they would be alone.
    room = torch.empty(4 + math.prod(shape), dtype=x.compute_dtype, device=x.policy.chosen.device)
    return Partial(room[4:].view(shape), room[:1].view(torch.int32)[:1])


def _fold_launch(groups: int, segments: int, launch: Launch) -> tuple[int, dict[str, Any]]:
    """Rows a program of the folds takes, and its switches: both follow from the video's shape alone."""
    parts = -(-segments // groups)
    width = min(1 << (parts - 1).bit_length(), FOLD_PARTS)
    rows = FOLD_PARTS // width
    return rows, dict(ROWS=rows, FOLD=width, num_warps=launch.warps, enable_fp_fusion=True)


def partial_sums(x: PairRows, reduction: Reduction, launch: Launch) -> Partial:
    """Sums over every segment; planes are the fields of `GroupErrors`."""
    from pgdpo_fast.kernels.pair import pair_errors_kernel

    operands, switches = _arguments(x, reduction, launch)
    partial = _partial(x, reduction, len(GroupErrors._fields))
    with _guard(partial.sums.device):
        pair_errors_kernel[(_segments(x, reduction.length), x.pairs)](
            operands,
            partial_ptr=partial.sums,
            arrived_ptr=partial.arrived,
            pairs=x.pairs,
            n=x.numel,
            seg_len=reduction.length,
            groups=reduction.groups,
            consecutive=reduction.consecutive,
            ANCHOR=reduction.anchor,
            CROSS=reduction.cross,
            ANCHOR_REJECTED=reduction.anchor_rejected,
            LANES=_lanes(x),
            KEEP=TWO_PASS_KEEP,
            PASS=TWO_PASS_PASS,
            maxnreg=PASS_REGISTERS,
            **switches,
        )
    return partial


def fold(partial: Tensor, groups: int, count: int, launch: Launch) -> Tensor:
    """Partial sums `[7, B, segments]` as means over each group, `[7, B, G]`, always added in the same order."""
    from pgdpo_fast.kernels.pair import fold_means_kernel

    statistics, pairs, segments = partial.shape
    out = partial.new_empty((statistics, pairs, groups))
    rows, switches = _fold_launch(groups, segments, launch)
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


def _numbers(
    reference_errors: Tensor | None, numbers: PairNumbers, epilogue: Epilogue, dtype: torch.dtype, absent: Tensor
):
    """The numbers of a call as the kernels take them, in `dtype`. What is absent is never read."""
    from pgdpo_fast.kernels import pair

    return pair.Numbers(
        reference_error_ptr=absent if reference_errors is None else reference_errors,
        weight_ptr=absent if numbers.weight is None else numbers.weight,
        posterior_scale_ptr=absent if numbers.posterior_scale is None else numbers.posterior_scale,
        beta_scale_ptr=absent if numbers.beta_scale is None else numbers.beta_scale,
        params_ptr=_parameters(epilogue, dtype, absent.device),
    )


def fold_objective(
    partial: Partial,
    groups: int,
    count: int,
    gaps: bool,
    reference_errors: Tensor | None,
    numbers: PairNumbers,
    epilogue: Epilogue,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums to loss `[]`, `Telemetry` `[9, B, G]` and `Coefficients` `[4, B, G]` in one launch."""
    from pgdpo_fast.kernels.pair import fold_kernel

    sums = partial.sums
    _, pairs, segments = sums.shape
    loss = sums.new_empty(())
    telemetry = sums.new_empty((len(Telemetry._fields), pairs, groups))
    coefficients = sums.new_empty((len(Coefficients._fields), pairs, groups))
    rows, switches = _fold_launch(groups, segments, launch)
    with _guard(sums.device):
        fold_kernel[(-(-pairs * groups // rows),)](
            _numbers(reference_errors, numbers, epilogue, sums.dtype, sums),
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


def pair_errors(operands: Operands, reduction: Reduction) -> Tensor:
    x = pair_rows(operands)
    launch = _launch(x, reduction)
    return fold(partial_sums(x, reduction, launch).sums, reduction.groups, x.numel // reduction.groups, launch)


def pair_objective(
    operands: Operands, reference_errors: Tensor | None, numbers: PairNumbers, reduction: Reduction, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    x = pair_rows(operands)
    gaps = x.reference is not None or reference_errors is not None
    count = x.numel // reduction.groups
    launch = _launch(x, reduction)
    partial = partial_sums(x, reduction, launch)
    return fold_objective(partial, reduction.groups, count, gaps, reference_errors, numbers, epilogue, launch)


def pair_gradient(
    operands: Operands, coefficients: Tensor, incoming: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    gradients = gradients_like(operands)
    _launch_gradients(pair_rows(operands), reduction, coefficients, incoming, _halves(*gradients), bets=None)
    return gradients


def _launch_gradients(
    x: PairRows,
    reduction: Reduction,
    coefficients: Tensor,
    incoming: Tensor,
    gradients: tuple[Tensor, Tensor],
    bets: Tensor | None,
) -> None:
    from pgdpo_fast.kernels.pair import pair_gradient_kernel

    chosen, rejected = gradients
    arguments, switches = _arguments(x, reduction, _launch(x, reduction))
    with _guard(chosen.device):
        pair_gradient_kernel[(_segments(x, reduction.length), x.pairs)](
            gw_ptr=chosen,
            gl_ptr=rejected,
            operands=arguments,
            coefficient_ptr=coefficients,
            incoming_ptr=incoming,
            bets_ptr=coefficients if bets is None else bets,
            last_ptr=coefficients if bets is None else _last_incoming(x),
            gw_stride=chosen.stride(0),
            gl_stride=rejected.stride(0),
            pairs=x.pairs,
            groups=reduction.groups,
            n=x.numel,
            seg_len=reduction.length,
            consecutive=reduction.consecutive,
            ANCHOR=reduction.anchor,
            ANCHOR_REJECTED=reduction.anchor_rejected,
            BET=bets is not None,
            BACKWARDS=BACKWARDS,
            PASS=TWO_PASS_PASS,
            **switches,
        )


def pair_elements(
    operands: Operands,
    numbers: PairNumbers,
    reduction: Reduction,
    epilogue: Epilogue,
    outer: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = gradients_like(operands, with_gradients)
    halves = _halves(*gradients) if with_gradients else None
    return *_elements(pair_rows(operands), numbers, reduction, epilogue, outer, halves, bets=None), *gradients


def _elements(
    x: PairRows,
    numbers: PairNumbers,
    reduction: Reduction,
    epilogue: Epilogue,
    outer: bool,
    gradients: tuple[Tensor, Tensor] | None,
    bets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, telemetry and means in two launches, and gradients where there is room for them."""
    from pgdpo_fast.kernels.element import OUTER_SUMS, SUMS, fold_elements_kernel

    partial = _partial(x, reduction, (OUTER_SUMS if outer else SUMS).value)
    sums, segments = partial.sums, partial.sums.shape[-1]
    loss, means = sums.new_empty(()), sums.new_empty((len(ElementMeans._fields), x.pairs))
    telemetry = sums.new_empty((len(Telemetry._fields), x.pairs, 1))
    _launch_elements(
        x,
        numbers,
        reduction,
        epilogue,
        outer,
        means=means,
        incoming=None,
        partial=partial,
        gradients=gradients,
        bets=bets,
    )
    rows, switches = _fold_launch(1, segments, _launch(x, reduction, elements=True))
    with _guard(sums.device):
        fold_elements_kernel[(-(-x.pairs // rows),)](
            _numbers(None, numbers, epilogue, sums.dtype, sums),
            partial_ptr=sums,
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
    return loss, telemetry, means


def pair_elements_gradient(
    operands: Operands,
    numbers: PairNumbers,
    means: Tensor,
    incoming: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    reduction: Reduction,
    epilogue: Epilogue,
    outer: bool,
    bet: bool,  # gradients for 1 are written once more: those of training come from pair_stream
) -> None:
    _launch_elements(
        pair_rows(operands),
        numbers,
        reduction,
        epilogue,
        outer,
        means=means,
        incoming=incoming,
        partial=None,
        gradients=_halves(chosen, rejected),
        bets=None,
    )


_last: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_states: dict[tuple[torch.device, int], Tensor] = {}
_gave_up: dict[torch.device, Tensor] = {}


def _last_incoming(x: PairRows) -> Tensor:
    """`[1]`, the incoming gradient that backward saw last on the device; 1 at first. It stays where it is, so that
    graphs go on reading and writing it. Several streams may: every pair or segment notes what it was made for."""
    key = x.compute_dtype, x.policy.chosen.device
    if key not in _last:
        _last[key] = torch.ones(1, dtype=key[0], device=key[1])
    return _last[key]


def _stream_state(places: int, device: torch.device) -> Tensor:
    """At least `places` zeros for one launch, which leaves zeros behind: kept for each stream, whose launches follow
    one another. A graph may be replayed on any, so a launch under capture has its own, zeroed in the graph."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(places, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    held = _states.get((device, stream))
    if held is None or held.numel() < places:
        held = _states[device, stream] = torch.zeros(2 * places, dtype=torch.int32, device=device)
    return held


def _gave_up_flag(device: torch.device) -> Tensor:
    """`[1]` int32 in host memory that kernels on the device write: the host reads it without waiting for them."""
    if device not in _gave_up:
        _gave_up[device] = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return _gave_up[device]


def check_waits(device: torch.device) -> None:
    """Raise `KernelTimeout` if a stream kernel that has ended on `device` gave up a wait. Reads host memory: no sync.

    Asked at the next call in the stream form and by `PreferenceLossOutput.check_finite`.
    """
    flag = _gave_up.get(device)
    if flag is not None and flag[0].item():
        flag.zero_()
        raise KernelTimeout(
            f"the stream kernel of the loss waited longer than any healthy launch and gave up on {device}; gradients "
            f"of that call are NaN, earlier ones are right. {launches.SETTING}=two-pass computes the same without waits"
        )


def pair_stream(
    operands: Operands,
    reference_errors: Tensor | None,
    numbers: PairNumbers,
    reduction: Reduction,
    epilogue: Epilogue,
    elements: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = pair_rows(operands)
    segments = _segments(x, reduction.length)
    gradients = gradients_like(operands)
    like = operands.policy.new_empty(0, dtype=x.compute_dtype)
    if elements:
        bets = like.new_empty((x.pairs, segments))
        loss, telemetry, _ = _elements(x, numbers, reduction, epilogue, False, _halves(*gradients), bets)
        return loss, telemetry, like, bets, *gradients

    from pgdpo_fast.kernels.stream import STATE_PAIRS, stream_kernel

    device = like.device
    check_waits(device)
    launch = _launch(x, reduction)
    arguments, switches = _arguments(x, reduction, launch)
    _, fold_switches = _fold_launch(reduction.groups, segments, launch)
    bets = like.new_empty((x.pairs, 1))
    loss = like.new_empty(())
    telemetry = like.new_empty((len(Telemetry._fields), x.pairs, reduction.groups))
    coefficients = like.new_empty((len(Coefficients._fields), x.pairs, reduction.groups))
    partial = like.new_empty((len(GroupErrors._fields), x.pairs, segments))
    chosen, rejected = _halves(*gradients)
    total = x.pairs * segments
    again = 4 * reduction.length * x.policy.chosen.element_size()  # bytes of a segment that gradients read again
    programs = STREAM_PROGRAMS
    if device.type == "cuda":
        programs = launch.programs * torch.cuda.get_device_properties(device).multi_processor_count
    with _guard(device):
        stream_kernel[(min(programs, 2 * total),)](
            gw_ptr=chosen,
            gl_ptr=rejected,
            operands=arguments,
            numbers=_numbers(reference_errors, numbers, epilogue, partial.dtype, partial),
            partial_ptr=partial,
            loss_ptr=loss,
            telemetry_ptr=telemetry,
            coefficient_ptr=coefficients,
            last_ptr=_last_incoming(x),
            bets_ptr=bets,
            state_ptr=_stream_state(STATE_PAIRS.value + 2 * x.pairs, device),
            gave_up_ptr=_gave_up_flag(device),
            gw_stride=chosen.stride(0),
            gl_stride=rejected.stride(0),
            pairs=x.pairs,
            groups=reduction.groups,
            segments=segments,
            n=x.numel,
            seg_len=reduction.length,
            count=x.numel // reduction.groups,
            consecutive=reduction.consecutive,
            lag=min(segments - (-launch.ahead // again), total),
            KIND=epilogue.kind,
            FLAGS=epilogue.flags,
            TERMS=_terms(epilogue),
            GAPS=x.reference is not None or reference_errors is not None,
            REFERENCE_ERRORS=reference_errors is not None,
            WEIGHTED=numbers.weight is not None,
            BETA_SCALED=numbers.beta_scale is not None,
            ANCHOR=reduction.anchor,
            CROSS=reduction.cross,
            ANCHOR_REJECTED=reduction.anchor_rejected,
            LANES=_lanes(x),
            WIDTH=FOLD_LOSSES,
            POLLS=STREAM_POLLS,
            KEEP=STREAM_KEEP,
            PASS=STREAM_PASS,
            maxnreg=STREAM_REGISTERS,
            **switches | fold_switches,
        )
    return loss, telemetry, coefficients, bets, *gradients


def pair_stream_gradient(
    operands: Operands,
    numbers: PairNumbers,
    coefficients: Tensor,
    bets: Tensor | None,
    incoming: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    reduction: Reduction,
    epilogue: Epilogue,
    elements: bool,
) -> None:
    x, gradients = pair_rows(operands), _halves(chosen, rejected)
    if not elements:
        return _launch_gradients(x, reduction, coefficients, incoming, gradients, bets)
    return _launch_elements(
        x,
        numbers,
        reduction,
        epilogue,
        False,
        means=incoming,
        incoming=incoming,
        partial=None,
        gradients=gradients,
        bets=bets,
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
    reduction: Reduction,
    epilogue: Epilogue,
    outer: bool,
    *,
    means: Tensor,
    incoming: Tensor | None,
    partial: Partial | None,
    gradients: tuple[Tensor, Tensor] | None,
    bets: Tensor | None,
) -> None:
    from pgdpo_fast.kernels.element import pair_elements_kernel

    operands, switches = _arguments(x, reduction, _launch(x, reduction, elements=True))
    absent = x.policy.chosen
    chosen, rejected = gradients or (absent, absent)
    with _guard(absent.device):
        pair_elements_kernel[(_segments(x, reduction.length), x.pairs)](
            gw_ptr=chosen,
            gl_ptr=rejected,
            operands=operands,
            numbers=_numbers(None, numbers, epilogue, x.compute_dtype, absent),
            mean_ptr=means,
            incoming_ptr=absent if incoming is None else incoming,
            last_ptr=absent if bets is None else _last_incoming(x),
            bets_ptr=absent if bets is None else bets,
            partial_ptr=absent if partial is None else partial.sums,
            arrived_ptr=absent if partial is None else partial.arrived,
            gw_stride=chosen.stride(0),
            gl_stride=rejected.stride(0),
            pairs=x.pairs,
            n=x.numel,
            seg_len=reduction.length,
            KIND=epilogue.kind,
            FLAGS=epilogue.flags,
            TERMS=_terms(epilogue),
            ANCHOR=reduction.anchor,
            OUTER=outer,
            WITH_SUMS=partial is not None,
            GRADS=gradients is not None,
            INCOMING=incoming is not None,
            BET=bets is not None,
            WEIGHTED=numbers.weight is not None,
            BETA_SCALED=numbers.beta_scale is not None,
            LANES=_lanes(x),
            maxnreg=PASS_REGISTERS if partial is None and not outer else None,
            **switches,
        )


def _triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


for _run in (
    pair_errors,
    pair_objective,
    pair_gradient,
    pair_elements,
    pair_elements_gradient,
    pair_stream,
    pair_stream_gradient,
):
    triton_library.impl(_run.__name__, with_bundles(_run), "CompositeExplicitAutograd")
