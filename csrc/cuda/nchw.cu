// The NCHW kernels for one element type, XSEP_T.
#include "depthwise_backward_nchw.cuh"
#include "depthwise_fprop_nchw.cuh"

namespace xsep::cuda {

template Kernel depthwise_fprop_nchw<XSEP_T>();
template Kernel depthwise_backward_nchw<XSEP_T>();

}  // namespace xsep::cuda
