// The NHWC kernels for the element type XSEP_T.

#include "depthwise_backward_nhwc.cuh"
#include "depthwise_fprop_nhwc.cuh"
#include "depthwise_fprop_nhwc_tma.cuh"

namespace xsep::cuda {

template Kernel depthwise_fprop_nhwc<XSEP_T>();
template Kernel depthwise_fprop_nhwc_tma<XSEP_T>();
template Kernel depthwise_backward_nhwc<XSEP_T>();

}  // namespace xsep::cuda
