"""Element granularity: every latent element is its own group, so the objective runs inside the pass over the latents.

Pointwise objectives need no reduction before their gradients: one launch reads each operand once, writes each gradient
once, for an incoming gradient of 1, and leaves partial sums of the telemetry. The backward launch returns at once when
the incoming gradient is 1 and otherwise writes the gradients again. The printed listing (`OUTER`) multiplies means over
the video, so its gradients take a second pass that knows them.
"""

import triton
import triton.language as tl
from pgdpo_fast.kernels.epilogue import (
    FLAG_IMPORTANCE,
    FLAG_IPR_ANCHOR,
    KIND_SFT,
    objective,
    pgdpo_slopes,
    pgdpo_terms,
    safeguarded,
)
from pgdpo_fast.kernels.pair import load, load_targets, reference_terms, thread_sums

# Planes of the partial sums: the nine of the telemetry, then 1 - gamma and the regularizer for OUTER.
ELEMENT_SUMS = 11
# Planes of the means OUTER needs in its second pass: gamma, P, 1 - gamma, I.
ELEMENT_MEANS = 4


@triton.jit
def element_block(
    sums,
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
    params_ptr,
    noise_scale,
    clean_scale,
    posterior_scale,
    scale,
    mean_gamma,
    mean_preference,
    mean_complement,
    mean_implicit,
    phase,
    offsets,
    mask,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    OUTER: tl.constexpr,
    SUMS: tl.constexpr,
    GRADS: tl.constexpr,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One block of elements through the objective: telemetry into the running sums, gradients to memory."""
    p_w = load(pw_ptr, offsets, mask, MASKED, COMPUTE)
    p_l = load(pl_ptr, offsets, mask, MASKED, COMPUTE)
    y_w, y_l = load_targets(
        yw_ptr, yl_ptr, noise_ptr, noise_scale, clean_scale, offsets, mask, SHARED_TARGET, TARGET_BUILT, MASKED, COMPUTE
    )
    u_w = p_w - y_w
    u_l = p_l - y_l
    e_w = u_w * u_w
    e_l = u_l * u_l
    minus_w = 0.0 * u_w
    d_w = minus_w
    d_l = minus_w
    if REFERENCE != 0:
        minus_w, plus_w = reference_terms(
            p_w, y_w, qw_ptr, sw_ptr, phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        minus_l, plus_l = reference_terms(
            p_l, y_l, ql_ptr, sl_ptr, phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        d_w = minus_w * plus_w
        d_l = minus_l * plus_l
    anchor = minus_w * minus_w
    complement = 0.0 * u_w
    implicit = complement
    if OUTER:
        logits, loss, implicit, alpha, gamma, complement, ratio, by_chosen, by_rejected = pgdpo_terms(
            e_w, d_w, d_l, anchor, params_ptr, FLAGS, COMPUTE
        )
        importance = 0.0 * u_w + 1.0
        ipr_scale = tl.load(params_ptr + 3)
        g_w, g_l, g_anchor = pgdpo_slopes(
            d_l,
            logits,
            alpha,
            gamma,
            complement,
            ratio,
            by_chosen,
            by_rejected,
            mean_gamma,
            ipr_scale * mean_complement,
            mean_preference - ipr_scale * mean_implicit,
            params_ptr,
            FLAGS,
        )
        g_l = safeguarded(g_l, e_w, u_w * u_l, params_ptr, FLAGS)
    else:
        loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor = objective(
            e_w, e_l, d_w, d_l, anchor, u_w * u_l, posterior_scale, params_ptr, KIND, FLAGS, COMPUTE
        )
    if GRADS:
        slope_w = g_w * u_w
        slope_l = g_l * u_l
        if FLAG_IPR_ANCHOR & FLAGS:  # an objective must not take the NaN of what it takes no notice of
            slope_w += g_anchor * minus_w
        if KIND == KIND_SFT:
            slope_l = tl.where(g_l == 0.0, 0.0, slope_l)
        gradient_w = (scale * slope_w).to(gw_ptr.dtype.element_ty)
        gradient_l = (scale * slope_l).to(gl_ptr.dtype.element_ty)
        if MASKED:
            tl.store(gw_ptr + offsets, gradient_w, mask=mask)
            tl.store(gl_ptr + offsets, gradient_l, mask=mask)
        else:
            tl.store(gw_ptr + offsets, gradient_w)
            tl.store(gl_ptr + offsets, gradient_l)
    if SUMS:
        if MASKED:  # a lane of zeros still has a loss, an alpha and a gamma
            loss = tl.where(mask, loss, 0.0)
            logits = tl.where(mask, logits, 0.0)
            alpha = tl.where(mask, alpha, 0.0)
            gamma = tl.where(mask, gamma, 0.0)
            importance = tl.where(mask, importance, 0.0)
            complement = tl.where(mask, complement, 0.0)
        sums = (
            sums[0] + thread_sums(loss, BLOCK, LANES),
            sums[1] + thread_sums(logits, BLOCK, LANES),
            sums[2] + thread_sums(alpha, BLOCK, LANES),
            sums[3] + thread_sums(gamma, BLOCK, LANES),
            sums[4] + thread_sums(importance, BLOCK, LANES),
            sums[5] + thread_sums(e_w, BLOCK, LANES),
            sums[6] + thread_sums(e_l, BLOCK, LANES),
            sums[7] + thread_sums(d_w, BLOCK, LANES),
            sums[8] + thread_sums(d_l, BLOCK, LANES),
            sums[9] + thread_sums(complement, BLOCK, LANES),
            sums[10] + thread_sums(implicit, BLOCK, LANES),
        )
    return sums


@triton.jit
def pair_elements_kernel(
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
    weight_ptr,
    posterior_scale_ptr,
    params_ptr,
    mean_ptr,
    incoming_ptr,
    partial_ptr,
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
    n,
    seg_len,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    OUTER: tl.constexpr,
    SUMS: tl.constexpr,
    GRADS: tl.constexpr,
    INCOMING: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (segments, pairs). Writes gradients `[B, ...]` (GRADS) and partial sums `[11, B, segments]` (SUMS).

    INCOMING scales the gradients by the incoming gradient `[]`; with SPECULATIVE the buffers already hold those for 1.
    """
    pair = tl.program_id(1).to(tl.int64)
    scale = 2.0 / (tl.zeros([], COMPUTE) + n)
    scale /= pairs
    if INCOMING:
        incoming = tl.load(incoming_ptr).to(COMPUTE)
        if SPECULATIVE:
            if incoming == 1.0:
                return
        scale *= incoming
    if WEIGHTED:
        scale *= tl.load(weight_ptr + pair).to(COMPUTE)
    segment = tl.program_id(0)
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
    posterior_scale = 0.0
    if FLAG_IMPORTANCE & FLAGS:
        posterior_scale = tl.load(posterior_scale_ptr + pair).to(COMPUTE)
    mean_gamma = 0.0
    mean_preference = 0.0
    mean_complement = 0.0
    mean_implicit = 0.0
    if OUTER and GRADS:
        mean_gamma = tl.load(mean_ptr + pair)
        mean_preference = tl.load(mean_ptr + pairs + pair)
        mean_complement = tl.load(mean_ptr + 2 * pairs + pair)
        mean_implicit = tl.load(mean_ptr + 3 * pairs + pair)

    zero = tl.zeros([BLOCK // LANES], COMPUTE)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        sums = element_block(
            sums,
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
            params_ptr,
            noise_scale,
            clean_scale,
            posterior_scale,
            scale,
            mean_gamma,
            mean_preference,
            mean_complement,
            mean_implicit,
            phase,
            begin + lanes,
            None,
            KIND,
            FLAGS,
            OUTER,
            SUMS,
            GRADS,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            PACK_BLOCK,
            False,
            COMPUTE,
            BLOCK,
            LANES,
        )
    if whole < length:
        offsets = whole + lanes
        sums = element_block(
            sums,
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
            params_ptr,
            noise_scale,
            clean_scale,
            posterior_scale,
            scale,
            mean_gamma,
            mean_preference,
            mean_complement,
            mean_implicit,
            phase,
            offsets,
            offsets < length,
            KIND,
            FLAGS,
            OUTER,
            SUMS,
            GRADS,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            PACK_BLOCK,
            True,
            COMPUTE,
            BLOCK,
            LANES,
        )
    if SUMS:
        segments = tl.num_programs(0)
        plane = tl.cast(pairs, tl.int64) * segments
        partial_ptr += pair * segments + segment
        for k in tl.static_range(11):
            tl.store(partial_ptr + k * plane, tl.sum(sums[k], 0))


@triton.jit
def fold_elements_kernel(
    partial_ptr,
    weight_ptr,
    params_ptr,
    loss_ptr,
    telemetry_ptr,
    mean_ptr,
    pairs,
    segments,
    n,
    OUTER: tl.constexpr,
    GAPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Partial sums `[11, B, segments]` to loss `[]`, telemetry `[9, B]` and means `[4, B]`. One program."""
    plane = tl.cast(pairs, tl.int64) * segments
    mean = 1.0 / (tl.zeros([1], COMPUTE) + n)
    total = tl.zeros([ROWS], COMPUTE)
    for first in range(0, pairs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < pairs
        preference = tl.zeros([ROWS], COMPUTE)
        gamma = preference
        complement = preference
        implicit = preference
        for k in tl.static_range(11):
            sums = tl.zeros([ROWS, FOLD], COMPUTE)
            for begin in range(0, segments, FOLD):
                step = begin + tl.arange(0, FOLD)
                where = row.to(tl.int64)[:, None] * segments + step[None, :]
                sums += tl.load(
                    partial_ptr + k * plane + where, mask=inside[:, None] & (step[None, :] < segments), other=0.0
                )
            value = tl.sum(sums, 1) * mean
            if k == 0:
                preference = value
            elif k == 3:
                gamma = value
            elif k == 9:
                complement = value
            elif k == 10:
                implicit = value
            if k > 0 and k < 9:
                if k >= 7 and not GAPS:
                    value += float("nan")
                tl.store(telemetry_ptr + k * pairs + row, value, mask=inside)
        loss = preference
        if OUTER:
            loss = gamma * preference + tl.load(params_ptr + 3) * complement * implicit
        tl.store(mean_ptr + row, gamma, mask=inside)
        tl.store(mean_ptr + pairs + row, preference, mask=inside)
        tl.store(mean_ptr + 2 * pairs + row, complement, mask=inside)
        tl.store(mean_ptr + 3 * pairs + row, implicit, mask=inside)
        tl.store(telemetry_ptr + row, loss, mask=inside)
        if WEIGHTED:
            loss *= tl.load(weight_ptr + row, mask=inside, other=0.0).to(COMPUTE)
        total += tl.where(inside, loss, 0.0)
    scale = 1.0 / (tl.zeros([1], COMPUTE) + pairs)
    tl.store(loss_ptr + tl.arange(0, 1), tl.sum(total, 0) * scale)
