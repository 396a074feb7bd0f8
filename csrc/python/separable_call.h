// The binding of the CPU's training block: a problem prepared once, and the tensors of a call by name.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "../separable.h"

namespace xsep {

class SeparableCall {
 public:
  SeparableCall(bool backward, const ConvShape& shape, int K, int dtype, bool nhwc, bool on_load, bool relu,
                std::array<double, 2> between, std::array<double, 2> after, bool statistics, int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1; got " + std::to_string(threads));
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
    args_.threads = threads;
    SeparableArgs planned = args_;
    static const char any = 0;  // the plan asks only whether there are vectors
    if (on_load) planned.on_load.center = &any;
    workspace_bytes = cpu::workspace_bytes(planned);
    on_load_ = on_load;
  }

  // `tensors` has an address for each field of SeparableArgs that the call needs, or (address, strides).
  void operator()(const pybind11::dict& tensors, uintptr_t workspace) const {
    SeparableArgs call = args_;
    const auto located = [](pybind11::handle value) -> TensorRef {
      const auto [address, s] = value.cast<std::pair<uintptr_t, std::array<int64_t, 4>>>();
      return {reinterpret_cast<const void*>(address), s[0], s[1], s[2], s[3]};
    };
    for (const auto& [key, value] : tensors) {
      const auto name = key.cast<std::string>();
      if (name == "x")
        call.x = located(value);
      else if (name == "dy")
        call.dy = located(value);
      else if (name == "y_made")
        call.y_made = located(value);
      else if (name == "residual")
        call.residual = located(value);
      else
        field(call, name) = reinterpret_cast<void*>(value.cast<uintptr_t>());
    }
    if (workspace % 64 != 0) throw std::invalid_argument("workspace must be aligned to 64 bytes");
    call.workspace = reinterpret_cast<void*>(workspace);
    const bool empty = call.shape.N == 0;  // tensors without elements have no address
    require(call.w && call.w_pw && (empty || call.x.data), "x, w and w_pw");
    require(!on_load_ || (call.on_load.center && call.on_load.scale && call.on_load.shift), "center, scale and shift");
    if (call.backward) {
      const bool made = call.mean_made && call.dmean && call.dm2 && (empty || call.y_made.data);
      require(call.dw && call.dw_pw && (empty || call.dx), "dx, dw and dw_pw");
      require(call.statistics ? made : empty || call.dy.data,
              "dy, or what was made with statistics and the gradients of these");
    } else {
      require((empty || call.y) && (!call.statistics || (call.mean && call.m2)), "y, and with statistics mean and m2");
    }
    pybind11::gil_scoped_release unlocked;
    cpu::separable(call);
  }

  int64_t workspace_bytes;

 private:
  static void require(bool there, const char* what) {
    if (!there) throw std::invalid_argument(std::string("a call needs ") + what);
  }

  struct Reference {
    const void** input;
    void** output;
    void operator=(void* address) const { input ? * input = address : * output = address; }
  };
  static Reference field(SeparableArgs& call, const std::string& name) {
    const std::pair<const char*, const void**> inputs[] = {{"w", &call.w},
                                                           {"w_pw", &call.w_pw},
                                                           {"center", &call.on_load.center},
                                                           {"scale", &call.on_load.scale},
                                                           {"shift", &call.on_load.shift},
                                                           {"w_bias", &call.w_bias},
                                                           {"bias", &call.bias},
                                                           {"mean_made", &call.mean_made},
                                                           {"dmean", &call.dmean},
                                                           {"dm2", &call.dm2}};
    const std::pair<const char*, void**> outputs[] = {
        {"y", &call.y},   {"mean", &call.mean},   {"m2", &call.m2},         {"dx", &call.dx},
        {"dw", &call.dw}, {"dw_pw", &call.dw_pw}, {"dscale", &call.dscale}, {"dshift", &call.dshift}};
    for (const auto& [known, place] : inputs) {
      if (name == known) return {place, nullptr};
    }
    for (const auto& [known, place] : outputs) {
      if (name == known) return {nullptr, place};
    }
    throw std::invalid_argument("no tensor of a call is named '" + name + "'");
  }

  SeparableArgs args_{};
  bool on_load_;
};

}  // namespace xsep
