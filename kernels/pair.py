"""The two passes over video latents that every preference loss is made of, and the small fold between them.

A video is a row of `segments * seg_len` elements; segment s belongs to group s % GROUPS. With one group the segments
are fixed-length chunks of the row; with frames as groups they are the H*W runs of a `[C, F, H, W]` row. Programs never
share an output and every fold has a fixed order, so results do not depend on the grid, the device or the batch size.

Operands: REFERENCE 0 none, 1 predictions, 2 packed bfloat16 residuals q - y, 3 packed float8 (e4m3) residuals with one
float32 scale per PACK_BLOCK elements. TARGET_BUILT makes the target as noise_scale * noise + clean_scale * clean.
"""

import triton
import triton.language as tl
from pgdpo_fast.kernels.epilogue import FLAG_IMPORTANCE, objective

# Planes of the statistics: policy errors, gaps, anchor, cross (all as sums until the fold divides them).
STATISTICS = 6
# Planes of the telemetry: loss, logits, alpha, gamma, importance, then the errors and gaps of both videos.
TELEMETRY = 9


@triton.jit
def load(ptr, offsets, mask, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """A block in the accumulation dtype. The cast follows the load at once: no low-precision arithmetic creeps in."""
    if MASKED:
        return tl.load(ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    return tl.load(ptr + offsets).to(COMPUTE)


@triton.jit
def thread_sums(x, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Sum each run of LANES values, which sit in one thread's registers: running sums cost a LANES-th of them."""
    return tl.sum(tl.reshape(x, [BLOCK // LANES, LANES]), 1)


@triton.jit
def load_float8(
    ptr, scale_ptr, phase, offsets, mask, PACK_BLOCK: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr
):
    """e4m3 bytes times their block's scale; `phase` is where in its block the segment starts.

    Decoded by bit moves, so every architecture and the interpreter agree.
    """
    if MASKED:
        byte = tl.load(ptr + offsets, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + (offsets + phase) // PACK_BLOCK, mask=mask, other=0.0)
    else:
        byte = tl.load(ptr + offsets).to(tl.int32)
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
):
    """p - q and p + q - 2y; their product is the gap, exact to full relative accuracy where p is close to q."""
    if REFERENCE == 1:
        q = load(q_ptr, offsets, mask, MASKED, COMPUTE)
        return p - q, (p - y) + (q - y)
    if REFERENCE == 2:
        residual = load(q_ptr, offsets, mask, MASKED, COMPUTE)
    else:
        residual = load_float8(q_ptr, scale_ptr, phase, offsets, mask, PACK_BLOCK, MASKED, COMPUTE)
    return (p - y) - residual, (p - y) + residual


@triton.jit
def load_targets(
    yw_ptr,
    yl_ptr,
    noise_ptr,
    noise_scale,
    clean_scale,
    offsets,
    mask,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Targets of the chosen and the rejected video; what the pair shares is read once."""
    y_w = load(yw_ptr, offsets, mask, MASKED, COMPUTE)
    y_l = y_w
    if not SHARED_TARGET:
        y_l = load(yl_ptr, offsets, mask, MASKED, COMPUTE)
    if TARGET_BUILT:
        noise = noise_scale * load(noise_ptr, offsets, mask, MASKED, COMPUTE)
        y_w = noise + clean_scale * y_w
        y_l = noise + clean_scale * y_l
    return y_w, y_l


@triton.jit
def accumulate(
    sums,
    pw_ptr,
    pl_ptr,
    yw_ptr,
    yl_ptr,
    noise_ptr,
    qw_ptr,
    ql_ptr,
    sw_ptr,
    sl_ptr,
    noise_scale,
    clean_scale,
    phase,
    offsets,
    mask,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    ANCHOR: tl.constexpr,
    CROSS: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One block into the six running sums. Masked lanes load zeros everywhere, hence add zero."""
    e_w, e_l, d_w, d_l, anchor, cross = sums
    p_w = load(pw_ptr, offsets, mask, MASKED, COMPUTE)
    p_l = load(pl_ptr, offsets, mask, MASKED, COMPUTE)
    y_w, y_l = load_targets(
        yw_ptr, yl_ptr, noise_ptr, noise_scale, clean_scale, offsets, mask, SHARED_TARGET, TARGET_BUILT, MASKED, COMPUTE
    )
    u_w = p_w - y_w
    u_l = p_l - y_l
    e_w += thread_sums(u_w * u_w, BLOCK, LANES)
    e_l += thread_sums(u_l * u_l, BLOCK, LANES)
    if CROSS:
        cross += thread_sums(u_w * u_l, BLOCK, LANES)
    if REFERENCE != 0:
        minus_w, plus_w = reference_terms(
            p_w, y_w, qw_ptr, sw_ptr, phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        minus_l, plus_l = reference_terms(
            p_l, y_l, ql_ptr, sl_ptr, phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        d_w += thread_sums(minus_w * plus_w, BLOCK, LANES)
        d_l += thread_sums(minus_l * plus_l, BLOCK, LANES)
        if ANCHOR:
            anchor += thread_sums(minus_w * minus_w, BLOCK, LANES)
    return e_w, e_l, d_w, d_l, anchor, cross


@triton.jit
def pair_errors_kernel(
    pw_ptr,
    pl_ptr,
    yw_ptr,
    yl_ptr,
    noise_ptr,
    qw_ptr,
    ql_ptr,
    sw_ptr,
    sl_ptr,
    target_scale_ptr,
    partial_ptr,
    pw_stride,
    pl_stride,
    yw_stride,
    yl_stride,
    noise_stride,
    qw_stride,
    ql_stride,
    sw_stride,
    sl_stride,
    pairs,
    n,
    seg_len,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    ANCHOR: tl.constexpr,
    CROSS: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Partial sums of every segment: grid (segments, pairs), output `[STATISTICS, pairs, segments]`.

    Reads the predictions, targets and references once (4 to 6 values an element position), writes 24 bytes a segment.
    """
    segment = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    segments = tl.num_programs(0)
    start = tl.multiple_of(segment.to(tl.int64) * seg_len, ALIGN)
    length = tl.minimum(n - start, seg_len).to(tl.int32)
    pw_ptr += pair * pw_stride + start
    pl_ptr += pair * pl_stride + start
    yw_ptr += pair * yw_stride + start
    yl_ptr += pair * yl_stride + start
    noise_ptr += pair * noise_stride + start
    qw_ptr += pair * qw_stride + start
    ql_ptr += pair * ql_stride + start
    sw_ptr += pair * sw_stride + start // PACK_BLOCK
    sl_ptr += pair * sl_stride + start // PACK_BLOCK
    phase = (start % PACK_BLOCK).to(tl.int32)
    noise_scale = 0.0
    clean_scale = 1.0
    if TARGET_BUILT:
        noise_scale = tl.load(target_scale_ptr + pair).to(COMPUTE)
        clean_scale = tl.load(target_scale_ptr + pairs + pair).to(COMPUTE)

    zero = tl.zeros([BLOCK // LANES], COMPUTE)
    sums = (zero, zero, zero, zero, zero, zero)
    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        sums = accumulate(
            sums,
            pw_ptr,
            pl_ptr,
            yw_ptr,
            yl_ptr,
            noise_ptr,
            qw_ptr,
            ql_ptr,
            sw_ptr,
            sl_ptr,
            noise_scale,
            clean_scale,
            phase,
            begin + lanes,
            None,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            ANCHOR,
            CROSS,
            PACK_BLOCK,
            False,
            COMPUTE,
            BLOCK,
            LANES,
        )
    if whole < length:
        offsets = whole + lanes
        sums = accumulate(
            sums,
            pw_ptr,
            pl_ptr,
            yw_ptr,
            yl_ptr,
            noise_ptr,
            qw_ptr,
            ql_ptr,
            sw_ptr,
            sl_ptr,
            noise_scale,
            clean_scale,
            phase,
            offsets,
            offsets < length,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            ANCHOR,
            CROSS,
            PACK_BLOCK,
            True,
            COMPUTE,
            BLOCK,
            LANES,
        )
    plane = tl.cast(pairs, tl.int64) * segments
    partial_ptr += pair * segments + segment
    for k in tl.static_range(6):
        tl.store(partial_ptr + k * plane, tl.sum(sums[k], 0))


@triton.jit
def fold_kernel(
    partial_ptr,
    reference_error_ptr,
    weight_ptr,
    posterior_scale_ptr,
    params_ptr,
    loss_ptr,
    telemetry_ptr,
    coefficient_ptr,
    rows,
    segments,
    groups,
    count,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    GAPS: tl.constexpr,
    REFERENCE_ERRORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Fold the partial sums of every group and, unless KIND < 0, run the objective on them. One program.

    Inputs: partials `[6, B, segments]`, reference errors `[2, B, G]`, row weights `[B, G]`, posterior scales `[B]`.
    Outputs: loss `[]`, telemetry `[9, B, G]`, gradient coefficients `[3, B, G]` (by p_w - y_w, p_l - y_l, p_w - q_w);
    with KIND < 0 only the six statistics, `[6, B, G]`, as means, in telemetry_ptr.
    """
    plane = tl.cast(rows // groups, tl.int64) * segments
    mean = 1.0 / (tl.zeros([1], COMPUTE) + count)
    row_scale = 1.0 / (tl.zeros([1], COMPUTE) + rows)
    total = tl.zeros([ROWS], COMPUTE)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        pair = row // groups
        base = pair.to(tl.int64) * segments + row % groups
        zero = tl.zeros([ROWS, FOLD], COMPUTE)
        sums = (zero, zero, zero, zero, zero, zero)
        for begin in range(0, segments, FOLD * groups):
            step = begin + tl.arange(0, FOLD) * groups
            where = base[:, None] + step[None, :]
            mask = inside[:, None] & ((row % groups)[:, None] + step[None, :] < segments)
            sums = (
                sums[0] + tl.load(partial_ptr + where, mask=mask, other=0.0),
                sums[1] + tl.load(partial_ptr + plane + where, mask=mask, other=0.0),
                sums[2] + tl.load(partial_ptr + 2 * plane + where, mask=mask, other=0.0),
                sums[3] + tl.load(partial_ptr + 3 * plane + where, mask=mask, other=0.0),
                sums[4] + tl.load(partial_ptr + 4 * plane + where, mask=mask, other=0.0),
                sums[5] + tl.load(partial_ptr + 5 * plane + where, mask=mask, other=0.0),
            )
        e_w = tl.sum(sums[0], 1) * mean
        e_l = tl.sum(sums[1], 1) * mean
        d_w = tl.sum(sums[2], 1) * mean
        d_l = tl.sum(sums[3], 1) * mean
        anchor = tl.sum(sums[4], 1) * mean
        cross = tl.sum(sums[5], 1) * mean
        out = telemetry_ptr + row
        if KIND < 0:
            tl.store(out, e_w, mask=inside)
            tl.store(out + rows, e_l, mask=inside)
            tl.store(out + 2 * rows, d_w, mask=inside)
            tl.store(out + 3 * rows, d_l, mask=inside)
            tl.store(out + 4 * rows, anchor, mask=inside)
            tl.store(out + 5 * rows, cross, mask=inside)
        else:
            if REFERENCE_ERRORS:
                d_w = e_w - tl.load(reference_error_ptr + row, mask=inside, other=0.0).to(COMPUTE)
                d_l = e_l - tl.load(reference_error_ptr + rows + row, mask=inside, other=0.0).to(COMPUTE)
            posterior_scale = 0.0 * e_w
            if FLAG_IMPORTANCE & FLAGS:
                posterior_scale = tl.load(posterior_scale_ptr + pair, mask=inside, other=0.0).to(COMPUTE)
            loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor = objective(
                e_w, e_l, d_w, d_l, anchor, cross, posterior_scale, params_ptr, KIND, FLAGS, COMPUTE
            )
            weight = tl.full([ROWS], 1.0, COMPUTE)
            if WEIGHTED:
                weight = tl.load(weight_ptr + row, mask=inside, other=0.0).to(COMPUTE)
            total += tl.where(inside, weight * loss, 0.0)
            tl.store(out, loss, mask=inside)
            tl.store(out + rows, logits, mask=inside)
            tl.store(out + 2 * rows, alpha, mask=inside)
            tl.store(out + 3 * rows, gamma, mask=inside)
            tl.store(out + 4 * rows, importance, mask=inside)
            tl.store(out + 5 * rows, e_w, mask=inside)
            tl.store(out + 6 * rows, e_l, mask=inside)
            if GAPS:
                tl.store(out + 7 * rows, d_w, mask=inside)
                tl.store(out + 8 * rows, d_l, mask=inside)
            else:
                tl.store(out + 7 * rows, d_w + float("nan"), mask=inside)
                tl.store(out + 8 * rows, d_l + float("nan"), mask=inside)
            scale = weight * (2.0 * mean * row_scale)
            tl.store(coefficient_ptr + row, scale * g_w, mask=inside)
            tl.store(coefficient_ptr + rows + row, scale * g_l, mask=inside)
            tl.store(coefficient_ptr + 2 * rows + row, scale * g_anchor, mask=inside)
    if KIND >= 0:
        tl.store(loss_ptr + tl.arange(0, 1), tl.sum(total, 0) * row_scale)


@triton.jit
def scaled_gradients(
    gw_ptr,
    gl_ptr,
    pw_ptr,
    pl_ptr,
    yw_ptr,
    yl_ptr,
    noise_ptr,
    qw_ptr,
    ql_ptr,
    sw_ptr,
    sl_ptr,
    noise_scale,
    clean_scale,
    c_w,
    c_l,
    c_anchor,
    phase,
    offsets,
    mask,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    ANCHOR: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One block of c_w (p_w - y_w) + c_anchor (p_w - q_w) and c_l (p_l - y_l)."""
    p_w = load(pw_ptr, offsets, mask, MASKED, COMPUTE)
    p_l = load(pl_ptr, offsets, mask, MASKED, COMPUTE)
    y_w, y_l = load_targets(
        yw_ptr, yl_ptr, noise_ptr, noise_scale, clean_scale, offsets, mask, SHARED_TARGET, TARGET_BUILT, MASKED, COMPUTE
    )
    g_w = c_w * (p_w - y_w)
    if ANCHOR:
        minus_w, _ = reference_terms(
            p_w, y_w, qw_ptr, sw_ptr, phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        g_w += c_anchor * minus_w
    # An objective that takes no notice of the rejected video must not take its NaN.
    g_l = tl.where(c_l == 0.0, 0.0, c_l * (p_l - y_l))
    if MASKED:
        tl.store(gw_ptr + offsets, g_w.to(gw_ptr.dtype.element_ty), mask=mask)
        tl.store(gl_ptr + offsets, g_l.to(gl_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(gw_ptr + offsets, g_w.to(gw_ptr.dtype.element_ty))
        tl.store(gl_ptr + offsets, g_l.to(gl_ptr.dtype.element_ty))


@triton.jit
def pair_gradient_kernel(
    gw_ptr,
    gl_ptr,
    pw_ptr,
    pl_ptr,
    yw_ptr,
    yl_ptr,
    noise_ptr,
    qw_ptr,
    ql_ptr,
    sw_ptr,
    sl_ptr,
    target_scale_ptr,
    coefficient_ptr,
    incoming_ptr,
    gw_stride,
    gl_stride,
    pw_stride,
    pl_stride,
    yw_stride,
    yl_stride,
    noise_stride,
    qw_stride,
    ql_stride,
    sw_stride,
    sl_stride,
    pairs,
    groups,
    n,
    seg_len,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    ANCHOR: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by both predictions from the coefficients `[3, B, G]` and the incoming gradient `[]`.

    Grid (segments, pairs), walked backwards: the error pass ended on the last segments, so those are still in L2.
    Reads predictions and targets once (and the reference where the anchor needs it), writes each gradient once.
    """
    segment = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    start = tl.multiple_of(segment.to(tl.int64) * seg_len, ALIGN)
    length = tl.minimum(n - start, seg_len).to(tl.int32)
    gw_ptr += pair * gw_stride + start
    gl_ptr += pair * gl_stride + start
    pw_ptr += pair * pw_stride + start
    pl_ptr += pair * pl_stride + start
    yw_ptr += pair * yw_stride + start
    yl_ptr += pair * yl_stride + start
    noise_ptr += pair * noise_stride + start
    qw_ptr += pair * qw_stride + start
    ql_ptr += pair * ql_stride + start
    sw_ptr += pair * sw_stride + start // PACK_BLOCK
    sl_ptr += pair * sl_stride + start // PACK_BLOCK
    phase = (start % PACK_BLOCK).to(tl.int32)
    noise_scale = 0.0
    clean_scale = 1.0
    if TARGET_BUILT:
        noise_scale = tl.load(target_scale_ptr + pair).to(COMPUTE)
        clean_scale = tl.load(target_scale_ptr + pairs + pair).to(COMPUTE)
    incoming = tl.load(incoming_ptr).to(COMPUTE)
    rows = tl.cast(pairs, tl.int64) * groups
    row = pair * groups + segment % groups
    c_w = incoming * tl.load(coefficient_ptr + row)
    c_l = incoming * tl.load(coefficient_ptr + rows + row)
    c_anchor = incoming * tl.load(coefficient_ptr + 2 * rows + row)

    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        scaled_gradients(
            gw_ptr,
            gl_ptr,
            pw_ptr,
            pl_ptr,
            yw_ptr,
            yl_ptr,
            noise_ptr,
            qw_ptr,
            ql_ptr,
            sw_ptr,
            sl_ptr,
            noise_scale,
            clean_scale,
            c_w,
            c_l,
            c_anchor,
            phase,
            begin + lanes,
            None,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            ANCHOR,
            PACK_BLOCK,
            False,
            COMPUTE,
        )
    if whole < length:
        offsets = whole + lanes
        scaled_gradients(
            gw_ptr,
            gl_ptr,
            pw_ptr,
            pl_ptr,
            yw_ptr,
            yl_ptr,
            noise_ptr,
            qw_ptr,
            ql_ptr,
            sw_ptr,
            sl_ptr,
            noise_scale,
            clean_scale,
            c_w,
            c_l,
            c_anchor,
            phase,
            offsets,
            offsets < length,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            ANCHOR,
            PACK_BLOCK,
            True,
            COMPUTE,
        )
