// The kernels that take every call, and the choice among them: see depthwise_generic_conv.cuh, _wgrad and
// _wgrad_staged.
//
// dgrad+wgrad are two launches, which read dy twice and, with a function on load, x twice.
#pragma once

#include "depthwise_generic_conv.cuh"
#include "depthwise_generic_wgrad_staged.cuh"

namespace xsep::cuda {
namespace generic {

inline std::string why_not(const DepthwiseArgs& args, const Device&) {
  const ConvShape& s = args.shape;
  const bool fits = int64_t{s.M} * s.R <= INT32_MAX / s.S;
  return fits ? "" : "more than 2^31 taps for a channel";
}

template <class T>
WgradPlan<T> wgrad_plan(const DepthwiseArgs& args, const Device& device) {
  WgradPlan<T> best = wgrad_plan<T, 4>(args, device, true);
  for (const WgradPlan<T>& other : {wgrad_plan<T, 4>(args, device, false), wgrad_plan<T, 8>(args, device, true),
                                    wgrad_plan<T, 8>(args, device, false), wgrad_staged_plan<T>(args, device)}) {
    if (other.cost < best.cost) best = other;
  }
  return best;
}

template <class T>
Reduction<T> wgrad_reduction(const DepthwiseArgs& args, const WgradPlan<T>& plan) {
  Reduction<T> r;
  r.partials = plan.params.partials, r.parts = plan.strips;
  r.channels = plan.params.channels, r.taps = r.sums = plan.params.filter;
  r.dw = static_cast<T*>(args.dw);
  return r;
}

template <class T>
cudaError_t wgrad(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  const WgradPlan<T> plan = wgrad_plan<T>(args, device);
  if (plan.blocks > 0) {
    const cudaError_t error = launch(plan.kernel, dim3(static_cast<unsigned>(plan.blocks)),
                                     dim3(static_cast<unsigned>(plan.threads)), plan.shared_bytes, stream, plan.params);
    if (error != cudaSuccess) return error;
  }
  return reduce_partials(wgrad_reduction(args, plan), stream);
}

// The passes follow each other in the stream and share the workspace.
template <class T>
int64_t workspace_bytes(const DepthwiseArgs& args, const Device& device) {
  int64_t bytes = 0;
  if (args.pass == Pass::kDgradWgrad && args.on_load.any()) {
    bytes = conv_reduction(args, conv_plan<T>(args, device)).bytes();
  }
  if (args.pass == Pass::kWgrad || args.pass == Pass::kDgradWgrad) {
    bytes = std::max(bytes, wgrad_reduction(args, wgrad_plan<T>(args, device)).bytes());
  }
  return bytes;
}

template <class T>
cudaError_t run(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  if (args.pass != Pass::kWgrad) {
    const cudaError_t error = conv<T>(args, device, stream);
    if (error != cudaSuccess || args.pass != Pass::kDgradWgrad) return error;
  }
  return wgrad<T>(args, device, stream);
}

}  // namespace generic

template <class T>
Kernel depthwise_generic() {
  return {"depthwise_generic", generic::why_not, generic::workspace_bytes<T>, generic::run<T>};
}

}  // namespace xsep::cuda
