// The CUDA operators with their launches run by the host: the same choice of the kernel, the same per-thread code, one
// thread after the other. What only a GPU can show (memory order, barriers, speed) is not in
// here.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/pack.h"

// The little of the CUDA runtime that operators call themselves.
extern "C" const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}

namespace pgdpo {
namespace cuda {
namespace {

// One block of pack_kernel. Lanes in step: each exchange of the kernel is a loop over the offsets of its shuffles.
template <class S, int P, bool VECTORS>
void pack_segment(const Pair& x, const Packed& out, const Segment<S>& s) {
  constexpr int WIDTH = width_of(P), LANES = PACK_BLOCK / WIDTH;
  for (int base = 0; base < s.count; base += THREADS * WIDTH) {
    float residual[THREADS][2][WIDTH];
    for (int t = 0; t < THREADS; ++t) lane_residuals<S, P, VECTORS>(s, base + t * WIDTH, residual[t]);
    for (int side = 0; side < 2; ++side) {
      uint32_t words[THREADS][WIDTH / 4] = {};
      for (int first = 0; out.rows[side].dtype == FLOAT8 && first < THREADS; first += LANES) {
        uint32_t largest = 0;
        for (int t = first; t < first + LANES; ++t) largest = std::max(largest, lane_largest(residual[t][side]));
        const float scale = first_scale(bits_float(largest));
        float wanted[LANES], kept[LANES];
        for (int lane = 0; lane < LANES; ++lane)
          lane_bytes(residual[first + lane][side], scale, words[first + lane], wanted[lane], kept[lane]);
        for (int offset = 1; offset < LANES; offset *= 2)
          for (int lane = 0; lane < LANES; lane += 2 * offset) {
            wanted[lane] += wanted[lane + offset];
            kept[lane] += kept[lane + offset];
          }
        const int at = base + first * WIDTH;
        const MutableRows& scales = out.scale[side];
        if (at < s.count)
          reinterpret_cast<float*>(scales.data)[s.pair * scales.stride + (s.start + at) / PACK_BLOCK] =
              corrected_scale(scale, wanted[0], kept[0]);
      }
      for (int t = 0; t < THREADS; ++t)
        if (base + t * WIDTH < s.count)
          put_row<WIDTH, VECTORS>(out.rows[side], x, s.pair, s.start + base + t * WIDTH, residual[t][side], words[t]);
    }
  }
}

}  // namespace

Current::Current(int) : multiprocessors(132) {}
Current::~Current() {}

void* device_address(const void* pointer) {
  return const_cast<void*>(pointer);
}

template <class S>
cudaError_t launch_pack(const Pair& x, const Packed& out, cudaStream_t) {
  with_pack<S>(x, out, [&](auto dtype, auto vectors) {
    for (int64_t block = 0; block < x.pairs * x.segments; ++block)
      pack_segment<S, decltype(dtype)::value, decltype(vectors)::value>(
          x, out, Segment<S>(x, block / x.segments, block % x.segments));
  });
  return cudaSuccess;
}

cudaError_t launch_gather(const Gather& x, int, cudaStream_t) {
  for (int i = 0; i < x.count; ++i)
    for (int k = 0; k < x.tables; ++k) memcpy(x.to[k] + i * x.bytes[k], x.from[k] + x.rows[i] * x.bytes[k], x.bytes[k]);
  return cudaSuccess;
}

template cudaError_t launch_pack<float>(const Pair&, const Packed&, cudaStream_t);
template cudaError_t launch_pack<double>(const Pair&, const Packed&, cudaStream_t);

}  // namespace cuda
}  // namespace pgdpo
