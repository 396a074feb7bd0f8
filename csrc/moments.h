// Mean, and sum of the squared deviations from it, of each channel of a tensor on the CPU: what a BatchNorm needs.
#pragma once

#include "depthwise.h"

namespace xsep {

struct MomentsArgs {
  int32_t N, C, H, W;
  Dtype dtype;
  bool nhwc;
  TensorRef x;           // a slice as in depthwise.h
  void* mean = nullptr;  // C numbers of the accumulation type; zeros of an empty tensor
  void* m2 = nullptr;    // likewise

  void* workspace = nullptr;  // workspace_bytes(), aligned to 64
  int threads = 1;
};

namespace cpu {

int64_t workspace_bytes(const MomentsArgs& args);
void moments(const MomentsArgs& args);

}  // namespace cpu
}  // namespace xsep
