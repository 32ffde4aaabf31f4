// The passes over video latents that every preference loss is made of, as plain C++: no torch, no allocation, no
// threads. cpu/pair.cpp is compiled once per instruction set; cpu/native.cpp picks one and spreads the chunks over
// threads.
//
// A video is a row of numel elements cut into `segments` runs of `length` (the last may be short); run s belongs to
// group s % groups. Chunk c is run c % segments of pair c / segments. Every chunk is summed in one fixed order, so
// results depend on neither the thread count nor the number of pairs.
#pragma once

#include <stdint.h>

namespace pgdpo {

enum Storage : int { BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FLOAT8 };
enum Reference : int { REFERENCE_NONE, REFERENCE_PREDICTION, REFERENCE_BFLOAT16, REFERENCE_FLOAT8 };

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
// residuals.
constexpr int PACK_BLOCK = 128;
struct Pair {
  Rows policy[2], target[2], reference[2], reference_scale[2], noise, target_scale;
  bool shared_target = false, built_target = false;
  int reference_form = REFERENCE_NONE;
  int64_t pairs = 0, numel = 0, segments = 0, length = 0, groups = 1;
};

// Planes of errors: policy errors, gaps, anchor, cross. Planes of element sums: the nine of the telemetry (the first is
// P instead of the loss with `outer`), 1 - gamma, and the regularizer I. Planes of means: gamma, P, 1 - gamma, I.
constexpr int STATISTICS = 6, TELEMETRY = 9, ELEMENT_SUMS = 11, ELEMENT_MEANS = 4;

// What an element pass computes besides its operands; numbers are in double and rounded to the pass's type on use.
struct Elements {
  int kind = 0, flags = 0;
  bool outer = false;
  double parameters[8] = {};
  const double* scale = nullptr;            // [pairs], of the gradients, or null: write none
  const double* posterior_scale = nullptr;  // [pairs] or null
  const double* means = nullptr;            // [ELEMENT_MEANS, pairs], for gradients with `outer`
  double* sums = nullptr;                   // [ELEMENT_SUMS, pairs * segments], or null: sum nothing
  MutableRows gradient[2];
};

struct Packed;  // cache.h

// One instruction set's passes over chunks [begin, end), accumulating in float or double.
struct Passes {
  const char* name;
  // sums: [STATISTICS, pairs * segments]. anchor, cross: whether those planes are wanted; unwanted ones are zero.
  void (*errors)(const Pair&, bool anchor, bool cross, double* sums, int64_t begin, int64_t end);
  // coefficients: [3, pairs * groups], of p_w - y_w, p_l - y_l and p_w - q_w.
  void (*gradients)(const Pair&, bool anchor, const double* coefficients, const MutableRows gradient[2], int64_t begin,
                    int64_t end);
  void (*elements)(const Pair&, const Elements&, int64_t begin, int64_t end);
  void (*pack)(const Pair&, const Packed&, int64_t begin, int64_t end);
};

}  // namespace pgdpo
