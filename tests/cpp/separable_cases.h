// What the tests of training blocks share.
#pragma once

#include <algorithm>
#include <utility>

#include "cases.h"

namespace xsep::cases {

// out[n][a][pixel] = sum over b of in[n][b][pixel] * weights(a, b)
template <class F>
std::vector<double> pointwise(int64_t N, int64_t A, int64_t B, int64_t plane, const std::vector<double>& in,
                              F&& weights) {
  std::vector<double> out(N * A * plane);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t a = 0; a < A; ++a)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < plane; ++i) out[(n * A + a) * plane + i] += in[(n * B + b) * plane + i] * weights(a, b);
  return out;
}

// The gradient of y, which statistics add to.  `values` are y as it was made, `count` its pixels.
inline Truth gradient_of_y(const Truth* dy, const std::vector<double>& values, int64_t count, int64_t plane,
                           const Truth* mean, const Truth& dmean, const Truth& dm2) {
  Truth g{std::vector<double>(values.size()), std::vector<double>(values.size())};
  const int64_t K = static_cast<int64_t>(dmean.values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t k = static_cast<int64_t>(i) / plane % K;
    if (dy) g.values[i] += dy->values[i], g.magnitude[i] += dy->magnitude[i];
    if (!mean) continue;
    g.values[i] += dmean.values[k] / count + 2 * (values[i] - mean->values[k]) * dm2.values[k];
    g.magnitude[i] += dmean.magnitude[k] / count + 2 * (std::abs(values[i]) + mean->magnitude[k]) * dm2.magnitude[k];
  }
  return g;
}

// What the gradient g of y gives: the problem's own gradients, and that of the pointwise weights, which is returned.
// `rounding` of g, z and of the gradient of z counts as so many of their terms.
inline Truth differentiate(Problem& problem, int64_t K, bool relu, const Truth& w_pw, Truth z, Truth g,
                           double rounding = 0) {
  const ConvShape& s = problem.shape;
  const int64_t C = s.C, plane = int64_t{s.P()} * s.Q();
  const auto round = [&](std::vector<double>& magnitude, const std::vector<double>& values) {
    for (size_t i = 0; i < values.size(); ++i) magnitude[i] += rounding * std::abs(values[i]);
  };
  round(g.magnitude, g.values);
  round(z.magnitude, z.values);
  problem.dy = pointwise(s.N, C, K, plane, g.values, [&](int64_t c, int64_t k) { return w_pw.values[k * C + c]; });
  std::vector<double> size_dz =
      pointwise(s.N, C, K, plane, g.magnitude, [&](int64_t c, int64_t k) { return w_pw.magnitude[k * C + c]; });
  round(size_dz, problem.dy);
  if (relu) {
    for (size_t i = 0; i < problem.dy.size(); ++i) problem.dy[i] *= problem.y.values[i] > 0;
  }
  problem.differentiate(size_dz);
  Truth dw_pw{std::vector<double>(K * C), std::vector<double>(K * C, problem.cancellation)};
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < plane; ++i) {
          const int64_t a = (n * K + k) * plane + i, b = (n * C + c) * plane + i;
          dw_pw.values[k * C + c] += g.values[a] * z.values[b];
          dw_pw.magnitude[k * C + c] += g.magnitude[a] * z.magnitude[b];
        }
  return dw_pw;
}

struct Random {
  std::mt19937 engine{11};
  std::normal_distribution<double> normal;

  // A small scale keeps float16 from overflowing.
  Truth draw(Dtype dtype, int64_t count, double scale = 1) {
    Truth t{std::vector<double>(count), {}};
    for (double& value : t.values) value = rounded(dtype, scale * normal(engine));
    t.magnitude = absolute(t.values);
    return t;
  }
};

inline Tensor vector_of(Dtype type, const std::vector<double>& values) {
  Tensor t(type, false, 1, static_cast<int64_t>(values.size()), 1, 1);
  t.fill(values);
  return t;
}

struct Statistics {
  Truth mean, m2;
};

// Of y as it was made: per channel the mean, and the sum of the squared deviations from it.
inline Statistics statistics_of(const std::vector<double>& y, int64_t K, int64_t plane) {
  std::vector<long double> mean(K), m2(K);
  Truth true_mean{{}, std::vector<double>(K, 1.0)}, true_m2 = true_mean;
  const auto each = [&](auto&& f) {
    for (size_t i = 0; i < y.size(); ++i) f(static_cast<int64_t>(i) / plane % K, static_cast<long double>(y[i]));
  };
  const int64_t count = static_cast<int64_t>(y.size()) / K;
  each([&](int64_t k, long double v) {
    mean[k] += v / count;
    true_mean.magnitude[k] += std::abs(static_cast<double>(v)) / count;
  });
  each([&](int64_t k, long double v) {
    m2[k] += (v - mean[k]) * (v - mean[k]);
    true_m2.magnitude[k] += static_cast<double>(v * v);
  });
  true_mean.values.assign(mean.begin(), mean.end());
  true_m2.values.assign(m2.begin(), m2.end());
  return {true_mean, true_m2};
}

}  // namespace xsep::cases
