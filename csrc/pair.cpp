// Compiled once per instruction set, with PGDPO_ISA naming it; see pair.h.
#include "pair.h"

#include <type_traits>

#include "epilogue.h"
#include "vector.h"

namespace pgdpo {
inline namespace PGDPO_ISA {
namespace {

constexpr int MIXED = -1;  // storage types differ between operands: decided per load instead of per pass
constexpr int FLUSH = 32;  // vectors added in the working precision before they move on to double

int64_t size_of(int dtype) {
  switch (dtype) {
    case FLOAT8:
      return 1;
    case BFLOAT16:
    case FLOAT16:
      return 2;
    case FLOAT32:
      return 4;
    default:
      return 8;
  }
}

template <bool WHOLE, class S>
PGDPO_INLINE void put(int dtype, char* to, int i, int lanes, Vec<S> x) {
  WHOLE ? store<S>(dtype, to, i, x) : store_lanes<S>(dtype, to, i, lanes, x);
}

template <class Any>
auto row_start(const Any& rows, int64_t pair, int64_t element) {
  return rows.data == nullptr ? rows.data : rows.data + (pair * rows.stride + element) * size_of(rows.dtype);
}

// Where a chunk lies.
struct Chunk {
  int64_t pair, segment, start;
  int count;

  Chunk(const Pair& x, int64_t index) : pair(index / x.segments), segment(index % x.segments) {
    start = segment * x.length;
    count = int(x.numel - start < x.length ? x.numel - start : x.length);
  }
};

// Differences of one vector of elements: p - y, and with a reference p - q and p + q - 2y. The gap is the product of the
// last two, which keeps its relative accuracy where policy and reference nearly agree.
template <class V>
struct Differences {
  V u_w, u_l, minus_w, minus_l, plus_w, plus_l;
};

template <class S, int D>
struct Reader {
  using V = Vec<S>;
  const char *policy[2], *target[2], *reference[2], *scale[2], *noise;
  int policy_dtype, target_dtype, reference_dtype, scale_dtype, noise_dtype, form, phase;
  bool shared;
  V noise_scale, clean_scale;

  Reader(const Pair& x, const Chunk& at, bool with_reference) {
    for (int side = 0; side < 2; ++side) {
      policy[side] = row_start(x.policy[side], at.pair, at.start);
      target[side] = row_start(x.target[side], at.pair, at.start);
      reference[side] = row_start(x.reference[side], at.pair, at.start);
      scale[side] = row_start(x.reference_scale[side], at.pair, at.start / PACK_BLOCK);
    }
    noise = row_start(x.noise, at.pair, at.start);
    policy_dtype = x.policy[0].dtype;
    target_dtype = x.target[0].dtype;
    reference_dtype = x.reference[0].dtype;
    scale_dtype = x.reference_scale[0].dtype;
    noise_dtype = x.noise.dtype;
    form = with_reference ? x.reference_form : int(REFERENCE_NONE);
    phase = int(at.start % PACK_BLOCK);
    shared = x.shared_target;
    if (noise != nullptr) {
      noise_scale = V(decode<S>(x.target_scale.dtype, x.target_scale.data, at.pair));
      clean_scale = V(decode<S>(x.target_scale.dtype, x.target_scale.data, x.target_scale.stride + at.pair));
    }
  }

  template <bool WHOLE>
  PGDPO_INLINE V fetch(int dtype, const char* from, int i, int lanes) const {
    const int known = D == MIXED ? dtype : D;
    return WHOLE ? load<S>(known, from, i) : load_lanes<S>(known, from, i, lanes);
  }

  // Residual q - y of a packed reference. The product is rounded to float, as when it was packed.
  template <bool WHOLE>
  PGDPO_INLINE V residual(int side, int i, int lanes) const {
    if (form == REFERENCE_BFLOAT16)
      return WHOLE ? load<S>(BFLOAT16, reference[side], i) : load_lanes<S>(BFLOAT16, reference[side], i, lanes);
    const int first = (phase + i) / PACK_BLOCK;
    if constexpr (WHOLE && sizeof(S) == 4) {
      if (first == (phase + i + V::width - 1) / PACK_BLOCK)
        return load_float8(reference[side], i) * V(decode<float>(scale_dtype, scale[side], first));
    }
    typename V::Value out = {};
    for (int lane = 0; lane < lanes; ++lane) {
      const float factor = decode<float>(scale_dtype, scale[side], (phase + i + lane) / PACK_BLOCK);
      out[lane] = S(decode_float8(uint8_t(reference[side][i + lane])) * factor);
    }
    return V(out);
  }

  template <bool WHOLE>
  PGDPO_INLINE Differences<V> read(int i, int lanes) const {
    Differences<V> d;
    V y_w = fetch<WHOLE>(target_dtype, target[0], i, lanes);
    V y_l = shared ? y_w : fetch<WHOLE>(target_dtype, target[1], i, lanes);
    if (noise != nullptr) {
      const V scaled = noise_scale * fetch<WHOLE>(noise_dtype, noise, i, lanes);
      y_w = scaled + clean_scale * y_w;
      y_l = scaled + clean_scale * y_l;
    }
    const V p_w = fetch<WHOLE>(policy_dtype, policy[0], i, lanes);
    const V p_l = fetch<WHOLE>(policy_dtype, policy[1], i, lanes);
    d.u_w = p_w - y_w;
    d.u_l = p_l - y_l;
    d.minus_w = d.minus_l = d.plus_w = d.plus_l = V(S(0));
    if (form == REFERENCE_PREDICTION) {
      const V q_w = fetch<WHOLE>(reference_dtype, reference[0], i, lanes);
      const V q_l = fetch<WHOLE>(reference_dtype, reference[1], i, lanes);
      d.minus_w = p_w - q_w;
      d.minus_l = p_l - q_l;
      d.plus_w = d.u_w + (q_w - y_w);
      d.plus_l = d.u_l + (q_l - y_l);
    } else if (form != REFERENCE_NONE) {
      const V r_w = residual<WHOLE>(0, i, lanes), r_l = residual<WHOLE>(1, i, lanes);
      d.minus_w = d.u_w - r_w;
      d.minus_l = d.u_l - r_l;
      d.plus_w = d.u_w + r_w;
      d.plus_l = d.u_l + r_l;
    }
    return d;
  }
};

// PLANES running sums: FLUSH vectors in the working precision, the rest in double.
template <class S, int PLANES>
struct Sums {
  using V = Vec<S>;
  double wide[PLANES][V::width] = {};

  PGDPO_INLINE void flush(V (&narrow)[PLANES]) {
    for (int k = 0; k < PLANES; ++k) {
      S lanes[V::width];  // indexing narrow itself would keep it out of registers
      memcpy(lanes, &narrow[k].v, sizeof(lanes));
      for (int lane = 0; lane < V::width; ++lane) wide[k][lane] += double(lanes[lane]);
      narrow[k] = V(S(0));
    }
  }
  void write(double* out, int64_t plane) const {
    for (int k = 0; k < PLANES; ++k) {
      double total = 0;
      for (int lane = 0; lane < V::width; ++lane) total += wide[k][lane];
      out[k * plane] = total;
    }
  }
};

// body(whole, i, lanes) over the vectors of a chunk; between(): after every FLUSH of them and at the end.
template <class V, class Body, class Between>
PGDPO_INLINE void over_vectors(int count, const Body& body, const Between& between) {
  const int whole = count / V::width * V::width;
  for (int i = 0; i < whole;) {
    const int stop = whole - i < FLUSH * V::width ? whole : i + FLUSH * V::width;
    for (; i < stop; i += V::width) body(std::true_type{}, i, V::width);
    between();
  }
  if (whole < count) {
    body(std::false_type{}, whole, count - whole);
    between();
  }
}

template <class S, int D>
void errors(const Pair& x, bool anchor, bool cross, double* sums, int64_t begin, int64_t end) {
  using V = Vec<S>;
  for (int64_t c = begin; c < end; ++c) {
    const Chunk at(x, c);
    const Reader<S, D> reader(x, at, true);
    Sums<S, STATISTICS> totals;
    V part[STATISTICS];
    for (V& p : part) p = V(S(0));
    over_vectors<V>(
        at.count,
        [&](auto whole, int i, int lanes) __attribute__((always_inline)) {
          const Differences<V> d = reader.template read<decltype(whole)::value>(i, lanes);
          part[0] = part[0] + d.u_w * d.u_w;
          part[1] = part[1] + d.u_l * d.u_l;
          part[2] = part[2] + d.minus_w * d.plus_w;
          part[3] = part[3] + d.minus_l * d.plus_l;
          if (anchor) part[4] = part[4] + d.minus_w * d.minus_w;
          if (cross) part[5] = part[5] + d.u_w * d.u_l;
        },
        [&]() __attribute__((always_inline)) { totals.flush(part); });
    totals.write(sums + c, x.pairs * x.segments);
  }
}

template <class S, int D>
void gradients(const Pair& x, bool anchor, const double* coefficients, const MutableRows gradient[2], int64_t begin,
               int64_t end) {
  using V = Vec<S>;
  const int64_t rows = x.pairs * x.groups;
  const int dtype = D == MIXED ? gradient[0].dtype : D;
  for (int64_t c = begin; c < end; ++c) {
    const Chunk at(x, c);
    const Reader<S, D> reader(x, at, anchor);
    const double* row = coefficients + at.pair * x.groups + at.segment % x.groups;
    const V c_w = S(row[0]), c_l = S(row[rows]), c_anchor = S(row[2 * rows]);
    char* out[2] = {row_start(gradient[0], at.pair, at.start), row_start(gradient[1], at.pair, at.start)};
    over_vectors<V>(
        at.count,
        [&](auto whole, int i, int lanes) __attribute__((always_inline)) {
          const Differences<V> d = reader.template read<decltype(whole)::value>(i, lanes);
          V g_w = c_w * d.u_w;
          if (anchor) g_w = g_w + c_anchor * d.minus_w;
          put<decltype(whole)::value>(dtype, out[0], i, lanes, g_w);
          put<decltype(whole)::value>(dtype, out[1], i, lanes, c_l * d.u_l);
        },
        []() __attribute__((always_inline)) {});
  }
}

template <class S, int D>
void elements(const Pair& x, const Elements& call, int64_t begin, int64_t end) {
  using V = Vec<S>;
  S parameters[PARAMETERS];
  for (int k = 0; k < PARAMETERS; ++k) parameters[k] = S(call.parameters[k]);
  const int dtype = D == MIXED ? call.gradient[0].dtype : D;
  const bool with_gradients = call.scale != nullptr, with_sums = call.sums != nullptr;
  V numbers;
  for (int lane = 0; lane < V::width; ++lane) numbers.v[lane] = S(lane);
  for (int64_t c = begin; c < end; ++c) {
    const Chunk at(x, c);
    const Reader<S, D> reader(x, at, true);
    const V scale = with_gradients ? S(call.scale[at.pair]) : S(0);
    const V posterior_scale = call.posterior_scale ? S(call.posterior_scale[at.pair]) : S(0);
    Outer<V> outer;
    const bool from_means = call.outer && with_gradients;
    if (from_means) {
      const double* mean = call.means + at.pair;
      outer = {V(S(mean[0])), V(S(mean[x.pairs])), V(S(mean[2 * x.pairs])), V(S(mean[3 * x.pairs]))};
    }
    char* out[2] = {row_start(call.gradient[0], at.pair, at.start), row_start(call.gradient[1], at.pair, at.start)};
    Sums<S, ELEMENT_SUMS> totals;
    V part[ELEMENT_SUMS];
    for (V& p : part) p = V(S(0));
    over_vectors<V>(
        at.count,
        [&](auto whole, int i, int lanes) __attribute__((always_inline)) {
          constexpr bool WHOLE = decltype(whole)::value;
          const Differences<V> d = reader.template read<WHOLE>(i, lanes);
          const Errors<V> e{d.u_w * d.u_w,         d.u_l * d.u_l, d.minus_w * d.plus_w, d.minus_l * d.plus_l,
                            d.minus_w * d.minus_w, d.u_w * d.u_l, posterior_scale};
          const Terms<V> t = objective<V>(call.kind, call.flags, parameters, e, from_means ? &outer : nullptr);
          if (with_gradients) {
            put<WHOLE>(dtype, out[0], i, lanes, scale * (t.by_chosen * d.u_w + t.by_anchor * d.minus_w));
            put<WHOLE>(dtype, out[1], i, lanes, scale * (t.by_rejected * d.u_l));
          }
          if (with_sums) {
            const V terms[ELEMENT_SUMS] = {call.outer ? t.preference : t.loss,
                                           t.logits,
                                           t.alpha,
                                           t.gamma,
                                           t.importance,
                                           e.policy_chosen,
                                           e.policy_rejected,
                                           e.gap_chosen,
                                           e.gap_rejected,
                                           t.complement,
                                           t.implicit};
            for (int k = 0; k < ELEMENT_SUMS; ++k)
              part[k] = part[k] + (WHOLE ? terms[k] : select(numbers < V(S(lanes)), terms[k], V(S(0))));
          }
        },
        [&]() __attribute__((always_inline)) { totals.flush(part); });
    if (with_sums) totals.write(call.sums + c, x.pairs * x.segments);
  }
}

// The storage type all operands of a pass share, or MIXED.
int common_storage(const Pair& x, bool with_reference, const MutableRows* gradient) {
  const int dtype = x.policy[0].dtype;
  const bool same = x.target[0].dtype == dtype && (!x.built_target || x.noise.dtype == dtype) &&
                    (!with_reference || x.reference_form != REFERENCE_PREDICTION || x.reference[0].dtype == dtype) &&
                    (gradient == nullptr || gradient[0].data == nullptr || gradient[0].dtype == dtype);
  return same ? dtype : MIXED;
}

// run(storage) with the storage types that have a pass of their own in float as compile-time constants.
template <class S, class Run>
void specialised(int storage, const Run& run) {
  if (sizeof(S) == 4 && storage == BFLOAT16)
    run(std::integral_constant<int, BFLOAT16>{});
  else if (sizeof(S) == 4 && storage == FLOAT32)
    run(std::integral_constant<int, FLOAT32>{});
  else
    run(std::integral_constant<int, MIXED>{});
}

template <class S>
void run_errors(const Pair& x, bool anchor, bool cross, double* sums, int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, true, nullptr), [&](auto storage) {
    errors<S, decltype(storage)::value>(x, anchor, cross, sums, begin, end);
  });
}

template <class S>
void run_gradients(const Pair& x, bool anchor, const double* coefficients, const MutableRows gradient[2], int64_t begin,
                   int64_t end) {
  specialised<S>(common_storage(x, anchor, gradient), [&](auto storage) {
    gradients<S, decltype(storage)::value>(x, anchor, coefficients, gradient, begin, end);
  });
}

template <class S>
void run_elements(const Pair& x, const Elements& call, int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, true, call.gradient), [&](auto storage) {
    elements<S, decltype(storage)::value>(x, call, begin, end);
  });
}

#define PGDPO_STRING(x) #x
#define PGDPO_NAME(x) PGDPO_STRING(x)

template <class S>
constexpr Passes PASSES = {PGDPO_NAME(PGDPO_ISA), run_errors<S>, run_gradients<S>, run_elements<S>};

}  // namespace

const Passes& passes(bool float64) { return float64 ? PASSES<double> : PASSES<float>; }

}  // namespace PGDPO_ISA
}  // namespace pgdpo
