// Element granularity: every latent element is its own group, so the objective runs inside the pass over the latents.
//
// A pointwise objective needs one pass: each operand read once, each gradient written once for an incoming gradient of
// 1, partial sums [ELEMENT_SUMS, B, segments] of the telemetry beside them. The backward launch returns at once when
// the incoming gradient is 1 and writes the gradients again when it is not. With `outer` the gradients need the video's
// means, hence a pass of their own.
#include "cuda/block.cuh"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace pgdpo {
namespace cuda {
namespace {

template <class S, int P, int ACCESS, int KIND>
__global__ void __launch_bounds__(THREADS, BLOCKS<S, ACCESS>)
    elements_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
  __shared__ S shared[ELEMENT_SUMS * TEAM_WARPS];
  let_next_start();
  const S incoming = call.incoming == nullptr ? S(1) : *call.incoming;
  if (call.speculative && incoming == S(1)) return;
  const int t = threadIdx.x;
  const uint32_t segments = uint32_t(x.segments);
  const Segment<S> s(x, blockIdx.x / segments, blockIdx.x % segments);
  S sums[ELEMENT_SUMS];
  thread_elements<S, P, ACCESS, KIND>(x, call, s, t, incoming, sums);
  if (KIND == OUTER_GRADIENTS || call.partial == nullptr) return;
  team_sum(sums, shared, 0, t);
  if (t < ELEMENT_SUMS) call.partial[t * x.pairs * x.segments + blockIdx.x] = team_total(shared, t);
}

constexpr int FOLD_BLOCK = 512;

// One block, one team a pair.
template <class S>
__global__ void __launch_bounds__(FOLD_BLOCK)
    fold_elements_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
  __shared__ S shared[FOLD_BLOCK / THREADS * ELEMENT_SUMS * TEAM_WARPS];
  wait_for_previous();
  const int team = threadIdx.x / THREADS, t = threadIdx.x % THREADS;
  S* mine = shared + team * ELEMENT_SUMS * TEAM_WARPS;
  S total = S(0), sums[ELEMENT_SUMS];
  for (int64_t pair = team; pair < x.pairs; pair += FOLD_BLOCK / THREADS) {
    thread_fold(call.partial, x.pairs, x.segments, 1, pair, t, THREADS, sums);
    team_sum(sums, mine, team, t);
    if (t == 0) {
#pragma unroll
      for (int k = 0; k < ELEMENT_SUMS; ++k) sums[k] = team_total(mine, k);
      total += finish_elements(x, call, pair, sums);
    }
    team_barrier(team);
  }
  total = block_total<FOLD_BLOCK>(total);
  if (threadIdx.x == 0) *call.loss = total / S(x.pairs);
}

}  // namespace

template <class S>
cudaError_t launch_elements(const Pair& x, const Call<S>& call, cudaStream_t stream) {
  with_elements<S>(x, call, [&](auto policy, auto access, auto kind) {
    elements_kernel<S, decltype(policy)::value, decltype(access)::value, decltype(kind)::value>
        <<<unsigned(x.pairs * x.segments), THREADS, 0, stream>>>(x, call);
  });
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_fold_elements(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream) {
  return launch_fold(fold_elements_kernel<S>, FOLD_BLOCK, x, call, device, stream);
}

template cudaError_t launch_elements<float>(const Pair&, const Call<float>&, cudaStream_t);
template cudaError_t launch_elements<double>(const Pair&, const Call<double>&, cudaStream_t);
template cudaError_t launch_fold_elements<float>(const Pair&, const Call<float>&, const Device&, cudaStream_t);
template cudaError_t launch_fold_elements<double>(const Pair&, const Call<double>&, const Device&, cudaStream_t);

}  // namespace cuda
}  // namespace pgdpo
