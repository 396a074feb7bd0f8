// One call of a pass, for every backend, and the C++ interface of the CPU kernels: raw pointers, element strides, a
// caller's workspace.
//
// x is (N, C, H, W), w is (C*M, 1, R, S) and contiguous, y is (N, C*M, P, Q).  Inputs may be slices: in NHWC their
// channel stride is 1, in NCHW their column stride is 1, the other strides are free.  Kernels allocate nothing that
// scales with the tensors, keep no state and are deterministic for a given number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_shape.h"
#include "dtype.h"

namespace xsep {

struct TensorRef {
  const void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;  // strides in elements
};

// u = relu(scale * (x - center) + shift) per channel, applied as x is loaded; padding is zeros of u.
// The vectors hold C numbers of the accumulation type (float, or double for float64); all null: u = x (or relu(x)).
struct OnLoad {
  const void* center = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;
  bool relu = false;

  bool any() const { return relu || center != nullptr; }
};

// kDgradWgrad reads dy and x once and writes dx and dw.
enum class Pass : int { kFprop = 0, kDgrad = 1, kWgrad = 2, kDgradWgrad = 3 };

struct DepthwiseArgs {
  Pass pass;
  ConvShape shape;
  Dtype dtype;
  bool nhwc;
  TensorRef x;                 // fprop, wgrad, dgrad_wgrad
  TensorRef dy;                // dgrad, wgrad, dgrad_wgrad
  const void* w = nullptr;     // fprop, dgrad, dgrad_wgrad
  const void* bias = nullptr;  // fprop, optional, C*M elements
  OnLoad on_load;              // of x
  void* y = nullptr;           // dense in the layout
  void* dx = nullptr;          // dense in the layout; gradient with respect to x, through on_load
  void* dw = nullptr;          // contiguous
  void* dscale = nullptr;      // with on_load vectors: C numbers of the accumulation type, sum of du * (x - center)
  void* dshift = nullptr;      // likewise, sum of du, where du is the gradient with respect to scale*(x-center)+shift
  void* workspace = nullptr;   // workspace_bytes() of the backend, aligned to 64
  int threads = 1;             // of the CPU
};

namespace cpu {

int64_t workspace_bytes(const DepthwiseArgs& args);
void depthwise(const DepthwiseArgs& args);

// The instruction sets this binary has kernels for and this processor runs, best first; and the one in use.
// ATEN_CPU_CAPABILITY (default, avx2, avx512) caps the choice as it does torch's.
int isa_count();
const char* isa_name(int index);
int current_isa();
void set_isa(int index);

}  // namespace cpu
}  // namespace xsep
