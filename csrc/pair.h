// The passes over video latents that every preference loss is made of, as plain C++: no torch, no allocation, no
// threads. The passes of cpu/ are compiled once per instruction set; cpu/native.cpp picks one and spreads the segments
// over threads.
//
// A video is a row of numel elements cut into `segments` of `length` (the last may be short); segment s belongs to
// group s / consecutive % groups. Over all pairs, segment c is the c % segments of pair c / segments. Each is summed in
// one fixed order, so results depend on neither the thread count nor the number of pairs.
#pragma once

#include <stdint.h>

#include "epilogue.h"

namespace pgdpo {

enum Storage : int { BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FLOAT8 };
// Mirrors of pgdpo_fast/backends/operands.py: the reference's form, and the planes of Telemetry, Coefficients and
// ElementMeans. Those of the statistics are the fields of GroupErrors in pgdpo_fast/objectives.py.
enum Reference : int {
  REFERENCE_NONE = 0,
  REFERENCE_PREDICTION = 1,
  REFERENCE_BFLOAT16 = 2,
  REFERENCE_FLOAT8 = 3,
};
enum Statistic : int {
  STATISTIC_POLICY_CHOSEN = 0,
  STATISTIC_POLICY_REJECTED = 1,
  STATISTIC_GAP_CHOSEN = 2,
  STATISTIC_GAP_REJECTED = 3,
  STATISTIC_ANCHOR = 4,
  STATISTIC_CROSS = 5,
  STATISTIC_ANCHOR_REJECTED = 6,
  STATISTICS = 7,
};
enum TelemetryRow : int {
  TELEMETRY_PER_PAIR_LOSS = 0,
  TELEMETRY_LOGITS = 1,
  TELEMETRY_ALPHA = 2,
  TELEMETRY_GAMMA = 3,
  TELEMETRY_IMPORTANCE = 4,
  TELEMETRY_POLICY_CHOSEN_ERROR = 5,
  TELEMETRY_POLICY_REJECTED_ERROR = 6,
  TELEMETRY_CHOSEN_GAP = 7,
  TELEMETRY_REJECTED_GAP = 8,
  TELEMETRY = 9,
};
enum Coefficient : int {
  COEFFICIENT_CHOSEN = 0,
  COEFFICIENT_REJECTED = 1,
  COEFFICIENT_ANCHOR = 2,
  COEFFICIENT_ANCHOR_REJECTED = 3,
  COEFFICIENTS = 4,
};
enum ElementMean : int {
  MEAN_GAMMA = 0,
  MEAN_PREFERENCE = 1,
  MEAN_COMPLEMENT = 2,
  MEAN_IMPLICIT = 3,
  ELEMENT_MEANS = 4,
};
// Planes of element sums: those of the telemetry (the first is the preference term P with `outer`), then these.
enum ElementSum : int {
  SUM_COMPLEMENT = 9,
  SUM_IMPLICIT = 10,
  ELEMENT_SUMS = 11,
};

// Rows of one operand, `stride` elements apart, each contiguous.
struct Rows {
  const char* data = nullptr;
  int64_t stride = 0;
  int dtype = FLOAT32;
};
struct MutableRows {
  char* data = nullptr;
  int64_t stride = 0;
  int dtype = FLOAT32;
};

// Index 0 is the chosen, 1 the rejected video. With noise, the target is noise_scale * noise + clean_scale * target,
// the two scales rows 0 and 1 of target_scale. reference_scale holds one number per PACK_BLOCK elements of FLOAT8
// residuals. A latent weight, of the pass's type, multiplies what an element adds to its group and its gradients;
// where it is zero nothing else of the element counts, not even NaN. A row has weight_length of them for every
// weight_span elements, over and over within the span.
constexpr int PACK_BLOCK = 128;
struct Pair {
  Rows policy[2], target[2], reference[2], reference_scale[2], noise, target_scale, latent_weight;
  int64_t weight_length = 0, weight_span = 0;
  bool shared_target = false, built_target = false;
  int reference_form = REFERENCE_NONE;
  int64_t pairs = 0, numel = 0, segments = 0, length = 0, groups = 1, consecutive = 1;

  int64_t group_of(int64_t segment) const { return segment / consecutive % groups; }
  // Where among its pair's the sums of a segment go: those of group g lie at g, g + groups, g + 2 groups, ...
  int64_t place(int64_t segment) const {
    const int64_t turn = segment / (consecutive * groups) * consecutive + segment % consecutive;
    return turn * groups + group_of(segment);
  }
};

// The statistics only some calls want.
struct Wishes {
  bool anchor, cross, anchor_rejected;
};

// What an element pass computes besides its operands; numbers are in double and rounded to the pass's type on use.
struct Elements {
  int terms = 0;
  Formula formula[TERM_LIMIT];
  bool outer = false;                       // of one formula
  const double* scale = nullptr;            // [pairs], of the gradients, or null: write none
  const double* posterior_scale = nullptr;  // [pairs] or null
  const double* beta_scale = nullptr;       // [pairs] or null
  const double* means = nullptr;            // [ELEMENT_MEANS, pairs], for gradients with `outer`
  double* sums = nullptr;                   // [ELEMENT_SUMS, pairs * segments], or null: sum nothing
  MutableRows gradient[2];
};

struct Packed;  // cache.h

// One instruction set's passes over segments [begin, end), accumulating in float or double.
struct Passes {
  const char* name;
  // sums: [STATISTICS, pairs * segments]; planes nobody wishes for are zero.
  void (*errors)(const Pair&, Wishes, double* sums, int64_t begin, int64_t end);
  // coefficients: [COEFFICIENTS, pairs * groups], of p_w - y_w, p_l - y_l, p_w - q_w and p_l - q_l.
  void (*gradients)(const Pair&, Wishes, const double* coefficients, const MutableRows gradient[2], int64_t begin,
                    int64_t end);
  void (*elements)(const Pair&, const Elements&, int64_t begin, int64_t end);
  void (*pack)(const Pair&, const Packed&, int64_t begin, int64_t end);
};

}  // namespace pgdpo
