// The driver of the CPU kernels: packs the filters, deals tiles out to threads, sums what they leave.
//
// A thread takes a contiguous run of the items, so results depend on the number of threads and on nothing else: sums
// are kept per thread and added in the order of the threads, without atomics.

#include "../depthwise.h"

#include <algorithm>
#include <cstring>

#include "call.h"
#include "isa.h"
#include "parallel.h"
#include "tile.h"

namespace xsep::cpu {
namespace {

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
  in_parallel(plan.threads, [&](int thread, int threads) {
    const auto share = [&](int64_t count, int i) { return count * i / threads; };
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
  });
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
