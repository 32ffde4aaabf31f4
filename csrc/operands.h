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

// Rows of a [pairs, ...] tensor whose rows are contiguous, `numel` elements each.
template <class Out = Rows>
Out rows_of(const Tensor& x, const char* name, const Tensor& like, int64_t pairs, int64_t numel) {
  STD_TORCH_CHECK(same_device(x, like), name, ": expected all tensors on one device");
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(0) == pairs && x.numel() == pairs * numel, name, ": expected ", pairs,
                  " rows of ", numel, " elements");
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == expected, name, ": expected contiguous rows");
    expected *= x.size(d);
  }
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

// The operands every operator takes, in the order of `Operands` in pgdpo_fast/backends/native.py.
struct Operands {
  Pair pair;
  Tensor policy;
  bool float64;

  Operands(const Tensor& p_w, const Tensor& p_l, const Tensor& y_w, const Tensor& y_l, const MaybeTensor& noise,
           const MaybeTensor& target_scale, const MaybeTensor& q_w, const MaybeTensor& q_l, const MaybeTensor& s_w,
           const MaybeTensor& s_l, int64_t form, int64_t groups, int64_t segments, int64_t length)
      : policy(p_w) {
    pair.pairs = p_w.size(0);
    STD_TORCH_CHECK(pair.pairs > 0 && p_w.numel() > 0, "policy: expected at least one pair");
    const int64_t n = p_w.numel() / pair.pairs;
    pair.numel = n;
    pair.groups = groups;
    pair.segments = segments;
    pair.length = length;
    STD_TORCH_CHECK(groups > 0 && length > 0 && length <= std::numeric_limits<int>::max() &&
                        segments == (n + length - 1) / length && segments % groups == 0,
                    "segments: ", segments, " of ", length, " do not cut ", n, " elements into ", groups, " groups");
    pair.policy[0] = rows_of(p_w, "policy", p_w, pair.pairs, n);
    pair.policy[1] = rows_of(p_l, "policy", p_w, pair.pairs, n);
    pair.target[0] = rows_of(y_w, "target", p_w, pair.pairs, n);
    pair.target[1] = rows_of(y_l, "target", p_w, pair.pairs, n);
    STD_TORCH_CHECK(pair.policy[0].dtype == pair.policy[1].dtype && pair.target[0].dtype == pair.target[1].dtype,
                    "chosen and rejected: expected one dtype");
    float64 = pair.policy[0].dtype == FLOAT64;
    pair.shared_target = pair.target[0].data == pair.target[1].data && pair.target[0].stride == pair.target[1].stride;
    if (noise) {
      STD_TORCH_CHECK(target_scale && same_device(*target_scale, p_w) && target_scale->dim() == 2 &&
                          target_scale->is_contiguous() && target_scale->size(0) == 2 &&
                          target_scale->size(1) == pair.pairs,
                      "target_scale: expected contiguous [2, B] with noise");
      pair.built_target = true;
      pair.noise = rows_of(*noise, "noise", p_w, pair.pairs, n);
      pair.target_scale = {static_cast<const char*>(target_scale->const_data_ptr()), pair.pairs,
                           storage_of(*target_scale, "target_scale")};
    }
    pair.reference_form = int(form);
    if (form != REFERENCE_NONE) {
      STD_TORCH_CHECK(q_w && q_l, "reference: expected tensors for form ", form);
      pair.reference[0] = rows_of(*q_w, "reference", p_w, pair.pairs, n);
      pair.reference[1] = rows_of(*q_l, "reference", p_w, pair.pairs, n);
      const int dtype = pair.reference[0].dtype;
      STD_TORCH_CHECK(pair.reference[1].dtype == dtype && (form != REFERENCE_BFLOAT16 || dtype == BFLOAT16) &&
                          (form == REFERENCE_FLOAT8) == (dtype == FLOAT8),
                      "reference: dtype does not fit form ", form);
    }
    if (form == REFERENCE_FLOAT8) {
      STD_TORCH_CHECK(s_w && s_l, "reference_scale: expected tensors for form ", form);
      const int64_t blocks = (n + PACK_BLOCK - 1) / PACK_BLOCK;
      pair.reference_scale[0] = rows_of(*s_w, "reference_scale", p_w, pair.pairs, blocks);
      pair.reference_scale[1] = rows_of(*s_l, "reference_scale", p_w, pair.pairs, blocks);
    }
  }

  int64_t chunks() const { return pair.pairs * pair.segments; }

  // run(begin, end) over all chunks, in threads once there are more than about 32K elements for each.
  template <class Run>
  void over_chunks(const Run& run) const {
    const int64_t grain = pair.length >= 32768 ? 1 : 32768 / pair.length;
    torch::stable::parallel_for(0, chunks(), grain, run);
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
    for (int64_t d = 1; d < from.dim(); ++d) STD_TORCH_CHECK(from.size(d) == to.size(d), "out: expected the table's rows");
    for (int64_t row : rows)
      STD_TORCH_CHECK(row >= 0 && row < from.size(0), "rows: expected numbers below ", from.size(0), ", got ", row);
    const int64_t bytes = from.numel() / from.size(0) * int64_t(from.element_size());
    copies.push_back({static_cast<const char*>(from.const_data_ptr()), static_cast<char*>(to.mutable_data_ptr()), bytes});
  }
  return copies;
}

#define PGDPO_OPERANDS                                                                                              \
  const Tensor &p_w, const Tensor &p_l, const Tensor &y_w, const Tensor &y_l, const MaybeTensor &noise,             \
      const MaybeTensor &target_scale, const MaybeTensor &q_w, const MaybeTensor &q_l, const MaybeTensor &s_w,      \
      const MaybeTensor &s_l, int64_t form, int64_t groups, int64_t segments, int64_t length
#define PGDPO_PASS_OPERANDS \
  p_w, p_l, y_w, y_l, noise, target_scale, q_w, q_l, s_w, s_l, form, groups, segments, length

#define PGDPO_OBJECTIVE                                                                                               \
  bool anchor, bool cross, MaybeTensor reference_errors, MaybeTensor weight, MaybeTensor posterior_scale, int64_t kind, \
      int64_t flags, std::vector<double> parameters, Tensor loss, Tensor telemetry, Tensor coefficients
#define PGDPO_PASS_OBJECTIVE \
  anchor, cross, reference_errors, weight, posterior_scale, kind, flags, parameters, loss, telemetry, coefficients

#define PGDPO_SCHEMA                                                                                             \
  "Tensor p_w, Tensor p_l, Tensor y_w, Tensor y_l, Tensor? noise, Tensor? target_scale, Tensor? q_w, Tensor? "  \
  "q_l, Tensor? s_w, Tensor? s_l, int form, int groups, int segments, int length, "
#define PGDPO_ELEMENTS_SCHEMA "Tensor? weight, Tensor? posterior_scale, int kind, int flags, float[] parameters, bool outer, "
#define PGDPO_OBJECTIVE_SCHEMA                                                                                         \
  "bool anchor, bool cross, Tensor? reference_errors, Tensor? weight, Tensor? posterior_scale, int kind, int flags, " \
  "float[] parameters, Tensor(a!) loss, Tensor(b!) telemetry, Tensor(c!) coefficients"
// The CPU and the CUDA library implement these.
inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def("statistics(" PGDPO_SCHEMA "bool anchor, bool cross, Tensor(a!) means) -> ()");
  m.def("objective(" PGDPO_SCHEMA PGDPO_OBJECTIVE_SCHEMA ") -> ()");
  m.def("gradients(" PGDPO_SCHEMA
        "bool anchor, Tensor coefficients, Tensor? incoming, Tensor(a!) chosen, Tensor(b!) rejected) -> ()");
  m.def("loss_and_gradients(" PGDPO_SCHEMA PGDPO_OBJECTIVE_SCHEMA
        ", Tensor? incoming, Tensor(d!) chosen, Tensor(e!) rejected) -> bool");
  m.def("element_objective(" PGDPO_SCHEMA PGDPO_ELEMENTS_SCHEMA
        "bool with_gradients, Tensor(a!) loss, Tensor(b!) telemetry, Tensor(c!) means, Tensor(d!) chosen, "
        "Tensor(e!) rejected) -> ()");
  m.def("element_gradients(" PGDPO_SCHEMA PGDPO_ELEMENTS_SCHEMA
        "bool speculative, Tensor means, Tensor incoming, Tensor(a!) chosen, Tensor(b!) rejected) -> ()");
  m.def("pack(" PGDPO_SCHEMA
        "Tensor(a!) chosen, Tensor(b!) rejected, Tensor(c!)? chosen_scale, Tensor(d!)? rejected_scale, "
        "Tensor(e!) means) -> ()");
  m.def("gather_rows(Tensor[] tables, int[] rows, Tensor(a!)[] out) -> ()");
}

}  // namespace
}  // namespace pgdpo
