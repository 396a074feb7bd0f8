// One call of a pass with its memory: what its tiles share.
#pragma once

#include "plan.h"

namespace xsep::cpu {

template <class T>
struct Call {
  using A = accumulate_t<T>;

  const DepthwiseArgs& args;
  const ConvShape& shape;
  const Plan& plan;
  const Kernels<A>& kernels;

  A* packed_w;       // [blocks][plan.order][block]
  A* packed_bias;    // [blocks][M][block], zeros without a bias
  A* packed_affine;  // center, scale, shift: each [blocks * block]

  Affine<A> affine(int b) const {
    if (!args.on_load.any()) return {};
    const int64_t each = plan.packed_affine / 3, at = int64_t{b} * plan.block;
    return {true, args.on_load.relu, packed_affine + at, packed_affine + each + at, packed_affine + 2 * each + at};
  }
};

// A thread's memory: tiles that are overwritten by every item, and sums that live until the end of the call.
template <class A>
struct Scratch {
  Scratch(const Plan& plan, A* memory)
      : x(memory),
        dy(x + plan.x_tile),
        out(dy + plan.dy_tile),
        planes(out + plan.out_tile),
        sums(planes + plan.planes) {}

  A *x, *dy, *out, *planes, *sums;
};

struct Item {
  int64_t image;
  int row_tile, col_tile;  // rows count in plan.staged_rows unless the plan is direct
  int block, blocks;       // first, count
};

template <class T>
const T* at(const TensorRef& t, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const T*>(t.data) + n * t.n + c * t.c + h * t.h + w * t.w;
}

// A dense output of `channels` x `rows` x `cols` images.
template <class T>
TensorRef dense(void* data, bool nhwc, int64_t channels, int64_t rows, int64_t cols) {
  if (nhwc) return {data, rows * cols * channels, 1, cols * channels, channels};
  return {data, channels * rows * cols, rows * cols, cols, 1};
}

}  // namespace xsep::cpu
