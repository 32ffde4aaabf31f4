// The rows of the reference cache: residuals q - y as bfloat16, or as float8 (e4m3) with one float32 scale per
// PACK_BLOCK.
//
// Every implementation makes the same bytes: no operation here may be contracted, and sums add neighbours first. The
// scale is chosen so that the largest residual of a block becomes 448, then corrected so that the block keeps its sum
// of squares (pgdpo_fast/loss.py says why).
#pragma once

#include "epilogue.h"
#include "pair.h"

namespace pgdpo {

// Where packed rows go: `dtype` of rows is BFLOAT16 or FLOAT8, scales are [pairs, blocks] float32 with FLOAT8.
struct Packed {
  MutableRows rows[2], scale[2];
};

inline int64_t pack_blocks_of(const Pair& x) {
  return (x.numel + PACK_BLOCK - 1) / PACK_BLOCK;
}

inline namespace PGDPO_ISA {

// Packs blocks [begin, end) of both videos; block b is number b % blocks of pair b / blocks.
void pack_blocks(const Pair& x, const Packed& out, int64_t begin, int64_t end);

#if defined(__CUDA_ARCH__)
#define PGDPO_EXACT(name, rounded, plain) \
  PGDPO_HD float name(float a, float b) { \
    return rounded(a, b);                 \
  }
#else
#define PGDPO_EXACT(name, rounded, plain) \
  PGDPO_HD float name(float a, float b) { \
    return a plain b;                     \
  }
#endif
PGDPO_EXACT(exact_add, __fadd_rn, +)
PGDPO_EXACT(exact_product, __fmul_rn, *)
PGDPO_EXACT(exact_quotient, __fdiv_rn, /)
#undef PGDPO_EXACT

PGDPO_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}
PGDPO_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// |x| as an integer that is ordered as |x| is, with NaN above all.
PGDPO_HD uint32_t size_bits(float x) {
  return float_bits(x) & 0x7fffffffu;
}

PGDPO_HD float first_scale(float largest) {
  const float scale = exact_product(largest, 1.0f / 448.0f);
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

// A residual over its scale, cut to +-448.
PGDPO_HD float scaled_residual(float residual, float scale) {
  const float x = exact_quotient(residual, scale);
  return x > 448.0f ? 448.0f : x < -448.0f ? -448.0f : x;
}

// Nearest float8, ties to even, of |x| <= 448 or NaN. Below the normal range (2^-6) adding 2^14 rounds to its last
// place.
PGDPO_HD uint32_t encode_float8(float x) {
  const uint32_t bits = float_bits(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  const uint32_t tiny = float_bits(exact_add(bits_float(size), 16384.0f)) - 0x46800000u;
  const uint32_t normal = (size - 0x3c000000u + 0x7ffffu + (size >> 20 & 1u)) >> 20;
  return (size > 0x7f800000u ? 0x7fu : size < 0x3c800000u ? tiny : normal) | sign;
}

// The float8 byte of a residual; what it is worth, for the correction.
PGDPO_HD float byte_value(uint32_t byte) {
  const float x = bits_float((byte & 0x80u) << 24 | (byte & 0x7fu) << 20);
  return (byte & 0x7fu) == 0x7fu ? bits_float(0x7fc00000u) : exact_product(x, 0x1p120f);
}

// `kept` is the sum of squares of the bytes' values, `wanted` that of the residuals over the first scale.
PGDPO_HD float corrected_scale(float scale, float wanted, float kept) {
  if (kept == 0.0f) return scale;
#if defined(__CUDA_ARCH__)
  return exact_product(scale, __fsqrt_rn(exact_quotient(wanted, kept)));
#else
  return exact_product(scale, sqrtf(exact_quotient(wanted, kept)));
#endif
}

}  // namespace PGDPO_ISA
}  // namespace pgdpo
