// The launches of the .cu files as the operators see them. Each enqueues on `stream` of the current device,
// returns the first error and never synchronizes.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan.h"

namespace pgdpo {
namespace cuda {

struct Device {
  int multiprocessors = 0, shared_limit = 0, major = 0;
};

// Makes a device current for as long as it lives, with what launches need to know of it. Throws when there is none.
struct Current {
  explicit Current(int device_index);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  Device device;
  cudaStream_t stream = nullptr;
  void* guard = nullptr;
};

// Partial sums and their fold; the fold alone, for sums made elsewhere.
template <class S>
cudaError_t launch_errors(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream);
template <class S>
cudaError_t launch_fold_errors(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream);
template <class S>
cudaError_t launch_gradients(const Pair& x, const Call<S>& call, cudaStream_t stream);
template <class S>
cudaError_t launch_elements(const Pair& x, const Call<S>& call, cudaStream_t stream);
template <class S>
cudaError_t launch_fold_elements(const Pair& x, const Call<S>& call, const Device& device, cudaStream_t stream);
template <class S>
cudaError_t launch_pack(const Pair& x, const Call<S>& call, const Packed& out, const Device& device,
                        cudaStream_t stream);

// Rows `rows` of up to TABLES tables, copied to consecutive rows; one launch.
struct Gather {
  static constexpr int TABLES = 4, ROWS = 64;
  const char* from[TABLES];
  char* to[TABLES];
  int64_t bytes[TABLES], rows[ROWS];
  bool vectors[TABLES];
  int tables = 0, count = 0;
};
cudaError_t launch_gather(const Gather& x, const Device& device, cudaStream_t stream);

// The address at which the current device reads `pointer`: its own memory, or pinned host memory. Null for anything
// else.
void* device_address(const void* pointer);

cudaError_t launch_one_touch(const Pair& x, const Call<float>& call, const OneTouch& plan, cudaStream_t stream);

}  // namespace cuda
}  // namespace pgdpo
