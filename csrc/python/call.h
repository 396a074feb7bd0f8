// What the bindings of every backend share: a problem prepared once, and the tensors of a call as integers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../depthwise.h"

namespace xsep {

// One problem with everything that no pointer changes, so that a call passes little.
class PreparedCall {
 public:
  PreparedCall(int pass, const ConvShape& shape, int dtype, bool nhwc, bool on_load, bool relu) : on_load_(on_load) {
    check(shape);
    if (pass < 0 || pass > 3) throw std::invalid_argument("pass must be 0 to 3; got " + std::to_string(pass));
    args_.pass = static_cast<Pass>(pass);
    args_.shape = shape;
    args_.dtype = static_cast<Dtype>(dtype);
    with_dtype(args_.dtype, [](auto) {});
    args_.nhwc = nhwc;
    args_.on_load.relu = relu;
  }

 protected:
  // With (x, its strides, dy, its strides, w, bias, y or dx, dw, center, scale, shift, dscale, dshift).
  DepthwiseArgs with(const pybind11::tuple& tensors) const {
    if (tensors.size() != 13) throw std::invalid_argument("a call takes 13 entries");
    const auto pointer = [&](int i) { return reinterpret_cast<void*>(tensors[i].cast<uintptr_t>()); };
    const auto located = [&](int i) -> TensorRef {
      const auto strides = tensors[i + 1].cast<pybind11::tuple>();
      const auto stride = [&](int axis) { return strides[axis].cast<int64_t>(); };
      return {pointer(i), stride(0), stride(1), stride(2), stride(3)};
    };
    DepthwiseArgs call = args_;
    call.x = located(0);
    call.dy = located(2);
    call.w = pointer(4);
    call.bias = pointer(5);
    (call.pass == Pass::kFprop ? call.y : call.dx) = pointer(6);
    call.dw = pointer(7);
    call.on_load.center = pointer(8);
    call.on_load.scale = pointer(9);
    call.on_load.shift = pointer(10);
    call.dscale = pointer(11);
    call.dshift = pointer(12);
    if (on_load_ && !(call.on_load.center && call.on_load.scale && call.on_load.shift)) {
      throw std::invalid_argument("center, scale and shift go together");
    }
    return call;
  }

  DepthwiseArgs args_{};
  bool on_load_;  // there are vectors
};

}  // namespace xsep
