// The scalar end of every objective: group errors in, loss, weights and derivatives out.
//
// The formulas are those of pgdpo_fast/objectives.py with their derivatives written out, torch's conventions at kinks
// included. One template serves host scalars and the CPU's vectors: T is float, double or a Vec (cpu/vector.h). With
// kind and flags compile-time constants at the call, inlining leaves only the branches taken.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define PGDPO_HD __host__ __device__ __forceinline__
#elif defined(PGDPO_QUICK_BUILD)
#define PGDPO_HD inline
#else
#define PGDPO_HD inline __attribute__((always_inline))
#endif

// The CPU passes are compiled once per instruction set; a namespace each keeps the linker from merging their templates.
#if !defined(PGDPO_ISA)
#define PGDPO_ISA generic
#endif

namespace pgdpo {
inline namespace PGDPO_ISA {

// Mirrors of the constants in pgdpo_fast/objectives.py.
enum Kind : int {
  KIND_DPO = 0,
  KIND_PGDPO = 1,
  KIND_IPO = 2,
  KIND_SLIC = 3,
  KIND_SFT = 4,
  KIND_DPOP = 5,
  KIND_DPO_SHIFT = 6,
  KIND_HINGE = 7,
};
enum Flag : int {
  FLAG_ARS = 1,
  FLAG_IPR_REWARD = 2,
  FLAG_IPR_ANCHOR = 4,
  FLAG_ATTACHED = 8,
  FLAG_RATIO_SHIFT = 4,
  FLAG_SAFEGUARD = 64,
  FLAG_IMPORTANCE = 128,
  FLAG_IPR_BETA = 256,
  FLAG_INSIDE = 512,
  FLAG_SAFEGUARD_BATCH = 1024,
  FLAG_TERM_WEIGHT = 2048,
  FLAG_TERM_WEIGHT_BETA = 4096,
  // Not in objectives.py: callers that know k1 == k2 add it, and one sigmoid serves alpha and 1 - gamma.
  FLAG_ONE_SIGMOID = 65536,
};
// A sum of objectives has bits of the kind and the flags for each term, the first lowest.
enum TermLayout : int {
  TERM_KIND_BITS = 8,
  TERM_FLAG_BITS = 16,
  TERM_LIMIT = 4,
};
enum Ratio : int {
  RATIO_LOGIT = 0,
  RATIO_SYMMETRIC = 1,
  RATIO_ABS = 2,
  RATIO_SIGNED = 3,
};
constexpr double RATIO_LIMIT = 1e6;
// Where an objective's numbers stand: the fields of Parameters.
enum Parameter : int {
  PARAMETER_HALF_BETA = 0,
  PARAMETER_K1 = 1,
  PARAMETER_K2 = 2,
  PARAMETER_IPR_SCALE = 3,
  PARAMETER_EPS = 4,
  PARAMETER_LABEL_SMOOTHING = 5,
  PARAMETER_TARGET = 6,
  PARAMETER_DELTA = 7,
  PARAMETER_WEIGHT = 8,
  PARAMETER_PENALTY = 9,
  PARAMETER_SHIFT = 10,
  PARAMETER_THRESHOLD = 11,
  PARAMETER_CLIP = 12,
  PARAMETER_MU = 13,
  PARAMETER_TERM_WEIGHT = 14,
  PARAMETERS = 15,
};

// One formula of an objective. Its weight and what follows beta are the callers' business, not `objective`'s.
struct Formula {
  int kind = 0, flags = 0;
  double parameters[PARAMETERS] = {};

  // Multiplies beta by `scale` wherever it stands.
  void scale_beta(double scale) {
    parameters[PARAMETER_HALF_BETA] *= scale;
    parameters[PARAMETER_TARGET] /= scale;
    if (flags & FLAG_IPR_BETA) parameters[PARAMETER_IPR_SCALE] *= scale;
    if (flags & FLAG_TERM_WEIGHT_BETA) parameters[PARAMETER_TERM_WEIGHT] *= scale;
  }
};

template <class T>
struct ScalarOf {
  using type = T;
};
template <class T>
using scalar_of = typename ScalarOf<T>::type;

PGDPO_HD float select(bool mask, float a, float b) {
  return mask ? a : b;
}
PGDPO_HD double select(bool mask, double a, double b) {
  return mask ? a : b;
}
PGDPO_HD float absolute(float x) {
  return fabsf(x);
}
PGDPO_HD double absolute(double x) {
  return fabs(x);
}
PGDPO_HD float exponential(float x) {
  return expf(x);
}
PGDPO_HD double exponential(double x) {
  return exp(x);
}
// exp(-|x|); a form that is tiny instead of zero far out will do.
PGDPO_HD float exp_minus_absolute(float x) {
  return expf(-fabsf(x));
}
PGDPO_HD double exp_minus_absolute(double x) {
  return exp(-fabs(x));
}
// log(1 + t), 0 <= t <= 1.
PGDPO_HD float log1p_unit(float t) {
  return log1pf(t);
}
PGDPO_HD double log1p_unit(double t) {
  return log1p(t);
}

// The larger of the two; NaN in x stays NaN, as in torch.clamp.
PGDPO_HD float at_least(float low, float x) {
  return low > x ? low : x;
}
PGDPO_HD double at_least(double low, double x) {
  return low > x ? low : x;
}
PGDPO_HD float at_most(float high, float x) {
  return high < x ? high : x;
}
PGDPO_HD double at_most(double high, double x) {
  return high < x ? high : x;
}

template <class T>
PGDPO_HD T clamp(T x, T low, T high) {
  return at_most(high, at_least(low, x));
}

// exp(x), x cut so that the result and its inverse are normal numbers.
PGDPO_HD float exp_cut(float x) {
  return expf(clamp(x, -86.5f, 86.5f));
}
PGDPO_HD double exp_cut(double x) {
  return exp(clamp(x, -707.0, 707.0));
}

template <class T>
PGDPO_HD T sign(T x) {
  return select(x > T(0), T(1), select(x < T(0), T(-1), T(0)));
}

// sigmoid(x) and sigmoid(-x), never by subtraction.
template <class T>
struct Sigmoids {
  T up, down;

  PGDPO_HD explicit Sigmoids(T x) {
    const T odds = exp_cut(x);
    down = T(1) / (T(1) + odds);
    up = odds * down;
  }
};

// The same with softplus(-x) = -log sigmoid(x), all from one exponential.
template <class T>
struct Logistic {
  T x, decay, up, down;

  // decay is exp(-|x|).
  PGDPO_HD Logistic(T x_, T decay_) : x(x_), decay(decay_) {
    const T large = T(1) / (T(1) + decay);
    const T small = decay * large;
    up = select(x >= T(0), large, small);
    down = select(x >= T(0), small, large);
  }
  PGDPO_HD T softplus_minus() const { return at_least(T(0), T(0) - x) + log1p_unit(decay); }
  PGDPO_HD T softplus_plus() const { return at_least(T(0), x) + log1p_unit(decay); }
};

// What the errors of one group (or one element) are: policy errors, gaps, mean (p_w - q_w)^2, mean (p_w - y_w)(p_l -
// y_l), and c_t of the pair. Members an objective does not use may hold anything finite.
template <class T>
struct Errors {
  T policy_chosen, policy_rejected, gap_chosen, gap_rejected, anchor, cross, posterior_scale;
};

// What the objective makes of them. The derivatives are by the chosen error, the rejected error and the anchor: a gap
// and its policy error have the same derivative by the prediction, so they are added. The last three serve Outer.
template <class T>
struct Terms {
  T loss, logits, alpha, gamma, importance;
  T by_chosen, by_rejected, by_anchor;
  T preference, complement, implicit;
};

// PG-DPO with combine="outer": the loss of a sample is gamma * preference + scale * complement * implicit of these
// means over its groups, so they stand where the group's own values would in the derivatives.
template <class T>
struct Outer {
  T gamma, preference, complement, implicit;
};

// PG-DPO's rho, cut to +-RATIO_LIMIT, and its derivatives by the chosen and the rejected reward (zero where it is cut).
template <class T>
PGDPO_HD T ratio_and_slopes(int which, bool slopes, T gap_chosen, T gap_rejected, T half_beta, T eps, T& by_chosen,
                            T& by_rejected) {
  const T chosen = T(0) - gap_chosen, rejected = T(0) - gap_rejected, margin = gap_rejected - gap_chosen;
  const T limit = T(RATIO_LIMIT);
  T ratio;
  if (which == RATIO_LOGIT) {
    ratio = half_beta * margin;
    by_chosen = half_beta;
    by_rejected = T(0) - half_beta;
  } else {
    T denominator;
    if (which == RATIO_SYMMETRIC) {
      denominator = absolute(chosen) + absolute(rejected) + T(1) / half_beta;
      ratio = margin / denominator;
    } else if (which == RATIO_ABS) {
      denominator = absolute(rejected) + absolute(eps);
      ratio = margin / denominator;
    } else {
      denominator = rejected + eps;
      const auto at_pole = denominator == T(0);
      denominator = select(at_pole, T(1), denominator);
      ratio = select(at_pole, sign(margin) * limit, margin / denominator);
    }
    if (slopes) {
      const T inverse = T(1) / denominator;
      if (which == RATIO_SYMMETRIC) {
        by_chosen = (T(1) - ratio * sign(chosen)) * inverse;
        by_rejected = (T(-1) - ratio * sign(rejected)) * inverse;
      } else if (which == RATIO_ABS) {
        by_chosen = inverse;
        by_rejected = (T(-1) - ratio * sign(rejected)) * inverse;
      } else {
        const auto at_pole = rejected + eps == T(0);
        by_chosen = select(at_pole, T(0), inverse);
        by_rejected = select(at_pole, T(0), (T(-1) - ratio) * inverse);
      }
    }
  }
  if (slopes) {
    const auto inside = absolute(ratio) <= limit;
    by_chosen = select(inside, by_chosen, T(0));
    by_rejected = select(inside, by_rejected, T(0));
  }
  return clamp(ratio, T(0) - limit, limit);
}

// PG-DPO's weights of a group: alpha and gamma with what they leave of 1, and the derivatives of rho.
template <class T>
struct Weights {
  T alpha, alpha_complement, gamma, complement, by_chosen, by_rejected;
};

template <class T>
PGDPO_HD void pgdpo_weights(int flags, const scalar_of<T>* parameters, const Errors<T>& errors, Weights<T>& out) {
  const bool regularized = flags & (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR);
  out.alpha = out.gamma = T(1);
  out.alpha_complement = out.complement = out.by_chosen = out.by_rejected = T(0);
  const T ratio = ratio_and_slopes((flags >> FLAG_RATIO_SHIFT) & 3, flags & FLAG_ATTACHED, errors.gap_chosen,
                                   errors.gap_rejected, T(parameters[PARAMETER_HALF_BETA]),
                                   T(parameters[PARAMETER_EPS]), out.by_chosen, out.by_rejected);
  if (regularized) {
    const Sigmoids<T> switched(T(parameters[PARAMETER_K2]) * ratio);
    out.complement = switched.up;
    out.gamma = switched.down;
  }
  if (flags & FLAG_ARS) {
    if (regularized && (flags & FLAG_ONE_SIGMOID)) {
      out.alpha = out.complement;
      out.alpha_complement = out.gamma;
    } else {
      const Sigmoids<T> scaled(T(parameters[PARAMETER_K1]) * ratio);
      out.alpha = scaled.up;
      out.alpha_complement = scaled.down;
    }
  }
}

// Safeguarded's factor of the rejected gradient, from a group's errors or, times anything, the batch's.
template <class T>
PGDPO_HD T safeguard(const scalar_of<T>* parameters, T chosen, T cross) {
  const auto conflict = cross > T(0);
  const T bound = (T(1) - T(parameters[PARAMETER_MU])) * chosen / select(conflict, cross, T(1));
  return select(conflict, clamp(bound, T(0), T(1)), T(1));
}

// The weight of importance-weighted objectives.
template <class T>
PGDPO_HD T importance_of(const scalar_of<T>* parameters, const Errors<T>& errors) {
  const T raw = exponential(T(-0.5) * errors.posterior_scale * (errors.policy_chosen + errors.policy_rejected));
  const T clip = T(parameters[PARAMETER_CLIP]);
  return select(raw < T(parameters[PARAMETER_THRESHOLD]), T(0), clamp(raw, T(1) - clip, T(1) + clip));
}

// The logits z of the objectives whose loss is made of log sigmoid(z); alpha is PG-DPO's.
template <class T>
PGDPO_HD T preference_logits(int kind, int flags, const scalar_of<T>* parameters, const Errors<T>& errors, T alpha) {
  const T d_w = errors.gap_chosen, d_l = errors.gap_rejected;
  T margin = d_l - d_w;
  if (kind == KIND_PGDPO) margin = alpha * d_l - d_w;
  if (kind == KIND_DPO_SHIFT) margin = T(parameters[PARAMETER_SHIFT]) * d_l - d_w;
  if (kind == KIND_DPOP) margin = margin - T(parameters[PARAMETER_PENALTY]) * select(d_w < T(0), T(0), d_w);
  const T logits = T(parameters[PARAMETER_HALF_BETA]) * margin;
  return flags & FLAG_INSIDE ? importance_of<T>(parameters, errors) * logits : logits;
}

// Those objectives halfway: PG-DPO's weights, z and exp(-|z|).
template <class T>
struct Halfway {
  Weights<T> weights;
  T logits, decay;
};

// Runs one group through the objective. `parameters` are the PARAMETERS numbers of Epilogue.parameters;
// `halfway`, where given, has been computed before.
template <class T>
PGDPO_HD Terms<T> objective(int kind, int flags, const scalar_of<T>* parameters, const Errors<T>& errors,
                            const Outer<T>* outer = nullptr, const Halfway<T>* halfway = nullptr) {
  const T zero = T(0), one = T(1), half = T(0.5);
  const T half_beta = T(parameters[PARAMETER_HALF_BETA]);
  const T d_w = errors.gap_chosen, d_l = errors.gap_rejected;
  Terms<T> out{zero, zero, one, one, one, zero, zero, zero, zero, zero, zero};
  if (kind == KIND_SFT) {
    out.loss = errors.policy_chosen;
    out.by_chosen = one;
  } else if (kind == KIND_SLIC || kind == KIND_HINGE) {
    const T weight = half * T(parameters[PARAMETER_WEIGHT]);
    const T slope = kind == KIND_SLIC ? half : half_beta;
    out.logits = kind == KIND_SLIC ? half * (errors.policy_rejected - errors.policy_chosen) : half_beta * (d_l - d_w);
    const T hinge = T(parameters[PARAMETER_DELTA]) - out.logits;
    const T active = select(hinge >= zero, slope, zero);
    out.loss = select(hinge < zero, zero, hinge) + weight * errors.policy_chosen;
    out.by_chosen = active + weight;
    out.by_rejected = zero - active;
  } else if (kind == KIND_IPO) {
    const T off_target = half * (d_l - d_w) - T(parameters[PARAMETER_TARGET]);
    out.logits = half_beta * (d_l - d_w);
    out.loss = off_target * off_target;
    out.by_chosen = zero - off_target;
    out.by_rejected = off_target;
  } else {
    Halfway<T> start{{one, zero, one, zero, zero, zero}, zero, zero};
    if (halfway != nullptr) {
      start = *halfway;
    } else {
      if (kind == KIND_PGDPO) pgdpo_weights<T>(flags, parameters, errors, start.weights);
      start.logits = preference_logits<T>(kind, flags, parameters, errors, start.weights.alpha);
      start.decay = exp_minus_absolute(start.logits);
    }
    const Logistic<T> preferred(start.logits, start.decay);
    out.logits = start.logits;
    T slope = half_beta * preferred.down;
    if (kind == KIND_PGDPO) {
      const bool ars = flags & FLAG_ARS, regularized = flags & (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR);
      const T k1 = T(parameters[PARAMETER_K1]), k2 = T(parameters[PARAMETER_K2]);
      const T scale = T(parameters[PARAMETER_IPR_SCALE]);
      const Weights<T>& weights = start.weights;
      out.alpha = weights.alpha;
      out.gamma = weights.gamma;
      out.complement = weights.complement;
      out.preference = preferred.softplus_minus();
      out.loss = out.gamma * out.preference;
      if (regularized) {
        out.implicit = flags & FLAG_IPR_REWARD ? d_w : errors.anchor;
        out.loss = out.loss + scale * out.complement * out.implicit;
      }
      const bool averaged = outer != nullptr && regularized;
      const Outer<T> mean = averaged ? *outer : Outer<T>{out.gamma, out.preference, out.complement, out.implicit};
      slope = mean.gamma * slope;
      out.by_chosen = slope;
      out.by_rejected = zero - slope * out.alpha;
      if (flags & FLAG_IPR_REWARD) out.by_chosen = out.by_chosen + scale * mean.complement;
      if (flags & FLAG_IPR_ANCHOR) out.by_anchor = scale * mean.complement;
      if (flags & FLAG_ATTACHED) {
        T by_ratio = zero;
        if (ars) by_ratio = zero - slope * d_l * (k1 * out.alpha * weights.alpha_complement);
        if (regularized)
          by_ratio = by_ratio - k2 * out.gamma * out.complement * (mean.preference - scale * mean.implicit);
        out.by_chosen = out.by_chosen - by_ratio * weights.by_chosen;
        out.by_rejected = out.by_rejected - by_ratio * weights.by_rejected;
      }
    } else if (kind == KIND_DPOP) {
      out.loss = preferred.softplus_minus();
      out.by_chosen = slope * (one + select(d_w < zero, zero, T(parameters[PARAMETER_PENALTY])));
      out.by_rejected = zero - slope;
    } else if (kind == KIND_DPO_SHIFT) {
      out.alpha = T(parameters[PARAMETER_SHIFT]);
      out.loss = preferred.softplus_minus();
      out.by_chosen = slope;
      out.by_rejected = zero - slope * out.alpha;
    } else {
      const T smoothing = T(parameters[PARAMETER_LABEL_SMOOTHING]);
      out.loss = preferred.softplus_minus();
      if (parameters[PARAMETER_LABEL_SMOOTHING] != 0) {
        out.loss = (one - smoothing) * out.loss + smoothing * preferred.softplus_plus();
        slope = half_beta * ((one - smoothing) * preferred.down - smoothing * preferred.up);
      }
      if (flags & FLAG_IMPORTANCE) {
        out.importance = importance_of<T>(parameters, errors);
        if (!(flags & FLAG_INSIDE)) out.loss = out.importance * out.loss;
        slope = out.importance * slope;
      }
      out.by_chosen = slope;
      out.by_rejected = zero - slope;
    }
  }
  if (flags & FLAG_SAFEGUARD)
    out.by_rejected = out.by_rejected * safeguard<T>(parameters, errors.policy_chosen, errors.cross);
  return out;
}

}  // namespace PGDPO_ISA
}  // namespace pgdpo
