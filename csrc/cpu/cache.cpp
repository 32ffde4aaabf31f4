// Packing on the CPU. Compiled once per instruction set, with PGDPO_ISA naming it and without contraction; see cache.h.
#include "cache.h"

#include "cpu/vector.h"

namespace pgdpo {
inline namespace PGDPO_ISA {
namespace {

int size_of(int dtype) {
  return dtype == FLOAT8 ? 1 : dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : dtype == FLOAT32 ? 4 : 8;
}

// PACK_BLOCK values from element `start` of a row on, zeros past `count`.
template <class S>
PGDPO_INLINE void read(const Rows& rows, int64_t pair, int64_t start, int count, S (&out)[PACK_BLOCK]) {
  const char* data = rows.data + (pair * rows.stride + start) * size_of(rows.dtype);
  for (int i = 0; i < PACK_BLOCK; i += Vec<S>::width) {
    const int lanes = count - i;
    const Vec<S> x = lanes >= Vec<S>::width ? load<S>(rows.dtype, data, i)
                                            : load_lanes<S>(rows.dtype, data, i, lanes > 0 ? lanes : 0);
    memcpy(out + i, &x.v, sizeof(x.v));
  }
}

template <int N>
PGDPO_INLINE float tree_sum(const float (&x)[N]) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    float half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = x[2 * i] + x[2 * i + 1];
    return tree_sum(half);
  }
}

float pack_block(const float (&residual)[PACK_BLOCK], uint8_t (&bytes)[PACK_BLOCK]) {
  uint32_t largest = 0;
  float wanted[PACK_BLOCK], kept[PACK_BLOCK];
  for (int i = 0; i < PACK_BLOCK; ++i) largest = size_bits(residual[i]) > largest ? size_bits(residual[i]) : largest;
  const float scale = first_scale(bits_float(largest));
  for (int i = 0; i < PACK_BLOCK; ++i) {
    const float x = scaled_residual(residual[i], scale);
    const uint32_t byte = encode_float8(x);
    const float value = byte_value(byte);
    bytes[i] = uint8_t(byte);
    wanted[i] = x * x;
    kept[i] = value * value;
  }
  return corrected_scale(scale, tree_sum(wanted), tree_sum(kept));
}

template <class S>
void pack_one(const Pair& x, const Packed& out, int side, int64_t pair, int64_t start) {
  const int count = int(x.numel - start < PACK_BLOCK ? x.numel - start : PACK_BLOCK);
  S q[PACK_BLOCK], y[PACK_BLOCK];
  float residual[PACK_BLOCK];
  read(x.policy[side], pair, start, count, q);
  read(x.target[side], pair, start, count, y);
  if (x.built_target) {
    const S noise_scale = decode<S>(x.target_scale.dtype, x.target_scale.data, pair);
    const S clean_scale = decode<S>(x.target_scale.dtype, x.target_scale.data, x.target_scale.stride + pair);
    S noise[PACK_BLOCK];
    read(x.noise, pair, start, count, noise);
    for (int i = 0; i < PACK_BLOCK; ++i) y[i] = noise_scale * noise[i] + clean_scale * y[i];
  }
  for (int i = 0; i < PACK_BLOCK; ++i) residual[i] = i < count ? float(q[i] - y[i]) : 0.0f;
  const MutableRows& rows = out.rows[side];
  char* to = rows.data + (pair * rows.stride + start) * (rows.dtype == BFLOAT16 ? 2 : 1);
  if (rows.dtype == BFLOAT16) {
    uint16_t halves[PACK_BLOCK];
    for (int i = 0; i < PACK_BLOCK; ++i) halves[i] = encode_bfloat16(residual[i]);
    memcpy(to, halves, 2 * count);
  } else {
    uint8_t bytes[PACK_BLOCK];
    const MutableRows& scales = out.scale[side];
    reinterpret_cast<float*>(scales.data)[pair * scales.stride + start / PACK_BLOCK] = pack_block(residual, bytes);
    memcpy(to, bytes, count);
  }
}

}  // namespace

void pack_blocks(const Pair& x, const Packed& out, int64_t begin, int64_t end) {
  const int64_t blocks = pack_blocks_of(x);
  for (int64_t b = begin; b < end; ++b)
    for (int side = 0; side < 2; ++side)
      (x.policy[0].dtype == FLOAT64 ? pack_one<double> : pack_one<float>)(x, out, side, b / blocks,
                                                                          b % blocks * PACK_BLOCK);
}

}  // namespace PGDPO_ISA
}  // namespace pgdpo
