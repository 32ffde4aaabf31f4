// The pass in which every element is a group of its own: errors, objective and gradients at once. Compiled once per
// instruction set, with PGDPO_ISA naming it; see pair.h.
#include <initializer_list>

#include "cpu/reader.h"
#include "epilogue.h"
#include "pair.h"

namespace pgdpo {
inline namespace PGDPO_ISA {
namespace {

// An element pass goes over BLOCK elements in three stages: read and convert (one version per storage type), run the
// objective (one version per common objective), convert and write. Each stage is a short loop whose iterations overlap,
// and the versions add instead of multiplying.
template <class S>
struct Block {
  alignas(64) S u_w[BLOCK], u_l[BLOCK], gap_w[BLOCK], gap_l[BLOCK], minus_w[BLOCK];
  alignas(64) S alpha[BLOCK], gamma[BLOCK], complement[BLOCK], logits[BLOCK], decay[BLOCK];
  alignas(64) S gradient_w[BLOCK], gradient_l[BLOCK];
  alignas(64) S weight[BLOCK];  // of WEIGHTED passes
};

enum Wanted { SUMS_AND_GRADIENTS, SUMS, GRADIENTS };

// The sums of an element pass, made where their terms are: of errors while reading, of the rest by the objective's
// stage. Each with the planes of ElementSum they go to.
enum ErrorSum : int { OF_ERROR_W, OF_ERROR_L, OF_GAP_W, OF_GAP_L, ERROR_SUMS };
constexpr int ERROR_PLANES[] = {TELEMETRY_POLICY_CHOSEN_ERROR, TELEMETRY_POLICY_REJECTED_ERROR, TELEMETRY_CHOSEN_GAP,
                                TELEMETRY_REJECTED_GAP};
enum ObjectiveSum : int {
  OF_LOSS,  // of P with `outer`
  OF_LOGITS,
  OF_ALPHA,
  OF_GAMMA,
  OF_IMPORTANCE,
  OF_COMPLEMENT,
  OF_IMPLICIT,
  OBJECTIVE_SUMS,
};
constexpr int OBJECTIVE_PLANES[] = {TELEMETRY_PER_PAIR_LOSS, TELEMETRY_LOGITS, TELEMETRY_ALPHA, TELEMETRY_GAMMA,
                                    TELEMETRY_IMPORTANCE,    SUM_COMPLEMENT,   SUM_IMPLICIT};

// What the objective's stage knows besides the block.
template <class S>
struct Stage {
  int kind, flags;
  S parameters[PARAMETERS];
  S scale, posterior_scale;
  S means[ELEMENT_MEANS];
  S weight;  // of the formula in a sum; scale has it already
};

// An objective with a logistic is a long chain of dependent arithmetic, of which a processor overlaps few at a time.
// Cut into a loop for PG-DPO's weights (unless they are differentiated), one for the logits and one for the rest, it
// takes two thirds of the time.
template <class S, int KIND, int FLAGS, bool OUTER, Wanted WANTED, bool WITH_WEIGHTS = false>
void run_objective(const Stage<S>& stage, Block<S>& block, int begin, int end, Vec<S> (&sums)[OBJECTIVE_SUMS]) {
  using V = Vec<S>;
  const int kind = KIND == ANY ? stage.kind : KIND, flags = FLAGS == ANY ? stage.flags : FLAGS;
  const V scale = stage.scale, posterior_scale = stage.posterior_scale;
  const Outer<V> outer{stage.means[MEAN_GAMMA], stage.means[MEAN_PREFERENCE], stage.means[MEAN_COMPLEMENT],
                       stage.means[MEAN_IMPLICIT]};
  const bool weighted = kind == KIND_PGDPO, attached = weighted && (flags & FLAG_ATTACHED);
  const bool cut = !attached && (weighted || kind == KIND_DPO || kind == KIND_DPOP || kind == KIND_DPO_SHIFT);
  const auto errors_at = [&](int i) PGDPO_LAMBDA {
    const V u_w = V::at(block.u_w + i), u_l = V::at(block.u_l + i), minus_w = V::at(block.minus_w + i);
    return Errors<V>{u_w * u_w,         u_l * u_l, V::at(block.gap_w + i), V::at(block.gap_l + i),
                     minus_w * minus_w, u_w * u_l, posterior_scale};
  };
  if (cut && weighted)
    for (int i = begin; i < end; i += V::width) {
      Weights<V> w;
      pgdpo_weights<V>(flags, stage.parameters, errors_at(i), w);
      w.alpha.to(block.alpha + i);
      w.gamma.to(block.gamma + i);
      w.complement.to(block.complement + i);
    }
  if (cut)
    for (int i = begin; i < end; i += V::width) {
      const V logits = preference_logits<V>(kind, flags, stage.parameters, errors_at(i), V::at(block.alpha + i));
      logits.to(block.logits + i);
      exp_minus_absolute(logits).to(block.decay + i);
    }
  V part[OBJECTIVE_SUMS];
  copy(sums, part);
  for (int i = begin; i < end; i += V::width) {
    const V u_w = V::at(block.u_w + i), u_l = V::at(block.u_l + i);
    Halfway<V> start;
    if (cut)
      start = {{V::at(block.alpha + i), V(S(0)), V::at(block.gamma + i), V::at(block.complement + i), V(S(0)), V(S(0))},
               V::at(block.logits + i),
               V::at(block.decay + i)};
    const Terms<V> t = objective<V>(kind, flags, stage.parameters, errors_at(i),
                                    OUTER && WANTED == GRADIENTS ? &outer : nullptr, cut ? &start : nullptr);
    if (WANTED != SUMS) {
      V slope = t.by_chosen * u_w;
      if (flags & FLAG_IPR_ANCHOR) slope = slope + t.by_anchor * V::at(block.minus_w + i);
      const V factor = WITH_WEIGHTS ? scale * V::at(block.weight + i) : scale;
      (factor * slope).to(block.gradient_w + i);
      (kind == KIND_SFT ? V(S(0)) : factor * (t.by_rejected * u_l)).to(block.gradient_l + i);
    }
    if (WANTED != GRADIENTS) {
      const auto kept = [&](V x) PGDPO_LAMBDA { return WITH_WEIGHTS ? V::at(block.weight + i) * x : x; };
      part[OF_LOSS] = part[OF_LOSS] + kept(OUTER ? t.preference : t.loss);
      part[OF_LOGITS] = part[OF_LOGITS] + kept(t.logits);
      part[OF_ALPHA] = part[OF_ALPHA] + kept(t.alpha);
      part[OF_GAMMA] = part[OF_GAMMA] + kept(t.gamma);
      part[OF_IMPORTANCE] = part[OF_IMPORTANCE] + kept(t.importance);
      if (OUTER) part[OF_COMPLEMENT] = part[OF_COMPLEMENT] + kept(t.complement);
      if (OUTER) part[OF_IMPLICIT] = part[OF_IMPLICIT] + kept(t.implicit);
    }
  }
  copy(part, sums);
}

template <class S>
using RunObjective = void (*)(const Stage<S>&, Block<S>&, int, int, Vec<S> (&)[OBJECTIVE_SUMS]);

template <class S>
constexpr bool HAS_VERSIONS = sizeof(S) == 4;

// Objectives with a version of their own in float, pointwise; everything else takes the version that branches.
template <class S>
RunObjective<S> pointwise_objective(int kind, int flags) {
#define PGDPO_VERSION(KIND, FLAGS) \
  if constexpr (HAS_VERSIONS<S>)   \
    if (kind == (KIND) && flags == (FLAGS)) return run_objective<S, KIND, FLAGS, false, SUMS_AND_GRADIENTS>;
  PGDPO_VERSION(KIND_DPO, 0)
  PGDPO_VERSION(KIND_DPO, FLAG_IMPORTANCE)
  PGDPO_VERSION(KIND_IPO, 0)
  PGDPO_VERSION(KIND_SLIC, 0)
  PGDPO_VERSION(KIND_HINGE, 0)
  PGDPO_VERSION(KIND_SFT, 0)
  PGDPO_VERSION(KIND_DPOP, 0)
  PGDPO_VERSION(KIND_DPO_SHIFT, 0)
  constexpr int both = FLAG_ARS | FLAG_IPR_REWARD;
  PGDPO_VERSION(KIND_PGDPO, both | FLAG_ONE_SIGMOID | RATIO_LOGIT << FLAG_RATIO_SHIFT)
  PGDPO_VERSION(KIND_PGDPO, both | FLAG_ONE_SIGMOID | RATIO_SYMMETRIC << FLAG_RATIO_SHIFT)
  PGDPO_VERSION(KIND_PGDPO, both | FLAG_ONE_SIGMOID | RATIO_ABS << FLAG_RATIO_SHIFT)
  PGDPO_VERSION(KIND_PGDPO, both | FLAG_ONE_SIGMOID | RATIO_SIGNED << FLAG_RATIO_SHIFT)
  PGDPO_VERSION(KIND_PGDPO, both | RATIO_LOGIT << FLAG_RATIO_SHIFT)
#undef PGDPO_VERSION
  return run_objective<S, ANY, ANY, false, SUMS_AND_GRADIENTS>;
}

template <class S>
RunObjective<S> outer_objective(int flags, bool with_gradients) {
  constexpr int listing =
      FLAG_ARS | FLAG_IPR_ANCHOR | FLAG_ATTACHED | FLAG_ONE_SIGMOID | RATIO_SIGNED << FLAG_RATIO_SHIFT;
  if constexpr (HAS_VERSIONS<S>)
    if (flags == listing)
      return with_gradients ? run_objective<S, KIND_PGDPO, listing, true, GRADIENTS>
                            : run_objective<S, KIND_PGDPO, listing, true, SUMS>;
  return with_gradients ? run_objective<S, KIND_PGDPO, ANY, true, GRADIENTS>
                        : run_objective<S, KIND_PGDPO, ANY, true, SUMS>;
}

// The formulas of a sum one after another: losses and gradients are added up, the rest is the first one's.
template <class S>
void run_sum(const Stage<S>* stages, const RunObjective<S>* run, int terms, Block<S>& block, int begin, int end,
             Vec<S> (&sums)[OBJECTIVE_SUMS]) {
  using V = Vec<S>;
  alignas(64) S total_w[BLOCK], total_l[BLOCK];
  for (int k = 0; k < terms; ++k) {
    V own[OBJECTIVE_SUMS];
    for (V& plane : own) plane = V(S(0));
    run[k](stages[k], block, begin, end, own);
    sums[OF_LOSS] = sums[OF_LOSS] + V(stages[k].weight) * own[OF_LOSS];
    for (int plane = OF_LOSS + 1; k == 0 && plane < OBJECTIVE_SUMS; ++plane) sums[plane] = sums[plane] + own[plane];
    for (int i = begin; i < end; i += V::width) {
      const V by_chosen = V::at(block.gradient_w + i), by_rejected = V::at(block.gradient_l + i);
      (k == 0 ? by_chosen : V::at(total_w + i) + by_chosen).to(total_w + i);
      (k == 0 ? by_rejected : V::at(total_l + i) + by_rejected).to(total_l + i);
    }
  }
  for (int i = begin; i < end; i += V::width) {
    V::at(total_w + i).to(block.gradient_w + i);
    V::at(total_l + i).to(block.gradient_l + i);
  }
}

template <class S, int D>
void elements(const Pair& x, const Elements& call, int64_t begin, int64_t end) {
  using V = Vec<S>;
  const bool with_gradients = call.scale != nullptr;
  Stage<S> stages[TERM_LIMIT] = {};
  RunObjective<S> run[TERM_LIMIT] = {};
  bool anchor = false, plain = call.terms == 1;
  double weights[TERM_LIMIT];
  const auto prepare = [&](double beta_scale) {
    for (int k = 0; k < call.terms; ++k) {
      Formula formula = call.formula[k];
      if (beta_scale != 1.0) formula.scale_beta(beta_scale);
      for (int i = 0; i < PARAMETERS; ++i) stages[k].parameters[i] = S(formula.parameters[i]);
      weights[k] = formula.parameters[PARAMETER_TERM_WEIGHT];
      stages[k].weight = S(weights[k]);
    }
  };
  prepare(1.0);
  for (int k = 0; k < call.terms; ++k) {
    const Formula& formula = call.formula[k];
    const bool one_sigmoid =
        formula.kind == KIND_PGDPO && formula.parameters[PARAMETER_K1] == formula.parameters[PARAMETER_K2];
    // The versions know nothing of what is settled here.
    constexpr int settled = FLAG_IPR_BETA | FLAG_TERM_WEIGHT | FLAG_TERM_WEIGHT_BETA;
    stages[k].kind = formula.kind;
    stages[k].flags = (formula.flags & ~settled) | (one_sigmoid ? FLAG_ONE_SIGMOID : 0);
    run[k] = D == WEIGHTED ? run_objective<S, ANY, ANY, false, SUMS_AND_GRADIENTS, true>
             : call.outer  ? outer_objective<S>(stages[k].flags, with_gradients)
                           : pointwise_objective<S>(formula.kind, stages[k].flags);
    anchor = anchor || (formula.kind == KIND_PGDPO && (formula.flags & FLAG_IPR_ANCHOR));
    plain = plain && !(formula.flags & FLAG_TERM_WEIGHT);
  }
  const int dtype = call.gradient[0].dtype;
  Block<S> block{};
  for (int64_t c = begin; c < end; ++c) {
    const Segment at(x, c);
    Reader<S, D, true> reader(x, at);
    if (call.beta_scale != nullptr) prepare(call.beta_scale[at.pair]);
    for (int k = 0; k < call.terms; ++k) {
      if (with_gradients) stages[k].scale = S(call.scale[at.pair] * weights[k]);
      if (call.posterior_scale != nullptr) stages[k].posterior_scale = S(call.posterior_scale[at.pair]);
    }
    if (call.means != nullptr)
      for (int k = 0; k < ELEMENT_MEANS; ++k) stages[0].means[k] = S(call.means[k * x.pairs + at.pair]);
    char* out[2] = {row_start(call.gradient[0], at.pair, at.start), row_start(call.gradient[1], at.pair, at.start)};
    Sums<V, ERROR_SUMS> errors;
    Sums<V, OBJECTIVE_SUMS> terms;
    for (int first = 0; first < at.count; first += BLOCK) {
      reader.begin_block(first, at.count);
      const int count = reader.count, split = reader.split;
      V part[ERROR_SUMS];
      copy(errors.narrow, part);
      const auto hold = [&](const Differences<V>& d, int i) PGDPO_LAMBDA {
        const V gap_w = d.minus_w * d.plus_w, gap_l = d.minus_l * d.plus_l;
        part[OF_ERROR_W] = part[OF_ERROR_W] + weighted<D>(d, d.u_w) * d.u_w;
        part[OF_ERROR_L] = part[OF_ERROR_L] + weighted<D>(d, d.u_l) * d.u_l;
        part[OF_GAP_W] = part[OF_GAP_W] + weighted<D>(d, gap_w);
        part[OF_GAP_L] = part[OF_GAP_L] + weighted<D>(d, gap_l);
        if constexpr (D == WEIGHTED) d.weight.to(block.weight + i);
        d.u_w.to(block.u_w + i);
        d.u_l.to(block.u_l + i);
        gap_w.to(block.gap_w + i);
        gap_l.to(block.gap_l + i);
        if (anchor) d.minus_w.to(block.minus_w + i);
      };
      reader.over(
          first,
          [&](const Differences<V>& even, const Differences<V>& odd, int i) PGDPO_LAMBDA {
            hold(even, i);
            hold(odd, i + V::width);
          },
          hold);
      copy(part, errors.narrow);
      const auto objective_over = [&](int begin, int end) {
        if (plain)
          run[0](stages[0], block, begin, end, terms.narrow);
        else
          run_sum(stages, run, call.terms, block, begin, end, terms.narrow);
      };
      const int whole = count & -V::width;
      objective_over(0, whole);
      if (whole < count) {  // lanes past the end keep what they had
        V before[OBJECTIVE_SUMS];
        copy(terms.narrow, before);
        objective_over(whole, count);
        for (int k = 0; k < OBJECTIVE_SUMS; ++k)
          terms.narrow[k] = select(V::ascending() < V(S(count - whole)), terms.narrow[k], before[k]);
      }
      if (with_gradients) {
        const S* gradient[2] = {block.gradient_w, block.gradient_l};
        for (int side = 0; side < 2; ++side) {
          const auto held = [&](int i) PGDPO_LAMBDA { return V::at(gradient[side] + i); };
          for (int i = 0; i < split; i += 2 * V::width) put_split(out[side], first + i, held(i), held(i + V::width));
          if (split < count) store_block<S>(dtype, out[side], first + split, count - split, gradient[side] + split);
        }
      }
      if ((first + BLOCK) % FLUSH == 0) {
        errors.flush();
        terms.flush();
      }
    }
    if (call.sums != nullptr) {
      errors.write(call.sums + c, ERROR_PLANES, x.pairs * x.segments);
      terms.write(call.sums + c, OBJECTIVE_PLANES, x.pairs * x.segments);
    }
  }
}

}  // namespace

template <class S>
void run_elements(const Pair& x, const Elements& call, int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, true, call.gradient),
                 [&](auto storage) { elements<S, decltype(storage)::value>(x, call, begin, end); });
}
template void run_elements<float>(const Pair&, const Elements&, int64_t, int64_t);
template void run_elements<double>(const Pair&, const Elements&, int64_t, int64_t);

}  // namespace PGDPO_ISA
}  // namespace pgdpo
