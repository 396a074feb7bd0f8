// The training block's kernels for the element type XSEP_T.

#include "separable_backward_nhwc.cuh"
#include "separable_fprop_nhwc.cuh"

namespace xsep::cuda {

template SeparableKernel separable_fprop_nhwc<XSEP_T>();
template SeparableKernel separable_fprop_nhwc_mma<XSEP_T>();
template SeparableKernel separable_backward_nhwc<XSEP_T>();
template SeparableKernel separable_backward_nhwc_mma<XSEP_T>();

}  // namespace xsep::cuda
