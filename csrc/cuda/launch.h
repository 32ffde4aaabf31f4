// The launches of cache.cu as the operators see them. Each enqueues on `stream` of the current device, returns the
// first error and never synchronizes.
#pragma once

#include <cuda_runtime_api.h>

#include "cache.h"

namespace pgdpo {
namespace cuda {

// Makes a device current for as long as it lives, with what launches need to know of it. Throws when there is none.
struct Current {
  explicit Current(int device_index);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  int multiprocessors = 0;
  cudaStream_t stream = nullptr;
  void* guard = nullptr;
};

// The address at which the current device reads `pointer`: its own memory, or pinned host memory. Null for anything
// else.
void* device_address(const void* pointer);

// Rows of predictions (x.policy); residuals are made in S.
template <class S>
cudaError_t launch_pack(const Pair& x, const Packed& out, cudaStream_t stream);

// Rows `rows` of up to TABLES tables, copied to consecutive rows; one launch.
struct Gather {
  static constexpr int TABLES = 4, ROWS = 64;
  const char* from[TABLES];
  char* to[TABLES];
  int64_t bytes[TABLES], rows[ROWS];
  bool vectors[TABLES];
  int tables = 0, count = 0;
};
cudaError_t launch_gather(const Gather& x, int multiprocessors, cudaStream_t stream);

}  // namespace cuda
}  // namespace pgdpo
