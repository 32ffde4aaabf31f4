// The CUDA operators as torch sees them, on LibTorch's stable ABI. A library of its own beside the CPU one, whose schemas
// it shares where both have the operator; scratch memory comes from torch's caching allocator, work goes to the current
// stream, nothing synchronizes, so every operator can be captured into a CUDA graph.
#include "cuda_launch.h"
#include "operands.h"

// Tests register the same operators elsewhere, over kernels that run on the host.
#if !defined(PGDPO_NAMESPACE)
#define PGDPO_NAMESPACE pgdpo_fast_native
#define PGDPO_CUDA CUDA
#endif

namespace pgdpo {
namespace {

using cuda::Call;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

template <class S>
constexpr ScalarType SCALAR_TYPE = sizeof(S) == 4 ? ScalarType::Float : ScalarType::Double;

// Contiguous numbers in the accumulation type, read or written where they are: no copy, no synchronization.
template <class S>
S* numbers(const Tensor& x, const char* name, const Tensor& like, int64_t count) {
  STD_TORCH_CHECK(same_device(x, like) && x.is_contiguous() && x.numel() == count && x.scalar_type() == SCALAR_TYPE<S>,
                  name, ": expected ", count, " contiguous ", sizeof(S) == 4 ? "float32" : "float64",
                  " numbers on the prediction's device");
  return static_cast<S*>(x.mutable_data_ptr());
}

template <class S>
const S* numbers(const MaybeTensor& x, const char* name, const Tensor& like, int64_t count) {
  return x ? numbers<S>(*x, name, like, count) : nullptr;
}

template <class S>
Tensor scratch(const Tensor& like, int64_t count) {
  const int64_t sizes[] = {count};
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), SCALAR_TYPE<S>);
}

void check_grid(const Operands& x) {
  STD_TORCH_CHECK(x.chunks() <= std::numeric_limits<int>::max(), "batch: ", x.pair.pairs, " pairs of ", x.pair.segments,
                  " segments are more than one launch can hold");
}

template <class S>
void set_objective(Call<S>& call, int64_t kind, int64_t flags, const std::vector<double>& parameters) {
  STD_TORCH_CHECK(parameters.size() <= PARAMETERS, "parameters: expected at most ", PARAMETERS, " numbers");
  call.kind = int(kind);
  call.flags = int(flags);
  for (size_t i = 0; i < parameters.size(); ++i) call.parameters[i] = S(parameters[i]);
}

template <class S>
void set_gradients(Call<S>& call, const Operands& x, const Tensor& chosen, const Tensor& rejected) {
  call.gradient[0] = rows_of<MutableRows>(chosen, "chosen", x.policy, x.pair.pairs, x.pair.numel);
  call.gradient[1] = rows_of<MutableRows>(rejected, "rejected", x.policy, x.pair.pairs, x.pair.numel);
  STD_TORCH_CHECK(call.gradient[0].dtype == x.pair.policy[0].dtype && call.gradient[1].dtype == call.gradient[0].dtype,
                  "gradients: expected the prediction's dtype");
}

// run(S{}) with the accumulation type of the operands; also checks what kernels read without asking.
template <class Run>
void with_type(const Operands& x, const Run& run) {
  check_grid(x);
  if (x.pair.built_target)
    STD_TORCH_CHECK((x.pair.target_scale.dtype == FLOAT64) == x.float64 && x.pair.target_scale.dtype != FLOAT16,
                    "target_scale: expected the accumulation dtype");
  if (x.pair.reference_form == REFERENCE_FLOAT8)
    STD_TORCH_CHECK(x.pair.reference_scale[0].dtype == FLOAT32 && x.pair.reference_scale[1].dtype == FLOAT32,
                    "reference_scale: expected float32");
  if (x.float64)
    run(double{});
  else
    run(float{});
}

// Means of all statistics over each group, [STATISTICS, B, G]: errors and fold.
void statistics(PGDPO_OPERANDS, bool anchor, bool cross, Tensor means) {
  const Operands x(PGDPO_PASS_OPERANDS);
  const cuda::Current on(p_w.get_device_index());
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    const Tensor partial = scratch<S>(p_w, STATISTICS * x.chunks());
    Call<S> call;
    call.kind = -1;
    call.anchor = anchor && form != REFERENCE_NONE;
    call.cross = cross;
    call.partial = static_cast<S*>(partial.mutable_data_ptr());
    call.telemetry = numbers<S>(means, "means", p_w, STATISTICS * x.pair.pairs * groups);
    check(cuda::launch_errors(x.pair, call, on.device, on.stream), "statistics");
  });
}

template <class S>
Call<S> objective_call(const Operands& x, const Tensor& partial, bool anchor, bool cross,
                       const MaybeTensor& reference_errors, const MaybeTensor& weight, const MaybeTensor& posterior_scale,
                       int64_t kind, int64_t flags, const std::vector<double>& parameters, const Tensor& loss,
                       const Tensor& telemetry, const Tensor& coefficients) {
  const int64_t rows = x.pair.pairs * x.pair.groups;
  Call<S> call;
  set_objective(call, kind, flags, parameters);
  call.anchor = anchor && x.pair.reference_form != REFERENCE_NONE;
  call.cross = cross;
  call.gaps = x.pair.reference_form != REFERENCE_NONE || reference_errors;
  call.partial = static_cast<S*>(partial.mutable_data_ptr());
  call.reference_errors = numbers<S>(reference_errors, "reference_errors", x.policy, 2 * rows);
  call.weight = numbers<S>(weight, "weight", x.policy, rows);
  call.posterior_scale = numbers<S>(posterior_scale, "posterior_scale", x.policy, x.pair.pairs);
  STD_TORCH_CHECK(!(flags & FLAG_IMPORTANCE) || posterior_scale, "posterior_scale: the objective needs it");
  call.loss = numbers<S>(loss, "loss", x.policy, 1);
  call.telemetry = numbers<S>(telemetry, "telemetry", x.policy, TELEMETRY * rows);
  call.coefficients = numbers<S>(coefficients, "coefficients", x.policy, 3 * rows);
  return call;
}

// Loss, telemetry and gradient coefficients: errors, then fold and objective.
void objective(PGDPO_OPERANDS, PGDPO_OBJECTIVE) {
  const Operands x(PGDPO_PASS_OPERANDS);
  const cuda::Current on(p_w.get_device_index());
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    const Tensor partial = scratch<S>(p_w, STATISTICS * x.chunks());
    const Call<S> call = objective_call<S>(x, partial, PGDPO_PASS_OBJECTIVE);
    check(cuda::launch_errors(x.pair, call, on.device, on.stream), "objective");
  });
}

void gradients(PGDPO_OPERANDS, bool anchor, Tensor coefficients, MaybeTensor incoming, Tensor chosen, Tensor rejected) {
  const Operands x(PGDPO_PASS_OPERANDS);
  const cuda::Current on(p_w.get_device_index());
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call;
    call.anchor = anchor && form != REFERENCE_NONE;
    call.coefficients = numbers<S>(coefficients, "coefficients", p_w, 3 * x.pair.pairs * groups);
    call.incoming = numbers<S>(incoming, "incoming", p_w, 1);
    set_gradients(call, x, chosen, rejected);
    check(cuda::launch_gradients(x.pair, call, on.stream), "gradients");
  });
}

// All of it at once: one launch when the operands fit on chip, else the launches of `objective` and `gradients`. Returns
// whether it was one.
bool loss_and_gradients(PGDPO_OPERANDS, PGDPO_OBJECTIVE, MaybeTensor incoming, Tensor chosen, Tensor rejected) {
  const Operands x(PGDPO_PASS_OPERANDS);
  const cuda::Current on(p_w.get_device_index());
  bool one = false;
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    const Tensor partial = scratch<S>(p_w, STATISTICS * x.chunks());
    Call<S> call = objective_call<S>(x, partial, PGDPO_PASS_OBJECTIVE);
    call.incoming = numbers<S>(incoming, "incoming", p_w, 1);
    set_gradients(call, x, chosen, rejected);
    if constexpr (sizeof(S) == 4) {
      const cuda::OneTouch plan = on.device.major < 9 ? cuda::OneTouch{}
                                                      : cuda::one_touch(x.pair, call.anchor, call.gradient,
                                                                        on.device.multiprocessors, on.device.shared_limit);
      if (plan.fits) {
        check(cuda::launch_one_touch(x.pair, call, plan, on.stream), "loss_and_gradients");
        one = true;
      }
    }
    if (!one) {
      check(cuda::launch_errors(x.pair, call, on.device, on.stream), "loss_and_gradients");
      check(cuda::launch_gradients(x.pair, call, on.stream), "loss_and_gradients");
    }
  });
  return one;
}

template <class S>
Call<S> element_call(const Operands& x, const MaybeTensor& weight, const MaybeTensor& posterior_scale, int64_t kind,
                     int64_t flags, const std::vector<double>& parameters, bool outer) {
  Call<S> call;
  set_objective(call, kind, flags, parameters);
  call.outer = outer;
  call.weight = numbers<S>(weight, "weight", x.policy, x.pair.pairs);
  call.posterior_scale = numbers<S>(posterior_scale, "posterior_scale", x.policy, x.pair.pairs);
  STD_TORCH_CHECK(!(flags & FLAG_IMPORTANCE) || posterior_scale, "posterior_scale: the objective needs it");
  STD_TORCH_CHECK(!outer || (kind == KIND_PGDPO && (flags & (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR))),
                  "outer: is PG-DPO's, with a regularizer");
  return call;
}

void element_objective(PGDPO_OPERANDS, MaybeTensor weight, MaybeTensor posterior_scale, int64_t kind, int64_t flags,
                       std::vector<double> parameters, bool outer, bool with_gradients, Tensor loss, Tensor telemetry,
                       Tensor means, Tensor chosen, Tensor rejected) {
  const Operands x(PGDPO_PASS_OPERANDS);
  STD_TORCH_CHECK(!(outer && with_gradients), "outer: gradients need the means first");
  const cuda::Current on(p_w.get_device_index());
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    const Tensor partial = scratch<S>(p_w, ELEMENT_SUMS * x.chunks());
    Call<S> call = element_call<S>(x, weight, posterior_scale, kind, flags, parameters, outer);
    call.partial = static_cast<S*>(partial.mutable_data_ptr());
    call.loss = numbers<S>(loss, "loss", p_w, 1);
    call.telemetry = numbers<S>(telemetry, "telemetry", p_w, TELEMETRY * x.pair.pairs);
    call.means = numbers<S>(means, "means", p_w, ELEMENT_MEANS * x.pair.pairs);
    if (with_gradients) set_gradients(call, x, chosen, rejected);
    check(cuda::launch_elements(x.pair, call, on.stream), "element_objective");
    check(cuda::launch_fold_elements(x.pair, call, on.device, on.stream), "element_objective");
  });
}

void element_gradients(PGDPO_OPERANDS, MaybeTensor weight, MaybeTensor posterior_scale, int64_t kind, int64_t flags,
                       std::vector<double> parameters, bool outer, bool speculative, Tensor means, Tensor incoming,
                       Tensor chosen, Tensor rejected) {
  const Operands x(PGDPO_PASS_OPERANDS);
  const cuda::Current on(p_w.get_device_index());
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call = element_call<S>(x, weight, posterior_scale, kind, flags, parameters, outer);
    call.speculative = speculative;
    call.means_in = numbers<S>(means, "means", p_w, ELEMENT_MEANS * x.pair.pairs);
    call.incoming = numbers<S>(incoming, "incoming", p_w, 1);
    set_gradients(call, x, chosen, rejected);
    check(cuda::launch_elements(x.pair, call, on.stream), "element_gradients");
  });
}

char* reachable(char* data, const char* name) {
  void* address = cuda::device_address(data);
  STD_TORCH_CHECK(address != nullptr, name, ": expected CUDA tensors or pinned host memory, see torch.Tensor.pin_memory");
  return static_cast<char*>(address);
}

// Residuals q - y of predictions q (in the policy's place) as rows of the reference cache, and their errors: one pass.
void pack(PGDPO_OPERANDS, Tensor chosen, Tensor rejected, MaybeTensor chosen_scale, MaybeTensor rejected_scale,
          Tensor means) {
  STD_TORCH_CHECK(groups == 1 && form == REFERENCE_NONE, "pack: takes predictions and targets of whole samples");
  const Operands x(PGDPO_PASS_OPERANDS);
  const cuda::Current on(p_w.get_device_index());
  Packed out = packed_of(x, chosen, rejected, chosen_scale, rejected_scale, [](const Tensor&) {});
  for (int side = 0; side < 2; ++side) {
    out.rows[side].data = reachable(out.rows[side].data, "packed rows");
    if (out.scale[side].data != nullptr) out.scale[side].data = reachable(out.scale[side].data, "scales");
  }
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    const Tensor partial = scratch<S>(p_w, STATISTICS * x.chunks());
    Call<S> call;
    call.kind = -1;
    call.partial = static_cast<S*>(partial.mutable_data_ptr());
    call.telemetry = numbers<S>(means, "means", p_w, STATISTICS * x.pair.pairs);
    check(cuda::launch_pack(x.pair, call, out, on.device, on.stream), "pack");
  });
}

void gather_rows(std::vector<Tensor> tables, std::vector<int64_t> rows, std::vector<Tensor> out) {
  const std::vector<RowCopy> copies = row_copies(tables, rows, out);
  for (const Tensor& x : out)
    STD_TORCH_CHECK(same_device(x, out[0]), "out: expected tensors on one device");
  const cuda::Current on(out[0].get_device_index());
  for (size_t table = 0; table < copies.size(); table += cuda::Gather::TABLES) {
    for (size_t row = 0; row < rows.size(); row += cuda::Gather::ROWS) {
      cuda::Gather x;
      for (size_t k = table; k < copies.size() && x.tables < cuda::Gather::TABLES; ++k, ++x.tables) {
        x.from[x.tables] = reachable(const_cast<char*>(copies[k].from), "tables");
        x.to[x.tables] = reachable(copies[k].to, "out") + row * copies[k].bytes;
        x.bytes[x.tables] = copies[k].bytes;
        x.vectors[x.tables] = copies[k].bytes % 16 == 0 && reinterpret_cast<uintptr_t>(x.from[x.tables]) % 16 == 0 &&
                              reinterpret_cast<uintptr_t>(x.to[x.tables]) % 16 == 0;
      }
      for (size_t i = row; i < rows.size() && x.count < cuda::Gather::ROWS; ++i, ++x.count) x.rows[x.count] = rows[i];
      check(cuda::launch_gather(x, on.device, on.stream), "gather_rows");
    }
  }
}

STABLE_TORCH_LIBRARY_IMPL(PGDPO_NAMESPACE, PGDPO_CUDA, m) {
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("objective", TORCH_BOX(&objective));
  m.impl("gradients", TORCH_BOX(&gradients));
  m.impl("loss_and_gradients", TORCH_BOX(&loss_and_gradients));
  m.impl("element_objective", TORCH_BOX(&element_objective));
  m.impl("element_gradients", TORCH_BOX(&element_gradients));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
}

}  // namespace
}  // namespace pgdpo
