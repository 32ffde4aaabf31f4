// The reference cache on the device: predictions to rows in one pass, written where they are kept (pinned
// host memory included), and the rows of a batch brought back in one launch.
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace pgdpo {
namespace cuda {
namespace {

// One block per segment. Reads predictions and targets once, writes rows and scales once. Six blocks fit on a
// multiprocessor; left alone the assembler goes for eight, and spills on sm_80.
template <class S, int P, bool VECTORS>
__global__ void __launch_bounds__(THREADS, 6)
    pack_kernel(const __grid_constant__ Pair x, const __grid_constant__ Packed out) {
  constexpr int WIDTH = width_of(P), LANES = PACK_BLOCK / WIDTH;
  const int t = threadIdx.x;
  const uint32_t segments = uint32_t(x.segments);
  const Segment<S> s(x, blockIdx.x / segments, blockIdx.x % segments);
#pragma unroll 1
  for (int base = 0; base < s.count; base += THREADS * WIDTH) {  // the whole warp comes, its lanes exchange
    const int at = base + t * WIDTH;
    float residual[2][WIDTH];
    lane_residuals<S, P, VECTORS>(s, at, residual);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      uint32_t words[WIDTH / 4] = {};
      if (out.rows[side].dtype == FLOAT8) {
        uint32_t largest = lane_largest(residual[side]);
#pragma unroll
        for (int offset = 1; offset < LANES; offset *= 2)
          largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        const float scale = first_scale(bits_float(largest));
        float wanted, kept;
        lane_bytes(residual[side], scale, words, wanted, kept);
#pragma unroll
        for (int offset = 1; offset < LANES; offset *= 2) {
          wanted = exact_add(wanted, __shfl_xor_sync(0xffffffffu, wanted, offset));
          kept = exact_add(kept, __shfl_xor_sync(0xffffffffu, kept, offset));
        }
        if (at < s.count && t % LANES == 0) {
          const MutableRows& scales = out.scale[side];
          reinterpret_cast<float*>(scales.data)[s.pair * scales.stride + (s.start + at) / PACK_BLOCK] =
              corrected_scale(scale, wanted, kept);
        }
      }
      if (at < s.count) put_row<WIDTH, VECTORS>(out.rows[side], x, s.pair, s.start + at, residual[side], words);
    }
  }
}

// Row blockIdx.y of the batch, all tables: 16 bytes per thread and step where everything is aligned. Reads of pinned
// memory take microseconds, so many are in flight.
__global__ void __launch_bounds__(256) gather_kernel(const __grid_constant__ Gather x) {
  const int64_t row = x.rows[blockIdx.y];
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int k = 0; k < x.tables; ++k) {
    const char* from = x.from[k] + row * x.bytes[k];
    char* to = x.to[k] + int64_t(blockIdx.y) * x.bytes[k];
    if (x.vectors[k]) {
      const int64_t units = x.bytes[k] / 16;
#pragma unroll 4
      for (int64_t i = first; i < units; i += step)
        reinterpret_cast<uint4*>(to)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    } else {
      for (int64_t i = first; i < x.bytes[k]; i += step) to[i] = from[i];
    }
  }
}

}  // namespace

template <class S>
cudaError_t launch_pack(const Pair& x, const Packed& out, cudaStream_t stream) {
  with_pack<S>(x, out, [&](auto dtype, auto vectors) {
    pack_kernel<S, decltype(dtype)::value, decltype(vectors)::value>
        <<<unsigned(x.pairs * x.segments), THREADS, 0, stream>>>(x, out);
  });
  return cudaGetLastError();
}

cudaError_t launch_gather(const Gather& x, int multiprocessors, cudaStream_t stream) {
  int64_t most = 0;
  for (int k = 0; k < x.tables; ++k) most = x.bytes[k] > most ? x.bytes[k] : most;
  const int64_t wanted = (most / 16 + 255) / 256, share = (4 * multiprocessors + x.count - 1) / x.count;
  const int64_t blocks = wanted < share ? wanted : share;
  gather_kernel<<<dim3(unsigned(blocks > 0 ? blocks : 1), unsigned(x.count)), 256, 0, stream>>>(x);
  return cudaGetLastError();
}

template cudaError_t launch_pack<float>(const Pair&, const Packed&, cudaStream_t);
template cudaError_t launch_pack<double>(const Pair&, const Packed&, cudaStream_t);

}  // namespace cuda
}  // namespace pgdpo
