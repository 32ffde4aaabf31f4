// The passes over video latents for sample and frame groups: errors, fold and objective, gradients, and all three in
// one launch where a call fits on chip. Partial sums are [STATISTICS, B, segments]; no atomics anywhere.
#include <cooperative_groups.h>

#include "cuda/block.cuh"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace pgdpo {
namespace cuda {
namespace {

// One block a segment. Reads predictions, targets and references once, writes 24 bytes a segment.
template <class S, int P, int ACCESS, int FORM>
__global__ void __launch_bounds__(THREADS, BLOCKS<S, ACCESS>)
    errors_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
  __shared__ S shared[STATISTICS * TEAM_WARPS];
  let_next_start();
  const int t = threadIdx.x;
  const uint32_t segments = uint32_t(x.segments);
  const Segment<S> s(x, blockIdx.x / segments, blockIdx.x % segments);
  S sums[STATISTICS];
  thread_sums<S, P, ACCESS, FORM>(s, t, call.anchor, call.cross, sums);
  team_sum(sums, shared, 0, t);
  if (t < STATISTICS) call.partial[t * x.pairs * x.segments + blockIdx.x] = team_total(shared, t);
}

template <class S>
constexpr int FOLD_BLOCK = sizeof(S) == 4 ? 1024 : 512;

template <class S>
__global__ void __launch_bounds__(FOLD_BLOCK<S>)
    fold_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
  __shared__ S shared[FOLD_BLOCK<S> / THREADS * STATISTICS * TEAM_WARPS];
  wait_for_previous();
  fold_rows<FOLD_BLOCK<S>>(x, call, shared);
}

// One block a segment, from the last to the first: the error pass ended on the last, so those are still in the L2.
// Reads predictions and targets once (and the chosen reference for the anchor), writes each gradient once.
template <class S, int P, int ACCESS, int FORM>
__global__ void __launch_bounds__(THREADS, BLOCKS<S, ACCESS>)
    gradient_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<S> call) {
  const uint32_t segments = uint32_t(x.segments), item = gridDim.x - 1 - blockIdx.x;
  const Segment<S> s(x, item / segments, item % segments);
  const int64_t rows = x.pairs * x.groups, row = s.pair * x.groups + item % segments % uint32_t(x.groups);
  const S incoming = call.incoming == nullptr ? S(1) : *call.incoming;
  const Coefficients<S> c = {incoming * call.coefficients[row], incoming * call.coefficients[rows + row],
                             incoming * call.coefficients[2 * rows + row]};
  thread_gradients<S, P, ACCESS, FORM>(s, threadIdx.x, c, call.gradient);
}

// Copies `bytes` of a segment into shared memory without passing through registers; WIDTH elements a thread and step,
// the ones it will read itself, so waiting for its own copies is enough.
template <int WIDTH>
__device__ inline char* hold(char* to, View& from, int count, int t, int region) {
  if (region == 0) return to;
  const int bytes = WIDTH * size_of(from.dtype);
#pragma unroll 1
  for (int at = t * WIDTH; at < count; at += THREADS * WIDTH) {
    const int offset = at / WIDTH * bytes;
    const uint32_t target = uint32_t(__cvta_generic_to_shared(to + offset));
    if (bytes >= 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from.data + offset) : "memory");
      if (bytes == 32)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + 16), "l"(from.data + offset + 16)
                     : "memory");
    } else if (bytes == 8) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(from.data + offset) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(from.data + offset) : "memory");
    }
  }
  from.data = to;
  return to + region;
}

// The views of a segment moved to where they are held, copying them there when COPY.
template <int WIDTH, bool COPY>
__device__ inline void move_to_held(const Held& held, Segment<float>& s, char* to, int t) {
  View* views[6] = {&s.policy[0], &s.policy[1], &s.target[0], &s.target[1], &s.noise, &s.reference[0]};
  const int regions[6] = {held.policy[0], held.policy[1], held.target[0], held.target[1], held.noise, held.reference};
#pragma unroll
  for (int k = 0; k < 6; ++k) {
    if (COPY) {
      View from = *views[k];
      to = hold<WIDTH>(to, from, s.count, t, regions[k]);
    } else if (regions[k] != 0) {
      views[k]->data = to;
      to += regions[k];
    }
  }
}

// Errors, objective and gradients in one cooperative launch, one block a multiprocessor: `slots` segments each are read
// once into shared memory, the sums of all are awaited at a grid barrier, and the gradients come from shared memory.
// Sums are those of errors_kernel, bit for bit.
template <int P, int FORM>
__global__ void __launch_bounds__(ONE_TOUCH_THREADS)
    one_touch_kernel(const __grid_constant__ Pair x, const __grid_constant__ Call<float> call, int slots) {
  constexpr int TEAMS = ONE_TOUCH_THREADS / THREADS, WIDTH = width_of(P);
  extern __shared__ __align__(16) char latents[];
  __shared__ float shared[TEAMS * STATISTICS * TEAM_WARPS];
  __shared__ Coefficients<float> row_coefficients[TEAMS];
  const int team = threadIdx.x / THREADS, t = threadIdx.x % THREADS;
  float* mine = shared + team * STATISTICS * TEAM_WARPS;
  const uint32_t segments = uint32_t(x.segments), items = uint32_t(x.pairs) * segments;
  const uint32_t first = blockIdx.x * slots;
  const int here = min(uint32_t(slots), items - first);
  const Held held(x, call.anchor);
  const int item_bytes = held.bytes();

#pragma unroll 1
  for (int slot = team; slot < here; slot += TEAMS) {
    Segment<float> s(x, (first + slot) / segments, (first + slot) % segments);
    move_to_held<WIDTH, true>(held, s, latents + slot * item_bytes, t);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
  for (int slot = team; slot < here; slot += TEAMS) {
    const uint32_t item = first + slot;
    Segment<float> s(x, item / segments, item % segments);
    const View reference = s.reference[0];
    move_to_held<WIDTH, false>(held, s, latents + slot * item_bytes, t);
    s.reference[0] = reference;
    float sums[STATISTICS];
    thread_sums<float, P, SAME, FORM, SHARED>(s, t, call.anchor, call.cross, sums);
    team_sum(sums, mine, team, t);
    if (t < STATISTICS) call.partial[uint64_t(t) * items + item] = team_total(mine, t);
    team_barrier(team);
  }

  cooperative_groups::this_grid().sync();

  const float incoming = call.incoming == nullptr ? 1.0f : *call.incoming;
  int64_t known = -1;
#pragma unroll 1
  for (int slot = team; slot < here; slot += TEAMS) {
    const uint32_t item = first + slot;
    const int64_t row = int64_t(item / segments) * x.groups + item % segments % uint32_t(x.groups);
    if (row != known) {
      float sums[STATISTICS], ignored = 0.0f;
      team_barrier(team);
      if (x.groups == 1) {
        thread_fold(call.partial, x.pairs, x.segments, x.groups, row, t, THREADS, sums);
        team_sum(sums, mine, team, t);
#pragma unroll
        for (int k = 0; k < STATISTICS; ++k) sums[k] = team_total(mine, k);
      } else if (t == 0) {
        thread_fold(call.partial, x.pairs, x.segments, x.groups, row, 0, 1, sums);
      }
      if (t == 0) {
        Coefficients<float> c = finish_row(x, call, row, sums, true, ignored);
        row_coefficients[team] = {incoming * c.chosen, incoming * c.rejected, incoming * c.anchor};
      }
      team_barrier(team);
      known = row;
    }
    const Coefficients<float> c = row_coefficients[team];
    Segment<float> s(x, item / segments, item % segments);
    move_to_held<WIDTH, false>(held, s, latents + slot * item_bytes, t);
    if (FORM != REFERENCE_NONE && call.anchor)
      thread_gradients<float, P, SAME, FORM, SHARED>(s, t, c, call.gradient);
    else
      thread_gradients<float, P, SAME, REFERENCE_NONE, SHARED>(s, t, c, call.gradient);
  }
  if (blockIdx.x == gridDim.x - 1) {  // the one that may hold fewer segments
    __syncthreads();
    fold_rows<ONE_TOUCH_THREADS>(x, call, shared);
  }
}

unsigned blocks(const Pair& x) {
  return unsigned(x.pairs * x.segments);
}

}  // namespace

template <class S>
cudaError_t launch_fold_errors(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream) {
  return launch_fold(fold_kernel<S>, FOLD_BLOCK<S>, x, call, device, stream);
}

template <class S>
cudaError_t launch_errors(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream) {
  with_errors<S>(x, [&](auto policy, auto access, auto form) {
    errors_kernel<S, decltype(policy)::value, decltype(access)::value, decltype(form)::value>
        <<<blocks(x), THREADS, 0, stream>>>(x, call);
  });
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : launch_fold_errors(x, call, device, stream);
}

template <class S>
cudaError_t launch_gradients(const Pair& x, const Call<S>& call, cudaStream_t stream) {
  with_gradients<S>(x, call, [&](auto policy, auto access, auto form) {
    gradient_kernel<S, decltype(policy)::value, decltype(access)::value, decltype(form)::value>
        <<<blocks(x), THREADS, 0, stream>>>(x, call);
  });
  return cudaGetLastError();
}

cudaError_t launch_one_touch(const Pair& x, const Call<float>& call, const OneTouch& plan, cudaStream_t stream) {
  const void* kernel = nullptr;
  with_one_touch(x, [&](auto policy, auto form) {
    kernel = reinterpret_cast<const void*>(one_touch_kernel<decltype(policy)::value, decltype(form)::value>);
  });
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  int slots = plan.slots;
  void* arguments[] = {const_cast<Pair*>(&x), const_cast<Call<float>*>(&call), &slots};
  return cudaLaunchCooperativeKernel(kernel, dim3(plan.blocks), dim3(ONE_TOUCH_THREADS), arguments, plan.shared_bytes,
                                     stream);
}

template cudaError_t launch_errors<float>(const Pair&, const Call<float>&, const Device&, cudaStream_t);
template cudaError_t launch_errors<double>(const Pair&, const Call<double>&, const Device&, cudaStream_t);
template cudaError_t launch_fold_errors<float>(const Pair&, const Call<float>&, const Device&, cudaStream_t);
template cudaError_t launch_fold_errors<double>(const Pair&, const Call<double>&, const Device&, cudaStream_t);
template cudaError_t launch_gradients<float>(const Pair&, const Call<float>&, cudaStream_t);
template cudaError_t launch_gradients<double>(const Pair&, const Call<double>&, cudaStream_t);

}  // namespace cuda
}  // namespace pgdpo
