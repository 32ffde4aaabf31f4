// The device and stream torch is on, for the launches of the CUDA operators.
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <memory>

#include "cuda/launch.h"

namespace pgdpo {
namespace cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device: ", cudaGetErrorString(error));
}

}  // namespace

Current::Current(int device_index) {
  auto made = std::make_unique<DeviceGuard>(device_index);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_index));
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &current));
  stream = static_cast<cudaStream_t>(current);
  guard = made.release();
}

Current::~Current() {
  delete static_cast<DeviceGuard*>(guard);
}

void* device_address(const void* pointer) {
  cudaPointerAttributes attributes;
  check(cudaPointerGetAttributes(&attributes, pointer));
  return attributes.type == cudaMemoryTypeUnregistered ? nullptr : attributes.devicePointer;
}

}  // namespace cuda
}  // namespace pgdpo
