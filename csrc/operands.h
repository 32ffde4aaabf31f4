// Tensors as the passes see them, on LibTorch's stable ABI: every operator's arguments, checked. For any device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cache.h"
#include "pair.h"

namespace pgdpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int storage_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return BFLOAT16;
    case ScalarType::Half:
      return FLOAT16;
    case ScalarType::Float:
      return FLOAT32;
    case ScalarType::Double:
      return FLOAT64;
    case ScalarType::Byte:
      return FLOAT8;
    default:
      STD_TORCH_CHECK(false, name, ": expected bfloat16, float16, float32, float64 or packed uint8");
  }
}

inline bool same_device(const Tensor& x, const Tensor& like) {
  return x.is_cpu() ? like.is_cpu() : !like.is_cpu() && x.get_device_index() == like.get_device_index();
}

inline bool has_contiguous_rows(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// Rows of a [pairs, ...] tensor whose rows are contiguous, `numel` elements each.
template <class Out = Rows>
Out rows_of(const Tensor& x, const char* name, const Tensor& like, int64_t pairs, int64_t numel) {
  STD_TORCH_CHECK(same_device(x, like), name, ": expected all tensors on one device");
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(0) == pairs && x.numel() == pairs * numel, name, ": expected ", pairs,
                  " rows of ", numel, " elements");
  STD_TORCH_CHECK(has_contiguous_rows(x), name, ": expected contiguous rows");
  Out rows;
  if constexpr (std::is_same_v<Out, Rows>) {
    rows.data = static_cast<const char*>(x.const_data_ptr());
  } else {
    rows.data = static_cast<char*>(x.mutable_data_ptr());
  }
  rows.stride = x.stride(0);
  rows.dtype = storage_of(x, name);
  return rows;
}

// The bundles of pgdpo_fast/backends/operands.py and objectives.py that operators take besides the operands.
struct PairNumbers {
  const MaybeTensor &weight, &posterior_scale, &beta_scale;
};
struct Reduction {
  int64_t reference_form, groups, length;
  bool anchor = false, cross = false, anchor_rejected = false;
  int64_t consecutive = 1;
};
struct Epilogue {
  int64_t kind, flags;
  const std::vector<double>& parameters;
};

// The operands every operator takes: chosen and rejected in two tensors, or in one whose rows hold the chosen half
// first. A target [pairs, ...] without rejected is shared.
struct Operands {
  Pair pair;
  Tensor policy;
  bool stacked, float64;

  Operands(const Tensor& p_w, const MaybeTensor& p_l, const Tensor& y_w, const MaybeTensor& y_l,
           const MaybeTensor& noise, const MaybeTensor& target_scale, const MaybeTensor& q_w, const MaybeTensor& q_l,
           const MaybeTensor& s_w, const MaybeTensor& s_l, const MaybeTensor& latent_weight, const Reduction& reduction)
      : policy(p_w), stacked(!p_l) {
    const int64_t groups = reduction.groups, length = reduction.length, form = reduction.reference_form;
    STD_TORCH_CHECK(p_w.dim() >= 2 && p_w.numel() > 0 && (p_l || p_w.size(0) % 2 == 0), "policy: expected pairs");
    pair.pairs = p_l ? p_w.size(0) : p_w.size(0) / 2;
    const int64_t n = p_w.numel() / p_w.size(0);
    pair.numel = n;
    pair.groups = groups;
    STD_TORCH_CHECK(groups > 0 && length > 0 && length <= std::numeric_limits<int>::max(), "segments of ", length,
                    " elements do not cut ", n, " into ", groups, " groups");
    pair.length = length;
    pair.segments = (n + length - 1) / length;
    pair.consecutive = reduction.consecutive;
    STD_TORCH_CHECK(reduction.consecutive > 0 && pair.segments % (groups * reduction.consecutive) == 0, pair.segments,
                    " segments of ", length, " elements do not make ", groups, " groups");
    set_side(pair.policy, p_w, p_l, "policy", n);
    set_side(pair.target, y_w, y_l, "target", n);
    float64 = pair.policy[0].dtype == FLOAT64;
    pair.shared_target = pair.target[0].data == pair.target[1].data && pair.target[0].stride == pair.target[1].stride;
    if (noise) {
      STD_TORCH_CHECK(target_scale && same_device(*target_scale, p_w) && target_scale->dim() == 2 &&
                          target_scale->is_contiguous() && target_scale->size(0) == 2 &&
                          target_scale->size(1) == pair.pairs,
                      "target_scale: expected contiguous [2, B] with noise");
      pair.built_target = true;
      pair.noise = rows_of(kept(*noise), "noise", p_w, pair.pairs, n);
      pair.target_scale = {static_cast<const char*>(target_scale->const_data_ptr()), pair.pairs,
                           storage_of(*target_scale, "target_scale")};
    }
    if (latent_weight) {
      const Tensor& w = *latent_weight;
      STD_TORCH_CHECK(same_device(w, p_w) && w.dim() == 3 && w.size(0) == pair.pairs && has_contiguous_rows(w) &&
                          w.size(1) > 0 && w.size(2) > 0 && n % (w.size(1) * w.size(2)) == 0 &&
                          storage_of(w, "latent_weight") == (float64 ? FLOAT64 : FLOAT32),
                      "latent_weight: expected [B, R, M] with contiguous rows, in the accumulation type");
      pair.latent_weight = {static_cast<const char*>(w.const_data_ptr()), w.stride(0), float64 ? FLOAT64 : FLOAT32};
      pair.weight_length = w.size(2);
      pair.weight_span = n / w.size(1);
    }
    pair.reference_form = int(form);
    if (form != REFERENCE_NONE) {
      STD_TORCH_CHECK(q_w, "reference: expected tensors for form ", form);
      set_side(pair.reference, *q_w, q_l, "reference", n);
      const int dtype = pair.reference[0].dtype;
      STD_TORCH_CHECK(
          (form != REFERENCE_BFLOAT16 || dtype == BFLOAT16) && (form == REFERENCE_FLOAT8) == (dtype == FLOAT8),
          "reference: dtype does not fit form ", form);
    }
    if (form == REFERENCE_FLOAT8) {
      STD_TORCH_CHECK(s_w, "reference_scale: expected tensors for form ", form);
      set_side(pair.reference_scale, *s_w, s_l, "reference_scale", (n + PACK_BLOCK - 1) / PACK_BLOCK);
    }
  }

  // Where the gradients go: tensors like the predictions, `rejected` empty when those are stacked.
  void set_gradients(MutableRows (&out)[2], const Tensor& chosen, const Tensor& rejected) const {
    const int64_t rows = stacked ? 2 * pair.pairs : pair.pairs;
    out[0] = rows_of<MutableRows>(chosen, "chosen", policy, rows, pair.numel);
    out[1] =
        stacked ? second_half(out[0], chosen) : rows_of<MutableRows>(rejected, "rejected", policy, rows, pair.numel);
    STD_TORCH_CHECK(out[0].dtype == pair.policy[0].dtype && out[1].dtype == out[0].dtype,
                    "gradients: expected the prediction's dtype");
  }

  // Uninitialized contiguous tensors beside the predictions: of numbers in the accumulation type, and for gradients.
  Tensor numbers(std::initializer_list<int64_t> shape) const {
    return torch::stable::new_empty(policy, {shape.begin(), shape.size()},
                                    float64 ? ScalarType::Double : ScalarType::Float);
  }
  Tensor chosen_gradient() const { return torch::stable::new_empty(policy, policy.sizes(), policy.scalar_type()); }
  Tensor rejected_gradient() const { return stacked ? nothing() : chosen_gradient(); }
  Tensor nothing() const {
    const int64_t zero = 0;
    return torch::stable::new_empty(policy, {&zero, 1}, policy.scalar_type());
  }

  int64_t all_segments() const { return pair.pairs * pair.segments; }

  // run(begin, end) over all segments, in threads once there are more than about 32K elements for each.
  template <class Run>
  void over_segments(const Run& run) const {
    const int64_t grain = pair.length >= 32768 ? 1 : 32768 / pair.length;
    torch::stable::parallel_for(0, all_segments(), grain, run);
  }

 private:
  std::vector<Tensor> copies;  // of operands whose rows are not contiguous

  const Tensor& kept(const Tensor& x) {
    if (has_contiguous_rows(x)) return x;
    copies.push_back(torch::stable::contiguous(x));
    return copies.back();
  }

  template <class Out>
  Out second_half(Out rows, const Tensor& x) const {
    rows.data += pair.pairs * rows.stride * int64_t(x.element_size());
    return rows;
  }

  void set_side(Rows (&side)[2], const Tensor& chosen, const MaybeTensor& rejected, const char* name, int64_t numel) {
    const bool halves = !rejected && chosen.dim() > 0 && chosen.size(0) == 2 * pair.pairs;
    side[0] = rows_of(kept(chosen), name, policy, halves ? 2 * pair.pairs : pair.pairs, numel);
    side[1] = rejected ? rows_of(kept(*rejected), name, policy, pair.pairs, numel)
              : halves ? second_half(side[0], chosen)
                       : side[0];
    STD_TORCH_CHECK(side[0].dtype == side[1].dtype, name, ": expected chosen and rejected of one dtype");
  }
};

// Where packed rows of these operands go. `check_place` is called with every output: rows may lie on another device.
template <class Check>
Packed packed_of(const Operands& x, const Tensor& chosen, const Tensor& rejected, const MaybeTensor& chosen_scale,
                 const MaybeTensor& rejected_scale, const Check& check_place) {
  Packed out;
  const Tensor* rows[2] = {&chosen, &rejected};
  const MaybeTensor* scales[2] = {&chosen_scale, &rejected_scale};
  for (int side = 0; side < 2; ++side) {
    check_place(*rows[side]);
    out.rows[side] = rows_of<MutableRows>(*rows[side], "packed rows", *rows[side], x.pair.pairs, x.pair.numel);
    const bool bytes = out.rows[side].dtype == FLOAT8;
    STD_TORCH_CHECK(bytes || out.rows[side].dtype == BFLOAT16, "packed rows: expected bfloat16 or uint8");
    STD_TORCH_CHECK(bytes == scales[side]->has_value() && out.rows[side].dtype == out.rows[0].dtype,
                    "packed rows: expected one dtype, and scales with uint8");
    if (!bytes) continue;
    const Tensor& scale = **scales[side];
    check_place(scale);
    out.scale[side] = rows_of<MutableRows>(scale, "scales", scale, x.pair.pairs, pack_blocks_of(x.pair));
    STD_TORCH_CHECK(out.scale[side].dtype == FLOAT32, "scales: expected float32");
  }
  return out;
}

// A table of rows, where those of a batch go, and the bytes of one.
struct RowCopy {
  const char* from;
  char* to;
  int64_t bytes;
};

inline std::vector<RowCopy> row_copies(const std::vector<Tensor>& tables, const std::vector<int64_t>& rows,
                                       const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(tables.size() == out.size() && !tables.empty(), "out: expected one tensor a table");
  std::vector<RowCopy> copies;
  for (size_t k = 0; k < tables.size(); ++k) {
    const Tensor &from = tables[k], &to = out[k];
    STD_TORCH_CHECK(from.dim() >= 1 && from.is_contiguous() && to.is_contiguous() && from.dim() == to.dim() &&
                        from.scalar_type() == to.scalar_type() && to.size(0) == int64_t(rows.size()),
                    "out: expected contiguous [", rows.size(), ", ...] like the table");
    for (int64_t d = 1; d < from.dim(); ++d)
      STD_TORCH_CHECK(from.size(d) == to.size(d), "out: expected the table's rows");
    for (int64_t row : rows)
      STD_TORCH_CHECK(row >= 0 && row < from.size(0), "rows: expected numbers below ", from.size(0), ", got ", row);
    const int64_t bytes = from.numel() / from.size(0) * int64_t(from.element_size());
    copies.push_back(
        {static_cast<const char*>(from.const_data_ptr()), static_cast<char*>(to.mutable_data_ptr()), bytes});
  }
  return copies;
}

// Each bundle as an operator takes it, field by field, and made of those fields. An operator's schema is in
// pgdpo_fast/backends/operators.py.
#define PGDPO_OPERANDS                                                                                            \
  const Tensor &p_w, const MaybeTensor &p_l, const Tensor &y_w, const MaybeTensor &y_l, const MaybeTensor &noise, \
      const MaybeTensor &target_scale, const MaybeTensor &q_w, const MaybeTensor &q_l, const MaybeTensor &s_w,    \
      const MaybeTensor &s_l, const MaybeTensor &latent_weight
#define PGDPO_PASS_OPERANDS p_w, p_l, y_w, y_l, noise, target_scale, q_w, q_l, s_w, s_l, latent_weight
#define PGDPO_NUMBERS const MaybeTensor &weight, const MaybeTensor &posterior_scale, const MaybeTensor &beta_scale
#define PGDPO_PASS_NUMBERS              \
  PairNumbers {                         \
    weight, posterior_scale, beta_scale \
  }
#define PGDPO_REDUCTION                                                                                  \
  int64_t reference_form, int64_t groups, int64_t length, bool anchor, bool cross, bool anchor_rejected, \
      int64_t consecutive
#define PGDPO_PASS_PLAN                                                         \
  Reduction {                                                                   \
    reference_form, groups, length, anchor, cross, anchor_rejected, consecutive \
  }
#define PGDPO_EPILOGUE int64_t kind, int64_t flags, std::vector<double> parameters
#define PGDPO_PASS_EPILOGUE \
  Epilogue {                \
    kind, flags, parameters \
  }

}  // namespace
}  // namespace pgdpo
