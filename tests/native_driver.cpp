// Runs every CPU pass of csrc/cpu on buffers that end where their data ends, and measures the vector functions
// against long double. Built with sanitizers by tests/test_native.py; prints "name value" lines.
#include <stdio.h>
#include <stdlib.h>

#include <cmath>
#include <memory>
#include <vector>

#include "cpu/reader.h"
#include "epilogue.h"
#include "pair.h"

namespace pgdpo {
inline namespace PGDPO_ISA {
const Passes& passes(bool float64);
}
}  // namespace pgdpo

namespace {

using namespace pgdpo;

uint32_t state = 12345;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return state / 4294967296.0 - 0.5;
}

template <class S, class Exact, class Run>
double worst_ulp(double low, double high, const Exact& exact, const Run& run) {
  constexpr int width = Vec<S>::width;
  double worst = 0;
  for (int i = 0; i < 4000; ++i) {
    S in[width], out[width];
    for (S& x : in) x = S(low + (high - low) * (uniform() + 0.5));
    if (i == 0) in[0] = S(low), in[1] = S(high);
    run(Vec<S>::at(in)).to(out);
    for (int lane = 0; lane < width; ++lane) {
      const long double truth = exact((long double)in[lane]);
      const S nearest = S(truth);
      const double ulp = double(std::nextafter(nearest, S(INFINITY)) - nearest);
      worst = std::fmax(worst, double(std::fabs((long double)out[lane] - truth)) / ulp);
    }
  }
  return worst;
}

template <class S>
void functions(const char* type) {
  const double far = double(Lanes<S>::exp_far), deep = sizeof(S) == 4 ? -87.0 : -708.0;
  const auto up = [](long double x) { return std::exp(x); };
  const auto minus = [](long double x) { return std::exp(-std::fabs(x)); };
  const auto log1p = [](long double x) { return std::log1p(x); };
  printf("exp_%s %.3f\n", type, worst_ulp<S>(deep, -deep, up, [](Vec<S> x) { return exponential(x); }));
  printf("exp_minus_absolute_%s %.3f\n", type,
         worst_ulp<S>(-far, far, minus, [](Vec<S> x) { return exp_minus_absolute(x); }));
  printf("exp_cut_%s %.3f\n", type, worst_ulp<S>(-far, far, up, [](Vec<S> x) { return exp_cut(x); }));
  printf("log1p_%s %.3f\n", type, worst_ulp<S>(0.0, 1.0, log1p, [](Vec<S> x) { return log1p_unit(x); }));
  printf("log1p_small_%s %.3f\n", type, worst_ulp<S>(0.0, 1e-6, log1p, [](Vec<S> x) { return log1p_unit(x); }));
}

// Every 16-bit float there is comes back from a load and a store as it was; NaN as some NaN.
int conversions() {
  int wrong = 0;
  constexpr int width = Vec<float>::width;
  for (int dtype : {BFLOAT16, FLOAT16}) {
    for (int first = 0; first < 65536; first += width) {
      uint16_t in[width], out[width], scalar[width];
      for (int lane = 0; lane < width; ++lane) in[lane] = uint16_t(first + lane);
      const Vec<float> x = load<float>(dtype, (const char*)in, 0);
      store<float>(dtype, (char*)out, 0, x);
      store_lanes<float>(dtype, (char*)scalar, 0, width, x);
      for (int lane = 0; lane < width; ++lane) {
        const bool nan = std::isnan(x.v[lane]);
        wrong += nan ? std::isnan(decode<float>(dtype, (const char*)out, lane)) == 0 : out[lane] != in[lane];
        wrong += nan ? std::isnan(decode<float>(dtype, (const char*)scalar, lane)) == 0 : scalar[lane] != in[lane];
      }
    }
    if (dtype == BFLOAT16)
      for (int first = 0; first < 65536; first += 2 * width) {
        uint16_t in[2 * width], out[2 * width];
        for (int lane = 0; lane < 2 * width; ++lane) in[lane] = uint16_t(first + lane);
        Vec<float> even, odd;
        load_split((const char*)in, 0, even, odd);
        const auto words = split_words(even, odd);
        memcpy(out, &words, sizeof(out));
        for (int lane = 0; lane < 2 * width; ++lane) {
          const float x = decode<float>(dtype, (const char*)in, lane), y = (lane % 2 ? odd : even).v[lane / 2];
          wrong += std::isnan(x) ? !std::isnan(y) || !std::isnan(decode<float>(dtype, (const char*)out, lane))
                                 : x != y || out[lane] != in[lane];
        }
      }
    for (int i = 0; i < 4096; ++i) {  // rounding: vectors and single values agree
      float values[width];
      for (float& v : values) v = float(uniform() * std::exp2(60 * uniform()));
      uint16_t whole[width], single[width];
      store<float>(dtype, (char*)whole, 0, Vec<float>::at(values));
      store_lanes<float>(dtype, (char*)single, 0, width, Vec<float>::at(values));
      wrong += memcmp(whole, single, sizeof(whole)) != 0;
    }
  }
  return wrong;
}

std::unique_ptr<char[]> filled(int dtype, int64_t count) {
  const int64_t bytes = count * size_of(dtype);
  std::unique_ptr<char[]> data(new char[bytes]);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == FLOAT8)
      data[i] = char(int((uniform() + 0.5) * 126) | (i % 2 ? 0x80 : 0));  // no NaN
    else
      encode<double>(dtype, data.get(), i, uniform());
  }
  return data;
}

// One call of every pass over `pairs` videos of `numel` elements; counts values that are not finite.
int run(const Passes& passes, int policy, int target, int form, int reference, bool shared, bool built, int64_t pairs,
        int64_t numel, int64_t length, int64_t groups, int kind, int flags, bool outer, bool weighted) {
  Pair x;
  std::vector<std::unique_ptr<char[]>> memory;
  const auto rows = [&](int dtype, int64_t width) {
    memory.push_back(filled(dtype, pairs * width));
    return Rows{memory.back().get(), width, dtype};
  };
  for (int side = 0; side < 2; ++side) {
    x.policy[side] = rows(policy, numel);
    x.target[side] = side && shared ? x.target[0] : rows(target, numel);
    if (form != REFERENCE_NONE) x.reference[side] = rows(reference, numel);
    if (form == REFERENCE_FLOAT8) x.reference_scale[side] = rows(FLOAT32, (numel + PACK_BLOCK - 1) / PACK_BLOCK);
  }
  if (built) {
    x.noise = rows(target, numel);
    x.target_scale = rows(FLOAT32, 2);
    x.target_scale.stride = pairs;
  }
  x.shared_target = shared;
  x.built_target = built;
  x.reference_form = form;
  x.pairs = pairs;
  x.numel = numel;
  x.length = length;
  x.groups = groups;
  x.segments = (numel + length - 1) / length;
  const int64_t segments = pairs * x.segments;
  if (weighted) {  // one weight for every third element
    x.weight_span = numel;
    x.weight_length = numel % 3 ? numel : numel / 3;
    x.latent_weight = rows(policy == FLOAT64 ? FLOAT64 : FLOAT32, x.weight_length);
  }
  const Wishes wanted{form != REFERENCE_NONE, true, form != REFERENCE_NONE};

  int bad = 0;
  const auto check = [&](const std::vector<double>& values) {
    for (double v : values) bad += !std::isfinite(v);
  };
  std::vector<double> sums(STATISTICS * segments, NAN);
  passes.errors(x, wanted, sums.data(), 0, segments);
  check(sums);

  std::unique_ptr<char[]> out[2];
  MutableRows gradient[2];
  const auto fresh = [&] {
    for (int side = 0; side < 2; ++side) {
      const int64_t bytes = pairs * numel * size_of(policy);
      out[side].reset(new char[bytes]);
      memset(out[side].get(), 0xff, bytes);
      gradient[side] = {out[side].get(), numel, policy};
    }
  };
  const auto check_gradients = [&] {
    for (auto& side : out)
      for (int64_t i = 0; i < pairs * numel; ++i) bad += !std::isfinite(decode<double>(policy, side.get(), i));
  };
  fresh();
  const std::vector<double> coefficients(COEFFICIENTS * pairs * groups, 0.5);
  passes.gradients(x, wanted, coefficients.data(), gradient, 0, segments);
  check_gradients();

  fresh();
  Elements call;
  call.outer = outer;
  call.terms = outer ? 1 : 1 + int(numel % 2);  // a sum with the chosen error for every other size
  call.formula[0].kind = kind;
  call.formula[0].flags = flags;
  call.formula[1].kind = KIND_SFT;
  call.formula[1].flags = FLAG_TERM_WEIGHT | FLAG_TERM_WEIGHT_BETA;
  for (int k = 0; k < call.terms; ++k) {
    double (&parameters)[PARAMETERS] = call.formula[k].parameters;
    for (double& number : parameters) number = 2.0;
    parameters[PARAMETER_HALF_BETA] = 5.0;
    parameters[PARAMETER_K2] = parameters[PARAMETER_WEIGHT] = flags % 2 ? 2.0 : 3.0;
    parameters[PARAMETER_IPR_SCALE] = 1.0;
    parameters[PARAMETER_EPS] = parameters[PARAMETER_CLIP] = 0.5;
    parameters[PARAMETER_THRESHOLD] = parameters[PARAMETER_MU] = 0.1;
  }
  const std::vector<double> scale(pairs, 0.25), posterior(pairs, 0.1), means(ELEMENT_MEANS * pairs, 0.5);
  call.posterior_scale = posterior.data();
  call.beta_scale = posterior.data();
  std::vector<double> elements(ELEMENT_SUMS * segments, NAN);
  call.sums = elements.data();
  if (!outer) {
    call.scale = scale.data();
    call.gradient[0] = gradient[0];
    call.gradient[1] = gradient[1];
  }
  passes.elements(x, call, 0, segments);
  check(elements);
  if (outer) {
    call.sums = nullptr;
    call.scale = scale.data();
    call.means = means.data();
    call.gradient[0] = gradient[0];
    call.gradient[1] = gradient[1];
    passes.elements(x, call, 0, segments);
  }
  check_gradients();
  return bad;
}

}  // namespace

int main() {
  functions<float>("float");
  functions<double>("double");
  printf("conversions %d\n", conversions());
  int bad = 0, calls = 0;
  const int objectives[][2] = {
      {KIND_DPO, 0},         {KIND_DPO, FLAG_IMPORTANCE}, {KIND_PGDPO, 3}, {KIND_PGDPO, 2}, {KIND_PGDPO, 3 | 16},
      {KIND_PGDPO, 11 | 32}, {KIND_PGDPO, 5 | 8 | 48},    {KIND_IPO, 0},   {KIND_SLIC, 0},  {KIND_SFT, 64},
      {KIND_DPOP, 64},       {KIND_DPO_SHIFT, 0},         {KIND_HINGE, 0}};
  const int64_t sizes[][3] = {{1, 1, 1}, {7, 7, 1}, {129, 128, 1}, {1037, 512, 1}, {2080, 4096, 1}, {150, 25, 3}};
  for (int policy : {BFLOAT16, FLOAT16, FLOAT32, FLOAT64})
    for (int target : {policy, int(FLOAT32)})
      for (int form = 0; form <= REFERENCE_FLOAT8; ++form)
        for (int layout = 0; layout < 4; ++layout)
          for (const auto& size : sizes) {
            const auto& objective = objectives[calls % 13];
            const int reference = form == 3 ? FLOAT8 : form == 2 ? BFLOAT16 : target;
            const bool outer = objective[0] == KIND_PGDPO && calls % 2;
            bad += run(passes(policy == FLOAT64), policy, target, form, reference, layout & 1, layout & 2, 2, size[0],
                       size[1], size[2], objective[0], objective[1], outer, !outer && calls % 3 == 0);
            ++calls;
          }
  printf("calls %d\nnot_finite %d\n", calls, bad);
}
