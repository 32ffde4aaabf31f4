// The device and stream torch is on, for the launches of the CUDA operators.
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <mutex>

#include "cuda/launch.h"

namespace pgdpo {
namespace cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device: ", cudaGetErrorString(error));
}

const Device& properties(int index) {
  constexpr int DEVICES = 64;
  static std::once_flag asked[DEVICES];
  static Device known[DEVICES];
  STD_TORCH_CHECK(index >= 0 && index < DEVICES, "expected a CUDA device index below ", DEVICES, ", got ", index);
  std::call_once(asked[index], [index] {
    Device& d = known[index];
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&d.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index));
  });
  return known[index];
}

}  // namespace

Current::Current(int device_index) : device(properties(device_index)) {
  auto made = std::make_unique<DeviceGuard>(device_index);
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &current));
  stream = static_cast<cudaStream_t>(current);
  guard = made.release();
}

void* device_address(const void* pointer) {
  cudaPointerAttributes attributes;
  check(cudaPointerGetAttributes(&attributes, pointer));
  return attributes.type == cudaMemoryTypeUnregistered ? nullptr : attributes.devicePointer;
}

Current::~Current() {
  delete static_cast<DeviceGuard*>(guard);
}

}  // namespace cuda
}  // namespace pgdpo
