// Sums across the threads of a block, in a fixed tree. A team is THREADS threads that work on one segment.
#pragma once

#include "cuda/launch.h"

namespace pgdpo {
namespace cuda {

constexpr int TEAM_WARPS = THREADS / 32;

// Blocks of THREADS a multiprocessor must hold at once, so at most 128 registers a thread for vectors of any dtype and
// 168 for single values; 0 leaves it to the compiler, which then uses fewest. float64 is not made for speed.
template <class S, int ACCESS>
constexpr int BLOCKS = sizeof(S) == 8    ? 1
                       : ACCESS == SAME  ? 0
                       : ACCESS == MIXED ? 4
                                         : 3;

__device__ inline void team_barrier(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(THREADS) : "memory");
}

// Adds PLANES values over the threads of a team. Afterwards team_total(k) is plane k's sum, in every thread, until the
// team's next team_barrier.
template <class S, int PLANES>
__device__ inline void team_sum(const S (&mine)[PLANES], S* shared, int team, int t) {
#pragma unroll
  for (int k = 0; k < PLANES; ++k) {
    S x = mine[k];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (t % 32 == 0) shared[k * TEAM_WARPS + t / 32] = x;
  }
  team_barrier(team);
}

template <class S>
__device__ inline S team_total(const S* shared, int plane) {
  const S* x = shared + plane * TEAM_WARPS;
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// Sum over a whole block of BLOCK threads, valid in thread 0. All threads must come.
template <int BLOCK, class S>
__device__ inline S block_total(S x) {
  __shared__ S warps[BLOCK / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  S total = S(0);
  if (threadIdx.x == 0)
    for (int i = 0; i < BLOCK / 32; ++i) total += warps[i];
  return total;
}

// Programmatic dependent launch: the next kernel may be set up while this one runs, and waits here for its results.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The fold of every group by one block: telemetry, coefficients and loss, or the means alone. One team a row when the
// group is the whole video (up to 512 runs), else one thread a row (as many runs as channels).
template <int BLOCK, class S>
__device__ inline void fold_rows(const Pair& x, const Call<S>& call, S* shared) {
  const bool teams = x.groups == 1;
  const int team = threadIdx.x / THREADS, t = threadIdx.x % THREADS;
  const int64_t rows = x.pairs * x.groups;
  S* mine = shared + team * STATISTICS * TEAM_WARPS;
  S total = S(0), sums[STATISTICS];
#pragma unroll 1
  for (int64_t row = teams ? team : threadIdx.x; row < rows; row += teams ? BLOCK / THREADS : BLOCK) {
    thread_fold(call.partial, x.pairs, x.segments, x.groups, row, teams ? t : 0, teams ? THREADS : 1, sums);
    if (teams) {
      team_sum(sums, mine, team, t);
#pragma unroll
      for (int k = 0; k < STATISTICS; ++k) sums[k] = team_total(mine, k);
      team_barrier(team);
    }
    if (!teams || t == 0) finish_row(x, call, row, sums, false, total);
  }
  total = block_total<BLOCK>(total);
  if (threadIdx.x == 0 && call.kind >= 0) *call.loss = total / S(rows);
}

// A fold is one block, set up while the pass before it runs where the device can (sm_90 on).
template <class S, class Kernel>
inline cudaError_t launch_fold(Kernel kernel, int threads, const Pair& x, const Call<S>& call, const Device& device,
                               cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, x, call);
}

}  // namespace cuda
}  // namespace pgdpo
