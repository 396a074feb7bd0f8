// The end of a residual module on the CPU: a max-pool of what its last convolution made, BatchNorm, and the sum with
// the other branch.
//
//   out = scale * (max_pool(y) - center) + shift + skip_scale * (skip - skip_center) + skip_shift
//
// or, without skip, relu(out).
//
// y is (N, C, H, W), skip and out are (N, C, P, Q), all NHWC: the channel stride of inputs is 1, their other strides
// are free.  The pool leaves out what lies beyond y; NaN is larger than any number.  Memory is as in depthwise.h.
#pragma once

#include "depthwise.h"

namespace xsep {

// The vectors are of the accumulation type (float, or double for float64), C numbers each.
struct ResidualSumArgs {
  ConvShape shape;  // of the pool, its window the filter: M and dilations 1, pads smaller than the window; or 1x1
  Dtype dtype;
  bool backward;
  bool relu;  // without skip
  TensorRef y;
  const void* center = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;  // forward, and backward with relu
  TensorRef skip;               // forward: optional.  backward: with its vectors only
  const void* skip_center = nullptr;
  const void* skip_scale = nullptr;
  const void* skip_shift = nullptr;  // forward, with skip_scale; without them skip is added as it is

  void* out = nullptr;  // dense

  // Backward.  Each window's largest number has one place: the first, or that of the last NaN.
  TensorRef dout;
  void* dy = nullptr;           // dense
  void* dskip = nullptr;        // dense; with skip_scale
  void* dscale = nullptr;       // C numbers of the accumulation type: sum of dout * (max_pool(y) - center)
  void* dshift = nullptr;       // likewise, sum of dout
  void* dskip_scale = nullptr;  // likewise, sum of dout * (skip - skip_center); with skip_scale

  void* workspace = nullptr;  // workspace_bytes(), aligned to 64
  int threads = 1;
};

namespace cpu {

int64_t workspace_bytes(const ResidualSumArgs& args);
void residual_sum(const ResidualSumArgs& args);

}  // namespace cpu
}  // namespace xsep
