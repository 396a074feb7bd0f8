// The binding of the CPU's training block: a problem prepared once, and the tensors of a call by name.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "../separable.h"
#include "named.h"

namespace xsep {

class SeparableCall {
 public:
  SeparableCall(bool backward, const ConvShape& shape, int K, int dtype, bool nhwc, bool on_load, bool relu,
                std::array<double, 2> between, std::array<double, 2> after, bool statistics, int threads) {
    args_.backward = backward;
    args_.shape = shape;
    args_.K = K;
    args_.dtype = static_cast<Dtype>(dtype);
    with_dtype(args_.dtype, [](auto) {});
    args_.nhwc = nhwc;
    args_.on_load.relu = relu;
    args_.between = {between[0], between[1]};
    args_.after = {after[0], after[1]};
    args_.statistics = statistics;
    args_.threads = checked_threads(threads);
    SeparableArgs planned = args_;
    static const char any = 0;  // the plan asks only whether there are vectors
    if (on_load) planned.on_load.center = &any;
    workspace_bytes = cpu::workspace_bytes(planned);
    on_load_ = on_load;
  }

  // `tensors` has an address for each field of SeparableArgs that the call needs, or (address, strides).
  void operator()(const pybind11::dict& tensors, uintptr_t workspace) const {
    SeparableArgs call = args_;
    assign_named(tensors, {{"x", &call.x}, {"dy", &call.dy}, {"y_made", &call.y_made}, {"residual", &call.residual}},
                 {{"w", &call.w},
                  {"w_pw", &call.w_pw},
                  {"center", &call.on_load.center},
                  {"scale", &call.on_load.scale},
                  {"shift", &call.on_load.shift},
                  {"w_bias", &call.w_bias},
                  {"bias", &call.bias},
                  {"mean_made", &call.mean_made},
                  {"dmean", &call.dmean},
                  {"dm2", &call.dm2}},
                 {{"y", &call.y},
                  {"mean", &call.mean},
                  {"m2", &call.m2},
                  {"dx", &call.dx},
                  {"dw", &call.dw},
                  {"dw_pw", &call.dw_pw},
                  {"dscale", &call.dscale},
                  {"dshift", &call.dshift}});
    call.workspace = checked_workspace(workspace);
    const bool empty = call.shape.N == 0;  // tensors without elements have no address
    require_tensors(call.w && call.w_pw && (empty || call.x.data), "x, w and w_pw");
    require_tensors(!on_load_ || (call.on_load.center && call.on_load.scale && call.on_load.shift),
                    "center, scale and shift");
    if (call.backward) {
      const bool made = call.mean_made && call.dmean && call.dm2 && (empty || call.y_made.data);
      require_tensors(call.dw && call.dw_pw && (empty || call.dx), "dx, dw and dw_pw");
      require_tensors(call.statistics ? made : empty || call.dy.data,
                      "dy, or what was made with statistics and the gradients of these");
    } else {
      require_tensors((empty || call.y) && (!call.statistics || (call.mean && call.m2)),
                      "y, and with statistics mean and m2");
    }
    pybind11::gil_scoped_release unlocked;
    cpu::separable(call);
  }

  int64_t workspace_bytes;

 private:
  SeparableArgs args_{};
  bool on_load_;
};

}  // namespace xsep
