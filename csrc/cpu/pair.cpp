// Compiled once per instruction set, with PGDPO_ISA naming it; see pair.h.
#include "pair.h"

#include <initializer_list>
#include <type_traits>

#include "cache.h"
#include "cpu/vector.h"
#include "epilogue.h"

namespace pgdpo {
inline namespace PGDPO_ISA {
namespace {

constexpr int MIXED = -1;     // storage types differ between operands: decided per load instead of per pass
constexpr int WEIGHTED = -2;  // the same, and elements have weights
constexpr int FLUSH = 2048;   // elements added up in the working precision before the sums move on to double
constexpr int BLOCK = 128;    // elements between two prefetches, and held between the stages of an element pass
constexpr int AHEAD = 2048;   // bytes of every operand a prefetch runs ahead
constexpr int64_t SECOND_LEVEL = int64_t(3)
                                 << 19;  // bytes of operands that a second-level cache keeps for the next pass
constexpr int64_t BEYOND_CACHE = int64_t(4) << 20;  // bytes of gradients from which on they are written past the caches

template <class I>
I lesser(I a, I b) {
  return a < b ? a : b;
}

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

// Writes a vector's bytes without fetching what they replace into the caches; `to` is aligned to 16 bytes.
template <class Bytes>
PGDPO_INLINE void write_past_caches(char* to, const Bytes& bytes) {
#if defined(__x86_64__)
  static_assert(sizeof(Bytes) % 16 == 0, "whole units");
  for (size_t at = 0; at < sizeof(Bytes); at += 16) {
    __m128i unit;
    memcpy(&unit, reinterpret_cast<const char*>(&bytes) + at, 16);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), unit);
  }
#else
  memcpy(to, &bytes, sizeof(Bytes));
#endif
}

template <bool WHOLE, class S>
PGDPO_INLINE void put(int dtype, char* to, int i, int lanes, Vec<S> x, bool past_caches = false) {
  if constexpr (WHOLE && sizeof(S) == 4)
    if (dtype == FLOAT32 && past_caches) return write_past_caches(to + 4 * i, x.v);
  WHOLE ? store<S>(dtype, to, i, x) : store_lanes<S>(dtype, to, i, lanes, x);
}

template <class S>
PGDPO_INLINE void put_split(char* to, int i, Vec<S> even, Vec<S> odd, bool past_caches = false) {
  if constexpr (sizeof(S) == 4) {
    const auto words = split_words(even, odd);
    if (past_caches) return write_past_caches(to + 2 * i, words);
    memcpy(to + 2 * i, &words, sizeof(words));
  }
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

// Differences of one vector of elements: p - y, and with a reference p - q and p + q - 2y. The gap is the product of
// the last two, which keeps its relative accuracy where policy and reference nearly agree.
template <class V>
struct Differences {
  V u_w, u_l, minus_w, minus_l, plus_w, plus_l;
  V weight;  // of WEIGHTED passes
};

// body(whole, i, lanes) over the vectors of elements [begin, end); lanes < width in the last one alone.
template <class V, class Body>
PGDPO_INLINE void over_vectors(int begin, int end, const Body& body) {
  int i = begin;
  for (; i + V::width <= end; i += V::width) body(std::true_type{}, i, V::width);
  if (i < end) body(std::false_type{}, i, end - i);
}

// One vector of every operand; reference holds predictions or residuals.
template <class V>
struct Operand {
  V policy[2], target[2], reference[2], noise;
};

template <class S, int D>
struct Reader {
  using V = Vec<S>;
  const char *policy[2], *target[2], *reference[2], *scale[2], *noise;
  int policy_dtype, target_dtype, reference_dtype, scale_dtype, noise_dtype, form, phase;
  bool shared;
  V noise_scale, clean_scale;
  const S* weight_row;
  int64_t weight_length, weight_span, start;
  alignas(64) S weights[D == WEIGHTED ? BLOCK : 1];  // of the block at hand, zeros past the end

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
    if constexpr (D == WEIGHTED) {
      weight_row = reinterpret_cast<const S*>(row_start(x.latent_weight, at.pair, 0));
      weight_length = x.weight_length;
      weight_span = x.weight_span;
      start = at.start;
    }
  }

  // To be called before the BLOCK elements from `first` on, a multiple of BLOCK, are read up to `end`.
  PGDPO_INLINE void begin_block(int first, int end) {
    prefetch(first);
    if constexpr (D == WEIGHTED) {
      const int count = lesser(BLOCK, end - first);
      for (int i = 0; i < count;) {
        const int64_t at = start + first + i, inside = at % weight_length;
        const int run = int(lesser<int64_t>(count - i, weight_length - inside));
        memcpy(weights + i, weight_row + at / weight_span * weight_length + inside, run * sizeof(S));
        i += run;
      }
      for (int i = count; i < BLOCK; ++i) weights[i] = S(0);
    }
  }

  // The storage type of an operand, at compile time where all share one; residuals have their own.
  static PGDPO_INLINE int known(int dtype) { return D < 0 ? dtype : D; }

  // Asks for the BLOCK elements AHEAD bytes after element i of every operand: the hardware follows too few streams at
  // once and stops at every page. Past the end of a chunk lies the next one; past the end of the memory nothing
  // happens.
  PGDPO_INLINE void prefetch(int i) const {
    for (int side = 0; side < 2; ++side) {
      prefetch(known(policy_dtype), policy[side], i);
      if (side == 0 || !shared) prefetch(known(target_dtype), target[side], i);
      if (form == REFERENCE_PREDICTION)
        prefetch(known(reference_dtype), reference[side], i);
      else if (form != REFERENCE_NONE)
        prefetch(reference_dtype, reference[side], i);
    }
    if (noise != nullptr) prefetch(known(noise_dtype), noise, i);
  }
  static PGDPO_INLINE void prefetch(int dtype, const char* from, int i) {
    const int64_t size = size_of(dtype);
    for (int64_t line = 0; line < BLOCK * size; line += 64) __builtin_prefetch(from + i * size + AHEAD + line);
  }

  template <bool WHOLE>
  PGDPO_INLINE V fetch(int dtype, const char* from, int i, int lanes) const {
    return WHOLE ? load<S>(known(dtype), from, i) : load_lanes<S>(known(dtype), from, i, lanes);
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
    Operand<V> x;
    x.target[0] = fetch<WHOLE>(target_dtype, target[0], i, lanes);
    x.target[1] = shared ? x.target[0] : fetch<WHOLE>(target_dtype, target[1], i, lanes);
    if (noise != nullptr) x.noise = fetch<WHOLE>(noise_dtype, noise, i, lanes);
    x.policy[0] = fetch<WHOLE>(policy_dtype, policy[0], i, lanes);
    x.policy[1] = fetch<WHOLE>(policy_dtype, policy[1], i, lanes);
    if (form == REFERENCE_PREDICTION) {
      x.reference[0] = fetch<WHOLE>(reference_dtype, reference[0], i, lanes);
      x.reference[1] = fetch<WHOLE>(reference_dtype, reference[1], i, lanes);
    } else if (form != REFERENCE_NONE) {
      x.reference[0] = residual<WHOLE>(0, i, lanes);
      x.reference[1] = residual<WHOLE>(1, i, lanes);
    }
    Differences<V> d = differences(x);
    if constexpr (D == WEIGHTED) {
      d.weight = V::at(weights + i % BLOCK);
      const auto unweighted = d.weight == V(S(0));
      for (V* x : {&d.u_w, &d.u_l, &d.minus_w, &d.minus_l, &d.plus_w, &d.plus_l}) *x = select(unweighted, V(S(0)), *x);
    }
    return d;
  }

  // The even and the odd ones of twice as many elements, for bfloat16 alone.
  PGDPO_INLINE void read_split(int i, Differences<V>& even, Differences<V>& odd) const {
    Operand<V> x, y;
    for (int side = 0; side < 2; ++side) {
      load_split(policy[side], i, x.policy[side], y.policy[side]);
      load_split(target[side], i, x.target[side], y.target[side]);
      if (form != REFERENCE_NONE) load_split(reference[side], i, x.reference[side], y.reference[side]);
    }
    if (noise != nullptr) load_split(noise, i, x.noise, y.noise);
    even = differences(x);
    odd = differences(y);
  }

  // two(even, odd, i) over pairs of vectors from element i on where bfloat16 can be read so, then one(whole,
  // differences, i, lanes) over the vectors left, zeros past the end. Returns where the second took over.
  template <class Two, class One>
  PGDPO_INLINE int over(int begin, int end, const Two& two, const One& one) const {
    int i = begin;
    if constexpr (D == BFLOAT16)
      if (form != REFERENCE_FLOAT8)
        for (; i + 2 * V::width <= end; i += 2 * V::width) {
          Differences<V> even, odd;
          read_split(i, even, odd);
          two(even, odd, i);
        }
    over_vectors<V>(i, end, [&](auto whole, int i, int lanes) PGDPO_LAMBDA {
      one(whole, read<decltype(whole)::value>(i, lanes), i, lanes);
    });
    return i;
  }

  PGDPO_INLINE Differences<V> differences(const Operand<V>& x) const {
    V y_w = x.target[0], y_l = x.target[1];
    if (noise != nullptr) {
      const V scaled = noise_scale * x.noise;
      y_w = scaled + clean_scale * y_w;
      y_l = scaled + clean_scale * y_l;
    }
    Differences<V> d;
    d.u_w = x.policy[0] - y_w;
    d.u_l = x.policy[1] - y_l;
    d.minus_w = d.minus_l = d.plus_w = d.plus_l = V(S(0));
    if (form == REFERENCE_PREDICTION) {
      d.minus_w = x.policy[0] - x.reference[0];
      d.minus_l = x.policy[1] - x.reference[1];
      d.plus_w = d.u_w + (x.reference[0] - y_w);
      d.plus_l = d.u_l + (x.reference[1] - y_l);
    } else if (form != REFERENCE_NONE) {
      d.minus_w = d.u_w - x.reference[0];
      d.minus_l = d.u_l - x.reference[1];
      d.plus_w = d.u_w + x.reference[0];
      d.plus_l = d.u_l + x.reference[1];
    }
    return d;
  }
};

// x times the weight of its elements, in WEIGHTED passes.
template <int D, class V>
PGDPO_INLINE V weighted(const Differences<V>& d, V x) {
  if constexpr (D == WEIGHTED) return d.weight * x;
  return x;
}

// PLANES running sums: up to FLUSH elements in the working precision, the rest in double.
template <class V, int PLANES>
struct Sums {
  using S = scalar_of<V>;
  V narrow[PLANES];
  double wide[PLANES][V::width] = {};

  Sums() {
    for (V& plane : narrow) plane = V(S(0));
  }
  void flush() {
    for (int k = 0; k < PLANES; ++k) {
      S lanes[V::width];
      narrow[k].to(lanes);
      for (int lane = 0; lane < V::width; ++lane) wide[k][lane] += double(lanes[lane]);
      narrow[k] = V(S(0));
    }
  }
  // Plane k goes to out[planes[k] * stride].
  void write(double* out, const int (&planes)[PLANES], int64_t stride) {
    flush();
    for (int k = 0; k < PLANES; ++k) {
      double total = 0;
      for (int lane = 0; lane < V::width; ++lane) total += wide[k][lane];
      out[planes[k] * stride] = total;
    }
  }
};

template <class S, int D>
void errors(const Pair& x, Wishes wanted, double* sums, int64_t begin, int64_t end) {
  using V = Vec<S>;
  for (int64_t c = begin; c < end; ++c) {
    const Chunk at(x, c);
    Reader<S, D> reader(x, at, true);
    Sums<V, STATISTICS> totals;
    for (int first = 0; first < at.count; first += BLOCK) {
      reader.begin_block(first, at.count);
      V part[STATISTICS];
      memcpy(part, totals.narrow, sizeof(part));
      const auto add = [&](const Differences<V>& d) PGDPO_LAMBDA {
        const V u_w = weighted<D>(d, d.u_w), u_l = weighted<D>(d, d.u_l);
        const V minus_w = weighted<D>(d, d.minus_w), minus_l = weighted<D>(d, d.minus_l);
        part[STATISTIC_POLICY_CHOSEN] = part[STATISTIC_POLICY_CHOSEN] + u_w * d.u_w;
        part[STATISTIC_POLICY_REJECTED] = part[STATISTIC_POLICY_REJECTED] + u_l * d.u_l;
        part[STATISTIC_GAP_CHOSEN] = part[STATISTIC_GAP_CHOSEN] + minus_w * d.plus_w;
        part[STATISTIC_GAP_REJECTED] = part[STATISTIC_GAP_REJECTED] + minus_l * d.plus_l;
        if (wanted.anchor) part[STATISTIC_ANCHOR] = part[STATISTIC_ANCHOR] + minus_w * d.minus_w;
        if (wanted.cross) part[STATISTIC_CROSS] = part[STATISTIC_CROSS] + u_w * d.u_l;
        if (wanted.anchor_rejected)
          part[STATISTIC_ANCHOR_REJECTED] = part[STATISTIC_ANCHOR_REJECTED] + minus_l * d.minus_l;
      };
      reader.over(
          first, lesser(first + BLOCK, at.count),
          [&](const Differences<V>& even, const Differences<V>& odd, int) PGDPO_LAMBDA { add(even), add(odd); },
          [&](auto, const Differences<V>& d, int, int) PGDPO_LAMBDA { add(d); });
      memcpy(totals.narrow, part, sizeof(part));
      if ((first + BLOCK) % FLUSH == 0) totals.flush();
    }
    totals.write(sums + at.pair * x.segments + x.place(at.segment),
                 {STATISTIC_POLICY_CHOSEN, STATISTIC_POLICY_REJECTED, STATISTIC_GAP_CHOSEN, STATISTIC_GAP_REJECTED,
                  STATISTIC_ANCHOR, STATISTIC_CROSS, STATISTIC_ANCHOR_REJECTED},
                 x.pairs * x.segments);
  }
}

template <class S, int D>
void gradients(const Pair& x, Wishes wanted, const double* coefficients, const MutableRows gradient[2], int64_t begin,
               int64_t end) {
  using V = Vec<S>;
  const int64_t rows = x.pairs * x.groups;
  const int dtype = D < 0 ? gradient[0].dtype : D;
  const bool large = 2 * x.pairs * x.numel * size_of(dtype) >= BEYOND_CACHE;
  // The error pass ended on this thread's last chunks: what the second-level cache still holds of them comes first.
  const int64_t count = end - begin, recent = lesser(count, SECOND_LEVEL / (6 * x.length * size_of(dtype)));
  for (int64_t step = 0; step < count; ++step) {
    const int64_t c = step < recent ? end - recent + step : begin + step - recent;
    const Chunk at(x, c);
    Reader<S, D> reader(x, at, wanted.anchor || wanted.anchor_rejected);
    const double* row = coefficients + at.pair * x.groups + x.group_of(at.segment);
    const V c_w = S(row[COEFFICIENT_CHOSEN * rows]), c_l = S(row[COEFFICIENT_REJECTED * rows]);
    const V c_anchor = S(row[COEFFICIENT_ANCHOR * rows]), c_anchor_l = S(row[COEFFICIENT_ANCHOR_REJECTED * rows]);
    char* out[2] = {row_start(gradient[0], at.pair, at.start), row_start(gradient[1], at.pair, at.start)};
    const bool past = large && uintptr_t(out[0]) % 16 == 0 && uintptr_t(out[1]) % 16 == 0;
    const auto by_chosen = [&](const Differences<V>& d) PGDPO_LAMBDA {
      return weighted<D>(d, wanted.anchor ? c_w * d.u_w + c_anchor * d.minus_w : c_w * d.u_w);
    };
    // An objective that takes no notice of the rejected video must not take its NaN.
    const bool unnoticed = row[COEFFICIENT_REJECTED * rows] == 0;
    const auto by_rejected = [&](const Differences<V>& d) PGDPO_LAMBDA {
      V slope = unnoticed ? V(S(0)) : c_l * d.u_l;
      if (wanted.anchor_rejected) slope = slope + c_anchor_l * d.minus_l;
      return weighted<D>(d, slope);
    };
    for (int first = 0; first < at.count; first += BLOCK) {
      reader.begin_block(first, at.count);
      reader.over(
          first, lesser(first + BLOCK, at.count),
          [&](const Differences<V>& even, const Differences<V>& odd, int i) PGDPO_LAMBDA {
            put_split(out[0], i, by_chosen(even), by_chosen(odd), past);
            put_split(out[1], i, by_rejected(even), by_rejected(odd), past);
          },
          [&](auto whole, const Differences<V>& d, int i, int lanes) PGDPO_LAMBDA {
            put<decltype(whole)::value>(dtype, out[0], i, lanes, by_chosen(d), past);
            put<decltype(whole)::value>(dtype, out[1], i, lanes, by_rejected(d), past);
          });
    }
  }
#if defined(__x86_64__)
  _mm_sfence();  // such writes are in no order with what another thread reads next
#endif
}

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
constexpr int ANY = -1;

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
void run_objective(const Stage<S>& stage, Block<S>& block, int count, Vec<S> (&sums)[OBJECTIVE_SUMS]) {
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
    for (int i = 0; i < count; i += V::width) {
      Weights<V> w;
      pgdpo_weights<V>(flags, stage.parameters, errors_at(i), w);
      w.alpha.to(block.alpha + i);
      w.gamma.to(block.gamma + i);
      w.complement.to(block.complement + i);
    }
  if (cut)
    for (int i = 0; i < count; i += V::width) {
      const V logits = preference_logits<V>(kind, flags, stage.parameters, errors_at(i), V::at(block.alpha + i));
      logits.to(block.logits + i);
      exp_minus_absolute(logits).to(block.decay + i);
    }
  Vec<S> part[OBJECTIVE_SUMS];
  memcpy(part, sums, sizeof(part));
  over_vectors<V>(0, count, [&](auto whole, int i, int lanes) PGDPO_LAMBDA {
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
      const auto kept = [&](V x) PGDPO_LAMBDA {
        if (WITH_WEIGHTS) return V::at(block.weight + i) * x;  // zeros past the end
        return decltype(whole)::value ? x : select(V::ascending() < V(S(lanes)), x, V(S(0)));
      };
      part[OF_LOSS] = part[OF_LOSS] + kept(OUTER ? t.preference : t.loss);
      part[OF_LOGITS] = part[OF_LOGITS] + kept(t.logits);
      part[OF_ALPHA] = part[OF_ALPHA] + kept(t.alpha);
      part[OF_GAMMA] = part[OF_GAMMA] + kept(t.gamma);
      part[OF_IMPORTANCE] = part[OF_IMPORTANCE] + kept(t.importance);
      if (OUTER) part[OF_COMPLEMENT] = part[OF_COMPLEMENT] + kept(t.complement);
      if (OUTER) part[OF_IMPLICIT] = part[OF_IMPLICIT] + kept(t.implicit);
    }
  });
  memcpy(sums, part, sizeof(part));
}

template <class S>
using RunObjective = void (*)(const Stage<S>&, Block<S>&, int, Vec<S> (&)[OBJECTIVE_SUMS]);

#if defined(PGDPO_QUICK_BUILD)
template <class S>
constexpr bool HAS_VERSIONS = false;
#else
template <class S>
constexpr bool HAS_VERSIONS = sizeof(S) == 4;
#endif

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
void run_sum(const Stage<S>* stages, const RunObjective<S>* run, int terms, Block<S>& block, int count,
             Vec<S> (&sums)[OBJECTIVE_SUMS]) {
  using V = Vec<S>;
  alignas(64) S total_w[BLOCK], total_l[BLOCK];
  for (int k = 0; k < terms; ++k) {
    V own[OBJECTIVE_SUMS];
    for (V& plane : own) plane = V(S(0));
    run[k](stages[k], block, count, own);
    sums[OF_LOSS] = sums[OF_LOSS] + V(stages[k].weight) * own[OF_LOSS];
    for (int plane = OF_LOSS + 1; k == 0 && plane < OBJECTIVE_SUMS; ++plane) sums[plane] = sums[plane] + own[plane];
    for (int i = 0; i < count; i += V::width) {
      const V by_chosen = V::at(block.gradient_w + i), by_rejected = V::at(block.gradient_l + i);
      (k == 0 ? by_chosen : V::at(total_w + i) + by_chosen).to(total_w + i);
      (k == 0 ? by_rejected : V::at(total_l + i) + by_rejected).to(total_l + i);
    }
  }
  for (int i = 0; i < count; i += V::width) {
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
  const int dtype = D < 0 ? call.gradient[0].dtype : D;
  Block<S> block{};
  for (int64_t c = begin; c < end; ++c) {
    const Chunk at(x, c);
    Reader<S, D> reader(x, at, true);
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
      const int count = lesser(BLOCK, at.count - first);
      reader.begin_block(first, at.count);
      V part[ERROR_SUMS];
      memcpy(part, errors.narrow, sizeof(part));
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
      const int split = reader.over(
          first, first + count,
          [&](const Differences<V>& even, const Differences<V>& odd, int i) PGDPO_LAMBDA {
            hold(even, i - first);
            hold(odd, i - first + V::width);
          },
          [&](auto, const Differences<V>& d, int i, int) PGDPO_LAMBDA { hold(d, i - first); });
      memcpy(errors.narrow, part, sizeof(part));
      if (plain)
        run[0](stages[0], block, count, terms.narrow);
      else
        run_sum(stages, run, call.terms, block, count, terms.narrow);
      if (with_gradients) {
        const S* gradient[2] = {block.gradient_w, block.gradient_l};
        for (int side = 0; side < 2; ++side) {
          const auto held = [&](int i) PGDPO_LAMBDA { return V::at(gradient[side] + i - first); };
          for (int i = first; i < split; i += 2 * V::width) put_split(out[side], i, held(i), held(i + V::width));
          over_vectors<V>(split, first + count, [&](auto whole, int i, int lanes) PGDPO_LAMBDA {
            put<decltype(whole)::value>(dtype, out[side], i, lanes, held(i));
          });
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

// The storage type all operands of a pass share, or MIXED, or WEIGHTED.
int common_storage(const Pair& x, bool with_reference, const MutableRows* gradient) {
  if (x.latent_weight.data != nullptr) return WEIGHTED;
  const int dtype = x.policy[0].dtype;
  const bool same = x.target[0].dtype == dtype && (!x.built_target || x.noise.dtype == dtype) &&
                    (!with_reference || x.reference_form != REFERENCE_PREDICTION || x.reference[0].dtype == dtype) &&
                    (gradient == nullptr || gradient[0].data == nullptr || gradient[0].dtype == dtype);
  return same ? dtype : MIXED;
}

// run(storage) with the storage types that have a pass of their own in float as compile-time constants.
template <class S, class Run>
void specialised(int storage, const Run& run) {
  if constexpr (HAS_VERSIONS<S>) {
    if (storage == BFLOAT16) return run(std::integral_constant<int, BFLOAT16>{});
    if (storage == FLOAT32) return run(std::integral_constant<int, FLOAT32>{});
  }
  if (storage == WEIGHTED) return run(std::integral_constant<int, WEIGHTED>{});
  run(std::integral_constant<int, MIXED>{});
}

template <class S>
void run_errors(const Pair& x, Wishes wanted, double* sums, int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, true, nullptr),
                 [&](auto storage) { errors<S, decltype(storage)::value>(x, wanted, sums, begin, end); });
}

template <class S>
void run_gradients(const Pair& x, Wishes wanted, const double* coefficients, const MutableRows gradient[2],
                   int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, wanted.anchor || wanted.anchor_rejected, gradient), [&](auto storage) {
    gradients<S, decltype(storage)::value>(x, wanted, coefficients, gradient, begin, end);
  });
}

template <class S>
void run_elements(const Pair& x, const Elements& call, int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, true, call.gradient),
                 [&](auto storage) { elements<S, decltype(storage)::value>(x, call, begin, end); });
}

#define PGDPO_STRING(x) #x
#define PGDPO_NAME(x) PGDPO_STRING(x)

template <class S>
constexpr Passes PASSES = {PGDPO_NAME(PGDPO_ISA), run_errors<S>, run_gradients<S>, run_elements<S>, pack_blocks};

}  // namespace

const Passes& passes(bool float64) {
  return float64 ? PASSES<double> : PASSES<float>;
}

}  // namespace PGDPO_ISA
}  // namespace pgdpo
