// The driver of the CPU kernels: packs the filters, deals tiles out to threads, sums what they leave.
//
// A thread takes a contiguous run of the items, so results depend on the number of threads and on nothing else: sums
// are kept per thread and added in the order of the threads, without atomics.

#include "../depthwise.h"

#include <algorithm>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "call.h"
#include "isa.h"
#include "tile.h"

namespace xsep::cpu {
namespace {

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

// Rows are innermost, so that a tile finds its halo in the cache; then groups of channels, columns, images.
template <class T>
void run_item(const Call<T>& call, Scratch<accumulate_t<T>>& scratch, int64_t i) {
  const Plan& plan = call.plan;
  const int row_tile = static_cast<int>(i % plan.rows.tiles),
            group = static_cast<int>(i / plan.rows.tiles % plan.groups);
  const int64_t place = i / plan.rows.tiles / plan.groups;
  const int col_tile = static_cast<int>(place % plan.cols.tiles);
  const int64_t image = place / plan.cols.tiles;
  const int first = plan.first_block(group), end = plan.first_block(group + 1);
  if (plan.direct) return Tile<T>(call, scratch, {image, row_tile, col_tile, first, end - first}).run();
  for (int b = first; b < end; b += plan.depth) {
    for (int band = 0; band < plan.bands; ++band) {
      Tile<T>(call, scratch, {image, row_tile * plan.bands + band, col_tile, b, std::min(plan.depth, end - b)}).run();
    }
  }
}

template <class T>
void run(const DepthwiseArgs& args, const Plan& plan) {
  using A = accumulate_t<T>;
  A* const shared = static_cast<A*>(args.workspace);
  A* const per_thread = shared + plan.packed_w + plan.packed_bias + plan.packed_affine;
  const Call<T> call{args,
                     args.shape,
                     plan,
                     kernels_for<T>(isa_in_use()),
                     shared,
                     shared + plan.packed_w,
                     shared + plan.packed_w + plan.packed_bias};
  const int64_t stride = plan.scratch + plan.sums;

#if defined(_OPENMP)
#pragma omp parallel num_threads(plan.threads)
#endif
  {
#if defined(_OPENMP)
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
#else
    const int threads = 1, thread = 0;
#endif
    const auto share = [&](int64_t count, int i) { return count * i / threads; };
    const auto barrier = [] {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    };
    for (int64_t b = share(plan.blocks, thread); b < share(plan.blocks, thread + 1); ++b) pack(call, b);
    Scratch<A> scratch(plan, per_thread + thread * stride);
    std::memset(scratch.sums, 0, plan.sums * sizeof(A));
    barrier();

    for (int64_t i = share(plan.items, thread); i < share(plan.items, thread + 1); ++i) run_item<T>(call, scratch, i);
    if (plan.makes_dw) {
      barrier();
      const A* sums = per_thread + plan.scratch;
      for (int64_t b = share(plan.blocks, thread); b < share(plan.blocks, thread + 1); ++b) {
        reduce(call, b, sums, stride, threads);
      }
    }
  }
}

}  // namespace

int64_t workspace_bytes(const DepthwiseArgs& args) {
  check(args.shape);
  return Plan(args).workspace_elements() * (args.dtype == Dtype::kFloat64 ? 8 : 4);
}

void depthwise(const DepthwiseArgs& args) {
  check(args.shape);
  const Plan plan(args);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T>(args, plan);
  });
}

}  // namespace xsep::cpu
