"""Element granularity: every latent element is its own group, so the objective runs inside the pass over the latents.

Pointwise objectives need no reduction before their gradients: one launch reads each operand once, writes each gradient
once, for the incoming gradient that was seen last, and leaves partial sums of the telemetry. Backward's launch returns
at once where that bet was right and else writes the gradients again. The printed listing (`OUTER`) multiplies means
over the video, so its gradients take a second pass that knows them.
"""

import triton
import triton.language as tl
from pgdpo_fast.kernels.epilogue import (
    EVERY_TERM,
    FLAG_IMPORTANCE,
    KIND_SFT,
    objective,
    pgdpo_slopes,
    pgdpo_terms,
    safeguarded,
    scaled_ipr,
)
from pgdpo_fast.kernels.pair import (
    REFERENCE_NONE,
    TELEMETRY_ALPHA,
    TELEMETRY_CHOSEN_GAP,
    TELEMETRY_GAMMA,
    TELEMETRY_IMPORTANCE,
    TELEMETRY_LOGITS,
    TELEMETRY_PER_PAIR_LOSS,
    TELEMETRY_POLICY_CHOSEN_ERROR,
    TELEMETRY_POLICY_REJECTED_ERROR,
    TELEMETRY_REJECTED_GAP,
    arrive,
    copies,
    counted,
    fold_parts,
    load,
    load_latent_weights,
    load_targets,
    mean_loss,
    reference_terms,
    segment_at,
    thread_sums,
)

# Planes of the partial sums: those of the telemetry, and with OUTER, where the first is the preference term, these.
SUMS = tl.constexpr(9)
SUM_COMPLEMENT = tl.constexpr(9)
SUM_IMPLICIT = tl.constexpr(10)
OUTER_SUMS = tl.constexpr(11)
# Mirrors of ElementMeans in pgdpo_fast/backends/operands.py, which OUTER needs in its second pass.
MEAN_GAMMA = tl.constexpr(0)
MEAN_PREFERENCE = tl.constexpr(1)
MEAN_COMPLEMENT = tl.constexpr(2)
MEAN_IMPLICIT = tl.constexpr(3)


@triton.jit
def element_block(
    sums,
    gw_ptr,
    gl_ptr,
    x,
    params_ptr,
    posterior_scale,
    beta_scale,
    scale,
    mean_gamma,
    mean_preference,
    mean_complement,
    mean_implicit,
    offsets,
    mask,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    TERMS: tl.constexpr,
    ANCHOR: tl.constexpr,
    OUTER: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    GRADS: tl.constexpr,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One block of elements through the objective: telemetry into the running sums, gradients to memory."""
    p_w = load(x.pw_ptr, offsets, mask, MASKED, COMPUTE)
    p_l = load(x.pl_ptr, offsets, mask, MASKED, COMPUTE)
    y_w, y_l = load_targets(x, offsets, mask, SHARED_TARGET, TARGET_BUILT, MASKED, COMPUTE)
    u_w = p_w - y_w
    u_l = p_l - y_l
    if LATENT_WEIGHT:
        weight = load_latent_weights(x, offsets, mask, LATENT_WEIGHT, MASKED, COMPUTE)
        u_w = counted(u_w, weight)
        u_l = counted(u_l, weight)
    e_w = u_w * u_w
    e_l = u_l * u_l
    minus_w = tl.zeros_like(u_w)
    d_w = minus_w
    d_l = minus_w
    if REFERENCE != REFERENCE_NONE:
        minus_w, plus_w = reference_terms(
            p_w, y_w, x.qw_ptr, x.sw_ptr, x.phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        minus_l, plus_l = reference_terms(
            p_l, y_l, x.ql_ptr, x.sl_ptr, x.phase, offsets, mask, REFERENCE, PACK_BLOCK, MASKED, COMPUTE
        )
        if LATENT_WEIGHT:
            minus_w = counted(minus_w, weight)
            minus_l = counted(minus_l, weight)
            plus_w = counted(plus_w, weight)
            plus_l = counted(plus_l, weight)
        d_w = minus_w * plus_w
        d_l = minus_l * plus_l
    anchor = minus_w * minus_w
    if OUTER:
        logits, loss, factor, implicit, alpha, gamma, complement, ratio, by_chosen, by_rejected = pgdpo_terms(
            e_w, d_w, d_l, anchor, beta_scale, params_ptr, FLAGS, BETA_SCALED, COMPUTE
        )
        importance = tl.zeros_like(u_w) + 1.0
        ipr_scale = scaled_ipr(params_ptr, beta_scale, FLAGS, BETA_SCALED)
        g_w, g_l, g_anchor = pgdpo_slopes(
            d_l,
            factor,
            alpha,
            gamma,
            complement,
            ratio,
            by_chosen,
            by_rejected,
            mean_gamma,
            ipr_scale * mean_complement,
            mean_preference - ipr_scale * mean_implicit,
            beta_scale,
            params_ptr,
            FLAGS,
            BETA_SCALED,
        )
        g_l = safeguarded(g_l, e_w, u_w * u_l, 0.0, 0.0, params_ptr, FLAGS)
    else:
        loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor = objective(
            e_w,
            e_l,
            d_w,
            d_l,
            anchor,
            u_w * u_l,
            0.0,
            0.0,
            posterior_scale,
            beta_scale,
            params_ptr,
            KIND,
            FLAGS,
            TERMS,
            BETA_SCALED,
            COMPUTE,
        )
    if GRADS:
        slope_w = g_w * u_w
        slope_l = g_l * u_l
        if ANCHOR:  # an objective must not take the NaN of what it takes no notice of
            slope_w += g_anchor * minus_w
        if KIND == KIND_SFT:
            slope_l = tl.where(g_l == 0.0, 0.0, slope_l)
        if LATENT_WEIGHT:
            slope_w *= weight
            slope_l *= weight
        gradient_w = (scale * slope_w).to(gw_ptr.dtype.element_ty)
        gradient_l = (scale * slope_l).to(gl_ptr.dtype.element_ty)
        if MASKED:
            tl.store(gw_ptr + offsets, gradient_w, mask=mask)
            tl.store(gl_ptr + offsets, gradient_l, mask=mask)
        else:
            tl.store(gw_ptr + offsets, gradient_w)
            tl.store(gl_ptr + offsets, gradient_l)
    if WITH_SUMS:
        if MASKED:  # a lane of zeros still has a loss, an alpha and a gamma
            loss = tl.where(mask, loss, 0.0)
            logits = tl.where(mask, logits, 0.0)
            alpha = tl.where(mask, alpha, 0.0)
            gamma = tl.where(mask, gamma, 0.0)
            importance = tl.where(mask, importance, 0.0)
        if LATENT_WEIGHT:  # with OUTER preference_loss refuses them
            loss *= weight
            logits *= weight
            alpha *= weight
            gamma *= weight
            importance *= weight
            e_w *= weight
            e_l *= weight
            d_w *= weight
            d_l *= weight
        plain = (
            sums[TELEMETRY_PER_PAIR_LOSS] + thread_sums(loss, BLOCK, LANES),
            sums[TELEMETRY_LOGITS] + thread_sums(logits, BLOCK, LANES),
            sums[TELEMETRY_ALPHA] + thread_sums(alpha, BLOCK, LANES),
            sums[TELEMETRY_GAMMA] + thread_sums(gamma, BLOCK, LANES),
            sums[TELEMETRY_IMPORTANCE] + thread_sums(importance, BLOCK, LANES),
            sums[TELEMETRY_POLICY_CHOSEN_ERROR] + thread_sums(e_w, BLOCK, LANES),
            sums[TELEMETRY_POLICY_REJECTED_ERROR] + thread_sums(e_l, BLOCK, LANES),
            sums[TELEMETRY_CHOSEN_GAP] + thread_sums(d_w, BLOCK, LANES),
            sums[TELEMETRY_REJECTED_GAP] + thread_sums(d_l, BLOCK, LANES),
        )
        if OUTER:
            if MASKED:
                complement = tl.where(mask, complement, 0.0)
            sums = plain + (
                sums[SUM_COMPLEMENT] + thread_sums(complement, BLOCK, LANES),
                sums[SUM_IMPLICIT] + thread_sums(implicit, BLOCK, LANES),
            )
        else:
            sums = plain
    return sums


@triton.jit(do_not_specialize=["pairs"])  # one binary for every B: the same bits
def pair_elements_kernel(
    gw_ptr,  # [B, n] in the predictions' dtype, written with GRADS
    gl_ptr,  # the same
    operands,  # Operands
    numbers,  # Numbers
    mean_ptr,  # [MEANS, B] COMPUTE, with OUTER and GRADS
    incoming_ptr,  # [] fp32 or fp64, with INCOMING
    last_ptr,  # [1] COMPUTE, with BET: the incoming gradient seen last; with INCOMING written
    bets_ptr,  # [B, segments] COMPUTE, with BET written: the one every segment's gradients are for; with INCOMING read
    partial_ptr,  # [SUMS, B, segments] COMPUTE, written with WITH_SUMS
    arrived_ptr,  # [] int32, written with WITH_SUMS: zero, for the fold
    gw_stride,  # elements between rows
    gl_stride,
    pairs,  # B
    n,  # elements of a video
    seg_len,  # elements of a segment; the last may be shorter
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    TERMS: tl.constexpr,
    ANCHOR: tl.constexpr,
    OUTER: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    GRADS: tl.constexpr,
    INCOMING: tl.constexpr,
    BET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    REFERENCE: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    TARGET_BUILT: tl.constexpr,
    LATENT_WEIGHT: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (segments, pairs). Writes gradients (GRADS) and partial sums (WITH_SUMS).

    INCOMING scales the gradients by the incoming gradient `[]`, BET by the one seen last; with both, gradients are
    written again where another one has come.
    """
    pair = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(0)
    scale = 2.0 / (tl.zeros([], COMPUTE) + n)
    scale /= pairs
    bets_ptr += pair * tl.num_programs(0) + segment
    if INCOMING:
        incoming = tl.load(incoming_ptr).to(COMPUTE)
        if BET:
            if segment + pair == 0:
                tl.store(last_ptr, incoming)
            if tl.load(bets_ptr) == incoming:
                return
        scale *= incoming
    elif BET:
        tl.store(bets_ptr, tl.load(last_ptr))
        tl.debug_barrier()  # another stream may be writing: what counts is what was noted
        scale *= tl.load(bets_ptr, cache_modifier=".cg")
    if WEIGHTED:
        scale *= tl.load(numbers.weight_ptr + pair).to(COMPUTE)
    start = tl.multiple_of(segment.to(tl.int64) * seg_len, ALIGN)
    length = tl.minimum(n - start, seg_len).to(tl.int32)
    gw_ptr += pair * gw_stride + start
    gl_ptr += pair * gl_stride + start
    x = segment_at(operands, pair, start, pairs, TARGET_BUILT, LATENT_WEIGHT, PACK_BLOCK, COMPUTE)
    posterior_scale = 0.0
    if (EVERY_TERM * FLAG_IMPORTANCE) & FLAGS:
        posterior_scale = tl.load(numbers.posterior_scale_ptr + pair).to(COMPUTE)
    beta_scale = 1.0
    if BETA_SCALED:
        beta_scale = tl.load(numbers.beta_scale_ptr + pair).to(COMPUTE)
    mean_gamma = 0.0
    mean_preference = 0.0
    mean_complement = 0.0
    mean_implicit = 0.0
    if OUTER and GRADS:
        mean_gamma = tl.load(mean_ptr + MEAN_GAMMA * pairs + pair)
        mean_preference = tl.load(mean_ptr + MEAN_PREFERENCE * pairs + pair)
        mean_complement = tl.load(mean_ptr + MEAN_COMPLEMENT * pairs + pair)
        mean_implicit = tl.load(mean_ptr + MEAN_IMPLICIT * pairs + pair)

    zero = tl.zeros([BLOCK // LANES], COMPUTE)
    sums = copies(zero, OUTER_SUMS if OUTER else SUMS)
    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        sums = element_block(
            sums,
            gw_ptr,
            gl_ptr,
            x,
            numbers.params_ptr,
            posterior_scale,
            beta_scale,
            scale,
            mean_gamma,
            mean_preference,
            mean_complement,
            mean_implicit,
            begin + lanes,
            None,
            KIND,
            FLAGS,
            TERMS,
            ANCHOR,
            OUTER,
            BETA_SCALED,
            WITH_SUMS,
            GRADS,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            LATENT_WEIGHT,
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
            x,
            numbers.params_ptr,
            posterior_scale,
            beta_scale,
            scale,
            mean_gamma,
            mean_preference,
            mean_complement,
            mean_implicit,
            offsets,
            offsets < length,
            KIND,
            FLAGS,
            TERMS,
            ANCHOR,
            OUTER,
            BETA_SCALED,
            WITH_SUMS,
            GRADS,
            REFERENCE,
            SHARED_TARGET,
            TARGET_BUILT,
            LATENT_WEIGHT,
            PACK_BLOCK,
            True,
            COMPUTE,
            BLOCK,
            LANES,
        )
    if WITH_SUMS:
        if segment + pair == 0:
            tl.store(arrived_ptr, 0)
        segments = tl.num_programs(0)
        plane = tl.cast(pairs, tl.int64) * segments
        partial_ptr += pair * segments + segment
        for k in tl.static_range(len(sums)):
            tl.store(partial_ptr + k * plane, tl.sum(sums[k], 0))


@triton.jit(do_not_specialize=["pairs"])  # one binary for every B: the same bits
def fold_elements_kernel(
    numbers,  # Numbers
    partial_ptr,  # [SUMS, B, segments] COMPUTE
    loss_ptr,  # [] COMPUTE, written
    telemetry_ptr,  # [TELEMETRY, B] COMPUTE, written
    mean_ptr,  # [MEANS, B] COMPUTE, written
    arrived_ptr,  # [] int32, zero
    pairs,  # B
    segments,  # of a video
    n,  # elements of a video
    FLAGS: tl.constexpr,
    OUTER: tl.constexpr,
    GAPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Partial sums of ROWS pairs a program to telemetry and means; the last program adds the losses."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < pairs
    plane = tl.cast(pairs, tl.int64) * segments
    mean = 1.0 / (tl.zeros([1], COMPUTE) + n)
    PLANES: tl.constexpr = OUTER_SUMS if OUTER else SUMS
    sums = fold_parts(partial_ptr, plane, row, inside, segments, 1, PLANES, COMPUTE, ROWS, FOLD)
    preference = sums[TELEMETRY_PER_PAIR_LOSS] * mean
    gamma = sums[TELEMETRY_GAMMA] * mean
    complement = tl.zeros_like(gamma)
    implicit = complement
    loss = preference
    if OUTER:
        complement = sums[SUM_COMPLEMENT] * mean
        implicit = sums[SUM_IMPLICIT] * mean
        beta_scale = 1.0
        if BETA_SCALED:
            beta_scale = tl.load(numbers.beta_scale_ptr + row, mask=inside, other=1.0).to(COMPUTE)
        ipr_scale = scaled_ipr(numbers.params_ptr, beta_scale, FLAGS, BETA_SCALED)
        loss = gamma * preference + ipr_scale * complement * implicit
    tl.store(mean_ptr + MEAN_GAMMA * pairs + row, gamma, mask=inside)
    tl.store(mean_ptr + MEAN_PREFERENCE * pairs + row, preference, mask=inside)
    tl.store(mean_ptr + MEAN_COMPLEMENT * pairs + row, complement, mask=inside)
    tl.store(mean_ptr + MEAN_IMPLICIT * pairs + row, implicit, mask=inside)
    tl.store(telemetry_ptr + TELEMETRY_PER_PAIR_LOSS * pairs + row, loss, mask=inside)
    for k in tl.static_range(1, SUMS):
        value = sums[k] * mean
        if k >= TELEMETRY_CHOSEN_GAP and not GAPS:
            value += float("nan")
        tl.store(telemetry_ptr + k * pairs + row, value, mask=inside)
    if arrive(arrived_ptr) == tl.num_programs(0) - 1:
        mean_loss(loss_ptr, telemetry_ptr, numbers.weight_ptr, pairs, WEIGHTED, COMPUTE, WIDTH)
