// The CUDA operators as torch sees them, on LibTorch's stable ABI. A library of its own beside the CPU one, whose
// operators it implements on CUDA; memory comes from torch's caching allocator, work goes to the current stream,
// nothing synchronizes, so every operator can be captured into a CUDA graph.
#include "cuda/launch.h"
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
S* data(const Tensor& x) {
  return static_cast<S*>(x.mutable_data_ptr());
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
Tensor pair_errors(PGDPO_OPERANDS, int64_t form, int64_t groups, int64_t length, bool anchor, bool cross) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, form, groups, length);
  const Tensor means = x.numbers({STATISTICS, x.pair.pairs, groups}), partial = x.numbers({STATISTICS, x.chunks()});
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call;
    call.kind = -1;
    call.anchor = anchor && form != REFERENCE_NONE;
    call.cross = cross;
    call.partial = data<S>(partial);
    call.telemetry = data<S>(means);
    check(cuda::launch_errors(x.pair, call, on.device, on.stream), "pair_errors");
  });
  return means;
}

// What the launches of an objective write.
struct Outputs {
  Tensor loss, telemetry, coefficients, partial;

  explicit Outputs(const Operands& x)
      : loss(x.numbers({})),
        telemetry(x.numbers({TELEMETRY, x.pair.pairs, x.pair.groups})),
        coefficients(x.numbers({3, x.pair.pairs, x.pair.groups})),
        partial(x.numbers({STATISTICS, x.chunks()})) {}
};

template <class S>
Call<S> objective_call(const Operands& x, const Settings& settings, const Outputs& out) {
  const int64_t rows = x.pair.pairs * x.pair.groups;
  Call<S> call;
  set_objective(call, settings.kind, settings.flags, settings.parameters);
  call.anchor = settings.anchor && x.pair.reference_form != REFERENCE_NONE;
  call.cross = settings.cross;
  call.gaps = x.pair.reference_form != REFERENCE_NONE || settings.reference_errors;
  call.reference_errors = numbers<S>(settings.reference_errors, "reference_errors", x.policy, 2 * rows);
  call.weight = numbers<S>(settings.weight, "weight", x.policy, rows);
  call.posterior_scale = numbers<S>(settings.posterior_scale, "posterior_scale", x.policy, x.pair.pairs);
  STD_TORCH_CHECK(!(settings.flags & FLAG_IMPORTANCE) || settings.posterior_scale,
                  "posterior_scale: the objective needs it");
  call.partial = data<S>(out.partial);
  call.loss = data<S>(out.loss);
  call.telemetry = data<S>(out.telemetry);
  call.coefficients = data<S>(out.coefficients);
  return call;
}

// Loss, telemetry and gradient coefficients: errors, then fold and objective.
std::tuple<Tensor, Tensor, Tensor> pair_objective(PGDPO_OPERANDS, const MaybeTensor& reference_errors,
                                                  const MaybeTensor& weight, const MaybeTensor& posterior_scale,
                                                  int64_t form, int64_t groups, int64_t length, bool anchor, bool cross,
                                                  int64_t kind, int64_t flags, std::vector<double> parameters) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, form, groups, length);
  const Settings settings = {reference_errors, weight, posterior_scale, anchor, cross, kind, flags, parameters};
  const Outputs out(x);
  with_type(x, [&](auto zero) {
    const auto call = objective_call<decltype(zero)>(x, settings, out);
    check(cuda::launch_errors(x.pair, call, on.device, on.stream), "pair_objective");
  });
  return {out.loss, out.telemetry, out.coefficients};
}

std::tuple<Tensor, Tensor> pair_gradient(PGDPO_OPERANDS, const Tensor& coefficients, const Tensor& incoming,
                                         int64_t form, int64_t groups, int64_t length, bool anchor) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, form, groups, length);
  const Tensor chosen = x.chosen_gradient(), rejected = x.rejected_gradient();
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call;
    call.anchor = anchor && form != REFERENCE_NONE;
    call.coefficients = numbers<S>(coefficients, "coefficients", p_w, 3 * x.pair.pairs * groups);
    call.incoming = numbers<S>(incoming, "incoming", p_w, 1);
    x.set_gradients(call.gradient, chosen, rejected);
    check(cuda::launch_gradients(x.pair, call, on.stream), "pair_gradient");
  });
  return {chosen, rejected};
}

// All of it at once: one launch when the operands fit on chip, else the launches of `pair_objective` and
// `pair_gradient`. The last result is whether it was one.
std::tuple<Tensor, Tensor, Tensor, Tensor, bool> loss_and_gradients(
    PGDPO_OPERANDS, const MaybeTensor& reference_errors, const MaybeTensor& weight, const MaybeTensor& posterior_scale,
    const MaybeTensor& incoming, int64_t form, int64_t groups, int64_t length, bool anchor, bool cross, int64_t kind,
    int64_t flags, std::vector<double> parameters) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, form, groups, length);
  const Settings settings = {reference_errors, weight, posterior_scale, anchor, cross, kind, flags, parameters};
  const Outputs out(x);
  const Tensor chosen = x.chosen_gradient(), rejected = x.rejected_gradient();
  bool one = false;
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call = objective_call<S>(x, settings, out);
    call.incoming = numbers<S>(incoming, "incoming", p_w, 1);
    x.set_gradients(call.gradient, chosen, rejected);
    if constexpr (sizeof(S) == 4) {
      const cuda::OneTouch plan =
          on.device.major < 9
              ? cuda::OneTouch{}
              : cuda::one_touch(x.pair, call.anchor, call.gradient, on.device.multiprocessors, on.device.shared_limit);
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
  return {out.loss, out.telemetry, chosen, rejected, one};
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_elements(PGDPO_OPERANDS, const MaybeTensor& weight,
                                                                 const MaybeTensor& posterior_scale, int64_t form,
                                                                 int64_t length, int64_t kind, int64_t flags,
                                                                 std::vector<double> parameters, bool outer,
                                                                 bool with_gradients) {
  STD_TORCH_CHECK(!(outer && with_gradients), "outer: gradients need the means first");
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, form, 1, length);
  const int64_t pairs = x.pair.pairs;
  const Tensor loss = x.numbers({}), telemetry = x.numbers({TELEMETRY, pairs, 1}),
               means = x.numbers({ELEMENT_MEANS, pairs}), partial = x.numbers({ELEMENT_SUMS, x.chunks()}),
               chosen = with_gradients ? x.chosen_gradient() : x.nothing(),
               rejected = with_gradients ? x.rejected_gradient() : x.nothing();
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call = element_call<S>(x, weight, posterior_scale, kind, flags, parameters, outer);
    call.partial = data<S>(partial);
    call.loss = data<S>(loss);
    call.telemetry = data<S>(telemetry);
    call.means = data<S>(means);
    if (with_gradients) x.set_gradients(call.gradient, chosen, rejected);
    check(cuda::launch_elements(x.pair, call, on.stream), "pair_elements");
    check(cuda::launch_fold_elements(x.pair, call, on.device, on.stream), "pair_elements");
  });
  return {loss, telemetry, means, chosen, rejected};
}

void pair_elements_gradient(PGDPO_OPERANDS, const MaybeTensor& weight, const MaybeTensor& posterior_scale,
                            const Tensor& means, const Tensor& incoming, Tensor chosen, Tensor rejected, int64_t form,
                            int64_t length, int64_t kind, int64_t flags, std::vector<double> parameters, bool outer,
                            bool speculative) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, form, 1, length);
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call = element_call<S>(x, weight, posterior_scale, kind, flags, parameters, outer);
    call.speculative = speculative;
    call.means_in = numbers<S>(means, "means", p_w, ELEMENT_MEANS * x.pair.pairs);
    call.incoming = numbers<S>(incoming, "incoming", p_w, 1);
    x.set_gradients(call.gradient, chosen, rejected);
    check(cuda::launch_elements(x.pair, call, on.stream), "pair_elements_gradient");
  });
}

char* reachable(char* data, const char* name) {
  void* address = cuda::device_address(data);
  STD_TORCH_CHECK(address != nullptr, name,
                  ": expected CUDA tensors or pinned host memory, see torch.Tensor.pin_memory");
  return static_cast<char*>(address);
}

// Residuals q - y of predictions q (in the policy's place) as rows of the reference cache, and their errors: one pass.
Tensor pack(PGDPO_OPERANDS, Tensor chosen, Tensor rejected, MaybeTensor chosen_scale, MaybeTensor rejected_scale,
            int64_t length) {
  const cuda::Current on(p_w.get_device_index());
  const Operands x(PGDPO_PASS_OPERANDS, REFERENCE_NONE, 1, length);
  Packed out = packed_of(x, chosen, rejected, chosen_scale, rejected_scale, [](const Tensor&) {});
  for (int side = 0; side < 2; ++side) {
    out.rows[side].data = reachable(out.rows[side].data, "packed rows");
    if (out.scale[side].data != nullptr) out.scale[side].data = reachable(out.scale[side].data, "scales");
  }
  Tensor means = x.numbers({STATISTICS, x.pair.pairs}), partial = x.numbers({STATISTICS, x.chunks()});
  with_type(x, [&](auto zero) {
    using S = decltype(zero);
    Call<S> call;
    call.kind = -1;
    call.partial = data<S>(partial);
    call.telemetry = data<S>(means);
    check(cuda::launch_pack(x.pair, call, out, on.device, on.stream), "pack");
  });
  return torch::stable::narrow(means, 0, 0, 2);
}

void gather_rows(std::vector<Tensor> tables, std::vector<int64_t> rows, std::vector<Tensor> out) {
  const std::vector<RowCopy> copies = row_copies(tables, rows, out);
  for (const Tensor& x : out) STD_TORCH_CHECK(same_device(x, out[0]), "out: expected tensors on one device");
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
  m.impl("pair_errors", TORCH_BOX(&pair_errors));
  m.impl("pair_objective", TORCH_BOX(&pair_objective));
  m.impl("pair_gradient", TORCH_BOX(&pair_gradient));
  m.impl("pair_elements", TORCH_BOX(&pair_elements));
  m.impl("pair_elements_gradient", TORCH_BOX(&pair_elements_gradient));
  m.impl("loss_and_gradients", TORCH_BOX(&loss_and_gradients));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
}

}  // namespace
}  // namespace pgdpo
