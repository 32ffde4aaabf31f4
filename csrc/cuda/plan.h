// What the host decides before a launch, from shapes, strides and addresses alone: how operands can be read, and
// whether a call fits on chip; and the choice of the kernel that follows. Plain C++, so tests need no GPU.
#pragma once

#include <type_traits>

#include "cache.h"
#include "cuda/threads.h"

namespace pgdpo {
namespace cuda {

constexpr int ONE_TOUCH_THREADS = 512;
// Shared memory of a one-touch block besides the latents it holds.
constexpr int ONE_TOUCH_RESERVED = 2048;

// Whether vectors of `width` elements of every row start at a multiple of their size.
inline bool aligned(const Rows& rows, int width, int64_t pairs) {
  if (rows.data == nullptr) return true;
  const int bytes = width * size_of(rows.dtype);
  const int unit = bytes < 16 ? bytes : 16;
  return rows.dtype != FLOAT64 && reinterpret_cast<uintptr_t>(rows.data) % unit == 0 &&
         (pairs == 1 || rows.stride % width == 0);
}

// How a pass can read its operands. `gradient` is null for a pass that writes none.
inline Access access_of(const Pair& x, bool with_reference, const MutableRows* gradient) {
  const int policy = x.policy[0].dtype, width = width_of(policy);
  bool vectors = policy != FLOAT64 && x.numel % width == 0 && x.length % width == 0 && aligned(x.noise, width, x.pairs);
  bool same = !x.built_target || x.noise.dtype == policy;
  for (int side = 0; side < 2; ++side) {
    vectors = vectors && aligned(x.policy[side], width, x.pairs) && aligned(x.target[side], width, x.pairs);
    same = same && x.target[side].dtype == policy;
    if (with_reference) {
      vectors = vectors && aligned(x.reference[side], width, x.pairs);
      if (x.reference_form == REFERENCE_PREDICTION) same = same && x.reference[side].dtype == policy;
    }
    if (gradient != nullptr && gradient[side].data != nullptr)
      vectors = vectors && aligned({gradient[side].data, gradient[side].stride, gradient[side].dtype}, width, x.pairs);
  }
  return !vectors ? SCALAR : same ? SAME : MIXED;
}

// How many bytes of each operand a one-touch block keeps of one segment, in the order it lays them out.
struct Held {
  int policy[2], target[2], noise, reference;

  PGDPO_HD static int region(const Rows& rows, int64_t length) {
    return rows.data == nullptr ? 0 : int((length * size_of(rows.dtype) + 15) / 16 * 16);
  }
  PGDPO_HD Held(const Pair& x, bool anchor) {
    for (int side = 0; side < 2; ++side) {
      policy[side] = region(x.policy[side], x.length);
      target[side] = side == 1 && x.shared_target ? 0 : region(x.target[side], x.length);
    }
    noise = x.built_target ? region(x.noise, x.length) : 0;
    reference = anchor ? region(x.reference[0], x.length) : 0;
  }
  PGDPO_HD int bytes() const { return policy[0] + policy[1] + target[0] + target[1] + noise + reference; }
};

// One block a multiprocessor keeps `slots` segments each: all of them must fit at once, since every block waits for the
// sums of all before it writes the first gradient.
struct OneTouch {
  bool fits = false;
  int blocks = 0, slots = 0, shared_bytes = 0;
};

// `shared_limit`: what a block may have of shared memory after opting in (227 KB on sm_90).
inline OneTouch one_touch(const Pair& x, bool anchor, const MutableRows* gradient, int multiprocessors,
                          int shared_limit) {
  OneTouch plan;
  const int64_t items = x.pairs * x.segments;
  if (multiprocessors < 1 || items > (int64_t(1) << 30) || x.length > (1 << 20) || access_of(x, true, gradient) != SAME)
    return plan;
  const int64_t slots = (items + multiprocessors - 1) / multiprocessors;
  const int64_t bytes = slots * Held(x, anchor).bytes();
  if (bytes + ONE_TOUCH_RESERVED > shared_limit) return plan;
  plan.fits = true;
  plan.slots = int(slots);
  plan.blocks = int((items + slots - 1) / slots);
  plan.shared_bytes = int(bytes);
  return plan;
}

template <int V>
using Constant = std::integral_constant<int, V>;

// run(policy dtype, access) as compile-time constants. float64 has one pass, the one that reads anything.
template <class S, class Run>
void with_policy(const Pair& x, Access access, const Run& run) {
  if constexpr (sizeof(S) == 8) {
    run(Constant<FLOAT64>{}, Constant<SCALAR>{});
  } else {
    const auto with_access = [&](auto policy) {
      if (access == SAME)
        run(policy, Constant<SAME>{});
      else if (access == MIXED)
        run(policy, Constant<MIXED>{});
      else
        run(policy, Constant<SCALAR>{});
    };
    if (x.policy[0].dtype == BFLOAT16)
      with_access(Constant<BFLOAT16>{});
    else if (x.policy[0].dtype == FLOAT16)
      with_access(Constant<FLOAT16>{});
    else
      with_access(Constant<FLOAT32>{});
  }
}

template <class Run>
void with_form(int form, const Run& run) {
  if (form == REFERENCE_NONE)
    run(Constant<REFERENCE_NONE>{});
  else if (form == REFERENCE_PREDICTION)
    run(Constant<REFERENCE_PREDICTION>{});
  else if (form == REFERENCE_BFLOAT16)
    run(Constant<REFERENCE_BFLOAT16>{});
  else
    run(Constant<REFERENCE_FLOAT8>{});
}

// run(policy dtype, access, reference form) of the error pass for these operands.
template <class S, class Run>
void with_errors(const Pair& x, const Run& run) {
  with_policy<S>(x, access_of(x, true, nullptr), [&](auto policy, auto access) {
    if constexpr (decltype(access)::value == SAME)
      with_form(x.reference_form, [&](auto form) { run(policy, access, form); });
    else
      run(policy, access, Constant<ANY>{});
  });
}

// The same of the gradient pass, which reads the reference for the anchor alone.
template <class S, class Run>
void with_gradients(const Pair& x, const Call<S>& call, const Run& run) {
  const Access access = access_of(x, call.anchor, call.gradient);
  with_policy<S>(x, access == SAME && call.anchor ? MIXED : access, [&](auto policy, auto access) {
    run(policy, access, Constant<decltype(access)::value == SAME ? int(REFERENCE_NONE) : int(ANY)>{});
  });
}

// run(policy dtype, access, kind) of an element pass. The objectives of everyday use have kernels of their own.
template <class S, class Run>
void with_elements(const Pair& x, const Call<S>& call, const Run& run) {
  const Access access = access_of(x, true, call.gradient);
  with_policy<S>(x, access == SAME ? MIXED : access, [&](auto policy, auto access) {
    if constexpr (decltype(access)::value != SAME) {
      if (call.outer && call.gradient[0].data != nullptr)
        run(policy, access, Constant<OUTER_GRADIENTS>{});
      else if (call.kind == KIND_DPO)
        run(policy, access, Constant<KIND_DPO>{});
      else if (call.kind == KIND_PGDPO)
        run(policy, access, Constant<KIND_PGDPO>{});
      else
        run(policy, access, Constant<ANY>{});
    }
  });
}

// run(policy dtype, access) of packing. Rows are written in vectors where they are read so.
template <class S, class Run>
void with_pack(const Pair& x, const Packed& out, const Run& run) {
  MutableRows rows[2] = {out.rows[0], out.rows[1]};
  const Access access = access_of(x, false, rows);
  with_policy<S>(x, access == SAME ? MIXED : access, [&](auto policy, auto access) {
    if constexpr (decltype(access)::value != SAME) run(policy, access);
  });
}

// run(policy dtype, reference form) of the one-touch launch.
template <class Run>
void with_one_touch(const Pair& x, const Run& run) {
  with_policy<float>(x, SAME, [&](auto policy, auto access) {
    if constexpr (decltype(access)::value == SAME) with_form(x.reference_form, [&](auto form) { run(policy, form); });
  });
}

}  // namespace cuda
}  // namespace pgdpo
