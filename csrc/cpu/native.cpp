// The CPU operators as torch sees them, on LibTorch's stable ABI: checks, threads, and the small folds between passes.
#include <string.h>

#include "epilogue.h"
#include "operands.h"

namespace pgdpo {
namespace generic {
const Passes& passes(bool float64);
}
namespace avx2 {
const Passes& passes(bool float64);
}
namespace avx512 {
const Passes& passes(bool float64);
}

namespace {

const Passes& passes(bool float64) {
#if defined(PGDPO_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::passes(float64);
#endif
#if defined(PGDPO_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::passes(float64);
#endif
#if defined(PGDPO_HAVE_GENERIC)
  return generic::passes(float64);
#else
  STD_TORCH_CHECK(false, "the native library was built for an instruction set this processor does not have");
#endif
}

std::string instruction_set() {
  return passes(false).name;
}

double number_at(const Rows& from, int64_t i) {
  switch (from.dtype) {
    case FLOAT32:
      return reinterpret_cast<const float*>(from.data)[i];
    case FLOAT64:
      return reinterpret_cast<const double*>(from.data)[i];
    default:
      STD_TORCH_CHECK(false, "expected a float32 or float64 tensor of numbers");
  }
}

// A small tensor of any strides, flattened.
std::vector<double> numbers(const Tensor& x, const char* name, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.numel() == count, name, ": expected ", count, " numbers on the CPU");
  const Rows from{static_cast<const char*>(x.const_data_ptr()), 0, storage_of(x, name)};
  std::vector<double> out(count);
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      offset += rest % x.size(d) * x.stride(d);
      rest /= x.size(d);
    }
    out[i] = number_at(from, offset);
  }
  return out;
}

std::vector<double> numbers(const MaybeTensor& x, const char* name, int64_t count) {
  return x ? numbers(*x, name, count) : std::vector<double>();
}

// Writes doubles into a tensor of `Operands::numbers`.
struct Output {
  void* data;
  bool float64;

  explicit Output(const Tensor& x) : data(x.mutable_data_ptr()), float64(x.scalar_type() == ScalarType::Double) {}
  double rounded(double x) const { return float64 ? x : double(float(x)); }
  void set(int64_t i, double x) const {
    if (float64)
      static_cast<double*>(data)[i] = x;
    else
      static_cast<float*>(data)[i] = float(x);
  }
};

// Sums of all statistics over every segment, [STATISTICS, pairs * segments].
std::vector<double> errors(const Operands& x, Wishes wanted) {
  std::vector<double> sums(STATISTICS * x.all_segments());
  if (x.pair.reference_form == REFERENCE_NONE) wanted.anchor = wanted.anchor_rejected = false;
  const Passes& run = passes(x.float64);
  x.over_segments([&](int64_t begin, int64_t end) { run.errors(x.pair, wanted, sums.data(), begin, end); });
  return sums;
}

// Mean over group `row % groups` of a pair, one plane of `errors`; always added in the same order.
double mean_of(const Operands& x, const std::vector<double>& sums, int plane, int64_t row) {
  const int64_t pair = row / x.pair.groups;
  double total = 0;
  for (int64_t s = row % x.pair.groups; s < x.pair.segments; s += x.pair.groups)
    total += sums[plane * x.all_segments() + pair * x.pair.segments + s];
  return total / double(x.pair.numel / x.pair.groups);
}

Tensor pair_errors(PGDPO_OPERANDS, PGDPO_REDUCTION) {
  const Operands x(PGDPO_PASS_OPERANDS, PGDPO_PASS_PLAN);
  const int64_t rows = x.pair.pairs * groups;
  const Tensor means = x.numbers({STATISTICS, x.pair.pairs, groups});
  const Output out(means);
  const std::vector<double> sums = errors(x, {anchor, cross, anchor_rejected});
  for (int k = 0; k < STATISTICS; ++k)
    for (int64_t row = 0; row < rows; ++row) out.set(k * rows + row, mean_of(x, sums, k, row));
  return means;
}

// The formulas an objective adds up.
std::vector<Formula> formulas_of(const Epilogue& epilogue) {
  const std::vector<double>& numbers = epilogue.parameters;
  const size_t terms = numbers.size() / PARAMETERS;
  STD_TORCH_CHECK(terms >= 1 && terms <= TERM_LIMIT && numbers.size() == terms * PARAMETERS, "parameters: expected ",
                  int(PARAMETERS), " numbers for each of at most ", int(TERM_LIMIT), " terms");
  std::vector<Formula> out(terms);
  for (size_t k = 0; k < terms; ++k) {
    out[k].kind = int(epilogue.kind >> (k * TERM_KIND_BITS)) & ((1 << TERM_KIND_BITS) - 1);
    out[k].flags = int(epilogue.flags >> (k * TERM_FLAG_BITS)) & ((1 << TERM_FLAG_BITS) - 1);
    for (int i = 0; i < PARAMETERS; ++i) out[k].parameters[i] = numbers[k * PARAMETERS + i];
  }
  return out;
}

bool any_flag(const std::vector<Formula>& formulas, int flag) {
  for (const Formula& formula : formulas)
    if (formula.flags & flag) return true;
  return false;
}

std::tuple<Tensor, Tensor, Tensor> pair_objective(PGDPO_OPERANDS, const MaybeTensor& reference_errors, PGDPO_NUMBERS,
                                                  PGDPO_REDUCTION, PGDPO_EPILOGUE) {
  const Operands x(PGDPO_PASS_OPERANDS, PGDPO_PASS_PLAN);
  const int64_t pairs = x.pair.pairs, rows = pairs * groups, count = x.pair.numel / groups;
  const Tensor loss = x.numbers({}), telemetry = x.numbers({TELEMETRY, pairs, groups}),
               coefficients = x.numbers({COEFFICIENTS, pairs, groups});
  const Output loss_out(loss), telemetry_out(telemetry), coefficient_out(coefficients);
  const std::vector<double> reference = numbers(reference_errors, "reference_errors", 2 * rows);
  const std::vector<double> weights = numbers(weight, "weight", rows);
  const std::vector<double> posterior = numbers(posterior_scale, "posterior_scale", pairs);
  const std::vector<double> beta_scales = numbers(beta_scale, "beta_scale", rows);
  const std::vector<Formula> formulas = formulas_of(PGDPO_PASS_EPILOGUE);
  STD_TORCH_CHECK(!any_flag(formulas, FLAG_IMPORTANCE) || posterior_scale, "posterior_scale: the objective needs it");
  const std::vector<double> sums = errors(x, {anchor, cross, anchor_rejected});
  const bool gaps = x.pair.reference_form != REFERENCE_NONE || reference_errors;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  double batch_chosen = 0, batch_cross = 0;
  if (any_flag(formulas, FLAG_SAFEGUARD_BATCH))
    for (int64_t row = 0; row < rows; ++row) {
      batch_chosen += mean_of(x, sums, STATISTIC_POLICY_CHOSEN, row);
      batch_cross += mean_of(x, sums, STATISTIC_CROSS, row);
    }
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double mean[STATISTICS];
    for (int k = 0; k < STATISTICS; ++k) mean[k] = mean_of(x, sums, k, row);
    Errors<double> e{mean[STATISTIC_POLICY_CHOSEN],
                     mean[STATISTIC_POLICY_REJECTED],
                     mean[STATISTIC_GAP_CHOSEN],
                     mean[STATISTIC_GAP_REJECTED],
                     mean[STATISTIC_ANCHOR],
                     mean[STATISTIC_CROSS],
                     posterior.empty() ? 0.0 : posterior[row / groups]};
    if (!reference.empty()) {
      // Cached reference errors were rounded like these: a policy that equals the reference has gaps of exactly zero.
      e.gap_chosen = telemetry_out.rounded(e.policy_chosen) - reference[row];
      e.gap_rejected = telemetry_out.rounded(e.policy_rejected) - reference[rows + row];
    }
    Terms<double> t{};
    for (size_t k = 0; k < formulas.size(); ++k) {
      Formula formula = formulas[k];
      if (!beta_scales.empty()) formula.scale_beta(beta_scales[row]);
      Terms<double> term = pgdpo::objective<double>(formula.kind, formula.flags, formula.parameters, e);
      if (formula.flags & FLAG_SAFEGUARD_BATCH)
        term.by_rejected *= safeguard<double>(formula.parameters, batch_chosen, batch_cross);
      const double part = formula.parameters[PARAMETER_TERM_WEIGHT];
      const double loss_before = t.loss, by_chosen = t.by_chosen, by_rejected = t.by_rejected, by_anchor = t.by_anchor;
      if (k == 0) t = term;
      t.loss = loss_before + part * term.loss;
      t.by_chosen = by_chosen + part * term.by_chosen;
      t.by_rejected = by_rejected + part * term.by_rejected;
      t.by_anchor = by_anchor + part * term.by_anchor;
    }
    const double w = weights.empty() ? 1.0 : weights[row], scale = w * 2.0 / (double(count) * double(rows));
    const auto tell = [&](TelemetryRow k, double value) { telemetry_out.set(k * rows + row, value); };
    tell(TELEMETRY_PER_PAIR_LOSS, t.loss);
    tell(TELEMETRY_LOGITS, t.logits);
    tell(TELEMETRY_ALPHA, t.alpha);
    tell(TELEMETRY_GAMMA, t.gamma);
    tell(TELEMETRY_IMPORTANCE, t.importance);
    tell(TELEMETRY_POLICY_CHOSEN_ERROR, e.policy_chosen);
    tell(TELEMETRY_POLICY_REJECTED_ERROR, e.policy_rejected);
    tell(TELEMETRY_CHOSEN_GAP, gaps ? e.gap_chosen : nan);
    tell(TELEMETRY_REJECTED_GAP, gaps ? e.gap_rejected : nan);
    coefficient_out.set(COEFFICIENT_CHOSEN * rows + row, scale * t.by_chosen);
    coefficient_out.set(COEFFICIENT_REJECTED * rows + row, scale * t.by_rejected);
    coefficient_out.set(COEFFICIENT_ANCHOR * rows + row, scale * t.by_anchor);
    coefficient_out.set(COEFFICIENT_ANCHOR_REJECTED * rows + row, 0.0);
    total += w * t.loss;
  }
  loss_out.set(0, total / double(rows));
  return {loss, telemetry, coefficients};
}

std::tuple<Tensor, Tensor> pair_gradient(PGDPO_OPERANDS, const Tensor& coefficients, const Tensor& incoming,
                                         PGDPO_REDUCTION) {
  const Operands x(PGDPO_PASS_OPERANDS, PGDPO_PASS_PLAN);
  std::vector<double> scaled = numbers(coefficients, "coefficients", COEFFICIENTS * x.pair.pairs * x.pair.groups);
  const double factor = numbers(incoming, "incoming", 1)[0];
  for (double& c : scaled) c *= factor;
  const Tensor chosen = x.chosen_gradient(), rejected = x.rejected_gradient();
  MutableRows out[2];
  x.set_gradients(out, chosen, rejected);
  const Passes& run = passes(x.float64);
  const Wishes wanted{anchor, cross, anchor_rejected};
  x.over_segments([&](int64_t begin, int64_t end) { run.gradients(x.pair, wanted, scaled.data(), out, begin, end); });
  return {chosen, rejected};
}

struct ElementCall : Elements {
  std::vector<double> row_scale, posterior, beta_scales, row_means;

  ElementCall(const Operands& x, const PairNumbers& per_pair, const Epilogue& epilogue, bool outer_)
      : row_scale(numbers(per_pair.weight, "weight", x.pair.pairs)),
        posterior(numbers(per_pair.posterior_scale, "posterior_scale", x.pair.pairs)),
        beta_scales(numbers(per_pair.beta_scale, "beta_scale", x.pair.pairs)) {
    const std::vector<Formula> formulas = formulas_of(epilogue);
    terms = int(formulas.size());
    for (int k = 0; k < terms; ++k) formula[k] = formulas[k];
    outer = outer_;
    STD_TORCH_CHECK(!any_flag(formulas, FLAG_IMPORTANCE) || per_pair.posterior_scale,
                    "posterior_scale: the objective needs it");
    STD_TORCH_CHECK(!any_flag(formulas, FLAG_SAFEGUARD_BATCH), "an element pass knows nothing of the batch");
    STD_TORCH_CHECK(!outer || (terms == 1 && formula[0].kind == KIND_PGDPO &&
                               (formula[0].flags & (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR))),
                    "outer: is PG-DPO's, with a regularizer");
    posterior_scale = posterior.empty() ? nullptr : posterior.data();
    beta_scale = beta_scales.empty() ? nullptr : beta_scales.data();
    if (row_scale.empty()) row_scale.assign(x.pair.pairs, 1.0);
  }

  // From here on row_scale multiplies gradients instead of losses.
  void write_gradients(const Operands& x, const Tensor& chosen, const Tensor& rejected, double incoming) {
    x.set_gradients(gradient, chosen, rejected);
    for (double& w : row_scale) w *= incoming * 2.0 / (double(x.pair.numel) * double(x.pair.pairs));
    scale = row_scale.data();
  }

  void run(const Operands& x) const {
    const Passes& run = passes(x.float64);
    x.over_segments([&](int64_t begin, int64_t end) { run.elements(x.pair, *this, begin, end); });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_elements(PGDPO_OPERANDS, PGDPO_NUMBERS, PGDPO_REDUCTION,
                                                                 PGDPO_EPILOGUE, bool outer, bool with_gradients) {
  const Operands x(PGDPO_PASS_OPERANDS, PGDPO_PASS_PLAN);
  ElementCall call(x, PGDPO_PASS_NUMBERS, PGDPO_PASS_EPILOGUE, outer);
  STD_TORCH_CHECK(!(outer && with_gradients), "outer: gradients need the means first");
  const int64_t pairs = x.pair.pairs;
  const Tensor loss = x.numbers({}), telemetry = x.numbers({TELEMETRY, pairs, 1}),
               means = x.numbers({ELEMENT_MEANS, pairs}), chosen = with_gradients ? x.chosen_gradient() : x.nothing(),
               rejected = with_gradients ? x.rejected_gradient() : x.nothing();
  const Output loss_out(loss), telemetry_out(telemetry), means_out(means);
  const std::vector<double> weights = call.row_scale;
  std::vector<double> sums(ELEMENT_SUMS * x.all_segments());
  call.sums = sums.data();
  if (with_gradients) call.write_gradients(x, chosen, rejected, 1.0);
  call.run(x);

  double total = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double mean[ELEMENT_SUMS];
    for (int k = 0; k < ELEMENT_SUMS; ++k) mean[k] = mean_of(x, sums, k, pair);
    double& loss_of_pair = mean[TELEMETRY_PER_PAIR_LOSS];
    means_out.set(MEAN_GAMMA * pairs + pair, mean[TELEMETRY_GAMMA]);
    means_out.set(MEAN_PREFERENCE * pairs + pair, loss_of_pair);
    means_out.set(MEAN_COMPLEMENT * pairs + pair, mean[SUM_COMPLEMENT]);
    means_out.set(MEAN_IMPLICIT * pairs + pair, mean[SUM_IMPLICIT]);
    if (outer) {
      Formula formula = call.formula[0];
      if (call.beta_scale != nullptr) formula.scale_beta(call.beta_scale[pair]);
      loss_of_pair = mean[TELEMETRY_GAMMA] * loss_of_pair +
                     formula.parameters[PARAMETER_IPR_SCALE] * mean[SUM_COMPLEMENT] * mean[SUM_IMPLICIT];
    }
    if (reference_form == REFERENCE_NONE)
      mean[TELEMETRY_CHOSEN_GAP] = mean[TELEMETRY_REJECTED_GAP] = std::numeric_limits<double>::quiet_NaN();
    for (int k = 0; k < TELEMETRY; ++k) telemetry_out.set(k * pairs + pair, mean[k]);
    total += weights[pair] * loss_of_pair;
  }
  loss_out.set(0, total / double(pairs));
  return {loss, telemetry, means, chosen, rejected};
}

void pair_elements_gradient(PGDPO_OPERANDS, PGDPO_NUMBERS, const Tensor& means, const Tensor& incoming, Tensor chosen,
                            Tensor rejected, PGDPO_REDUCTION, PGDPO_EPILOGUE, bool outer, bool bet) {
  const double factor = numbers(incoming, "incoming", 1)[0];
  if (bet && factor == 1.0) return;
  const Operands x(PGDPO_PASS_OPERANDS, PGDPO_PASS_PLAN);
  ElementCall call(x, PGDPO_PASS_NUMBERS, PGDPO_PASS_EPILOGUE, outer);
  if (outer) {
    call.row_means = numbers(means, "means", ELEMENT_MEANS * x.pair.pairs);
    call.means = call.row_means.data();
  }
  call.write_gradients(x, chosen, rejected, factor);
  call.run(x);
}

// Residuals q - y of predictions q (in the policy's place) as rows of the reference cache.
void pack(PGDPO_OPERANDS, Tensor chosen, Tensor rejected, MaybeTensor chosen_scale, MaybeTensor rejected_scale,
          int64_t length) {
  const Operands x(PGDPO_PASS_OPERANDS, {REFERENCE_NONE, 1, length});
  const Packed out = packed_of(x, chosen, rejected, chosen_scale, rejected_scale, [](const Tensor& place) {
    STD_TORCH_CHECK(place.is_cpu(), "packed rows: expected CPU tensors");
  });
  const Passes& run = passes(x.float64);
  torch::stable::parallel_for(0, x.pair.pairs * pack_blocks_of(x.pair), 256,
                              [&](int64_t begin, int64_t end) { run.pack(x.pair, out, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(pgdpo_fast_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(pgdpo_fast_native, CPU, m) {
  m.impl("pair_errors", TORCH_BOX(&pair_errors));
  m.impl("pair_objective", TORCH_BOX(&pair_objective));
  m.impl("pair_gradient", TORCH_BOX(&pair_gradient));
  m.impl("pair_elements", TORCH_BOX(&pair_elements));
  m.impl("pair_elements_gradient", TORCH_BOX(&pair_elements_gradient));
  m.impl("pack", TORCH_BOX(&pack));
}

}  // namespace
}  // namespace pgdpo
