// The CUDA operators as torch sees them, on LibTorch's stable ABI: `pack` and `gather_rows` of the reference cache, a
// library of its own beside the CPU one. Memory comes from torch's caching allocator, work goes to the current stream,
// nothing synchronizes. Rows and tables may lie in pinned host memory, which torch does not know to be in use: the
// caller keeps those tensors until the launch is done (pgdpo_fast/backends/native.py).
#include "cuda/launch.h"
#include "operands.h"

// Tests register the same operators elsewhere, over kernels that run on the host.
#if !defined(PGDPO_NAMESPACE)
#define PGDPO_NAMESPACE pgdpo_fast_native
#define PGDPO_CUDA CUDA
#endif

namespace pgdpo {
namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

char* reachable(const char* data, const char* name) {
  void* address = cuda::device_address(data);
  STD_TORCH_CHECK(address != nullptr, name,
                  ": expected CUDA tensors or pinned host memory, see torch.Tensor.pin_memory");
  return static_cast<char*>(address);
}

// Residuals q - y of predictions q (in the policy's place) as rows of the reference cache, in one pass.
void pack(PGDPO_OPERANDS, Tensor chosen, Tensor rejected, MaybeTensor chosen_scale, MaybeTensor rejected_scale,
          int64_t length) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, {REFERENCE_NONE, 1, length});
  STD_TORCH_CHECK(length % PACK_BLOCK == 0 || length == x.pair.numel, "length: expected a multiple of ", PACK_BLOCK,
                  ", got ", length);
  STD_TORCH_CHECK(x.all_segments() <= std::numeric_limits<int>::max(), "batch: ", x.pair.pairs, " pairs of ",
                  x.pair.segments, " segments are more than one launch can hold");
  if (x.pair.built_target)
    STD_TORCH_CHECK(x.pair.target_scale.dtype == (x.float64 ? FLOAT64 : FLOAT32),
                    "target_scale: expected the accumulation dtype");
  Packed out = packed_of(x, chosen, rejected, chosen_scale, rejected_scale, [](const Tensor&) {});
  for (int side = 0; side < 2; ++side) {
    out.rows[side].data = reachable(out.rows[side].data, "packed rows");
    if (out.scale[side].data != nullptr) out.scale[side].data = reachable(out.scale[side].data, "scales");
  }
  check((x.float64 ? cuda::launch_pack<double> : cuda::launch_pack<float>)(x.pair, out, on.stream), "pack");
}

void gather_rows(std::vector<Tensor> tables, std::vector<int64_t> rows, std::vector<Tensor> out) {
  const std::vector<RowCopy> copies = row_copies(tables, rows, out);
  for (const Tensor& x : out) STD_TORCH_CHECK(same_device(x, out[0]), "out: expected tensors on one device");
  const cuda::Current on(out[0].get_device_index());
  for (size_t table = 0; table < copies.size(); table += cuda::Gather::TABLES) {
    for (size_t row = 0; row < rows.size(); row += cuda::Gather::ROWS) {
      cuda::Gather x;
      for (size_t k = table; k < copies.size() && x.tables < cuda::Gather::TABLES; ++k, ++x.tables) {
        x.from[x.tables] = reachable(copies[k].from, "tables");
        x.to[x.tables] = reachable(copies[k].to, "out") + row * copies[k].bytes;
        x.bytes[x.tables] = copies[k].bytes;
        x.vectors[x.tables] = copies[k].bytes % 16 == 0 && reinterpret_cast<uintptr_t>(x.from[x.tables]) % 16 == 0 &&
                              reinterpret_cast<uintptr_t>(x.to[x.tables]) % 16 == 0;
      }
      for (size_t i = row; i < rows.size() && x.count < cuda::Gather::ROWS; ++i, ++x.count) x.rows[x.count] = rows[i];
      check(cuda::launch_gather(x, on.multiprocessors, on.stream), "gather_rows");
    }
  }
}

STABLE_TORCH_LIBRARY_IMPL(PGDPO_NAMESPACE, PGDPO_CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
}

}  // namespace
}  // namespace pgdpo
