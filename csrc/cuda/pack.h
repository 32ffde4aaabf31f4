// What one CUDA thread computes of packing, and how the host picks the kernel. No function here knows about blocks or
// grids, so tests run them all on the host.
//
// THREADS threads share a segment; thread t takes elements t * WIDTH, (t + THREADS) * WIDTH, ... whatever the
// alignment, the grid or the number of pairs. A lane holds WIDTH residuals, PACK_BLOCK / WIDTH neighbouring lanes one
// block; between the steps lanes exchange the block's largest residual and its sums, in a fixed tree.
#pragma once

#include <type_traits>

#include "cache.h"
#include "cuda/rows.h"

namespace pgdpo {
namespace cuda {

constexpr int THREADS = 128;  // that work on one segment

// One segment of one pair: where its operands start, and what is the same for all of its elements.
template <class S>
struct Segment {
  View prediction[2], target[2], noise;
  int64_t pair, start;
  int count;
  bool shared_target, built_target;
  S noise_scale, clean_scale;

  PGDPO_HD static View view(const Rows& rows, int64_t pair, int64_t start) {
    return {rows.data == nullptr ? nullptr : rows.data + (pair * rows.stride + start) * size_of(rows.dtype),
            rows.dtype};
  }

  PGDPO_HD Segment(const Pair& x, int64_t pair_, int64_t index) : pair(pair_) {
    start = index * x.length;
    count = int(x.numel - start < x.length ? x.numel - start : x.length);
    shared_target = x.shared_target;
    built_target = x.built_target;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      prediction[side] = view(x.policy[side], pair, start);
      target[side] = view(x.target[side], pair, start);
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

// WIDTH residuals q - y of both videos from element `at` on, zeros past the end.
template <class S, int P, bool VECTORS>
PGDPO_HD void lane_residuals(const Segment<S>& s, int at, float (&residual)[2][width_of(P)]) {
  constexpr int WIDTH = width_of(P);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) residual[0][i] = residual[1][i] = 0.0f;
  if (at >= s.count) return;
  Vector<S, WIDTH, P, VECTORS> predictions[2];
  Vector<S, WIDTH, ANY, VECTORS> targets[2], noise;
  predictions[0].load(s.prediction[0], at, s.count);
  predictions[1].load(s.prediction[1], at, s.count);
  targets[0].load(s.target[0], at, s.count);
  if (!s.shared_target) targets[1].load(s.target[1], at, s.count);
  if (s.built_target) noise.load(s.noise, at, s.count);
  S q[2][WIDTH], y[2][WIDTH];
  predictions[0].values(s.prediction[0], q[0]);
  predictions[1].values(s.prediction[1], q[1]);
  targets[0].values(s.target[0], y[0]);
  if (s.shared_target) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) y[1][i] = y[0][i];
  } else {
    targets[1].values(s.target[1], y[1]);
  }
  if (s.built_target) {
    S drawn[WIDTH];
    noise.values(s.noise, drawn);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const S scaled = product(s.noise_scale, drawn[i]);
      y[0][i] = scaled + product(s.clean_scale, y[0][i]);
      y[1][i] = scaled + product(s.clean_scale, y[1][i]);
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side)
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (VECTORS || at + i < s.count) residual[side][i] = float(q[side][i] - y[side][i]);
}

template <int WIDTH>
PGDPO_HD uint32_t lane_largest(const float (&residual)[WIDTH]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) largest = size_bits(residual[i]) > largest ? size_bits(residual[i]) : largest;
  return largest;
}

// Neighbours first, as everywhere.
template <int WIDTH>
PGDPO_HD float lane_sum(float (&x)[WIDTH]) {
#pragma unroll
  for (int n = WIDTH / 2; n > 0; n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = exact_add(x[2 * i], x[2 * i + 1]);
  return x[0];
}

// The bytes of a lane's residuals, four a word, and its parts of the two sums of squares.
template <int WIDTH>
PGDPO_HD void lane_bytes(const float (&residual)[WIDTH], float scale, uint32_t (&words)[WIDTH / 4], float& wanted,
                         float& kept) {
  float of_residuals[WIDTH], of_bytes[WIDTH];
#pragma unroll
  for (int k = 0; k < WIDTH / 4; ++k) words[k] = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const float x = scaled_residual(residual[i], scale);
    const uint32_t byte = encode_float8(x);
    const float value = byte_value(byte);
    words[i / 4] |= byte << 8 * (i % 4);
    of_residuals[i] = exact_product(x, x);
    of_bytes[i] = exact_product(value, value);
  }
  wanted = lane_sum(of_residuals);
  kept = lane_sum(of_bytes);
}

// Writes a lane's part of a row: bfloat16 residuals, or bytes.
template <int WIDTH, bool VECTORS>
PGDPO_HD void put_row(const MutableRows& rows, const Pair& x, int64_t pair, int64_t position,
                      const float (&residual)[WIDTH], const uint32_t (&bytes)[WIDTH / 4]) {
  const bool halves = rows.dtype == BFLOAT16;
  char* to = rows.data + (pair * rows.stride + position) * (halves ? 2 : 1);
  if constexpr (VECTORS) {
    uint32_t words[WIDTH / 2];
#pragma unroll
    for (int k = 0; k < WIDTH / 2; ++k)
      words[k] = halves ? pack_bfloat16(residual[2 * k], residual[2 * k + 1]) : bytes[k < WIDTH / 4 ? k : 0];
#if defined(__CUDA_ARCH__)
    if (halves && WIDTH == 8)
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[WIDTH / 2 - 2], words[WIDTH / 2 - 1]);
    else if (halves || WIDTH == 8)
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    else
      *reinterpret_cast<uint32_t*>(to) = words[0];
#else
    memcpy(to, words, halves ? 2 * WIDTH : WIDTH);
#endif
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (position + i >= x.numel) break;
      if (halves) {
        const uint16_t half = uint16_t(pack_bfloat16(residual[i], 0.0f));
        reinterpret_cast<uint16_t*>(to)[i] = half;
      } else {
        to[i] = char(bytes[i / 4] >> 8 * (i % 4));
      }
    }
  }
}

// Whether vectors of `width` elements of every row start at a multiple of their size.
template <class Some>
bool aligned(const Some& rows, int width, int64_t pairs) {
  if (rows.data == nullptr) return true;
  const int bytes = width * size_of(rows.dtype), unit = bytes < 16 ? bytes : 16;
  return rows.dtype != FLOAT64 && reinterpret_cast<uintptr_t>(rows.data) % unit == 0 &&
         (pairs == 1 || rows.stride % width == 0);
}

// Whether these operands can be read and written in vectors. Which thread sees which element is the same either way.
inline bool in_vectors(const Pair& x, const Packed& out) {
  const int width = width_of(x.policy[0].dtype);
  bool vectors = x.numel % width == 0 && x.length % width == 0 && aligned(x.noise, width, x.pairs);
  for (int side = 0; side < 2; ++side)
    vectors = vectors && aligned(x.policy[side], width, x.pairs) && aligned(x.target[side], width, x.pairs) &&
              aligned(out.rows[side], width, x.pairs);
  return vectors;
}

template <auto V>
using Constant = std::integral_constant<decltype(V), V>;

// run(prediction dtype, vectors) as compile-time constants. float64 has one pass, the one that reads anything.
template <class S, class Run>
void with_pack(const Pair& x, const Packed& out, const Run& run) {
  if constexpr (sizeof(S) == 8) {
    run(Constant<int(FLOAT64)>{}, Constant<false>{});
  } else {
    const auto with_vectors = [&](auto dtype) {
      if (in_vectors(x, out))
        run(dtype, Constant<true>{});
      else
        run(dtype, Constant<false>{});
    };
    if (x.policy[0].dtype == BFLOAT16)
      with_vectors(Constant<int(BFLOAT16)>{});
    else if (x.policy[0].dtype == FLOAT16)
      with_vectors(Constant<int(FLOAT16)>{});
    else
      with_vectors(Constant<int(FLOAT32)>{});
  }
}

}  // namespace cuda
}  // namespace pgdpo
