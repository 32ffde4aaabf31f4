"""The two passes over video latents that every preference loss is made of, and the small fold between them.

A video is a row of `segments * seg_len` elements; segment s belongs to group s % GROUPS. With one group the segments
are fixed-length segments of the row; with frames as groups they are the H*W runs of a `[C, F, H, W]` row. Where frames
lie outside channels several segments in a row belong to one group: `place` says where their sums go. Programs never
share an output and every fold has a fixed order, so results do not depend on the grid, the device or the batch size.

Switches: REFERENCE is the reference's form, SHARED_TARGET says that the pair has one target, TARGET_BUILT makes it as
noise_scale * noise + clean_scale * clean, LATENT_WEIGHT says whether elements have weights; each squared difference and
each gradient is multiplied by its element's, and where that is zero nothing that is read counts, not even NaN.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pgdpo_fast.kernels.epilogue import EVERY_TERM, FLAG_IMPORTANCE, FLAG_SAFEGUARD_BATCH, objective

# Mirrors of pgdpo_fast/backends/operands.py: ReferenceForm, and the planes of Telemetry and Coefficients. Those of the
# statistics are the fields of GroupErrors in pgdpo_fast/objectives.py, all as sums until the fold divides them.
REFERENCE_NONE = tl.constexpr(0)
REFERENCE_PREDICTION = tl.constexpr(1)
REFERENCE_BFLOAT16 = tl.constexpr(2)
REFERENCE_FLOAT8 = tl.constexpr(3)
STATISTIC_POLICY_CHOSEN = tl.constexpr(0)
STATISTIC_POLICY_REJECTED = tl.constexpr(1)
STATISTIC_GAP_CHOSEN = tl.constexpr(2)
STATISTIC_GAP_REJECTED = tl.constexpr(3)
STATISTIC_ANCHOR = tl.constexpr(4)
STATISTIC_CROSS = tl.constexpr(5)
STATISTIC_ANCHOR_REJECTED = tl.constexpr(6)
STATISTICS = tl.constexpr(7)
TELEMETRY_PER_PAIR_LOSS = tl.constexpr(0)
TELEMETRY_LOGITS = tl.constexpr(1)
TELEMETRY_ALPHA = tl.constexpr(2)
TELEMETRY_GAMMA = tl.constexpr(3)
TELEMETRY_IMPORTANCE = tl.constexpr(4)
TELEMETRY_POLICY_CHOSEN_ERROR = tl.constexpr(5)
TELEMETRY_POLICY_REJECTED_ERROR = tl.constexpr(6)
TELEMETRY_CHOSEN_GAP = tl.constexpr(7)
TELEMETRY_REJECTED_GAP = tl.constexpr(8)
COEFFICIENT_CHOSEN = tl.constexpr(0)
COEFFICIENT_REJECTED = tl.constexpr(1)
COEFFICIENT_ANCHOR = tl.constexpr(2)
COEFFICIENT_ANCHOR_REJECTED = tl.constexpr(3)
COEFFICIENTS = tl.constexpr(4)
# Nothing is told to the caches. A plain "" as a default of what other functions call is beyond triton 3.6.
NO_HINT = tl.constexpr("")
LATENT_WEIGHT_NONE = tl.constexpr(0)
LATENT_WEIGHT_EACH = tl.constexpr(1)  # one for every element of a video
LATENT_WEIGHT_SHARED = tl.constexpr(2)  # `weight_length` of them for every `weight_span` elements, over and over


class Operands(NamedTuple):
    """The latents of a call as a kernel's argument: rows of n contiguous elements, `stride` elements apart.

    w is the chosen, l the rejected video. What a call lacks may point anywhere; it is not read.
    """

    pw_ptr: Any  # [B, n] bf16, fp16, fp32 or fp64: predictions
    pl_ptr: Any
    yw_ptr: Any  # [B, n] bf16, fp16, fp32 or fp64: targets, or clean latents with TARGET_BUILT
    yl_ptr: Any
    noise_ptr: Any  # [B, n] bf16, fp16, fp32 or fp64, with TARGET_BUILT
    qw_ptr: Any  # [B, n] the reference's predictions, bf16 residuals q - y, or the same as uint8 of e4m3
    ql_ptr: Any
    sw_ptr: Any  # [B, ceil(n / PACK_BLOCK)] fp32 scales, with REFERENCE_FLOAT8
    sl_ptr: Any
    target_scale_ptr: Any  # [2, B] COMPUTE: noise_scale and clean_scale, with TARGET_BUILT
    latent_weight_ptr: Any  # [B, n / weight_span * weight_length] COMPUTE, with LATENT_WEIGHT
    weight_length: Any
    weight_span: Any
    pw_stride: Any
    pl_stride: Any
    yw_stride: Any
    yl_stride: Any
    noise_stride: Any
    qw_stride: Any
    ql_stride: Any
    sw_stride: Any
    sl_stride: Any
    latent_weight_stride: Any


class Segment(NamedTuple):
    """The run of a pair's rows that a program works on: where its operands start, and what its elements share."""

    pw_ptr: Any
    pl_ptr: Any
    yw_ptr: Any
    yl_ptr: Any
    noise_ptr: Any
    qw_ptr: Any
    ql_ptr: Any
    sw_ptr: Any
    sl_ptr: Any
    phase: Any  # int32: where in its block of PACK_BLOCK elements the run starts
    noise_scale: Any  # COMPUTE
    clean_scale: Any
    latent_weight_ptr: Any
    weight_phase: Any  # int32: where in its span the run starts
    weight_length: Any
    weight_span: Any


@triton.jit
def segment_at(
    x,
    pair,
    start,
    pairs,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The run of `x` from element `start` of `pair` on, both int64."""
    noise_scale = 0.0
    clean_scale = 1.0
    if TARGET_BUILT:
        noise_scale = tl.load(x.target_scale_ptr + pair).to(COMPUTE)
        clean_scale = tl.load(x.target_scale_ptr + pairs + pair).to(COMPUTE)
    latent_weight_ptr = x.latent_weight_ptr
    weight_phase = 0
    if LATENT_WEIGHT == LATENT_WEIGHT_EACH:
        latent_weight_ptr += pair * x.latent_weight_stride + start
    elif LATENT_WEIGHT == LATENT_WEIGHT_SHARED:
        latent_weight_ptr += pair * x.latent_weight_stride + start // x.weight_span * x.weight_length
        weight_phase = (start % x.weight_span).to(tl.int32)
    return Segment(
        pw_ptr=x.pw_ptr + (pair * x.pw_stride + start),
        pl_ptr=x.pl_ptr + (pair * x.pl_stride + start),
        yw_ptr=x.yw_ptr + (pair * x.yw_stride + start),
        yl_ptr=x.yl_ptr + (pair * x.yl_stride + start),
        noise_ptr=x.noise_ptr + (pair * x.noise_stride + start),
        qw_ptr=x.qw_ptr + (pair * x.qw_stride + start),
        ql_ptr=x.ql_ptr + (pair * x.ql_stride + start),
        sw_ptr=x.sw_ptr + (pair * x.sw_stride + start // PACK_BLOCK),
        sl_ptr=x.sl_ptr + (pair * x.sl_stride + start // PACK_BLOCK),
        phase=(start % PACK_BLOCK).to(tl.int32),
        noise_scale=noise_scale,
        clean_scale=clean_scale,
        latent_weight_ptr=latent_weight_ptr,
        weight_phase=weight_phase,
        weight_length=x.weight_length,
        weight_span=x.weight_span,
    )


@triton.jit
def group_of(segment, groups, consecutive):
    return segment // consecutive % groups


@triton.jit
def place(segment, groups, consecutive):
    """Where among its pair's the sums of `segment` go: group g's lie at g, g + groups, g + 2 groups, ..."""
    turn = segment // (consecutive * groups) * consecutive + segment % consecutive
    return turn * groups + group_of(segment, groups, consecutive)


@triton.jit
def load(ptr, offsets, mask, MASKED: tl.constexpr, COMPUTE: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """A block in the accumulation dtype. The cast follows the load at once: no low-precision arithmetic creeps in.
    EVICT is what the caches are told of the line."""
    if MASKED:
        return tl.load(ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICT).to(COMPUTE)
    return tl.load(ptr + offsets, eviction_policy=EVICT).to(COMPUTE)


@triton.jit
def load_latent_weights(
    x,
    offsets,
    mask,
    LATENT_WEIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVICT: tl.constexpr = NO_HINT,
):
    """The elements' weights, with LATENT_WEIGHT."""
    if LATENT_WEIGHT == LATENT_WEIGHT_SHARED:
        at = offsets + x.weight_phase
        offsets = at // x.weight_span * x.weight_length + at % x.weight_length
    return load(x.latent_weight_ptr, offsets, mask, MASKED, COMPUTE, EVICT)


@triton.jit
def counted(x, latent_weight):
    """`x` where it has a weight. What has none may be NaN."""
    return tl.where(latent_weight == 0.0, 0.0, x)


@triton.jit
def thread_sums(x, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Sum each run of LANES values, which sit in one thread's registers: running sums cost a LANES-th of them."""
    return tl.sum(tl.reshape(x, [BLOCK // LANES, LANES]), 1)


@triton.jit
def load_float8(
    ptr,
    scale_ptr,
    phase,
    offsets,
    mask,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVICT: tl.constexpr = NO_HINT,
):
    """e4m3 bytes times their block's scale; `phase` is where in its block the segment starts.

    Decoded by bit moves, so every architecture and the interpreter agree.
    """
    if MASKED:
        byte = tl.load(ptr + offsets, mask=mask, other=0, eviction_policy=EVICT).to(tl.int32)
        scale = tl.load(scale_ptr + (offsets + phase) // PACK_BLOCK, mask=mask, other=0.0)
    else:
        byte = tl.load(ptr + offsets, eviction_policy=EVICT).to(tl.int32)
        scale = tl.load(scale_ptr + (offsets + phase) // PACK_BLOCK)
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    # exponent and mantissa now sit as a float32 whose bias is off by 127 - 7
    return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36 * scale).to(COMPUTE)


@triton.jit
def reference_terms(
    p,
    y,
    q_ptr,
    scale_ptr,
    phase,
    offsets,
    mask,
    REFERENCE: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVICT: tl.constexpr = NO_HINT,
):
    """p - q and p + q - 2y; their product is the gap, exact to full relative accuracy where p is close to q."""
    if REFERENCE == REFERENCE_PREDICTION:
        q = load(q_ptr, offsets, mask, MASKED, COMPUTE, EVICT)
        return p - q, (p - y) + (q - y)
    if REFERENCE == REFERENCE_BFLOAT16:
        residual = load(q_ptr, offsets, mask, MASKED, COMPUTE, EVICT)
    else:
        residual = load_float8(q_ptr, scale_ptr, phase, offsets, mask, PACK_BLOCK, MASKED, COMPUTE, EVICT)
    return (p - y) - residual, (p - y) + residual


@triton.jit
def load_targets(
    x,
    offsets,
    mask,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVICT: tl.constexpr = NO_HINT,
):
    """Targets of the chosen and the rejected video; what the pair shares is read once."""
    y_w = load(x.yw_ptr, offsets, mask, MASKED, COMPUTE, EVICT)
    y_l = y_w
    if not SHARED_TARGET:
        y_l = load(x.yl_ptr, offsets, mask, MASKED, COMPUTE, EVICT)
    if TARGET_BUILT:
        noise = x.noise_scale * load(x.noise_ptr, offsets, mask, MASKED, COMPUTE, EVICT)
        y_w = noise + x.clean_scale * y_w
        y_l = noise + x.clean_scale * y_l
    return y_w, y_l


@triton.jit
def accumulate(
    sums,
    x,
    offsets,
    mask,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr,
    CROSS: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    KEEP: tl.constexpr = NO_HINT,
    PASS: tl.constexpr = NO_HINT,
):
    """One block into the seven running sums. Masked lanes load zeros everywhere, hence add zero. KEEP and PASS are what
    the caches are told of what the gradients need again, and of the rest."""
    e_w, e_l, d_w, d_l, anchor, cross, anchor_l = sums
    p_w = load(x.pw_ptr, offsets, mask, MASKED, COMPUTE, KEEP)
    p_l = load(x.pl_ptr, offsets, mask, MASKED, COMPUTE, KEEP)
    y_w, y_l = load_targets(x, offsets, mask, SHARED_TARGET, TARGET_BUILT, MASKED, COMPUTE, KEEP)
    u_w = p_w - y_w
    u_l = p_l - y_l
    v_w = u_w
    v_l = u_l
    if LATENT_WEIGHT:
        weight = load_latent_weights(x, offsets, mask, LATENT_WEIGHT, MASKED, COMPUTE)
        u_w = counted(u_w, weight)
        u_l = counted(u_l, weight)
        v_w = weight * u_w
        v_l = weight * u_l
    e_w += thread_sums(v_w * u_w, BLOCK, LANES)
    e_l += thread_sums(v_l * u_l, BLOCK, LANES)
    if CROSS:
        cross += thread_sums(v_w * u_l, BLOCK, LANES)
    if REFERENCE != REFERENCE_NONE:
        minus_w, plus_w = reference_terms(
            p_w,
            y_w,
            x.qw_ptr,
            x.sw_ptr,
            x.phase,
            offsets,
            mask,
            REFERENCE,
            PACK_BLOCK,
            MASKED,
            COMPUTE,
            KEEP if ANCHOR else PASS,
        )
        minus_l, plus_l = reference_terms(
            p_l, y_l, x.ql_ptr, x.sl_ptr, x.phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE, PASS
        )
        weighted_w = minus_w
        weighted_l = minus_l
        if LATENT_WEIGHT:
            minus_w = counted(minus_w, weight)
            minus_l = counted(minus_l, weight)
            plus_w = counted(plus_w, weight)
            plus_l = counted(plus_l, weight)
            weighted_w = weight * minus_w
            weighted_l = weight * minus_l
        d_w += thread_sums(weighted_w * plus_w, BLOCK, LANES)
        d_l += thread_sums(weighted_l * plus_l, BLOCK, LANES)
        if ANCHOR:
            anchor += thread_sums(weighted_w * minus_w, BLOCK, LANES)
        if ANCHOR_REJECTED:
            anchor_l += thread_sums(weighted_l * minus_l, BLOCK, LANES)
    return e_w, e_l, d_w, d_l, anchor, cross, anchor_l


@triton.jit
def segment_sums(
    x,
    length,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr,
    CROSS: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    KEEP: tl.constexpr = NO_HINT,
    PASS: tl.constexpr = NO_HINT,
):
    """The seven sums over the `length` elements from a segment's start on."""
    zero = tl.zeros([BLOCK // LANES], COMPUTE)
    sums = (zero, zero, zero, zero, zero, zero, zero)
    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        sums = accumulate(
            sums,
            x,
            begin + lanes,
            None,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            LATENT_WEIGHT,
            ANCHOR,
            CROSS,
            ANCHOR_REJECTED,
            PACK_BLOCK,
            False,
            COMPUTE,
            BLOCK,
            LANES,
            KEEP,
            PASS,
        )
    if whole < length:
        offsets = whole + lanes
        sums = accumulate(
            sums,
            x,
            offsets,
            offsets < length,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            LATENT_WEIGHT,
            ANCHOR,
            CROSS,
            ANCHOR_REJECTED,
            PACK_BLOCK,
            True,
            COMPUTE,
            BLOCK,
            LANES,
            KEEP,
            PASS,
        )
    added = ()
    for k in tl.static_range(len(sums)):
        added = added + (tl.sum(sums[k], 0),)
    return added


@triton.jit(do_not_specialize=["pairs"])  # one binary for every B: the same bits
def pair_errors_kernel(
    operands,  # Operands
    partial_ptr,  # [STATISTICS, B, segments] COMPUTE, written
    arrived_ptr,  # [] int32, written: zero, for the fold
    pairs,  # B
    n,  # elements of a video
    seg_len,  # elements of a segment; the last may be shorter
    groups,  # G
    consecutive,  # segments in a row that belong to one group
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr,
    CROSS: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    KEEP: tl.constexpr,
    PASS: tl.constexpr,
):
    """Partial sums of every segment: grid (segments, pairs).

    Reads the predictions, targets and references once (4 to 6 values per position), writes 28 bytes per segment.
    """
    segment = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    segments = tl.num_programs(0)
    start = tl.multiple_of(segment.to(tl.int64) * seg_len, ALIGN)
    length = tl.minimum(n - start, seg_len).to(tl.int32)
    x = segment_at(operands, pair, start, pairs, TARGET_BUILT, LATENT_WEIGHT, PACK_BLOCK, COMPUTE)
    sums = segment_sums(
        x,
        length,
        REFERENCE,
        SHARED_TARGET,
        TARGET_BUILT,
        LATENT_WEIGHT,
        ANCHOR,
        CROSS,
        ANCHOR_REJECTED,
        PACK_BLOCK,
        COMPUTE,
        BLOCK,
        LANES,
        KEEP,
        PASS,
    )
    if segment + pair == 0:
        tl.store(arrived_ptr, 0)
    plane = tl.cast(pairs, tl.int64) * segments
    partial_ptr += pair * segments + place(segment, groups, consecutive)
    for k in tl.static_range(len(sums)):
        tl.store(partial_ptr + k * plane, sums[k])


@triton.jit
def copies(x, COUNT: tl.constexpr):
    """COUNT times `x`, as a tuple; `(x,) * COUNT` is beyond the interpreter of triton 3.6."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (x,)
    return made


@triton.jit
def add_planes(sums, ptr, plane, where, mask):
    """The values at `where` of as many planes as there are running sums, added to them. Past the first-level cache:
    other multiprocessors have just written them."""
    added = ()
    for k in tl.static_range(len(sums)):
        value = tl.load(ptr + k * plane + where, mask=mask, other=0.0, cache_modifier=".cg")
        added = added + (sums[k] + value,)
    return added


@triton.jit
def fold_parts(
    partial_ptr,
    plane,
    row,
    inside,
    segments,
    groups,
    PLANES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """The partial sums of every row of a block, added up, for each of PLANES planes.

    Row r is group r % groups of pair r // groups, with every groups-th of its segments. All planes are loaded before
    any is used; neighbouring rows, which lie side by side, are the fastest axis.
    """
    group = row % groups
    first = (row // groups).to(tl.int64) * segments + group
    sums = copies(tl.zeros([FOLD, ROWS], COMPUTE), PLANES)
    for begin in range(0, segments, FOLD * groups):
        step = begin + tl.arange(0, FOLD) * groups
        mask = inside[None, :] & (group[None, :] + step[:, None] < segments)
        sums = add_planes(sums, partial_ptr, plane, first[None, :] + step[:, None], mask)
    folded = ()
    for k in tl.static_range(PLANES):
        folded = folded + (tl.sum(sums[k], 0),)
    return folded


@triton.jit
def batch_sums(partial_ptr, plane, parts, COMPUTE: tl.constexpr, FOLD: tl.constexpr):
    """The chosen errors and cross terms of the whole batch, which every program adds up for itself, in one order."""
    chosen = tl.zeros([FOLD], COMPUTE)
    cross = chosen
    for begin in range(0, parts, FOLD):
        part = begin + tl.arange(0, FOLD)
        mask = part < parts
        chosen += tl.load(
            partial_ptr + STATISTIC_POLICY_CHOSEN * plane + part, mask=mask, other=0.0, cache_modifier=".cg"
        )
        cross += tl.load(partial_ptr + STATISTIC_CROSS * plane + part, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(chosen, 0), tl.sum(cross, 0)


@triton.jit
def fold_groups(
    numbers,  # Numbers
    partial_ptr,
    telemetry_ptr,
    coefficient_ptr,
    row,
    inside,
    rows,
    segments,
    groups,
    count,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    TERMS: tl.constexpr,
    GAPS: tl.constexpr,
    REFERENCE_ERRORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Fold a block of groups and run the objective on them: telemetry and coefficients."""
    plane = tl.cast(rows // groups, tl.int64) * segments
    mean = 1.0 / (tl.zeros([1], COMPUTE) + count)
    row_scale = 1.0 / (tl.zeros([1], COMPUTE) + rows)
    # No objective takes the last plane.
    sums = fold_parts(partial_ptr, plane, row, inside, segments, groups, STATISTIC_ANCHOR_REJECTED, COMPUTE, ROWS, FOLD)
    e_w = sums[STATISTIC_POLICY_CHOSEN] * mean
    e_l = sums[STATISTIC_POLICY_REJECTED] * mean
    d_w = sums[STATISTIC_GAP_CHOSEN] * mean
    d_l = sums[STATISTIC_GAP_REJECTED] * mean
    anchor = sums[STATISTIC_ANCHOR] * mean
    cross = sums[STATISTIC_CROSS] * mean
    if REFERENCE_ERRORS:
        d_w = e_w - tl.load(numbers.reference_error_ptr + row, mask=inside, other=0.0).to(COMPUTE)
        d_l = e_l - tl.load(numbers.reference_error_ptr + rows + row, mask=inside, other=0.0).to(COMPUTE)
    posterior_scale = tl.zeros_like(e_w)
    if (EVERY_TERM * FLAG_IMPORTANCE) & FLAGS:
        posterior_scale = tl.load(numbers.posterior_scale_ptr + row // groups, mask=inside, other=0.0).to(COMPUTE)
    batch_chosen = 0.0
    batch_cross = 0.0
    if (EVERY_TERM * FLAG_SAFEGUARD_BATCH) & FLAGS:
        batch_chosen, batch_cross = batch_sums(partial_ptr, plane, rows // groups * segments, COMPUTE, FOLD)
    beta_scale = 1.0
    if BETA_SCALED:
        beta_scale = tl.load(numbers.beta_scale_ptr + row, mask=inside, other=1.0).to(COMPUTE)
    loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor = objective(
        e_w,
        e_l,
        d_w,
        d_l,
        anchor,
        cross,
        batch_chosen,
        batch_cross,
        posterior_scale,
        beta_scale,
        numbers.params_ptr,
        KIND,
        FLAGS,
        TERMS,
        BETA_SCALED,
        COMPUTE,
    )
    if not GAPS:
        d_w += float("nan")
        d_l += float("nan")
    telemetry = telemetry_ptr + row
    tl.store(telemetry + TELEMETRY_PER_PAIR_LOSS * rows, loss, mask=inside)
    tl.store(telemetry + TELEMETRY_LOGITS * rows, logits, mask=inside)
    tl.store(telemetry + TELEMETRY_ALPHA * rows, alpha, mask=inside)
    tl.store(telemetry + TELEMETRY_GAMMA * rows, gamma, mask=inside)
    tl.store(telemetry + TELEMETRY_IMPORTANCE * rows, importance, mask=inside)
    tl.store(telemetry + TELEMETRY_POLICY_CHOSEN_ERROR * rows, e_w, mask=inside)
    tl.store(telemetry + TELEMETRY_POLICY_REJECTED_ERROR * rows, e_l, mask=inside)
    tl.store(telemetry + TELEMETRY_CHOSEN_GAP * rows, d_w, mask=inside)
    tl.store(telemetry + TELEMETRY_REJECTED_GAP * rows, d_l, mask=inside)
    scale = tl.full([ROWS], 1.0, COMPUTE)
    if WEIGHTED:
        scale = tl.load(numbers.weight_ptr + row, mask=inside, other=0.0).to(COMPUTE)
    scale *= 2.0 * mean * row_scale
    coefficient = coefficient_ptr + row
    tl.store(coefficient + COEFFICIENT_CHOSEN * rows, scale * g_w, mask=inside)
    tl.store(coefficient + COEFFICIENT_REJECTED * rows, scale * g_l, mask=inside)
    tl.store(coefficient + COEFFICIENT_ANCHOR * rows, scale * g_anchor, mask=inside)
    tl.store(coefficient + COEFFICIENT_ANCHOR_REJECTED * rows, tl.zeros_like(g_w), mask=inside)


@triton.jit
def arrive(arrived_ptr):
    """How many programs came here before this one. What they had written is visible to the last of them."""
    tl.debug_barrier()  # all threads have written
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel")


@triton.jit
def mean_loss(
    loss_ptr, telemetry_ptr, weight_ptr, rows, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, WIDTH: tl.constexpr
):
    """The weighted mean of the groups' losses, added in an order that depends on nothing but their number."""
    total = tl.zeros([WIDTH], COMPUTE)
    for begin in range(0, rows, WIDTH):
        row = begin + tl.arange(0, WIDTH)
        loss = tl.load(
            telemetry_ptr + TELEMETRY_PER_PAIR_LOSS * rows + row, mask=row < rows, other=0.0, cache_modifier=".cg"
        )
        if WEIGHTED:
            loss *= tl.load(weight_ptr + row, mask=row < rows, other=0.0).to(COMPUTE)
        total += loss
    tl.store(loss_ptr + tl.arange(0, 1), tl.sum(total, 0) / (tl.zeros([1], COMPUTE) + rows))


class Numbers(NamedTuple):
    """The numbers of an objective and its groups as a kernel's argument; what a call lacks may point anywhere."""

    reference_error_ptr: Any  # [2, B, G] COMPUTE, chosen and rejected, with REFERENCE_ERRORS
    weight_ptr: Any  # [B, G] COMPUTE, with WEIGHTED
    posterior_scale_ptr: Any  # [B] COMPUTE, with FLAG_IMPORTANCE
    beta_scale_ptr: Any  # [B, G] COMPUTE, with BETA_SCALED
    params_ptr: Any  # [TERMS, PARAMETERS] COMPUTE


@triton.jit(do_not_specialize=["rows"])  # one binary for every B: the same bits
def fold_kernel(
    numbers,  # Numbers
    partial_ptr,  # [STATISTICS, B, segments] COMPUTE
    loss_ptr,  # [] COMPUTE, written
    telemetry_ptr,  # [TELEMETRY, B, G] COMPUTE, written
    coefficient_ptr,  # [COEFFICIENTS, B, G] COMPUTE, written
    arrived_ptr,  # [] int32, zero
    rows,  # B * G
    segments,  # of a video
    groups,  # G
    count,  # elements of a group
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    TERMS: tl.constexpr,
    GAPS: tl.constexpr,
    REFERENCE_ERRORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fold the partial sums of ROWS groups a program and run the objective; the last program adds the losses."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    fold_groups(
        numbers,
        partial_ptr,
        telemetry_ptr,
        coefficient_ptr,
        row,
        row < rows,
        rows,
        segments,
        groups,
        count,
        KIND,
        FLAGS,
        TERMS,
        GAPS,
        REFERENCE_ERRORS,
        WEIGHTED,
        BETA_SCALED,
        COMPUTE,
        ROWS,
        FOLD,
    )
    if arrive(arrived_ptr) == tl.num_programs(0) - 1:
        mean_loss(loss_ptr, telemetry_ptr, numbers.weight_ptr, rows, WEIGHTED, COMPUTE, WIDTH)


@triton.jit(do_not_specialize=["rows"])  # one binary for every B: the same bits
def fold_means_kernel(
    partial_ptr,  # [STATISTICS, B, segments] COMPUTE
    out_ptr,  # [STATISTICS, B, G] COMPUTE, written
    rows,  # B * G
    segments,  # of a video
    groups,  # G
    count,  # elements of a group
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """The partial sums of ROWS groups a program as means."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    plane = tl.cast(rows // groups, tl.int64) * segments
    mean = 1.0 / (tl.zeros([1], COMPUTE) + count)
    sums = fold_parts(partial_ptr, plane, row, row < rows, segments, groups, STATISTICS, COMPUTE, ROWS, FOLD)
    for k in tl.static_range(STATISTICS):
        tl.store(out_ptr + k * rows + row, sums[k] * mean, mask=row < rows)


@triton.jit
def scaled_gradients(
    gw_ptr,
    gl_ptr,
    x,
    c_w,
    c_l,
    c_anchor,
    c_anchor_rejected,
    offsets,
    mask,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PASS: tl.constexpr = NO_HINT,
):
    """One block of c_w (p_w - y_w) + c_anchor (p_w - q_w) and the same of the other
    video, each times the element's weight."""
    p_w = load(x.pw_ptr, offsets, mask, MASKED, COMPUTE, PASS)
    p_l = load(x.pl_ptr, offsets, mask, MASKED, COMPUTE, PASS)
    y_w, y_l = load_targets(x, offsets, mask, SHARED_TARGET, TARGET_BUILT, MASKED, COMPUTE, PASS)
    g_w = c_w * (p_w - y_w)
    if ANCHOR:
        minus_w, _ = reference_terms(
            p_w, y_w, x.qw_ptr, x.sw_ptr, x.phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE, PASS
        )
        g_w += c_anchor * minus_w
    # An objective that takes no notice of the rejected video must not take its NaN.
    g_l = tl.where(c_l == 0.0, 0.0, c_l * (p_l - y_l))
    if ANCHOR_REJECTED:
        minus_l, _ = reference_terms(
            p_l, y_l, x.ql_ptr, x.sl_ptr, x.phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE, PASS
        )
        g_l += c_anchor_rejected * minus_l
    if LATENT_WEIGHT:
        weight = load_latent_weights(x, offsets, mask, LATENT_WEIGHT, MASKED, COMPUTE, PASS)
        g_w = counted(weight * g_w, weight)
        g_l = counted(weight * g_l, weight)
    if MASKED:
        tl.store(gw_ptr + offsets, g_w.to(gw_ptr.dtype.element_ty), mask=mask, eviction_policy=PASS)
        tl.store(gl_ptr + offsets, g_l.to(gl_ptr.dtype.element_ty), mask=mask, eviction_policy=PASS)
    else:
        tl.store(gw_ptr + offsets, g_w.to(gw_ptr.dtype.element_ty), eviction_policy=PASS)
        tl.store(gl_ptr + offsets, g_l.to(gl_ptr.dtype.element_ty), eviction_policy=PASS)


@triton.jit
def segment_gradients(
    gw_ptr,
    gl_ptr,
    x,
    length,
    coefficient_ptr,
    row,
    rows,
    incoming,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    PASS: tl.constexpr = NO_HINT,
):
    """The gradients of the `length` elements from a segment's start on, with the coefficients of group `row`."""
    c_w = incoming * tl.load(coefficient_ptr + COEFFICIENT_CHOSEN * rows + row, cache_modifier=".cg")
    c_l = incoming * tl.load(coefficient_ptr + COEFFICIENT_REJECTED * rows + row, cache_modifier=".cg")
    c_anchor = incoming * tl.load(coefficient_ptr + COEFFICIENT_ANCHOR * rows + row, cache_modifier=".cg")
    c_anchor_rejected = incoming * tl.load(
        coefficient_ptr + COEFFICIENT_ANCHOR_REJECTED * rows + row, cache_modifier=".cg"
    )
    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        scaled_gradients(
            gw_ptr,
            gl_ptr,
            x,
            c_w,
            c_l,
            c_anchor,
            c_anchor_rejected,
            begin + lanes,
            None,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            LATENT_WEIGHT,
            ANCHOR,
            ANCHOR_REJECTED,
            PACK_BLOCK,
            False,
            COMPUTE,
            PASS,
        )
    if whole < length:
        offsets = whole + lanes
        scaled_gradients(
            gw_ptr,
            gl_ptr,
            x,
            c_w,
            c_l,
            c_anchor,
            c_anchor_rejected,
            offsets,
            offsets < length,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            LATENT_WEIGHT,
            ANCHOR,
            ANCHOR_REJECTED,
            PACK_BLOCK,
            True,
            COMPUTE,
            PASS,
        )


@triton.jit(do_not_specialize=["pairs"])  # one binary for every B: the same bits
def pair_gradient_kernel(
    gw_ptr,  # [B, n] in the predictions' dtype, written
    gl_ptr,  # the same
    operands,  # Operands
    coefficient_ptr,  # [COEFFICIENTS, B, G] COMPUTE
    incoming_ptr,  # [] fp32 or fp64
    bets_ptr,  # [B] COMPUTE, with BET: the incoming gradient the gradients of each pair are already there for
    last_ptr,  # [1] COMPUTE, written with BET
    gw_stride,  # elements between rows
    gl_stride,
    pairs,  # B
    groups,  # G
    n,  # elements of a video
    seg_len,  # elements of a segment; the last may be shorter
    consecutive,  # segments in a row that belong to one group
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    ANCHOR: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    BET: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    PASS: tl.constexpr,
):
    """Gradients by both predictions from the coefficients and the incoming gradient.

    Grid (segments, pairs), walked BACKWARDS: the error pass ended on the last segments, so those are still in L2.
    Reads predictions and targets once (and the reference where the anchor needs it), writes each gradient once.
    """
    segment = tl.program_id(0)
    if BACKWARDS:
        segment = tl.num_programs(0) - 1 - segment
    pair = tl.program_id(1).to(tl.int64)
    incoming = tl.load(incoming_ptr).to(COMPUTE)
    if BET:
        if segment + pair == 0:
            tl.store(last_ptr, incoming)
        if tl.load(bets_ptr + pair) == incoming:
            return
    start = tl.multiple_of(segment.to(tl.int64) * seg_len, ALIGN)
    length = tl.minimum(n - start, seg_len).to(tl.int32)
    gw_ptr += pair * gw_stride + start
    gl_ptr += pair * gl_stride + start
    x = segment_at(operands, pair, start, pairs, TARGET_BUILT, LATENT_WEIGHT, PACK_BLOCK, COMPUTE)
    rows = tl.cast(pairs, tl.int64) * groups
    row = pair * groups + group_of(segment, groups, consecutive)
    segment_gradients(
        gw_ptr,
        gl_ptr,
        x,
        length,
        coefficient_ptr,
        row,
        rows,
        incoming,
        REFERENCE,
        SHARED_TARGET,
        TARGET_BUILT,
        LATENT_WEIGHT,
        ANCHOR,
        ANCHOR_REJECTED,
        PACK_BLOCK,
        COMPUTE,
        BLOCK,
        PASS,
    )
