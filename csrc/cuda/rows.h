// How a CUDA thread reads and writes rows of latents: 128-bit accesses where alignment allows, one conversion per
// value.
//
// Everything here compiles for the host too, where tests drive the very same code; only the load instructions and the
// float16 conversions differ there.
#pragma once

#include "epilogue.h"
#include "pair.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "cpu/vector.h"
#endif

namespace pgdpo {
namespace cuda {

constexpr int THREADS = 128;  // that work on one segment
constexpr int ANY = -1;       // a dtype or reference form known at run time only

// How operands are read: vectors of the policy's own dtype, vectors of any dtype up to 32 bits, or one value at a time
// for rows that are not aligned and for float64. Which thread sees which element is the same in all three.
enum Access : int { SAME, MIXED, SCALAR };

// Which cache policy a load asks for. Values that are needed again stay, others do not push them out.
enum Space : int { KEEP, STREAM, SHARED };

PGDPO_HD constexpr int size_of(int dtype) {
  return dtype == FLOAT8 ? 1 : dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : dtype == FLOAT32 ? 4 : 8;
}

// Consecutive elements a thread takes at a time: one 128-bit load of the policy.
PGDPO_HD constexpr int width_of(int dtype) {
  return size_of(dtype) == 2 ? 8 : 4;
}

PGDPO_HD float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
PGDPO_HD double fused(double a, double b, double c) {
  return fma(a, b, c);
}

// A product that is rounded on its own: built targets are those of torch, bit for bit.
PGDPO_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PGDPO_HD double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

PGDPO_HD float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

PGDPO_HD uint32_t to_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

// Two float16 values in one word.
PGDPO_HD void unpack_halves(uint32_t word, float& low, float& high) {
#if defined(__CUDA_ARCH__)
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = both.x;
  high = both.y;
#elif !defined(__CUDACC__)
  low = decode_half(uint16_t(word));
  high = decode_half(uint16_t(word >> 16));
#endif
}

PGDPO_HD uint32_t pack_halves(int dtype, float low, float high) {
#if defined(__CUDA_ARCH__)
  if (dtype == BFLOAT16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
#elif !defined(__CUDACC__)
  return dtype == BFLOAT16 ? encode_bfloat16(low) | uint32_t(encode_bfloat16(high)) << 16
                           : encode_half(low) | uint32_t(encode_half(high)) << 16;
#else
  return 0;
#endif
}

// Float8 e4m3: its exponent and mantissa as a float32 whose bias is off by 127 - 7. (The byte of NaN reads as 480: a
// row that holds one has a NaN for its scale.)
PGDPO_HD float unpack_float8(uint32_t byte) {
  return from_bits((byte & 0x80u) << 24 | (byte & 0x7fu) << 20) * 0x1p120f;
}

template <int BYTES, int SPACE>
PGDPO_HD void fetch(uint32_t* to, const char* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (BYTES == 16) {
    const uint4* at = reinterpret_cast<const uint4*>(from);
    const uint4 x = SPACE == SHARED ? *at : SPACE == STREAM ? __ldcs(at) : __ldg(at);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (BYTES == 8) {
    const uint2* at = reinterpret_cast<const uint2*>(from);
    const uint2 x = SPACE == SHARED ? *at : SPACE == STREAM ? __ldcs(at) : __ldg(at);
    to[0] = x.x, to[1] = x.y;
  } else {
    const uint32_t* at = reinterpret_cast<const uint32_t*>(from);
    to[0] = SPACE == SHARED ? *at : SPACE == STREAM ? __ldcs(at) : __ldg(at);
  }
#else
  memcpy(to, from, BYTES);
#endif
}

// One value of a dtype that is a constant where it matters.
template <class S>
PGDPO_HD S fetch_one(int dtype, const char* data, int i) {
#if defined(__CUDA_ARCH__)
  if (dtype == BFLOAT16) return S(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]));
  if (dtype == FLOAT16) return S(__half2float(reinterpret_cast<const __half*>(data)[i]));
  if (dtype == FLOAT32) return S(reinterpret_cast<const float*>(data)[i]);
  if (dtype == FLOAT8) return S(unpack_float8(uint8_t(data[i])));
  return S(reinterpret_cast<const double*>(data)[i]);
#elif !defined(__CUDACC__)
  return dtype == FLOAT8 ? S(unpack_float8(uint8_t(data[i]))) : decode<S>(dtype, data, i);
#else
  return S(0);
#endif
}

template <class S>
PGDPO_HD void put_one(int dtype, char* data, int64_t i, S x) {
#if defined(__CUDA_ARCH__)
  switch (dtype) {
    case BFLOAT16:
      reinterpret_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(x));
      break;
    case FLOAT16:
      reinterpret_cast<__half*>(data)[i] = __float2half_rn(float(x));
      break;
    case FLOAT32:
      reinterpret_cast<float*>(data)[i] = float(x);
      break;
    default:
      reinterpret_cast<double*>(data)[i] = double(x);
  }
#elif !defined(__CUDACC__)
  encode<S>(dtype, data, i, x);
#endif
}

// One operand's part of one segment; `data` points at its first element.
struct View {
  const char* data;
  int dtype;
};

// WIDTH consecutive values of one operand. In the vector modes `load` only issues the loads and `value` converts, so
// that the loads of all operands are in flight together. DTYPE is the operand's, or ANY to read it from the view.
template <class S, int WIDTH, int DTYPE, int ACCESS, int SPACE>
struct Vector {
  static constexpr int WORDS = WIDTH * (DTYPE == ANY ? 4 : size_of(DTYPE)) / 4;
  uint32_t words[WORDS];

  PGDPO_HD void load(const View& from, int at, int) {
    const int bytes = WIDTH * size_of(DTYPE == ANY ? from.dtype : DTYPE);
    const char* data = from.data + int64_t(at) * (bytes / WIDTH);
    if (WORDS >= 4 && bytes >= 16) {
      fetch<16, SPACE>(words, data);
      if (WORDS >= 8 && bytes >= 32) fetch<16, SPACE>(words + (WORDS >= 8 ? 4 : 0), data + 16);
    } else if (WORDS >= 2 && bytes >= 8) {
      fetch<8, SPACE>(words, data);
    } else {
      fetch<4, SPACE>(words, data);
    }
  }

  PGDPO_HD void values(const View& from, S (&out)[WIDTH]) const {
    const int dtype = DTYPE == ANY ? from.dtype : DTYPE;
    if (dtype == BFLOAT16) {
#pragma unroll
      for (int i = 0; i < WIDTH; i += 2) {
        const uint32_t word = words[i / 2 < WORDS ? i / 2 : 0];
        out[i] = S(from_bits(word << 16));
        out[i + 1] = S(from_bits(word & 0xffff0000u));
      }
    } else if (dtype == FLOAT16) {
#pragma unroll
      for (int i = 0; i < WIDTH; i += 2) {
        float low = 0, high = 0;
        unpack_halves(words[i / 2 < WORDS ? i / 2 : 0], low, high);
        out[i] = S(low);
        out[i + 1] = S(high);
      }
    } else if (dtype == FLOAT8) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out[i] = S(unpack_float8(words[i / 4 < WORDS ? i / 4 : 0] >> 8 * (i % 4)));
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out[i] = S(from_bits(words[i < WORDS ? i : 0]));
    }
  }
};

template <class S, int WIDTH, int DTYPE, int SPACE>
struct Vector<S, WIDTH, DTYPE, SCALAR, SPACE> {
  S loaded[WIDTH];

  PGDPO_HD void load(const View& from, int at, int count) {
    if constexpr (DTYPE != ANY) {
      load_as<DTYPE>(from, at, count);
    } else {
      if (from.dtype == BFLOAT16)
        load_as<BFLOAT16>(from, at, count);
      else if (from.dtype == FLOAT16)
        load_as<FLOAT16>(from, at, count);
      else if (from.dtype == FLOAT32)
        load_as<FLOAT32>(from, at, count);
      else if (from.dtype == FLOAT64)
        load_as<FLOAT64>(from, at, count);
      else
        load_as<FLOAT8>(from, at, count);
    }
  }
  template <int KNOWN>
  PGDPO_HD void load_as(const View& from, int at, int count) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) loaded[i] = at + i < count ? fetch_one<S>(KNOWN, from.data, at + i) : S(0);
  }
  PGDPO_HD void values(const View&, S (&out)[WIDTH]) const {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) out[i] = loaded[i];
  }
};

// Writes 16 bytes of values rounded to DTYPE.
template <class S, int WIDTH, int DTYPE>
PGDPO_HD void put(char* data, int at, const S (&x)[WIDTH]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] =
        WIDTH == 4 ? to_bits(float(x[i])) : pack_halves(DTYPE, float(x[2 * i % WIDTH]), float(x[(2 * i + 1) % WIDTH]));
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(data + int64_t(at) * size_of(DTYPE)) = make_uint4(words[0], words[1], words[2], words[3]);
#else
  memcpy(data + int64_t(at) * size_of(DTYPE), words, sizeof(words));
#endif
}

}  // namespace cuda
}  // namespace pgdpo
