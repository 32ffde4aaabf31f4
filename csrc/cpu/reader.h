// What the passes over segments share: reading operands as vectors of differences, sums, and writing gradients.
//
// Storage types stay out of the arithmetic, so that it is compiled once for float and once for double: operands of
// another type than the pass's are converted a block at a time, those of its own are read where they lie. bfloat16
// throughout, which is what training has, goes straight from memory to registers instead.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cpu/vector.h"
#include "pair.h"

namespace pgdpo {
inline namespace PGDPO_ISA {

constexpr int ANY = -1;       // of a kind, of flags, of storage types: decided at run time
constexpr int WEIGHTED = -2;  // any storage types, and elements have weights
constexpr int FLUSH = 2048;   // elements added up in the working precision before the sums move on to double
constexpr int BLOCK = 128;    // elements that are converted, and prefetched, at a time
constexpr int AHEAD = 2048;   // bytes of every operand a prefetch runs ahead

template <class I>
I lesser(I a, I b) {
  return a < b ? a : b;
}

inline int64_t size_of(int dtype) {
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

template <class Any>
auto row_start(const Any& rows, int64_t pair, int64_t element) {
  return rows.data == nullptr ? rows.data : rows.data + (pair * rows.stride + element) * size_of(rows.dtype);
}

// Where a segment lies.
struct Segment {
  int64_t pair, segment, start;
  int count;

  Segment(const Pair& x, int64_t index) : pair(index / x.segments), segment(index % x.segments) {
    start = segment * x.length;
    count = int(x.numel - start < x.length ? x.numel - start : x.length);
  }
};

// `count` elements from element `first` on, with zeros up to a whole vector.
template <class S>
PGDPO_APART void load_block(int dtype, const char* from, int first, int count, S* to) {
  const int whole = count & -Vec<S>::width;
  const auto vectors = [&](int known) PGDPO_LAMBDA {
    for (int i = 0; i < whole; i += Vec<S>::width) load<S>(known, from, first + i).to(to + i);
  };
  dtype == BFLOAT16 ? vectors(BFLOAT16) : dtype == FLOAT16 ? vectors(FLOAT16) : vectors(dtype);
  if (whole < count) load_lanes<S>(dtype, from, first + whole, count - whole).to(to + whole);
}

// The same of float8 with its scales, element 0 `phase` elements after the start of the first scale's. The product is
// rounded to float, as when it was packed.
template <class S>
PGDPO_APART void load_scaled_block(const char* from, const Rows& scale, int phase, int first, int count, S* to) {
  for (int i = 0; i < count;) {
    const int place = phase + first + i, run = lesser(count - i, PACK_BLOCK - place % PACK_BLOCK);
    const float factor = decode<float>(scale.dtype, scale.data, place / PACK_BLOCK);
    int k = i;
    if constexpr (sizeof(S) == 4)
      for (; k + Vec<S>::width <= i + run; k += Vec<S>::width)
        (load_float8(from, first + k) * Vec<S>(factor)).to(to + k);
    for (; k < i + run; ++k) to[k] = S(decode_float8(uint8_t(from[first + k])) * factor);
    i += run;
  }
  for (int i = count; i % Vec<S>::width; ++i) to[i] = S(0);
}

// Writes without fetching what is replaced into the caches; `to` and `bytes` are multiples of 16. To be called for a
// whole block of one video: half a line at a time, in turns with another video, takes up to twice as long.
PGDPO_INLINE void write_past_caches(char* to, const void* from, int bytes) {
#if defined(__x86_64__)
  for (int at = 0; at < bytes; at += 16) {
    __m128i unit;
    memcpy(&unit, static_cast<const char*>(from) + at, 16);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), unit);
  }
#else
  memcpy(to, from, bytes);
#endif
}

// load_block's inverse.
template <class S>
PGDPO_APART void store_block(int dtype, char* to, int first, int count, const S* from, bool past_caches = false) {
  int i = 0;
  if (sizeof(S) == 4 && dtype == FLOAT32 && past_caches) {
    i = count & -Vec<S>::width;
    write_past_caches(to + 4 * first, from, 4 * i);
  }
  for (; i + Vec<S>::width <= count; i += Vec<S>::width) store<S>(dtype, to, first + i, Vec<S>::at(from + i));
  if (i < count) store_lanes<S>(dtype, to, first + i, count - i, Vec<S>::at(from + i));
}

// Two vectors of gradients as bfloat16, of the even and of the odd elements.
template <class S>
PGDPO_INLINE void put_split(char* to, int i, Vec<S> even, Vec<S> odd) {
  if constexpr (sizeof(S) == 4) {
    const auto words = split_words(even, odd);
    memcpy(to + 2 * i, &words, sizeof(words));
  }
}

// Differences of one vector of elements: p - y, and with a reference p - q and p + q - 2y. The gap is the product of
// the last two, which keeps its relative accuracy where policy and reference nearly agree.
template <class V>
struct Differences {
  V u_w, u_l, minus_w, minus_l, plus_w, plus_l;
  V weight;  // of WEIGHTED passes
};

// One vector of predictions, targets, and reference predictions or residuals.
template <class V>
struct Operand {
  V policy[2], target[2], reference[2];
};

// The row of one operand within a segment.
template <class S>
struct Column {
  const char* data = nullptr;
  int dtype = FLOAT32;
  const S* block = nullptr;  // the elements at hand, zeros up to a whole vector
  alignas(64) S converted[BLOCK];

  Column(const Rows& rows, const Segment& at) : data(row_start(rows, at.pair, at.start)), dtype(rows.dtype) {}

  // Makes elements [begin, end) of the block from `first` on readable.
  PGDPO_INLINE void read(int first, int begin, int end) {
    const bool own = dtype == (sizeof(S) == 4 ? FLOAT32 : FLOAT64) && end % Vec<S>::width == 0;
    block = own ? reinterpret_cast<const S*>(data) + first : converted;
    if (!own) load_block<S>(dtype, data, first + begin, end - begin, converted + begin);
  }

  // D is the dtype where it is known.
  template <int D>
  PGDPO_INLINE void prefetch(int first) const {
    const int64_t size = size_of(D < 0 ? dtype : D);
    for (int64_t line = 0; line < BLOCK * size; line += 64) __builtin_prefetch(data + first * size + AHEAD + line);
  }
};

// The elements of a segment, block by block. D is BFLOAT16 where every operand is, ANY, or WEIGHTED; REFERENCE whether
// one may be read.
template <class S, int D, bool REFERENCE>
struct Reader {
  using V = Vec<S>;
  Column<S> policy[2], target[2], reference[2], noise;
  Rows scale[2];  // of float8 residuals
  int form, phase, count = 0, split = 0;
  bool shared;
  V noise_scale = S(0), clean_scale = S(0);
  const S* weight_row;
  int64_t weight_length, weight_span, start;
  alignas(64) S weights[D == WEIGHTED ? BLOCK : 1];  // of the block at hand, zeros past the end

  Reader(const Pair& x, const Segment& at, bool with_reference = REFERENCE)
      : policy{{x.policy[0], at}, {x.policy[1], at}},
        target{{x.target[0], at}, {x.target[1], at}},
        reference{{x.reference[0], at}, {x.reference[1], at}},
        noise(x.noise, at),
        form(with_reference ? x.reference_form : int(REFERENCE_NONE)),
        phase(int(at.start % PACK_BLOCK)),
        shared(x.shared_target),
        weight_row(reinterpret_cast<const S*>(row_start(x.latent_weight, at.pair, 0))),
        weight_length(x.weight_length),
        weight_span(x.weight_span),
        start(at.start) {
    for (int side = 0; side < 2; ++side) {
      scale[side] = x.reference_scale[side];
      scale[side].data = row_start(x.reference_scale[side], at.pair, at.start / PACK_BLOCK);
    }
    if (noise.data != nullptr) {
      noise_scale = V(decode<S>(x.target_scale.dtype, x.target_scale.data, at.pair));
      clean_scale = V(decode<S>(x.target_scale.dtype, x.target_scale.data, x.target_scale.stride + at.pair));
    }
  }

  // Turns to the block of BLOCK elements from `first` on, a multiple of BLOCK, that ends at `end` at the latest.
  PGDPO_INLINE void begin_block(int first, int end) {
    count = lesser(BLOCK, end - first);
    split = D == BFLOAT16 && form != REFERENCE_FLOAT8 ? count & -(2 * V::width) : 0;
    // The hardware follows too few streams at once and stops at every page. Past the end of a segment lies the next
    // one; past the end of the memory nothing happens.
    for (int side = 0; side < 2; ++side) {
      policy[side].template prefetch<D>(first);
      if (side == 0 || !shared) target[side].template prefetch<D>(first);
      if (form == REFERENCE_PREDICTION)
        reference[side].template prefetch<D>(first);
      else if (form != REFERENCE_NONE)
        reference[side].template prefetch<ANY>(first);
    }
    if (noise.data != nullptr) noise.template prefetch<D>(first);
    if (split < count) convert(first);
    if constexpr (D == WEIGHTED) read_weights(first);
  }

  // two(even, odd, i) over pairs of vectors of a block where bfloat16 can be read so, then one(differences, i) over the
  // vectors from `split` on; elements past `count` are zero.
  template <class Two, class One>
  PGDPO_INLINE void over(int first, const Two& two, const One& one) const {
    if constexpr (D == BFLOAT16) {
      const auto halves = each_side([](const Column<S>& x) { return x.data; });
      const char* const noise_halves = noise.data;
      for (int i = 0; i < split; i += 2 * V::width) {
        Operand<V> even, odd;
        read_split(halves, noise_halves, first + i, even, odd);
        two(differences(even), differences(odd), i);
      }
    }
    const auto blocks = each_side([](const Column<S>& x) { return x.block; });
    for (int i = split; i < count; i += V::width) one(read(blocks, i), i);
  }

 private:
  PGDPO_APART void convert(int first) {
    for (int side = 0; side < 2; ++side) {
      policy[side].read(first, split, count);
      if (side == 0 || !shared) target[side].read(first, split, count);
      if (form == REFERENCE_FLOAT8) {
        Column<S>& to = reference[side];
        to.block = to.converted;
        load_scaled_block<S>(to.data, scale[side], phase, first + split, count - split, to.converted + split);
      } else if (form != REFERENCE_NONE) {
        reference[side].read(first, split, count);
      }
    }
    if (noise.data != nullptr) {
      noise.read(first, split, count);
      if (shared) target[1].block = target[0].block;
      for (int i = split; i < count; i += V::width) {
        V y_w = V::at(target[0].block + i), y_l = V::at(target[1].block + i);
        add_noise(V::at(noise.block + i), y_w, y_l);
        y_w.to(target[0].converted + i);
        y_l.to(target[1].converted + i);
      }
      for (Column<S>& y : target) y.block = y.converted;
    } else if (shared) {
      target[1].block = target[0].block;
    }
  }

  PGDPO_APART void read_weights(int first) {
    for (int i = 0; i < count;) {
      const int64_t at = start + first + i, inside = at % weight_length;
      const int run = int(lesser<int64_t>(count - i, weight_length - inside));
      memcpy(weights + i, weight_row + at / weight_span * weight_length + inside, run * sizeof(S));
      i += run;
    }
    for (int i = count; i < BLOCK; ++i) weights[i] = S(0);
  }

  // Where the operands lie: in registers, which what is written meanwhile cannot change.
  template <class T>
  struct Places {
    const T *policy[2], *target[2], *reference[2];
  };
  template <class Of>
  PGDPO_INLINE auto each_side(const Of& of) const {
    return Places<std::remove_cv_t<std::remove_pointer_t<decltype(of(noise))>>>{
        {of(policy[0]), of(policy[1])}, {of(target[0]), of(target[1])}, {of(reference[0]), of(reference[1])}};
  }

  PGDPO_INLINE void add_noise(V x, V& y_w, V& y_l) const {
    const V scaled = noise_scale * x;
    y_w = scaled + clean_scale * y_w;
    y_l = scaled + clean_scale * y_l;
  }

  PGDPO_INLINE Differences<V> read(const Places<S>& from, int i) const {
    Operand<V> x;
    for (int side = 0; side < 2; ++side) {
      x.policy[side] = V::at(from.policy[side] + i);
      x.target[side] = V::at(from.target[side] + i);
      if (REFERENCE && form != REFERENCE_NONE) x.reference[side] = V::at(from.reference[side] + i);
    }
    Differences<V> d = differences(x);
    if constexpr (D == WEIGHTED) {
      d.weight = V::at(weights + i);
      const auto unweighted = d.weight == V(S(0));
      for (V* x : {&d.u_w, &d.u_l, &d.minus_w, &d.minus_l, &d.plus_w, &d.plus_l}) *x = select(unweighted, V(S(0)), *x);
    }
    return d;
  }

  // The even and the odd ones of twice as many elements.
  PGDPO_INLINE void read_split(const Places<char>& from, const char* noise, int i, Operand<V>& even,
                               Operand<V>& odd) const {
    for (int side = 0; side < 2; ++side) {
      load_split(from.policy[side], i, even.policy[side], odd.policy[side]);
      load_split(from.target[side], i, even.target[side], odd.target[side]);
      if (REFERENCE && form != REFERENCE_NONE)
        load_split(from.reference[side], i, even.reference[side], odd.reference[side]);
    }
    if (noise != nullptr) {
      V first, second;
      load_split(noise, i, first, second);
      add_noise(first, even.target[0], even.target[1]);
      add_noise(second, odd.target[0], odd.target[1]);
    }
  }

  PGDPO_INLINE Differences<V> differences(const Operand<V>& x) const {
    Differences<V> d;
    d.u_w = x.policy[0] - x.target[0];
    d.u_l = x.policy[1] - x.target[1];
    d.minus_w = d.minus_l = d.plus_w = d.plus_l = V(S(0));
    if (!REFERENCE) return d;
    if (form == REFERENCE_PREDICTION) {
      d.minus_w = x.policy[0] - x.reference[0];
      d.minus_l = x.policy[1] - x.reference[1];
      d.plus_w = d.u_w + (x.reference[0] - x.target[0]);
      d.plus_l = d.u_l + (x.reference[1] - x.target[1]);
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

// Vector by vector: memcpy does it in pieces, which the next loads then have to wait for.
template <class V, int N>
PGDPO_INLINE void copy(const V (&from)[N], V (&to)[N]) {
  for (int k = 0; k < N; ++k) to[k] = from[k];
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
  void write(double* out, const int* planes, int64_t stride) {
    flush();
    for (int k = 0; k < PLANES; ++k) {
      double total = 0;
      for (int lane = 0; lane < V::width; ++lane) total += wide[k][lane];
      out[planes[k] * stride] = total;
    }
  }
};

// The storage type all operands of a pass share if that is bfloat16, or WEIGHTED, or ANY.
inline int common_storage(const Pair& x, bool with_reference, const MutableRows* gradient) {
  if (x.latent_weight.data != nullptr) return WEIGHTED;
  const bool same = x.policy[0].dtype == BFLOAT16 && x.target[0].dtype == BFLOAT16 &&
                    (!x.built_target || x.noise.dtype == BFLOAT16) &&
                    (!with_reference || x.reference_form != REFERENCE_PREDICTION || x.reference[0].dtype == BFLOAT16) &&
                    (gradient == nullptr || gradient[0].data == nullptr || gradient[0].dtype == BFLOAT16);
  return same ? BFLOAT16 : ANY;
}

// run(storage), the storage a compile-time constant that has a version of the pass.
template <class S, class Run>
void specialised(int storage, const Run& run) {
  if constexpr (sizeof(S) == 4)
    if (storage == BFLOAT16) return run(std::integral_constant<int, BFLOAT16>{});
  if (storage == WEIGHTED) return run(std::integral_constant<int, WEIGHTED>{});
  run(std::integral_constant<int, ANY>{});
}

}  // namespace PGDPO_ISA
}  // namespace pgdpo
