// The passes of sample and frame groups: errors before the objective, gradients after it; and the table of all passes.
// Compiled once per instruction set, with PGDPO_ISA naming it; see pair.h.
#include "cache.h"
#include "cpu/reader.h"
#include "epilogue.h"
#include "pair.h"

namespace pgdpo {
inline namespace PGDPO_ISA {

// elements.cpp
template <class S>
void run_elements(const Pair& x, const Elements& call, int64_t begin, int64_t end);

namespace {

constexpr int64_t SECOND_LEVEL = int64_t(3)
                                 << 19;  // bytes of operands that a second-level cache keeps for the next pass

// Bytes of gradients from which on they are written past the caches: that took a quarter of the pass on an Intel Xeon,
// and cost an eighth on an AMD EPYC. The sanitizers' build sets it, to have both.
int64_t beyond_cache() {
#if defined(PGDPO_BEYOND_CACHE)
  return PGDPO_BEYOND_CACHE;
#elif defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return int64_t(4) << 20;
#endif
  return INT64_MAX;
}

// The first PLANES statistics: policy errors, with gaps, or all. More sums than are wanted would not fit into the
// registers beside their terms, and a sum kept in memory takes three times as long.
template <class S, int D, int PLANES>
void errors(const Pair& x, Wishes wanted, double* sums, int64_t begin, int64_t end) {
  using V = Vec<S>;
  for (int64_t c = begin; c < end; ++c) {
    const Segment at(x, c);
    Reader<S, D, (PLANES > STATISTIC_GAP_CHOSEN)> reader(x, at);
    Sums<V, PLANES> totals;
    for (int first = 0; first < at.count; first += BLOCK) {
      reader.begin_block(first, at.count);
      V part[PLANES];
      copy(totals.narrow, part);
      const auto add = [&](const Differences<V>& d) PGDPO_LAMBDA {
        const V u_w = weighted<D>(d, d.u_w), u_l = weighted<D>(d, d.u_l);
        part[STATISTIC_POLICY_CHOSEN] = part[STATISTIC_POLICY_CHOSEN] + u_w * d.u_w;
        part[STATISTIC_POLICY_REJECTED] = part[STATISTIC_POLICY_REJECTED] + u_l * d.u_l;
        const V minus_w = weighted<D>(d, d.minus_w), minus_l = weighted<D>(d, d.minus_l);
        if constexpr (PLANES > STATISTIC_GAP_CHOSEN) {
          part[STATISTIC_GAP_CHOSEN] = part[STATISTIC_GAP_CHOSEN] + minus_w * d.plus_w;
          part[STATISTIC_GAP_REJECTED] = part[STATISTIC_GAP_REJECTED] + minus_l * d.plus_l;
        }
        if constexpr (PLANES > STATISTIC_ANCHOR) {
          if (wanted.anchor) part[STATISTIC_ANCHOR] = part[STATISTIC_ANCHOR] + minus_w * d.minus_w;
          if (wanted.cross) part[STATISTIC_CROSS] = part[STATISTIC_CROSS] + u_w * d.u_l;
          if (wanted.anchor_rejected)
            part[STATISTIC_ANCHOR_REJECTED] = part[STATISTIC_ANCHOR_REJECTED] + minus_l * d.minus_l;
        }
      };
      reader.over(
          first, [&](const Differences<V>& even, const Differences<V>& odd, int) PGDPO_LAMBDA { add(even), add(odd); },
          [&](const Differences<V>& d, int) PGDPO_LAMBDA { add(d); });
      copy(part, totals.narrow);
      if ((first + BLOCK) % FLUSH == 0) totals.flush();
    }
    double made[STATISTICS] = {};
    constexpr int planes[] = {0, 1, 2, 3, 4, 5, 6};
    totals.write(made, planes, 1);
    double* to = sums + at.pair * x.segments + x.place(at.segment);
    for (int k = 0; k < STATISTICS; ++k) to[k * x.pairs * x.segments] = made[k];
  }
}

// ANCHOR: with the terms of the anchors that are wanted.
template <class S, int D, bool ANCHOR>
void gradients(const Pair& x, Wishes wanted, const double* coefficients, const MutableRows gradient[2], int64_t begin,
               int64_t end) {
  using V = Vec<S>;
  const int64_t rows = x.pairs * x.groups;
  const int dtype = gradient[0].dtype;
  const bool large = 2 * x.pairs * x.numel * size_of(dtype) >= beyond_cache();
  // The error pass ended on this thread's last segments: what the second-level cache still holds of them comes first.
  const int64_t count = end - begin, recent = lesser(count, SECOND_LEVEL / (6 * x.length * size_of(dtype)));
  for (int64_t step = 0; step < count; ++step) {
    const int64_t c = step < recent ? end - recent + step : begin + step - recent;
    const Segment at(x, c);
    Reader<S, D, ANCHOR> reader(x, at, wanted.anchor || wanted.anchor_rejected);
    const double* row = coefficients + at.pair * x.groups + x.group_of(at.segment);
    const V c_w = S(row[COEFFICIENT_CHOSEN * rows]), c_l = S(row[COEFFICIENT_REJECTED * rows]);
    const V c_anchor = S(row[COEFFICIENT_ANCHOR * rows]), c_anchor_l = S(row[COEFFICIENT_ANCHOR_REJECTED * rows]);
    char* out[2] = {row_start(gradient[0], at.pair, at.start), row_start(gradient[1], at.pair, at.start)};
    const bool past = large && uintptr_t(out[0]) % 16 == 0 && uintptr_t(out[1]) % 16 == 0;
    const auto by_chosen = [&](const Differences<V>& d) PGDPO_LAMBDA {
      return weighted<D>(d, ANCHOR && wanted.anchor ? c_w * d.u_w + c_anchor * d.minus_w : c_w * d.u_w);
    };
    // An objective that takes no notice of the rejected video must not take its NaN.
    const bool unnoticed = row[COEFFICIENT_REJECTED * rows] == 0;
    const auto by_rejected = [&](const Differences<V>& d) PGDPO_LAMBDA {
      V slope = unnoticed ? V(S(0)) : c_l * d.u_l;
      if (ANCHOR && wanted.anchor_rejected) slope = slope + c_anchor_l * d.minus_l;
      return weighted<D>(d, slope);
    };
    for (int first = 0; first < at.count; first += BLOCK) {
      reader.begin_block(first, at.count);
      alignas(64) S held[2][BLOCK];
      alignas(64) char halves[2][2 * BLOCK];
      char* const to[2] = {past ? halves[0] : out[0] + 2 * first, past ? halves[1] : out[1] + 2 * first};
      reader.over(
          first,
          [&](const Differences<V>& even, const Differences<V>& odd, int i) PGDPO_LAMBDA {
            put_split(to[0], i, by_chosen(even), by_chosen(odd));
            put_split(to[1], i, by_rejected(even), by_rejected(odd));
          },
          [&](const Differences<V>& d, int i) PGDPO_LAMBDA {
            by_chosen(d).to(held[0] + i);
            by_rejected(d).to(held[1] + i);
          });
      const int split = reader.split, rest = reader.count - split;
      for (int side = 0; side < 2; ++side) {
        if (past && split > 0) write_past_caches(out[side] + 2 * first, halves[side], 2 * split);
        if (rest > 0) store_block<S>(dtype, out[side], first + split, rest, held[side] + split, past);
      }
    }
  }
#if defined(__x86_64__)
  _mm_sfence();  // such writes are in no order with what another thread reads next
#endif
}

// What has versions without the sums that nobody wants; the others' are rare.
template <class S, int D>
constexpr bool HAS_VERSIONS = sizeof(S) == 4 && D != WEIGHTED;

template <class S>
void run_errors(const Pair& x, Wishes wanted, double* sums, int64_t begin, int64_t end) {
  specialised<S>(common_storage(x, true, nullptr), [&](auto storage) {
    constexpr int D = decltype(storage)::value;
    if constexpr (HAS_VERSIONS<S, D>)
      if (!wanted.anchor && !wanted.cross && !wanted.anchor_rejected)
        return x.reference_form == REFERENCE_NONE ? errors<S, D, STATISTIC_GAP_CHOSEN>(x, wanted, sums, begin, end)
                                                  : errors<S, D, STATISTIC_ANCHOR>(x, wanted, sums, begin, end);
    errors<S, D, STATISTICS>(x, wanted, sums, begin, end);
  });
}

template <class S>
void run_gradients(const Pair& x, Wishes wanted, const double* coefficients, const MutableRows gradient[2],
                   int64_t begin, int64_t end) {
  const bool anchor = wanted.anchor || wanted.anchor_rejected;
  specialised<S>(common_storage(x, anchor, gradient), [&](auto storage) {
    constexpr int D = decltype(storage)::value;
    if constexpr (HAS_VERSIONS<S, D>)
      if (!anchor) return gradients<S, D, false>(x, wanted, coefficients, gradient, begin, end);
    gradients<S, D, true>(x, wanted, coefficients, gradient, begin, end);
  });
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
