// One call of a pass with its memory: what its tiles share, and what its threads leave.
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

// Fills a block of what the tiles share.
template <class T>
void pack(const Call<T>& call, int b) {
  using A = accumulate_t<T>;
  const Plan& plan = call.plan;
  const ConvShape& s = call.shape;
  const T* w = static_cast<const T*>(call.args.w);
  const T* bias = static_cast<const T*>(call.args.bias);
  for (int lane = 0; lane < plan.block; ++lane) {
    const int64_t c = plan.first_channel(b) + lane;
    const bool exists = c < s.C;
    if (plan.packed_w) {
      A* dst = call.packed_w + int64_t{b} * plan.taps * plan.block + lane;
      for (int order : plan.order) {
        *dst = exists ? to_float(w[c * plan.taps + order]) : A{0};
        dst += plan.block;
      }
    }
    for (int m = 0; m < s.M; ++m) {
      call.packed_bias[(int64_t{b} * s.M + m) * plan.block + lane] =
          bias && exists ? to_float(bias[c * s.M + m]) : A{0};
    }
    if (plan.packed_affine) {
      const int64_t each = plan.packed_affine / 3;
      const auto value = [&](const void* vector, A otherwise) {
        return vector && exists ? static_cast<const A*>(vector)[c] : otherwise;
      };
      A* dst = call.packed_affine + int64_t{b} * plan.block + lane;
      dst[0] = value(call.args.on_load.center, 0);
      dst[each] = value(call.args.on_load.scale, 1);
      dst[2 * each] = value(call.args.on_load.shift, 0);
    }
  }
}

// Adds up what the threads have for one block, in their order, and writes dw and the gradients of the affine.
template <class T>
void reduce(const Call<T>& call, int b, const accumulate_t<T>* sums, int64_t stride, int threads) {
  using A = accumulate_t<T>;
  const Plan& plan = call.plan;
  T* dw = static_cast<T*>(call.args.dw);
  for (int lane = 0; lane < plan.block; ++lane) {
    const int64_t c = plan.first_channel(b) + lane;
    if (c >= call.shape.C) return;
    if (c < int64_t{b} * plan.block) continue;  // the block before has it
    const auto total = [&](int position) {
      const A* p = sums + b * plan.sums_per_block + int64_t{position} * plan.block + lane;
      A value = p[0];
      for (int t = 1; t < threads; ++t) value += p[t * stride];
      return value;
    };
    for (int tap = 0; tap < plan.taps; ++tap) dw[c * plan.taps + tap] = from_float<T>(total(tap));
    if (call.args.dscale) static_cast<A*>(call.args.dscale)[c] = total(plan.taps);
    if (call.args.dshift) static_cast<A*>(call.args.dshift)[c] = total(plan.taps + 1);
  }
}

// The functions of an instruction set for T.
template <class T>
const Kernels<accumulate_t<T>>& kernels_for(const Isa& isa) {
  if constexpr (std::is_same_v<T, float>)
    return isa.float32;
  else if constexpr (std::is_same_v<T, double>)
    return isa.float64;
  else if constexpr (std::is_same_v<T, half_t>)
    return isa.float16;
  else
    return isa.bfloat16;
}

// A dense output of `channels` x `rows` x `cols` images.
template <class T>
TensorRef dense(void* data, bool nhwc, int64_t channels, int64_t rows, int64_t cols) {
  if (nhwc) return {data, rows * cols * channels, 1, cols * channels, channels};
  return {data, channels * rows * cols, rows * cols, cols, 1};
}

}  // namespace xsep::cpu
