// Element granularity: every latent element is its own group, so the objective runs inside the pass over the latents.
//
// A pointwise objective needs one pass: each operand read once, each gradient written once for an incoming gradient of 1,
// partial sums [ELEMENT_SUMS, B, segments] of the telemetry beside them. The backward launch returns at once when the
// incoming gradient is 1 and writes the gradients again when it is not. With `outer` the gradients need the video's means,
// hence a pass of their own.
#include "cuda_block.cuh"
#include "cuda_launch.h"

namespace pgdpo {
namespace cuda {
namespace {

template <class S, int P, int ACCESS, int KIND>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 4 ? 4 : 1) elements_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
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
__global__ void __launch_bounds__(FOLD_BLOCK) fold_elements_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
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

template <class S>
using Kernel = void (*)(Pair, Call<S>);

// The two objectives of everyday use have kernels of their own; one kernel holds the others.
template <class S, int P, int ACCESS>
Kernel<S> elements_of(const Call<S>& call) {
  if (call.outer && call.gradient[0].data != nullptr) return elements_kernel<S, P, ACCESS, OUTER_GRADIENTS>;
  switch (call.kind) {
    case KIND_DPO:
      return elements_kernel<S, P, ACCESS, KIND_DPO>;
    case KIND_PGDPO:
      return elements_kernel<S, P, ACCESS, KIND_PGDPO>;
    default:
      return elements_kernel<S, P, ACCESS, ANY>;
  }
}

template <int P>
Kernel<float> elements_of(Access access, const Call<float>& call) {
  return access == SCALAR ? elements_of<float, P, SCALAR>(call) : elements_of<float, P, MIXED>(call);
}

}  // namespace

template <class S>
cudaError_t launch_elements(const Pair& x, const Call<S>& call, cudaStream_t stream) {
  Kernel<S> kernel;
  if constexpr (sizeof(S) == 8) {
    kernel = elements_of<double, FLOAT64, SCALAR>(call);
  } else {
    const Access access = access_of(x, true, call.gradient);
    kernel = x.policy[0].dtype == BFLOAT16  ? elements_of<BFLOAT16>(access, call)
             : x.policy[0].dtype == FLOAT16 ? elements_of<FLOAT16>(access, call)
                                            : elements_of<FLOAT32>(access, call);
  }
  kernel<<<unsigned(x.pairs * x.segments), THREADS, 0, stream>>>(x, call);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_fold_elements(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = FOLD_BLOCK;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, fold_elements_kernel<S>, x, call);
}

template cudaError_t launch_elements<float>(const Pair&, const Call<float>&, cudaStream_t);
template cudaError_t launch_elements<double>(const Pair&, const Call<double>&, cudaStream_t);
template cudaError_t launch_fold_elements<float>(const Pair&, const Call<float>&, const Device&, cudaStream_t);
template cudaError_t launch_fold_elements<double>(const Pair&, const Call<double>&, const Device&, cudaStream_t);

}  // namespace cuda
}  // namespace pgdpo
