// The binding of the CPU's moments: a problem prepared once, and the tensors of a call by name.
#pragma once

#include "../moments.h"
#include "named.h"

namespace xsep {

class MomentsCall {
 public:
  MomentsCall(const std::array<int32_t, 4>& sizes, int dtype, bool nhwc, int threads) {
    args_.N = sizes[0], args_.C = sizes[1], args_.H = sizes[2], args_.W = sizes[3];
    args_.dtype = static_cast<Dtype>(dtype);
    with_dtype(args_.dtype, [](auto) {});
    args_.nhwc = nhwc;
    args_.threads = checked_threads(threads);
    workspace_bytes = cpu::workspace_bytes(args_);
  }

  // `tensors` has an address for each field of MomentsArgs that the call needs, and (address, strides) of x.
  void operator()(const pybind11::dict& tensors, uintptr_t workspace) const {
    MomentsArgs call = args_;
    assign_named(tensors, {{"x", &call.x}}, {}, {{"mean", &call.mean}, {"m2", &call.m2}});
    call.workspace = checked_workspace(workspace);
    require_tensors(call.mean && call.m2 && (call.N == 0 || call.x.data), "x, mean and m2");
    pybind11::gil_scoped_release unlocked;
    cpu::moments(call);
  }

  int64_t workspace_bytes;

 private:
  MomentsArgs args_{};
};

}  // namespace xsep
