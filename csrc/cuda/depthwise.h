// The C++ interface of the CUDA kernels: raw device pointers, a caller's workspace and stream.
//
// Kernels own nothing: no allocation, no synchronisation, no stream.  They are deterministic.
#pragma once

#include <string>
#include <vector>

#include "../depthwise.h"
#include "device.h"

namespace xsep::cuda {

// What the choice of a kernel and of its grid depends on.
struct Device {
  int arch;  // 10 * major + minor of the compute capability
  int multiprocessors;
  int shared_bytes;  // that a block may have, opt-in included
};

// One family of kernels for one element type.  Families stand in order of preference; the last, generic, takes all.
struct Kernel {
  const char* name;                                             // of its file
  std::string (*why_not)(const DepthwiseArgs&, const Device&);  // empty: it takes the call
  int64_t (*workspace_bytes)(const DepthwiseArgs&, const Device&);
  cudaError_t (*run)(const DepthwiseArgs&, const Device&, cudaStream_t);
  bool off_at_first = false;  // until the self-test has passed on the card
};

// The families of an element type, in order of preference.
const std::vector<Kernel>& kernels(Dtype dtype);

// The first that takes the call and is enabled, or null.
const Kernel* choose(const DepthwiseArgs& args, const Device& device);

// A family that failed its self-test is switched off for the process, one type at a time; one that has to pass it
// first is switched on.
void set_enabled(Dtype dtype, const std::string& name, bool enabled);

}  // namespace xsep::cuda
