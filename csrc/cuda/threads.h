// What one CUDA thread computes: its part of a segment's sums, gradients or elements, and of the folds between passes.
//
// THREADS threads share a segment; thread t takes elements t * WIDTH, (t + THREADS) * WIDTH, ... in that order whatever
// the alignment, the grid or the number of pairs, and sums meet in a fixed tree. So results depend on the shape alone.
// No function here knows about blocks or grids, so tests run them all on the host.
#pragma once

#include "cuda/rows.h"

namespace pgdpo {
namespace cuda {

// Numbers of a call that are not tensors of latents. Pointers are null where an operand is absent.
template <class S>
struct Call {
  int kind = 0, flags = 0;
  bool gaps = false, outer = false, anchor = false, cross = false, speculative = false;
  S parameters[PARAMETERS] = {};
  const S* reference_errors = nullptr;  // [2, B, G]
  const S* weight = nullptr;            // [B, G]; at element granularity [B]
  const S* posterior_scale = nullptr;   // [B]
  const S* incoming = nullptr;          // [], null for 1
  const S* means_in = nullptr;          // [ELEMENT_MEANS, B]
  S* partial = nullptr;                 // [STATISTICS or ELEMENT_SUMS, B, segments]
  S* loss = nullptr;                    // []
  S* telemetry = nullptr;               // [TELEMETRY, B, G], or the six means [STATISTICS, B, G] when kind < 0
  S* coefficients = nullptr;            // [3, B, G]: of p_w - y_w, p_l - y_l, p_w - q_w
  S* means = nullptr;                   // [ELEMENT_MEANS, B]
  MutableRows gradient[2];
};

// One segment of one pair: where its operands start, and what is the same for all of its elements.
template <class S>
struct Segment {
  View policy[2], target[2], reference[2], noise;
  const float* scale[2];  // of the whole row, indexed by position / PACK_BLOCK
  int64_t pair, index, start;
  int count, form;
  bool shared_target, built_target;
  S noise_scale, clean_scale;

  PGDPO_HD static View view(const Rows& rows, int64_t pair, int64_t start) {
    return {rows.data == nullptr ? nullptr : rows.data + (pair * rows.stride + start) * size_of(rows.dtype),
            rows.dtype};
  }

  PGDPO_HD Segment(const Pair& x, int64_t pair_, int64_t index_) : pair(pair_), index(index_) {
    start = index * x.length;
    count = int(x.numel - start < x.length ? x.numel - start : x.length);
    form = x.reference_form;
    shared_target = x.shared_target;
    built_target = x.built_target;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      policy[side] = view(x.policy[side], pair, start);
      target[side] = view(x.target[side], pair, start);
      reference[side] = view(x.reference[side], pair, start);
      const Rows& rows = x.reference_scale[side];
      scale[side] = reinterpret_cast<const float*>(rows.data) + (rows.data == nullptr ? 0 : pair * rows.stride);
    }
    noise = view(x.noise, pair, start);
    noise_scale = S(0);
    clean_scale = S(1);
    if (built_target) {
      noise_scale = reinterpret_cast<const S*>(x.target_scale.data)[pair];
      clean_scale = reinterpret_cast<const S*>(x.target_scale.data)[x.pairs + pair];
    }
  }
};

// Differences at one element: p - y, and with a reference p - q and p + q - 2y. The gap is the product of the last two,
// which keeps its relative accuracy where policy and reference nearly agree.
template <class S>
struct Differences {
  S u_w, u_l, minus_w, minus_l, plus_w, plus_l;
};

// WIDTH elements of all operands. FORM is the reference's form or ANY; HELD where policy, target and noise lie.
template <class S, int P, int ACCESS, int FORM, int HELD, int REFERENCE_SPACE>
struct Stretch {
  static constexpr int WIDTH = width_of(P);
  static constexpr int OTHER = ACCESS == SAME ? P : ANY;
  static constexpr int REFERENCE_DTYPE = FORM == REFERENCE_FLOAT8     ? FLOAT8
                                         : FORM == REFERENCE_BFLOAT16 ? BFLOAT16
                                         : FORM == ANY                ? ANY
                                                                      : OTHER;
  Vector<S, WIDTH, P, ACCESS, HELD> p_w, p_l;
  Vector<S, WIDTH, OTHER, ACCESS, HELD> y_w, y_l, noise;
  Vector<S, WIDTH, REFERENCE_DTYPE, ACCESS, REFERENCE_SPACE> q_w, q_l;

  PGDPO_HD static int form_of(const Segment<S>& s) { return FORM == ANY ? s.form : FORM; }

  PGDPO_HD void load(const Segment<S>& s, int at, bool rejected_reference = true) {
    p_w.load(s.policy[0], at, s.count);
    p_l.load(s.policy[1], at, s.count);
    y_w.load(s.target[0], at, s.count);
    if (!s.shared_target) y_l.load(s.target[1], at, s.count);
    if (s.built_target) noise.load(s.noise, at, s.count);
    if (form_of(s) != REFERENCE_NONE) {
      q_w.load(s.reference[0], at, s.count);
      if (rejected_reference) q_l.load(s.reference[1], at, s.count);
    }
  }

  // Residual q - y of a packed float8 reference: bytes times their block's scale.
  PGDPO_HD static void scaled(const Segment<S>& s, int side, int at, S (&r)[WIDTH]) {
    if constexpr (ACCESS == SCALAR) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        if (at + i < s.count) r[i] = S(float(r[i]) * s.scale[side][(s.start + at + i) / PACK_BLOCK]);
    } else {
      const float factor = s.scale[side][(s.start + at) / PACK_BLOCK];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) r[i] = S(float(r[i]) * factor);
    }
  }

  // use(i, Differences) for each of the elements that exist.
  template <class Use>
  PGDPO_HD void each(const Segment<S>& s, int at, bool rejected_reference, const Use& use) const {
    S pw[WIDTH], pl[WIDTH], yw[WIDTH], yl[WIDTH], rw[WIDTH], rl[WIDTH];
    p_w.values(s.policy[0], pw);
    p_l.values(s.policy[1], pl);
    y_w.values(s.target[0], yw);
    if (s.shared_target) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) yl[i] = yw[i];
    } else {
      y_l.values(s.target[1], yl);
    }
    if (s.built_target) {
      S drawn[WIDTH];
      noise.values(s.noise, drawn);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const S scaled_noise = product(s.noise_scale, drawn[i]);
        yw[i] = scaled_noise + product(s.clean_scale, yw[i]);
        yl[i] = scaled_noise + product(s.clean_scale, yl[i]);
      }
    }
    const int form = form_of(s);
    if (form != REFERENCE_NONE) {
      q_w.values(s.reference[0], rw);
      if (rejected_reference) q_l.values(s.reference[1], rl);
      if (form == REFERENCE_FLOAT8) {
        scaled(s, 0, at, rw);
        if (rejected_reference) scaled(s, 1, at, rl);
      }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      Differences<S> d;
      d.u_w = pw[i] - yw[i];
      d.u_l = pl[i] - yl[i];
      d.minus_w = d.minus_l = d.plus_w = d.plus_l = S(0);
      if (form == REFERENCE_PREDICTION) {
        d.minus_w = pw[i] - rw[i];
        d.plus_w = d.u_w + (rw[i] - yw[i]);
        if (rejected_reference) {
          d.minus_l = pl[i] - rl[i];
          d.plus_l = d.u_l + (rl[i] - yl[i]);
        }
      } else if (form != REFERENCE_NONE) {
        d.minus_w = d.u_w - rw[i];
        d.plus_w = d.u_w + rw[i];
        if (rejected_reference) {
          d.minus_l = d.u_l - rl[i];
          d.plus_l = d.u_l + rl[i];
        }
      }
      if (ACCESS != SCALAR || at + i < s.count) use(i, d);
    }
  }
};

// run(block, at) over the vectors of thread `t`, BATCH of them loaded before the first is used.
template <int BATCH, class Block, class S, class Run>
PGDPO_HD void over_vectors(const Segment<S>& s, int t, bool rejected_reference, const Run& run) {
  constexpr int STEP = THREADS * Block::WIDTH;
  int at = t * Block::WIDTH;
  if constexpr (BATCH == 2) {
    for (; at + STEP < s.count; at += 2 * STEP) {
      Block first, second;
      first.load(s, at, rejected_reference);
      second.load(s, at + STEP, rejected_reference);
      run(first, at);
      run(second, at + STEP);
    }
  }
  for (; at < s.count; at += STEP) {
    Block block;
    block.load(s, at, rejected_reference);
    run(block, at);
  }
}

// Thread `t`'s part of the six sums of a segment. Planes nobody wants stay zero.
template <class S, int P, int ACCESS, int FORM, int HELD = KEEP>
PGDPO_HD void thread_sums(const Segment<S>& s, int t, bool anchor, bool cross, S (&sums)[STATISTICS]) {
  // The reference is not read again unless the anchor is, so it must not push policy and target out of the L2.
  using Block = Stretch<S, P, ACCESS, FORM, HELD, STREAM>;
#pragma unroll
  for (int k = 0; k < STATISTICS; ++k) sums[k] = S(0);
  over_vectors<ACCESS == SAME && HELD == KEEP ? 2 : 1, Block>(s, t, true, [&](const Block& block, int at) {
    block.each(s, at, true, [&](int, const Differences<S>& d) {
      sums[0] = fused(d.u_w, d.u_w, sums[0]);
      sums[1] = fused(d.u_l, d.u_l, sums[1]);
      if (FORM != REFERENCE_NONE) {
        sums[2] = fused(d.minus_w, d.plus_w, sums[2]);
        sums[3] = fused(d.minus_l, d.plus_l, sums[3]);
        if (anchor) sums[4] = fused(d.minus_w, d.minus_w, sums[4]);
      }
      if (cross) sums[5] = fused(d.u_w, d.u_l, sums[5]);
    });
  });
}

// Coefficients of one row times the incoming gradient.
template <class S>
struct Coefficients {
  S chosen, rejected, anchor;
};

// Thread `t`'s part of both gradients of a segment. FORM is REFERENCE_NONE without an anchor.
template <class S, int P, int ACCESS, int FORM, int HELD = STREAM>
PGDPO_HD void thread_gradients(const Segment<S>& s, int t, const Coefficients<S>& c, const MutableRows (&gradient)[2]) {
  using Block = Stretch<S, P, ACCESS, FORM, HELD, HELD>;
  char* out[2];
#pragma unroll
  for (int side = 0; side < 2; ++side)
    out[side] = gradient[side].data + (s.pair * gradient[side].stride + s.start) * size_of(P);
  over_vectors<ACCESS == SAME && HELD == STREAM ? 2 : 1, Block>(s, t, false, [&](const Block& block, int at) {
    S g_w[Block::WIDTH], g_l[Block::WIDTH];
    block.each(s, at, false, [&](int i, const Differences<S>& d) {
      g_w[i] = FORM == REFERENCE_NONE ? c.chosen * d.u_w : fused(c.chosen, d.u_w, c.anchor * d.minus_w);
      g_l[i] = c.rejected == S(0) ? S(0) : c.rejected * d.u_l;  // no notice taken, no NaN taken
      if (ACCESS == SCALAR) {                                   // at once: held back, they would cost registers
        put_one<S>(P, out[0], at + i, g_w[i]);
        put_one<S>(P, out[1], at + i, g_l[i]);
      }
    });
    if (ACCESS != SCALAR) {
      put<S, Block::WIDTH, P>(out[0], at, g_w);
      put<S, Block::WIDTH, P>(out[1], at, g_l);
    }
  });
}

// The second pass of PG-DPO with combine="outer", as a kind of its own: gradients from the video's means, no sums.
constexpr int OUTER_GRADIENTS = 100;

// Thread `t`'s part of an element pass: sums of the telemetry, gradients, or both. KIND is the objective's, ANY for
// those other than DPO and PG-DPO, or OUTER_GRADIENTS.
template <class S, int P, int ACCESS, int KIND>
PGDPO_HD void thread_elements(const Pair& x, const Call<S>& call, const Segment<S>& s, int t, S incoming,
                              S (&sums)[ELEMENT_SUMS]) {
  using Block = Stretch<S, P, ACCESS, ANY, STREAM, STREAM>;
  constexpr bool FROM_MEANS = KIND == OUTER_GRADIENTS;
  const int kind = KIND == ANY ? call.kind : FROM_MEANS ? int(KIND_PGDPO) : KIND;
  const bool with_gradients = call.gradient[0].data != nullptr;
  S scale = S(0), posterior_scale = S(0);
  char* out[2] = {nullptr, nullptr};
  if (with_gradients) {
    scale = incoming * (S(2) / S(x.numel) / S(x.pairs));
    if (call.weight != nullptr) scale *= call.weight[s.pair];
#pragma unroll
    for (int side = 0; side < 2; ++side)
      out[side] = call.gradient[side].data + (s.pair * call.gradient[side].stride + s.start) * size_of(P);
  }
  if (call.flags & FLAG_IMPORTANCE) posterior_scale = call.posterior_scale[s.pair];
  Outer<S> outer = {S(0), S(0), S(0), S(0)};
  if (FROM_MEANS)
    outer = {call.means_in[s.pair], call.means_in[x.pairs + s.pair], call.means_in[2 * x.pairs + s.pair],
             call.means_in[3 * x.pairs + s.pair]};
#pragma unroll
  for (int k = 0; k < ELEMENT_SUMS; ++k) sums[k] = S(0);
  const bool anchored = kind == KIND_PGDPO && (call.flags & FLAG_IPR_ANCHOR);
  over_vectors<1, Block>(s, t, true, [&](const Block& block, int at) {
    S g_w[Block::WIDTH], g_l[Block::WIDTH];
    block.each(s, at, true, [&](int i, const Differences<S>& d) {
      const Errors<S> e{d.u_w * d.u_w,         d.u_l * d.u_l, d.minus_w * d.plus_w, d.minus_l * d.plus_l,
                        d.minus_w * d.minus_w, d.u_w * d.u_l, posterior_scale};
      const Terms<S> terms = objective<S>(kind, call.flags, call.parameters, e, FROM_MEANS ? &outer : nullptr);
      // An objective must not take the NaN of what it takes no notice of.
      g_w[i] =
          scale * (anchored ? fused(terms.by_chosen, d.u_w, terms.by_anchor * d.minus_w) : terms.by_chosen * d.u_w);
      g_l[i] = kind == KIND_SFT ? S(0) : scale * (terms.by_rejected * d.u_l);
      if (ACCESS == SCALAR && with_gradients) {
        put_one<S>(P, out[0], at + i, g_w[i]);
        put_one<S>(P, out[1], at + i, g_l[i]);
      }
      if (FROM_MEANS) return;
      sums[0] += call.outer ? terms.preference : terms.loss;
      sums[1] += terms.logits;
      sums[2] += terms.alpha;
      sums[3] += terms.gamma;
      sums[4] += terms.importance;
      sums[5] += e.policy_chosen;
      sums[6] += e.policy_rejected;
      sums[7] += e.gap_chosen;
      sums[8] += e.gap_rejected;
      sums[9] += terms.complement;
      sums[10] += terms.implicit;
    });
    if (ACCESS != SCALAR && with_gradients) {
      put<S, Block::WIDTH, P>(out[0], at, g_w);
      put<S, Block::WIDTH, P>(out[1], at, g_l);
    }
  });
}

// Sums of `planes` planes of partials over the runs of one group: those of thread `t` of `step`.
template <class S, int PLANES>
PGDPO_HD void thread_fold(const S* partial, int64_t pairs, int64_t segments, int64_t groups, int64_t row, int t,
                          int step, S (&sums)[PLANES]) {
  const int64_t plane = pairs * segments;
  const S* from = partial + row / groups * segments + row % groups;
  const int parts = int(segments / groups);
#pragma unroll
  for (int k = 0; k < PLANES; ++k) sums[k] = S(0);
#pragma unroll 4
  for (int part = t; part < parts; part += step) {
#pragma unroll
    for (int k = 0; k < PLANES; ++k) sums[k] += from[k * plane + part * groups];
  }
}

// One group through the objective, from its six sums: telemetry and coefficients to memory unless `quiet`. Returns the
// coefficients; adds the group's weighted loss to `total`.
template <class S>
PGDPO_HD Coefficients<S> finish_row(const Pair& x, const Call<S>& call, int64_t row, const S (&sums)[STATISTICS],
                                    bool quiet, S& total) {
  const int64_t rows = x.pairs * x.groups;
  const S count = S(x.numel / x.groups);
  S mean[STATISTICS];
#pragma unroll
  for (int k = 0; k < STATISTICS; ++k) mean[k] = sums[k] / count;
  if (call.kind < 0) {
#pragma unroll
    for (int k = 0; k < STATISTICS; ++k) call.telemetry[k * rows + row] = mean[k];
    return {S(0), S(0), S(0)};
  }
  Errors<S> e{mean[0], mean[1], mean[2], mean[3], mean[4], mean[5], S(0)};
  if (call.reference_errors != nullptr) {
    e.gap_chosen = e.policy_chosen - call.reference_errors[row];
    e.gap_rejected = e.policy_rejected - call.reference_errors[rows + row];
  }
  if (call.flags & FLAG_IMPORTANCE) e.posterior_scale = call.posterior_scale[row / x.groups];
  const Terms<S> terms = objective<S>(call.kind, call.flags, call.parameters, e);
  const S weight = call.weight == nullptr ? S(1) : call.weight[row];
  const S scale = weight * (S(2) / count / S(rows));
  total += weight * terms.loss;
  const Coefficients<S> c = {scale * terms.by_chosen, scale * terms.by_rejected, scale * terms.by_anchor};
  if (!quiet) {
    const S nan = S(from_bits(0x7fc00000u));
    const S values[TELEMETRY] = {terms.loss,
                                 terms.logits,
                                 terms.alpha,
                                 terms.gamma,
                                 terms.importance,
                                 e.policy_chosen,
                                 e.policy_rejected,
                                 call.gaps ? e.gap_chosen : nan,
                                 call.gaps ? e.gap_rejected : nan};
#pragma unroll
    for (int k = 0; k < TELEMETRY; ++k) call.telemetry[k * rows + row] = values[k];
    call.coefficients[row] = c.chosen;
    call.coefficients[rows + row] = c.rejected;
    call.coefficients[2 * rows + row] = c.anchor;
  }
  return c;
}

// The means of one pair's elements to telemetry, means for `outer`, and the pair's weighted loss.
template <class S>
PGDPO_HD S finish_elements(const Pair& x, const Call<S>& call, int64_t pair, const S (&sums)[ELEMENT_SUMS]) {
  S mean[ELEMENT_SUMS];
#pragma unroll
  for (int k = 0; k < ELEMENT_SUMS; ++k) mean[k] = sums[k] / S(x.numel);
  call.means[pair] = mean[3];
  call.means[x.pairs + pair] = mean[0];
  call.means[2 * x.pairs + pair] = mean[9];
  call.means[3 * x.pairs + pair] = mean[10];
  if (call.outer) mean[0] = mean[3] * mean[0] + call.parameters[3] * mean[9] * mean[10];
  if (x.reference_form == REFERENCE_NONE) mean[7] = mean[8] = S(from_bits(0x7fc00000u));
#pragma unroll
  for (int k = 0; k < TELEMETRY; ++k) call.telemetry[k * x.pairs + pair] = mean[k];
  return (call.weight == nullptr ? S(1) : call.weight[pair]) * mean[0];
}

}  // namespace cuda
}  // namespace pgdpo
