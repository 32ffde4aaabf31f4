// How a CUDA thread reads rows of latents and writes packed ones: 128-bit accesses where alignment allows, one
// conversion per value.
//
// Everything here compiles for the host too, where tests drive the very same code; only the load instructions and the
// 16-bit conversions differ there.
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

constexpr int ANY = -1;  // a dtype known at run time only

PGDPO_HD constexpr int size_of(int dtype) {
  return dtype == FLOAT8 ? 1 : dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : dtype == FLOAT32 ? 4 : 8;
}

// Consecutive elements that one thread takes at a time: one 128-bit load of the prediction.
PGDPO_HD constexpr int width_of(int dtype) {
  return size_of(dtype) == 2 ? 8 : 4;
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

// Two values as bfloat16 in one word.
PGDPO_HD uint32_t pack_bfloat16(float low, float high) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
#elif !defined(__CUDACC__)
  return encode_bfloat16(low) | uint32_t(encode_bfloat16(high)) << 16;
#else
  return 0;
#endif
}

// Latents are read once: they need not stay in the caches.
template <int BYTES>
PGDPO_HD void fetch(uint32_t* to, const char* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (BYTES == 16) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(from));
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    const uint2 x = __ldcs(reinterpret_cast<const uint2*>(from));
    to[0] = x.x, to[1] = x.y;
  }
#else
  memcpy(to, from, BYTES);
#endif
}

template <class S>
PGDPO_HD S fetch_one(int dtype, const char* data, int i) {
#if defined(__CUDA_ARCH__)
  if (dtype == BFLOAT16) return S(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]));
  if (dtype == FLOAT16) return S(__half2float(reinterpret_cast<const __half*>(data)[i]));
  if (dtype == FLOAT32) return S(reinterpret_cast<const float*>(data)[i]);
  return S(reinterpret_cast<const double*>(data)[i]);
#elif !defined(__CUDACC__)
  return decode<S>(dtype, data, i);
#else
  return S(0);
#endif
}

// One operand's part of one segment; `data` points at its first element.
struct View {
  const char* data;
  int dtype;
};

// WIDTH consecutive values of one operand. With VECTORS `load` only issues the loads and `values` converts, so that the
// loads of all operands are in flight together. DTYPE is the operand's, or ANY to read it from the view.
template <class S, int WIDTH, int DTYPE, bool VECTORS>
struct Vector {
  static constexpr int WORDS = WIDTH * (DTYPE == ANY ? 4 : size_of(DTYPE)) / 4;
  uint32_t words[WORDS];

  PGDPO_HD void load(const View& from, int at, int) {
    const int bytes = WIDTH * size_of(DTYPE == ANY ? from.dtype : DTYPE);
    const char* data = from.data + int64_t(at) * (bytes / WIDTH);
    if (WORDS >= 4 && bytes >= 16) {
      fetch<16>(words, data);
      if (WORDS >= 8 && bytes >= 32) fetch<16>(words + (WORDS >= 8 ? 4 : 0), data + 16);
    } else {
      fetch<8>(words, data);
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
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out[i] = S(from_bits(words[i < WORDS ? i : 0]));
    }
  }
};

// One value at a time, for rows that are not aligned and for float64.
template <class S, int WIDTH, int DTYPE>
struct Vector<S, WIDTH, DTYPE, false> {
  S loaded[WIDTH];

  PGDPO_HD void load(const View& from, int at, int count) {
    const int dtype = DTYPE == ANY ? from.dtype : DTYPE;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) loaded[i] = at + i < count ? fetch_one<S>(dtype, from.data, at + i) : S(0);
  }
  PGDPO_HD void values(const View&, S (&out)[WIDTH]) const {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) out[i] = loaded[i];
  }
};

}  // namespace cuda
}  // namespace pgdpo
