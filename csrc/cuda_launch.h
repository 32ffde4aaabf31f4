// The launches of pair.cu and element.cu as the operators see them. Each enqueues on `stream` of the current device,
// returns the first error and never synchronizes.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_pair.h"
#include "cuda_plan.h"

namespace pgdpo {
namespace cuda {

struct Device {
  int multiprocessors, shared_limit, major;
};

template <class S>
cudaError_t launch_errors(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream);
template <class S>
cudaError_t launch_gradients(const Pair& x, const Call<S>& call, cudaStream_t stream);
template <class S>
cudaError_t launch_elements(const Pair& x, const Call<S>& call, cudaStream_t stream);
template <class S>
cudaError_t launch_fold_elements(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream);
cudaError_t launch_one_touch(const Pair& x, const Call<float>& call, const OneTouch& plan, cudaStream_t stream);

}  // namespace cuda
}  // namespace pgdpo
