// The C++ interface of the CUDA kernels of the training block.
#pragma once

#include <string>
#include <vector>

#include "depthwise.h"
#include "separable.h"

namespace xsep::cuda {

// One family of kernels for one element type.  Families stand in order of preference.
struct SeparableKernel {
  const char* name;                                             // of its file, and what multiplies
  std::string (*why_not)(const SeparableArgs&, const Device&);  // empty: it takes the call
  int64_t (*workspace_bytes)(const SeparableArgs&, const Device&);
  cudaError_t (*run)(const SeparableArgs&, const Device&, cudaStream_t);
};

// The families of an element type, in order of preference; none of float64.
const std::vector<SeparableKernel>& separable_kernels(Dtype dtype);

// The first that takes the call and is enabled, or null.
const SeparableKernel* choose(const SeparableArgs& args, const Device& device);

// As set_enabled() of depthwise.h.
void set_separable_enabled(Dtype dtype, const std::string& name, bool enabled);

}  // namespace xsep::cuda
