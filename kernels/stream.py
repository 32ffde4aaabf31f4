"""Errors, objective and gradients of a batch in one persistent launch that reads every byte from memory once.

Programs draw tickets in one order: the error sums of the first segments, then error sums and gradients in turns, then
the remaining gradients. Gradients follow errors at a distance of at least a pair's segments, short enough for what they
read again to be in the second-level cache. The last program to bring a sum of a pair folds them, in the order of the
two-pass form, and releases the coefficients; gradients are made for the incoming gradient seen last.

A waiting program waits for programs that hold an earlier ticket, so are running, and those never wait for errors: there
is no deadlock however few programs run at once. A wait has an end all the same, see POLLS.
"""

import triton
import triton.language as tl
from pgdpo_fast.kernels.pair import (
    COEFFICIENTS,
    STATISTICS,
    arrive,
    fold_groups,
    group_of,
    mean_loss,
    place,
    segment_at,
    segment_gradients,
    segment_sums,
)

# Places in the state: counters, all zero before and after a launch, then [B] segments summed and [B] pairs released.
STATE_TICKET = tl.constexpr(0)
STATE_FOLDED = tl.constexpr(1)
STATE_LEFT = tl.constexpr(2)
STATE_GAVE_UP = tl.constexpr(3)
STATE_PAIRS = tl.constexpr(4)


@triton.jit
def position(ticket, total, lag):
    """What a ticket of 2 * total stands for: 1 for error sums and 0 for gradients, and of which of `total` segments.

    E_0 .. E_{lag-1}, then E_i and D_{i-lag} in turns, then the remaining D; segments are numbered pair after pair.
    """
    errors = 1
    item = ticket
    if ticket >= lag:
        after = ticket - lag
        if after < 2 * (total - lag):
            errors = 1 - after % 2
            item = after // 2 + errors * lag
        else:
            errors = 0
            item = after - (total - lag)
    return errors, item


@triton.jit(do_not_specialize=["pairs", "lag"])  # one binary for every B: the same bits
def stream_kernel(
    gw_ptr,  # [B, n] in the predictions' dtype, written
    gl_ptr,  # the same
    operands,  # Operands
    numbers,  # Numbers
    partial_ptr,  # [STATISTICS, B, segments] COMPUTE, written
    loss_ptr,  # [] COMPUTE, written
    telemetry_ptr,  # [TELEMETRY, B, G] COMPUTE, written
    coefficient_ptr,  # [COEFFICIENTS, B, G] COMPUTE, written
    last_ptr,  # [1] COMPUTE: the incoming gradient seen last
    bets_ptr,  # [B] COMPUTE, written: the one the gradients of each pair are for
    state_ptr,  # [STATE_PAIRS + 2 B] int32, zero; zero again when the launch is over
    gave_up_ptr,  # [1] int32, host memory the device can write: 1 where a wait has ended without its coefficients
    gw_stride,  # elements between rows
    gl_stride,
    pairs,  # B
    groups,  # G
    segments,  # of a video
    n,  # elements of a video
    seg_len,  # elements of a segment; the last may be shorter
    count,  # elements of a group
    consecutive,  # segments in a row that belong to one group
    lag,  # segments between errors and gradients: at least `segments`, or all there are
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    TERMS: tl.constexpr,
    GAPS: tl.constexpr,
    REFERENCE_ERRORS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BETA_SCALED: tl.constexpr,
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
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    POLLS: tl.constexpr,
    KEEP: tl.constexpr,
    PASS: tl.constexpr,
):
    """Any number of programs. POLLS bounds a wait: after as many looks at a pair's flag, about a microsecond each, a
    program gives up, says so, and makes the pair's gradients NaN; nobody waits after that."""
    total = pairs * segments
    rows = tl.cast(pairs, tl.int64) * groups
    done_ptr = state_ptr + STATE_PAIRS
    released_ptr = done_ptr + pairs
    ticket = tl.atomic_add(state_ptr + STATE_TICKET, 1, sem="relaxed")
    while ticket < 2 * total:
        errors, item = position(ticket, total, lag)
        pair = (item // segments).to(tl.int64)
        segment = item % segments
        start = tl.multiple_of(segment.to(tl.int64) * seg_len, ALIGN)
        length = tl.minimum(n - start, seg_len).to(tl.int32)
        x = segment_at(operands, pair, start, pairs, TARGET_BUILT, LATENT_WEIGHT, PACK_BLOCK, COMPUTE)
        if errors == 1:
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
            plane = tl.cast(total, tl.int64)
            where = pair * segments + place(segment, groups, consecutive)
            for k in tl.static_range(STATISTICS):
                tl.store(partial_ptr + k * plane + where, sums[k])
            if arrive(done_ptr + pair) == segments - 1:
                for first in range(0, groups, ROWS):
                    group = first + tl.arange(0, ROWS)
                    fold_groups(
                        numbers,
                        partial_ptr,
                        telemetry_ptr,
                        coefficient_ptr,
                        (pair * groups).to(tl.int32) + group,
                        group < groups,
                        pairs * groups,
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
                tl.store(bets_ptr + pair, tl.load(last_ptr, cache_modifier=".cg"))
                tl.debug_barrier()
                tl.atomic_xchg(released_ptr + pair, 1, sem="release")
                if arrive(state_ptr + STATE_FOLDED) == pairs - 1:
                    mean_loss(loss_ptr, telemetry_ptr, numbers.weight_ptr, pairs * groups, WEIGHTED, COMPUTE, WIDTH)
        else:
            released = tl.atomic_add(released_ptr + pair, 0, sem="acquire")
            if released == 0:
                patience = POLLS
                if tl.atomic_add(state_ptr + STATE_GAVE_UP, 0, sem="relaxed") != 0:
                    patience = 0
                while (released == 0) & (patience > 0):
                    released = tl.atomic_add(released_ptr + pair, 0, sem="acquire")
                    patience -= 1
                if released == 0:
                    tl.atomic_xchg(state_ptr + STATE_GAVE_UP, 1, sem="relaxed")
                    tl.store(gave_up_ptr, 1)
                    tl.store(bets_ptr + pair, float("nan"))  # so that backward's check writes no other gradients
                    for first in range(0, groups, ROWS):
                        group = first + tl.arange(0, ROWS)
                        lost = tl.full([ROWS], float("nan"), COMPUTE)
                        for k in tl.static_range(COEFFICIENTS):
                            tl.store(coefficient_ptr + k * rows + pair * groups + group, lost, mask=group < groups)
            incoming = tl.load(bets_ptr + pair, cache_modifier=".cg")
            if released == 0:
                incoming += float("nan")
            segment_gradients(
                gw_ptr + (pair * gw_stride + start),
                gl_ptr + (pair * gl_stride + start),
                x,
                length,
                coefficient_ptr,
                pair * groups + group_of(segment, groups, consecutive),
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
        ticket = tl.atomic_add(state_ptr + STATE_TICKET, 1, sem="relaxed")
    if arrive(state_ptr + STATE_LEFT) == tl.num_programs(0) - 1:
        places = 2 * pairs + STATE_PAIRS
        for first in range(0, places, WIDTH):
            at = first + tl.arange(0, WIDTH)
            tl.store(state_ptr + at, tl.zeros([WIDTH], tl.int32), mask=at < places)
