// The training block and its inference form on the CPU: depthwise and pointwise convolution in one go.
//
//   u = on_load(x)                                 padding is zeros of u
//   z = between(depthwise(u, w) + w_bias)
//   y = after(pointwise(z, w_pw) + bias + residual)
//   mean, m2: per channel of y, the mean and the sum of the squared deviations from it
//
// x is (N, C, H, W), w (C, 1, R, S), w_pw (K, C, 1, 1), y (N, K, P, Q).  Neither u nor z is stored; backward makes them
// again from x.  Layouts, slices and memory are as in depthwise.h.
#pragma once

#include <limits>

#include "depthwise.h"

namespace xsep {

// min(max(v, low), high); NaN stays.
struct Clamp {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();

  bool any() const { return low > -std::numeric_limits<double>::infinity() || high < -low; }
};

// Vectors are of the accumulation type (float, or double for float64), biases of the tensors' type.
struct SeparableArgs {
  ConvShape shape;  // of the depthwise convolution; M is 1
  int32_t K;        // channels of y
  Dtype dtype;
  bool nhwc;
  bool backward;
  TensorRef x;
  const void* w = nullptr;
  const void* w_pw = nullptr;  // contiguous
  OnLoad on_load;
  Clamp between;  // backward: none, or low 0 (ReLU)

  // Forward.
  const void* w_bias = nullptr;  // C numbers, optional
  const void* bias = nullptr;    // K numbers, optional
  TensorRef residual;            // of y's sizes; optional
  Clamp after;
  void* y = nullptr;  // dense in the layout
  bool statistics = false;
  void* mean = nullptr;
  void* m2 = nullptr;

  // Backward: the gradient of y is dy + dmean / count + 2 (y - mean) dm2; without statistics, dy.
  TensorRef dy;  // optional with statistics
  TensorRef y_made;
  const void* mean_made = nullptr;
  const void* dmean = nullptr;  // with statistics
  const void* dm2 = nullptr;    // with statistics
  void* dx = nullptr;           // dense in the layout; through on_load
  void* dw = nullptr;
  void* dw_pw = nullptr;
  void* dscale = nullptr;  // with on_load vectors: C numbers, as in DepthwiseArgs
  void* dshift = nullptr;

  void* workspace = nullptr;  // workspace_bytes(), aligned to 64
  int threads = 1;
};

namespace cpu {

int64_t workspace_bytes(const SeparableArgs& args);
void separable(const SeparableArgs& args);

}  // namespace cpu
}  // namespace xsep
