// What one CUDA thread computes of packing: a lane holds WIDTH residuals, PACK_BLOCK / WIDTH neighbouring lanes one
// block. Between the steps lanes exchange the block's largest residual and its sums; no function here knows how.
#pragma once

#include "cache.h"
#include "cuda/threads.h"

namespace pgdpo {
namespace cuda {

// WIDTH residuals of both videos from element `at` on, zeros past the end; adds their squared errors to `sums`.
template <class S, int P, int ACCESS>
PGDPO_HD void lane_residuals(const Segment<S>& s, int at, float (&residual)[2][width_of(P)], S (&sums)[STATISTICS]) {
  using Block = Stretch<S, P, ACCESS, REFERENCE_NONE, STREAM, STREAM>;
#pragma unroll
  for (int i = 0; i < Block::WIDTH; ++i) residual[0][i] = residual[1][i] = 0.0f;
  if (at >= s.count) return;
  Block block;
  block.load(s, at);
  block.each(s, at, false, [&](int i, const Differences<S>& d) {
    sums[0] = fused(d.u_w, d.u_w, sums[0]);
    sums[1] = fused(d.u_l, d.u_l, sums[1]);
    residual[0][i] = float(d.u_w);
    residual[1][i] = float(d.u_l);
  });
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
template <int WIDTH, int ACCESS>
PGDPO_HD void put_row(const MutableRows& rows, const Pair& x, int64_t pair, int64_t position,
                      const float (&residual)[WIDTH], const uint32_t (&bytes)[WIDTH / 4]) {
  const bool halves = rows.dtype == BFLOAT16;
  char* to = rows.data + (pair * rows.stride + position) * (halves ? 2 : 1);
  if constexpr (ACCESS == SCALAR) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (position + i >= x.numel) break;
      if (halves)
        put_one<float>(BFLOAT16, to, i, residual[i]);
      else
        to[i] = char(bytes[i / 4] >> 8 * (i % 4));
    }
  } else {
    uint32_t words[WIDTH / 2];
#pragma unroll
    for (int k = 0; k < WIDTH / 2; ++k)
      words[k] = halves ? pack_halves(BFLOAT16, residual[2 * k], residual[2 * k + 1]) : bytes[k < WIDTH / 4 ? k : 0];
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
  }
}

}  // namespace cuda
}  // namespace pgdpo
