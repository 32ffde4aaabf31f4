// The CUDA operators with their launches run by the host: the same plans, the same per-thread code, the same trees of
// sums, one thread after the other. What only a GPU can show (memory order, barriers, speed) is not in here.
#include <algorithm>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/pack.h"
#include "operands.h"

// The little of the CUDA runtime that operators call themselves.
extern "C" const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}

namespace pgdpo {
namespace cuda {
namespace {

constexpr int WARP = 32;

// Sums over a team as team_sum and team_total make them.
template <class S, int PLANES>
void team_totals(S (&threads)[THREADS][PLANES], S (&totals)[PLANES]) {
  for (int k = 0; k < PLANES; ++k) {
    S warps[THREADS / WARP];
    for (int warp = 0; warp < THREADS / WARP; ++warp) {
      S x[WARP];
      for (int lane = 0; lane < WARP; ++lane) x[lane] = threads[warp * WARP + lane][k];
      for (int offset = WARP / 2; offset > 0; offset /= 2)
        for (int lane = 0; lane < offset; ++lane) x[lane] += x[lane + offset];
      warps[warp] = x[0];
    }
    totals[k] = (warps[0] + warps[1]) + (warps[2] + warps[3]);
  }
}

template <class S>
void fold(const Pair& x, const Call<S>& call) {
  S total = S(0);
  for (int64_t row = 0; row < x.pairs * x.groups; ++row) {
    S sums[STATISTICS];
    if (x.groups == 1) {
      S threads[THREADS][STATISTICS];
      for (int t = 0; t < THREADS; ++t)
        thread_fold(call.partial, x.pairs, x.segments, x.groups, row, t, THREADS, threads[t]);
      team_totals(threads, sums);
    } else {
      thread_fold(call.partial, x.pairs, x.segments, x.groups, row, 0, 1, sums);
    }
    finish_row(x, call, row, sums, false, total);
  }
  if (call.kind >= 0) *call.loss = total / S(x.pairs * x.groups);
}

template <class S, class Each>
void each_segment(const Pair& x, const Each& each) {
  for (int64_t item = 0; item < x.pairs * x.segments; ++item)
    each(item, Segment<S>(x, item / x.segments, item % x.segments));
}

}  // namespace

Current::Current(int) {
  device.multiprocessors = 132;
  device.shared_limit = 227 * 1024;
  device.major = 9;
}
Current::~Current() {}

template <class S>
cudaError_t launch_errors(const Pair& x, const Call<S>& call, const Device&, cudaStream_t) {
  with_errors<S>(x, [&](auto policy, auto access, auto form) {
    each_segment<S>(x, [&](int64_t item, const Segment<S>& s) {
      S threads[THREADS][STATISTICS], totals[STATISTICS];
      for (int t = 0; t < THREADS; ++t)
        thread_sums<S, decltype(policy)::value, decltype(access)::value, decltype(form)::value>(s, t, call.anchor,
                                                                                                call.cross, threads[t]);
      team_totals(threads, totals);
      for (int k = 0; k < STATISTICS; ++k) call.partial[k * x.pairs * x.segments + item] = totals[k];
    });
  });
  fold(x, call);
  return cudaSuccess;
}

template <class S>
cudaError_t launch_gradients(const Pair& x, const Call<S>& call, cudaStream_t) {
  const int64_t rows = x.pairs * x.groups;
  const S incoming = call.incoming == nullptr ? S(1) : *call.incoming;
  with_gradients<S>(x, call, [&](auto policy, auto access, auto form) {
    each_segment<S>(x, [&](int64_t, const Segment<S>& s) {
      const int64_t row = s.pair * x.groups + s.index % x.groups;
      const Coefficients<S> c = {incoming * call.coefficients[row], incoming * call.coefficients[rows + row],
                                 incoming * call.coefficients[2 * rows + row]};
      for (int t = 0; t < THREADS; ++t)
        thread_gradients<S, decltype(policy)::value, decltype(access)::value, decltype(form)::value>(s, t, c,
                                                                                                     call.gradient);
    });
  });
  return cudaSuccess;
}

template <class S>
cudaError_t launch_elements(const Pair& x, const Call<S>& call, cudaStream_t) {
  const S incoming = call.incoming == nullptr ? S(1) : *call.incoming;
  if (call.speculative && incoming == S(1)) return cudaSuccess;
  with_elements<S>(x, call, [&](auto policy, auto access, auto kind) {
    each_segment<S>(x, [&](int64_t item, const Segment<S>& s) {
      S threads[THREADS][ELEMENT_SUMS], totals[ELEMENT_SUMS];
      for (int t = 0; t < THREADS; ++t)
        thread_elements<S, decltype(policy)::value, decltype(access)::value, decltype(kind)::value>(
            x, call, s, t, incoming, threads[t]);
      if (call.partial == nullptr) return;
      team_totals(threads, totals);
      for (int k = 0; k < ELEMENT_SUMS; ++k) call.partial[k * x.pairs * x.segments + item] = totals[k];
    });
  });
  return cudaSuccess;
}

template <class S>
cudaError_t launch_fold_elements(const Pair& x, const Call<S>& call, const Device&, cudaStream_t) {
  S total = S(0);
  for (int64_t pair = 0; pair < x.pairs; ++pair) {
    S threads[THREADS][ELEMENT_SUMS], totals[ELEMENT_SUMS];
    for (int t = 0; t < THREADS; ++t)
      thread_fold(call.partial, x.pairs, x.segments, int64_t(1), pair, t, THREADS, threads[t]);
    team_totals(threads, totals);
    total += finish_elements(x, call, pair, totals);
  }
  *call.loss = total / S(x.pairs);
  return cudaSuccess;
}

void* device_address(const void* pointer) {
  return const_cast<void*>(pointer);
}

// Lanes in step: each exchange of the kernel is a loop over the offsets of its shuffles.
template <class S>
cudaError_t launch_pack(const Pair& x, const Call<S>& call, const Packed& out, const Device&, cudaStream_t) {
  with_pack<S>(x, out, [&](auto policy, auto access) {
    constexpr int P = decltype(policy)::value, ACCESS = decltype(access)::value;
    constexpr int WIDTH = width_of(P), LANES = PACK_BLOCK / WIDTH;
    each_segment<S>(x, [&](int64_t item, const Segment<S>& s) {
      S threads[THREADS][STATISTICS] = {}, totals[STATISTICS];
      for (int base = 0; base < s.count; base += THREADS * WIDTH) {
        float residual[THREADS][2][WIDTH];
        for (int t = 0; t < THREADS; ++t) lane_residuals<S, P, ACCESS>(s, base + t * WIDTH, residual[t], threads[t]);
        for (int side = 0; side < 2; ++side) {
          uint32_t words[THREADS][WIDTH / 4] = {};
          for (int first = 0; out.rows[side].dtype == FLOAT8 && first < THREADS; first += LANES) {
            uint32_t largest = 0;
            for (int t = first; t < first + LANES; ++t) largest = std::max(largest, lane_largest(residual[t][side]));
            const float scale = first_scale(bits_float(largest));
            float wanted[LANES], kept[LANES];
            for (int lane = 0; lane < LANES; ++lane)
              lane_bytes(residual[first + lane][side], scale, words[first + lane], wanted[lane], kept[lane]);
            for (int offset = 1; offset < LANES; offset *= 2)
              for (int lane = 0; lane < LANES; lane += 2 * offset) {
                wanted[lane] += wanted[lane + offset];
                kept[lane] += kept[lane + offset];
              }
            const int at = base + first * WIDTH;
            if (at < s.count)
              reinterpret_cast<float*>(
                  out.scale[side].data)[s.pair * out.scale[side].stride + (s.start + at) / PACK_BLOCK] =
                  corrected_scale(scale, wanted[0], kept[0]);
          }
          for (int t = 0; t < THREADS; ++t)
            if (base + t * WIDTH < s.count)
              put_row<WIDTH, ACCESS>(out.rows[side], x, s.pair, s.start + base + t * WIDTH, residual[t][side],
                                     words[t]);
        }
      }
      team_totals(threads, totals);
      for (int k = 0; k < STATISTICS; ++k) call.partial[k * x.pairs * x.segments + item] = totals[k];
    });
  });
  fold(x, call);
  return cudaSuccess;
}

cudaError_t launch_gather(const Gather& x, const Device&, cudaStream_t) {
  for (int i = 0; i < x.count; ++i)
    for (int k = 0; k < x.tables; ++k) memcpy(x.to[k] + i * x.bytes[k], x.from[k] + x.rows[i] * x.bytes[k], x.bytes[k]);
  return cudaSuccess;
}

// Gradients from what the blocks hold are those from where it was copied, so only the plan is checked.
cudaError_t launch_one_touch(const Pair& x, const Call<float>& call, const OneTouch& plan, cudaStream_t stream) {
  if (plan.blocks * int64_t(plan.slots) < x.pairs * x.segments || plan.shared_bytes > 227 * 1024)
    throw std::runtime_error("the plan does not cover the call");
  launch_errors(x, call, Device{}, stream);
  return launch_gradients(x, call, stream);
}

template cudaError_t launch_errors<float>(const Pair&, const Call<float>&, const Device&, cudaStream_t);
template cudaError_t launch_errors<double>(const Pair&, const Call<double>&, const Device&, cudaStream_t);
template cudaError_t launch_gradients<float>(const Pair&, const Call<float>&, cudaStream_t);
template cudaError_t launch_gradients<double>(const Pair&, const Call<double>&, cudaStream_t);
template cudaError_t launch_elements<float>(const Pair&, const Call<float>&, cudaStream_t);
template cudaError_t launch_elements<double>(const Pair&, const Call<double>&, cudaStream_t);
template cudaError_t launch_fold_elements<float>(const Pair&, const Call<float>&, const Device&, cudaStream_t);
template cudaError_t launch_fold_elements<double>(const Pair&, const Call<double>&, const Device&, cudaStream_t);
template cudaError_t launch_pack<float>(const Pair&, const Call<float>&, const Packed&, const Device&, cudaStream_t);
template cudaError_t launch_pack<double>(const Pair&, const Call<double>&, const Packed&, const Device&, cudaStream_t);

}  // namespace cuda

namespace {

// Blocks, segments a block and bytes a block of the one-touch launch; zeros when the call does not fit.
std::vector<int64_t> one_touch_plan(PGDPO_OPERANDS, int64_t form, int64_t length, bool anchor, int64_t multiprocessors,
                                    int64_t shared_limit) {
  const Operands x(PGDPO_PASS_OPERANDS, form, 1, length);
  const cuda::OneTouch plan = cuda::one_touch(x.pair, anchor, nullptr, int(multiprocessors), int(shared_limit));
  return {plan.blocks, plan.slots, plan.shared_bytes};
}

STABLE_TORCH_LIBRARY_IMPL(pgdpo_fast_emulated, CPU, m) {
  m.impl("one_touch_plan", TORCH_BOX(&one_touch_plan));
}

}  // namespace
}  // namespace pgdpo
