// Vectors of float or double as wide as the instruction set compiled for, and what the passes need of them: arithmetic,
// selection, exp and log1p to about one ulp, loads and stores of every storage type. GNU vector extensions (gcc,
// clang).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "epilogue.h"
#include "pair.h"

#if defined(__AVX512F__)
#define PGDPO_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PGDPO_VECTOR_BYTES 32
#else
#define PGDPO_VECTOR_BYTES 16
#endif

// With sanitizers the ordinary build takes minutes: PGDPO_QUICK_BUILD leaves out inlining.
#define PGDPO_APART __attribute__((noinline))  // compiled once, whoever calls it
#if defined(PGDPO_QUICK_BUILD)
#define PGDPO_INLINE inline
#define PGDPO_LAMBDA
#else
#define PGDPO_INLINE inline __attribute__((always_inline))
#define PGDPO_LAMBDA __attribute__((always_inline))  // after a lambda's parameters
#endif

namespace pgdpo {
inline namespace PGDPO_ISA {

template <class S>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Value __attribute__((vector_size(PGDPO_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(PGDPO_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(PGDPO_VECTOR_BYTES)));
  static constexpr int mantissa = 23, bias = 127;
  // 1.5 * 2^23 + bias: adding it leaves the nearest integer, biased like an exponent, in the low bits.
  static constexpr float round = 12582912.0f + bias;
  static constexpr float exp_low = -104.0f, exp_high = 89.0f, exp_far = 86.5f;
  static constexpr uint32_t sign = 0x80000000u;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -0.00021219444005469058277f;
};
template <>
struct Lanes<double> {
  typedef double Value __attribute__((vector_size(PGDPO_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(PGDPO_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(PGDPO_VECTOR_BYTES)));
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744.0 + bias;
  static constexpr double exp_low = -746.0, exp_high = 710.0, exp_far = 707.0;
  static constexpr uint64_t sign = 0x8000000000000000u;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 1.908214929270587816144266e-10;
};

// One register. A struct, so that scalars convert and the functions of epilogue.h are found.
template <class S>
struct Vec {
  using Value = typename Lanes<S>::Value;
  using Mask = typename Lanes<S>::Mask;
  using Bits = typename Lanes<S>::Bits;
  static constexpr int width = PGDPO_VECTOR_BYTES / sizeof(S);

  Value v;

  Vec() = default;
  PGDPO_INLINE Vec(S x) : v(x - Value{}) {}
  PGDPO_INLINE explicit Vec(Value x) : v(x) {}

  static PGDPO_INLINE Vec at(const S* from) {
    Vec x;
    memcpy(&x.v, from, sizeof(x.v));
    return x;
  }
  PGDPO_INLINE void to(S* into) const { memcpy(into, &v, sizeof(v)); }
  // 0, 1, 2, ...
  static PGDPO_INLINE Vec ascending() {
    Vec x;
    for (int lane = 0; lane < width; ++lane) x.v[lane] = S(lane);
    return x;
  }

  friend PGDPO_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend PGDPO_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend PGDPO_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend PGDPO_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend PGDPO_INLINE Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  friend PGDPO_INLINE Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend PGDPO_INLINE Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend PGDPO_INLINE Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  friend PGDPO_INLINE Mask operator==(Vec a, Vec b) { return a.v == b.v; }
  friend PGDPO_INLINE Vec select(Mask m, Vec a, Vec b) { return Vec(m ? a.v : b.v); }
  friend PGDPO_INLINE Vec absolute(Vec x) { return Vec((Value)((Bits)x.v & (Lanes<S>::sign - 1))); }
  friend PGDPO_INLINE Vec minus_absolute(Vec x) { return Vec((Value)((Bits)x.v | Lanes<S>::sign)); }

  // a > b ? a : b and a < b ? a : b, one instruction each on x86, which gives b where either is NaN.
  friend PGDPO_INLINE Vec at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return Vec((Value)_mm512_max_ps((__m512)a.v, (__m512)b.v));
#elif defined(__AVX2__)
    if constexpr (sizeof(S) == 4) return Vec((Value)_mm256_max_ps((__m256)a.v, (__m256)b.v));
#endif
    return Vec(a.v > b.v ? a.v : b.v);
  }
  friend PGDPO_INLINE Vec at_most(Vec a, Vec b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return Vec((Value)_mm512_min_ps((__m512)a.v, (__m512)b.v));
#elif defined(__AVX2__)
    if constexpr (sizeof(S) == 4) return Vec((Value)_mm256_min_ps((__m256)a.v, (__m256)b.v));
#endif
    return Vec(a.v < b.v ? a.v : b.v);
  }
};

template <class S>
struct ScalarOf<Vec<S>> {
  using type = S;
};

// Even and odd powers apart: two chains of half the length.
template <class S, int N>
PGDPO_INLINE Vec<S> polynomial(const S (&c)[N], Vec<S> x) {
  using V = Vec<S>;
  const V square = x * x;
  constexpr int top = N - 1;
  V first = c[top], second = c[top - 1];
#pragma GCC unroll 16
  for (int i = top - 2; i >= 0; i -= 2) {
    first = first * square + V(c[i]);
    if (i > 0) second = second * square + V(c[i - 1]);
  }
  return top % 2 ? first * x + second : second * x + first;
}

// (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2, Chebyshev interpolation.
constexpr float EXP_FLOAT[] = {0.5f, 0.16666576976989698775683f, 0.041666554617204574203483f, 0.0083631790527225773704f,
                               0.0013926183587713494542f};
constexpr double EXP_DOUBLE[] = {0.5,
                                 0.16666666666666670991,
                                 0.041666666666666669755,
                                 0.0083333333333261351258,
                                 0.0013888888888883748305,
                                 0.00019841269874820625271,
                                 0.000024801587325547741216,
                                 2.755725540020642443e-6,
                                 2.7557273643110295328e-7,
                                 2.5105217004720745164e-8,
                                 2.0914686968086877233e-9};
// (log1p(t) - t) / t^2 on [0, 1], by powers of t - 1/2, Chebyshev interpolation.
constexpr float LOG1P_FLOAT[] = {-0.378139567567f,   0.179224561613f,   -0.0932301350984f,
                                 0.0511033199852f,   -0.0289554280212f, 0.0165080833853f,
                                 -0.00973701605871f, 0.0073592079416f,  -0.00446621160127f};
constexpr double LOG1P_DOUBLE[] = {
    -0.37813956756734247209,     0.17922493693603627464,     -0.093230366363665040888,    0.051083446105658519852,
    -0.028943183165228189435,    0.016788742470007617954,    -0.0099099007090186887274,   0.005929012347899713845,
    -0.0035856667568142699406,   0.0021876319632153701112,   -0.0013444937157557210017,   0.00083152340814907325806,
    -0.00051695759936257307159,  0.00032221611029923420111,  -0.00020204880268313708838,  0.00013056054379050491658,
    -0.000082455019444624405527, 0.000041382496613759451887, -0.000026208826056265816259, 0.000035907402357816665997,
    -0.000022938856818471437769};

template <class S>
PGDPO_INLINE Vec<S> log1p_unit(Vec<S> t) {
  const Vec<S> centred = t - Vec<S>(S(0.5));
  if constexpr (sizeof(S) == 4) {
    return t + t * t * polynomial(LOG1P_FLOAT, centred);
  } else {
    return t + t * t * polynomial(LOG1P_DOUBLE, centred);
  }
}

// exp(r) - 1, |r| <= ln2 / 2.
template <class S>
PGDPO_INLINE Vec<S> expm1_near_zero(Vec<S> r) {
  if constexpr (sizeof(S) == 4) {
    return r + r * r * polynomial(EXP_FLOAT, r);
  } else {
    return r + r * r * polynomial(EXP_DOUBLE, r);
  }
}

// The integer nearest to log2, as a number and, biased, in the low bits of `shifted`.
template <class S>
struct Power {
  Vec<S> shifted, n;

  PGDPO_INLINE explicit Power(Vec<S> log2)
      : shifted(log2 + Vec<S>(Lanes<S>::round)), n(shifted - Vec<S>(Lanes<S>::round)) {}

  // What is left of x = n ln2 + r.
  PGDPO_INLINE Vec<S> rest(Vec<S> x) const {
    return (x - n * Vec<S>(Lanes<S>::ln2_high)) - n * Vec<S>(Lanes<S>::ln2_low);
  }
};

// 2^n for a biased n in the low bits, within the exponents of normal numbers.
template <class S>
PGDPO_INLINE typename Lanes<S>::Value two_to(typename Lanes<S>::Bits biased) {
  return (typename Lanes<S>::Value)(biased << Lanes<S>::mantissa);
}

// exp(x) = 2^n exp(r), |r| <= ln2 / 2; 2^n in two factors, so that results below the normal range and above the finite
// one come out.
template <class S>
PGDPO_INLINE Vec<S> exponential(Vec<S> x) {
  using V = Vec<S>;
  using L = Lanes<S>;
  using Bits = typename L::Bits;
  x = clamp(x, V(L::exp_low), V(L::exp_high));
  const Power<S> power(x * V(S(1.44269504088896340736)));
  const V value = V(S(1)) + expm1_near_zero(power.rest(x));
  const auto n = (typename L::Mask)((Bits)power.shifted.v - (Bits)(L::round - typename L::Value{}));
  const Bits half = (Bits)(n >> 1);
  return value * V(two_to<S>(half + L::bias)) * V(two_to<S>((Bits)n - half + L::bias));
}

// exp(x) where it and its inverse are normal numbers: one factor does.
template <class S>
PGDPO_INLINE Vec<S> exp_normal(Vec<S> x) {
  const Power<S> power(x * Vec<S>(S(1.44269504088896340736)));
  const Vec<S> scale(two_to<S>((typename Lanes<S>::Bits)power.shifted.v));
  return scale + scale * expm1_near_zero(power.rest(x));
}

template <class S>
PGDPO_INLINE Vec<S> exp_cut(Vec<S> x) {
  return exp_normal(clamp(x, Vec<S>(-Lanes<S>::exp_far), Vec<S>(Lanes<S>::exp_far)));
}

template <class S>
PGDPO_INLINE Vec<S> exp_minus_absolute(Vec<S> x) {
  return exp_normal(at_least(Vec<S>(-Lanes<S>::exp_far), minus_absolute(x)));
}

template <class To, class From>
PGDPO_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

PGDPO_INLINE float decode_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h & 0x7c00u, low = h & 0x3ffu;
  if (exponent == 0) return bits_as<float>(bits_as<uint32_t>(float(low) * 0x1p-24f) | sign);
  const uint32_t bits = (uint32_t(h & 0x7fffu) << 13) + (exponent == 0x7c00u ? 0x70000000u : 0x38000000u);
  return bits_as<float>(bits | sign);
}

// Float8 e4m3: no infinities, 0x7f is NaN.
PGDPO_INLINE float decode_float8(uint8_t b) {
  const uint32_t sign = uint32_t(b & 0x80u) << 24, rest = b & 0x7fu;
  if (rest < 8) return bits_as<float>(bits_as<uint32_t>(float(rest) * 0x1p-9f) | sign);
  return bits_as<float>((rest == 0x7fu ? 0x7fc00000u : (rest << 20) + 0x3c000000u) | sign);
}

PGDPO_INLINE uint16_t encode_half(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t h;
  if (size > 0x7f800000u) {
    h = 0x7e00u;
  } else if (size >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (size < 0x38800000u) {  // below the normal range: adding 1/2 rounds to its last place, 2^-24
    h = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    h = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  return uint16_t(h | sign);
}

PGDPO_INLINE uint16_t encode_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class S>
PGDPO_INLINE S decode(int dtype, const char* at, int64_t i) {
  switch (dtype) {
    case BFLOAT16: {
      uint16_t h;
      memcpy(&h, at + 2 * i, 2);
      return S(bits_as<float>(uint32_t(h) << 16));
    }
    case FLOAT16: {
      uint16_t h;
      memcpy(&h, at + 2 * i, 2);
      return S(decode_half(h));
    }
    case FLOAT32: {
      float x;
      memcpy(&x, at + 4 * i, 4);
      return S(x);
    }
    case FLOAT64: {
      double x;
      memcpy(&x, at + 8 * i, 8);
      return S(x);
    }
    default:
      return S(decode_float8(uint8_t(at[i])));
  }
}

template <class S>
PGDPO_INLINE void encode(int dtype, char* at, int64_t i, S x) {
  switch (dtype) {
    case BFLOAT16: {
      const uint16_t h = encode_bfloat16(float(x));
      memcpy(at + 2 * i, &h, 2);
      break;
    }
    case FLOAT16: {
      const uint16_t h = encode_half(float(x));
      memcpy(at + 2 * i, &h, 2);
      break;
    }
    case FLOAT32: {
      const float y = float(x);
      memcpy(at + 4 * i, &y, 4);
      break;
    }
    default: {
      const double y = double(x);
      memcpy(at + 8 * i, &y, 8);
    }
  }
}

// `count` lanes from element i on, zeros after them.
template <class S>
PGDPO_INLINE Vec<S> load_lanes(int dtype, const char* at, int64_t i, int count) {
  typename Vec<S>::Value out = {};
  for (int lane = 0; lane < count; ++lane) out[lane] = decode<S>(dtype, at, i + lane);
  return Vec<S>(out);
}

template <class S>
PGDPO_INLINE void store_lanes(int dtype, char* at, int64_t i, int count, Vec<S> x) {
  for (int lane = 0; lane < count; ++lane) encode<S>(dtype, at, i + lane, x.v[lane]);
}

typedef uint16_t Halves __attribute__((vector_size(PGDPO_VECTOR_BYTES / 2)));
typedef uint8_t Quarters __attribute__((vector_size(PGDPO_VECTOR_BYTES / 4)));

PGDPO_INLINE Vec<float> load_float8(const char* at, int64_t i) {
  using Value = Vec<float>::Value;
  using Bits = Lanes<float>::Bits;
  Quarters bytes;
  memcpy(&bytes, at + i, sizeof(bytes));
  const Bits wide = __builtin_convertvector(bytes, Bits), rest = wide & 0x7fu;
  const Bits tiny = (Bits)(__builtin_convertvector((Lanes<float>::Mask)rest, Value) * 0x1p-9f);
  const Bits size = rest < 8u ? tiny : (rest << 20) + 0x3c000000u;
  return Vec<float>((Value)((rest == 0x7fu ? size | 0x7fc00000u : size) | ((wide & 0x80u) << 24)));
}

// 16-bit values in the upper halves of 32-bit lanes.
PGDPO_INLINE Vec<float> load_bfloat16(const char* at, int64_t i) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + 2 * i)));
  return Vec<float>((Vec<float>::Value)_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(at + 2 * i)));
  return Vec<float>((Vec<float>::Value)_mm256_slli_epi32(wide, 16));
#else
  Halves h;
  memcpy(&h, at + 2 * i, sizeof(h));
  return Vec<float>((Vec<float>::Value)(__builtin_convertvector(h, Lanes<float>::Bits) << 16));
#endif
}

// A whole vector's worth of bfloat16 from element i on, twice as many elements as a vector has: the even ones and the
// odd ones. Half the instructions of two vectors in order.
PGDPO_INLINE void load_split(const char* at, int64_t i, Vec<float>& even, Vec<float>& odd) {
  using Value = Vec<float>::Value;
  Lanes<float>::Bits words;
  memcpy(&words, at + 2 * i, sizeof(words));
  even = Vec<float>((Value)(words << 16));
  odd = Vec<float>((Value)(words & 0xffff0000u));
}

// Rounded to bfloat16 in the upper halves of the lanes; NaN stays NaN.
PGDPO_INLINE Lanes<float>::Bits rounded_to_bfloat16(Vec<float> x) {
  const auto bits = (Lanes<float>::Bits)x.v;
  return x.v == x.v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}

// load_split's inverse.
PGDPO_INLINE Lanes<float>::Bits split_words(Vec<float> even, Vec<float> odd) {
  return (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xffff0000u);
}

// A whole vector from element i on.
template <class S>
PGDPO_INLINE Vec<S> load(int dtype, const char* at, int64_t i) {
  constexpr bool single = sizeof(S) == 4;
  if constexpr (single) {
    if (dtype == BFLOAT16) return load_bfloat16(at, i);
#if defined(__AVX512F__)
    if (dtype == FLOAT16)
      return Vec<S>((typename Vec<S>::Value)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(at + 2 * i))));
#elif defined(__AVX2__)
    if (dtype == FLOAT16)
      return Vec<S>((typename Vec<S>::Value)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(at + 2 * i))));
#endif
  }
  if (dtype == (single ? FLOAT32 : FLOAT64)) {
    typename Vec<S>::Value out;
    memcpy(&out, at + sizeof(S) * i, sizeof(out));
    return Vec<S>(out);
  }
  return load_lanes<S>(dtype, at, i, Vec<S>::width);
}

template <class S>
PGDPO_INLINE void store(int dtype, char* at, int64_t i, Vec<S> x) {
  constexpr bool single = sizeof(S) == 4;
  if constexpr (single) {
    if (dtype == BFLOAT16) {
      const Halves h = __builtin_convertvector(rounded_to_bfloat16(x) >> 16, Halves);
      memcpy(at + 2 * i, &h, sizeof(h));
      return;
    }
#if defined(__AVX512F__)
    if (dtype == FLOAT16) {
      _mm256_storeu_si256((__m256i*)(at + 2 * i), _mm512_cvtps_ph((__m512)x.v, 0));
      return;
    }
#elif defined(__AVX2__)
    if (dtype == FLOAT16) {
      _mm_storeu_si128((__m128i*)(at + 2 * i), _mm256_cvtps_ph((__m256)x.v, 0));
      return;
    }
#endif
  }
  if (dtype == (single ? FLOAT32 : FLOAT64)) {
    memcpy(at + sizeof(S) * i, &x.v, sizeof(x.v));
    return;
  }
  store_lanes<S>(dtype, at, i, Vec<S>::width, x);
}

}  // namespace PGDPO_ISA
}  // namespace pgdpo
