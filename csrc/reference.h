// Naive loops with double accumulators: the truth that C++ tests hold the kernels against.  Dense NCHW doubles.
#pragma once

#include <vector>

#include "conv_shape.h"

namespace xsep::reference {

// Calls f(y index, x index, w index) for every product of the convolution.
template <class F>
void for_each_product(const ConvShape& s, F&& f) {
  const int P = s.P(), Q = s.Q();
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t k = 0; k < s.K(); ++k)
      for (int p = 0; p < P; ++p)
        for (int q = 0; q < Q; ++q)
          for (int r = 0; r < s.R; ++r)
            for (int t = 0; t < s.S; ++t) {
              const int h = p * s.stride_h - s.pad_top + r * s.dilation_h;
              const int w = q * s.stride_w - s.pad_left + t * s.dilation_w;
              if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
              f(((n * s.K() + k) * P + p) * Q + q, ((n * s.C + k / s.M) * s.H + h) * s.W + w, (k * s.R + r) * s.S + t);
            }
}

inline std::vector<double> fprop(const ConvShape& s, const std::vector<double>& x, const std::vector<double>& w) {
  std::vector<double> y(s.y_numel());
  for_each_product(s, [&](int64_t i, int64_t j, int64_t k) { y[i] += x[j] * w[k]; });
  return y;
}

inline std::vector<double> dgrad(const ConvShape& s, const std::vector<double>& dy, const std::vector<double>& w) {
  std::vector<double> dx(s.x_numel());
  for_each_product(s, [&](int64_t i, int64_t j, int64_t k) { dx[j] += dy[i] * w[k]; });
  return dx;
}

inline std::vector<double> wgrad(const ConvShape& s, const std::vector<double>& dy, const std::vector<double>& x) {
  std::vector<double> dw(s.w_numel());
  for_each_product(s, [&](int64_t i, int64_t j, int64_t k) { dw[k] += dy[i] * x[j]; });
  return dw;
}

}  // namespace xsep::reference
