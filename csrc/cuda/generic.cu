// The generic kernels for the element type XSEP_T.

#include "depthwise_generic.cuh"

namespace xsep::cuda {

template Kernel depthwise_generic<XSEP_T>();

}  // namespace xsep::cuda
