// The binding of the CPU's residual sums: a problem prepared once, and the tensors of a call by name.
#pragma once

#include "../residual_sum.h"
#include "named.h"

namespace xsep {

class ResidualSumCall {
 public:
  // `skip_vectors`: the other branch has center, scale and shift of its own.
  ResidualSumCall(bool backward, const ConvShape& shape, int dtype, bool skip_vectors, bool relu, int threads)
      : skip_vectors_(skip_vectors) {
    args_.backward = backward;
    args_.shape = shape;
    args_.relu = relu;
    args_.dtype = static_cast<Dtype>(dtype);
    with_dtype(args_.dtype, [](auto) {});
    args_.threads = checked_threads(threads);
    workspace_bytes = cpu::workspace_bytes(args_);
  }

  // `tensors` has an address for each field of ResidualSumArgs that the call needs, or (address, strides).
  void operator()(const pybind11::dict& tensors, uintptr_t workspace) const {
    ResidualSumArgs call = args_;
    assign_named(tensors, {{"y", &call.y}, {"skip", &call.skip}, {"dout", &call.dout}},
                 {{"center", &call.center},
                  {"scale", &call.scale},
                  {"shift", &call.shift},
                  {"skip_center", &call.skip_center},
                  {"skip_scale", &call.skip_scale},
                  {"skip_shift", &call.skip_shift}},
                 {{"out", &call.out},
                  {"dy", &call.dy},
                  {"dskip", &call.dskip},
                  {"dscale", &call.dscale},
                  {"dshift", &call.dshift},
                  {"dskip_scale", &call.dskip_scale}});
    call.workspace = checked_workspace(workspace);
    const bool empty = call.shape.N == 0;  // tensors without elements have no address
    require_tensors(call.center && call.scale && (empty || call.y.data), "y, center and scale");
    require_tensors(!skip_vectors_ || (call.skip_center && call.skip_scale && (empty || call.skip.data)),
                    "skip, skip_center and skip_scale");
    if (call.backward) {
      require_tensors(call.dscale && call.dshift && (empty || (call.dout.data && call.dy)),
                      "dout, dy, dscale and dshift");
      require_tensors(!skip_vectors_ || (call.dskip_scale && (empty || call.dskip)), "dskip and dskip_scale");
      require_tensors(skip_vectors_ || !call.skip.data, "no skip without its vectors");
      require_tensors(!call.relu || call.shift, "shift");
    } else {
      require_tensors(call.shift && (empty || call.out) && (!skip_vectors_ || call.skip_shift),
                      "out, shift and skip_shift");
    }
    pybind11::gil_scoped_release unlocked;
    cpu::residual_sum(call);
  }

  int64_t workspace_bytes;

 private:
  ResidualSumArgs args_{};
  bool skip_vectors_;
};

}  // namespace xsep
