// One call of the training block, forward or backward, or of its inference form: raw pointers, element strides, a
// caller's workspace.
//
//   u        = the function on load of x; padding is zeros of u
//   z        = activation(depthwise(u, w_dw) + w_dw_bias)
//   y        = out_activation(pointwise(z, w_pw) + bias + residual)
//   mean, m2 = per channel of y, as it is stored: the mean, and the sum of the squared deviations from it
//
// x is (N, C, H, W), w_dw (C, 1, R, S) and w_pw (K, C), both contiguous, y (N, K, P, Q).  As in depthwise.h x may be a
// slice, and kernels own nothing.
//
// Backward makes the gradients of x, w_dw, w_pw and of the function on load from that of y, which is dy or, where y had
// statistics, dy + dmean / count + 2 (y - mean) dm2.
#pragma once

#include "../depthwise.h"

namespace xsep::cuda {

enum class Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2 };

struct SeparableArgs {
  ConvShape shape;  // of the depthwise convolution
  int32_t K;        // channels of y
  Dtype dtype;
  bool nhwc;
  Activation activation;
  TensorRef x;
  const void* w_dw = nullptr;
  const void* w_pw = nullptr;
  OnLoad on_load;
  void* workspace = nullptr;  // workspace_bytes(), aligned to 64
  bool backward = false;

  // Forward.
  const void* w_dw_bias = nullptr;  // C numbers of the tensors' type, optional
  const void* bias = nullptr;       // K numbers of it, optional
  TensorRef residual;               // of y's sizes, optional
  Activation out_activation = Activation::kNone;
  void* y = nullptr;      // dense in the layout
  float* mean = nullptr;  // K numbers; null: no statistics
  float* m2 = nullptr;    // likewise

  // Backward.
  const void* w_pw_t = nullptr;      // (C, K): w_pw transposed, which takes its place
  const void* dy = nullptr;          // dense in the layout; with statistics it may be null
  const void* y_made = nullptr;      // with statistics, dense in the layout
  const float* mean_made = nullptr;  // K numbers; null: no statistics
  const float* dmean = nullptr;      // with statistics
  const float* dm2 = nullptr;        // with statistics
  void* dx = nullptr;                // dense in the layout; through on_load
  void* dw_dw = nullptr;
  void* dw_pw = nullptr;
  float* dscale = nullptr;  // with a function on load: C numbers, as in DepthwiseArgs
  float* dshift = nullptr;
};

}  // namespace xsep::cuda
