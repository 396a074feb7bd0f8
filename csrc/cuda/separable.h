// One call of the training block's forward pass: raw pointers, element strides, a caller's workspace.
//
//   u        = the function on load of x; padding is zeros of u
//   z        = activation(depthwise(u, w_dw))
//   y        = pointwise(z, w_pw)
//   mean, m2 = per channel of y, as it is stored: the mean, and the sum of the squared deviations from it
//
// x is (N, C, H, W), w_dw (C, 1, R, S) and w_pw (K, C), both contiguous, y (N, K, P, Q).  As in depthwise.h inputs may
// be slices, and kernels own nothing.
#pragma once

#include "../depthwise.h"

namespace xsep::cuda {

enum class Activation : int { kNone = 0, kRelu = 1 };

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
  void* y = nullptr;          // dense in the layout
  float* mean = nullptr;      // K numbers; null: no statistics
  float* m2 = nullptr;        // likewise
  void* workspace = nullptr;  // workspace_bytes(), aligned to 64
};

}  // namespace xsep::cuda
