// wgrad in NCHW along columns, for 1xK filters and signals, where threads that read their runs from the tensors would
// make a warp touch 32 lines of memory at a time.
//
// A block of up to 256 threads takes one channel, one row of taps, up to eight groups of kTaps of them, and a strip of
// tiles: some rows of dy (of one or several images), whole or a part of their columns.  It copies the dy of a tile and
// the x that they meet to shared memory, neighbours by neighbouring threads, widened, through the function on load and
// with zeros for padding.  A thread then sums its taps over nine positions of dy of one row, as
// depthwise_generic_wgrad.cuh does; nine is odd, so that lanes read different banks.
//
// Bytes: dy and x once for each row of taps and each 8 * kTaps taps of it, which is once for a 1xK filter of up to 64
// taps; x again where tiles of a row meet.  Instructions limit it, some 40 an element for the copy and 20 a group of
// taps.
#pragma once

#include <limits>

#include "depthwise_generic_wgrad.cuh"

namespace xsep::cuda::generic {

constexpr int kStagedTaps = 8, kStagedRun = 9, kStagedLoads = 3;
constexpr int kStagedBytes = 48 * 1024;

template <class T>
__global__ void __launch_bounds__(kWgradThreads, 2) depthwise_generic_wgrad_staged_kernel(WgradParams<T> p) {
  using A = accumulate_t<T>;
  const int tile_cols = p.tile_cols.by, x_cols = p.x_cols.by;
  A* const dy = shared_memory<A>();           // [tile_rows][tile_cols]
  A* const x = dy + p.tile_rows * tile_cols;  // [tile_rows][x_cols]

  int block = blockIdx.x, thread = threadIdx.x;
  int cross_tap = take(block, p.tap_blocks);
  const int first_group = take(cross_tap, p.line_blocks) * p.block_tap_groups;
  const auto [channel, strip] = p.blocks(block);
  const int line = take(thread, p.tile), tap_group = first_group + thread;
  const bool works = thread < p.block_tap_groups && tap_group < p.taps.count;
  int row = line;
  const int first_out = p.runs.first(take(row, p.line_runs)), first_tap = p.taps.first(tap_group);
  const int staged_tap = p.taps.spacing.by == 1 ? first_group * kStagedTaps : 0;
  const int in_channel = channel / p.multiplier;
  const Function<A> function = p.function.of(in_channel);

  A sums[kStagedTaps] = {};
  for (int tile = strip * p.strip, end = smaller(tile + p.strip, p.tiles); tile < end; ++tile) {
    int tile_line = tile;
    const int col0 = take(tile_line, p.col_tiles) * tile_cols, cols = smaller(tile_cols, p.slide.out - col0);
    const Position first = p.positions.at(int64_t{tile_line} * p.tile_rows);
    __syncthreads();  // for those who read the tile before
    for (int i = threadIdx.x; i < p.tile_rows * tile_cols; i += blockDim.x) {
      int i_row = i;
      const int col = take(i_row, p.tile_cols);
      const Position at = p.positions.after(first, i_row);
      dy[i] = at.n < p.N && col < cols ? widen(load(p.dy.at(at.n, channel, col0 + col, at.row))) : A{0};
    }
    const int in_slide = col0 * p.slide.stride + staged_tap * p.slide.dilation - p.slide.pad;
    for (int i = threadIdx.x; i < p.tile_rows * x_cols; i += blockDim.x) {
      int i_row = i;
      const int col = in_slide + take(i_row, p.x_cols);
      const Position at = p.positions.after(first, i_row);
      const int in_cross = at.row * p.cross.stride + cross_tap * p.cross.dilation - p.cross.pad;
      A value = 0;
      if (at.n < p.N && in_cross >= 0 && in_cross < p.cross.in && col >= 0 && col < p.slide.in) {
        value = widen(load(p.x.at(at.n, in_channel, col, in_cross)));
        if (function.any) value = function(value);
      }
      x[i] = value;
    }
    __syncthreads();
    if (!works || first_out >= cols || p.positions.after(first, row).n >= p.N) continue;
    const Range range{0, smaller(kStagedRun, (cols - 1 - first_out) / p.runs.spacing + 1)};
    const int in = first_out * p.slide.stride + (first_tap - staged_tap) * p.slide.dilation;
    correlate<kStagedLoads>(range, FixedShared<A>{dy + row * tile_cols + first_out, p.runs.spacing.by},
                            MovingShared<A>{x + row * x_cols + in, p.in_step.by}, sums);
  }
  store_sums(p, strip, channel, cross_tap, first_tap, works, line, 1, sums);
}

// A plan whose cost is infinite where rows are too far apart in shared memory, or lanes too few.
template <class T>
WgradPlan<T> wgrad_staged_plan(const DepthwiseArgs& args, const Device& device) {
  using A = accumulate_t<T>;
  WgradPlan<T> plan = wgrad_plan<T, kStagedTaps>(args, device, false);
  WgradParams<T>& p = plan.params;
  plan.cost = std::numeric_limits<double>::infinity();
  if (args.nhwc) return plan;
  const int64_t line_blocks = ceil_div(p.taps.count, kWgradTapGroups), spacing = p.runs.spacing.by;
  p.block_tap_groups = static_cast<int32_t>(ceil_div(p.taps.count, line_blocks));
  p.line_blocks = Divider(static_cast<int32_t>(line_blocks));

  // A tile: whole rows, or a part of one.
  const int64_t lines = kWgradThreads / p.block_tap_groups, all_rows = int64_t{p.N} * p.cross.out;
  if (spacing > lines) return plan;
  const int64_t tile_cols = std::min<int64_t>(p.slide.out, lines / spacing * spacing * kStagedRun);
  p.runs = groups(static_cast<int32_t>(tile_cols), spacing, kStagedRun);
  p.line_runs = Divider(p.runs.count);
  p.tile_rows = static_cast<int32_t>(std::clamp<int64_t>(all_rows, 1, lines / p.runs.count));
  const int64_t block_taps = kStagedTaps * int64_t{p.taps.spacing.by == 1 ? p.block_tap_groups : p.taps.count};
  const int64_t x_cols =
      (int64_t{p.runs.count} * kStagedRun - 1) * p.slide.stride + (block_taps - 1) * p.slide.dilation + 1;
  const int64_t bytes = p.tile_rows * (tile_cols + x_cols) * sizeof(A);
  if (bytes > kStagedBytes) return plan;

  const int64_t col_tiles = ceil_div(p.slide.out, tile_cols), tiles = ceil_div(all_rows, p.tile_rows) * col_tiles;
  if (tiles > INT32_MAX) return plan;
  p.tile_cols = Divider(static_cast<int32_t>(tile_cols)), p.x_cols = Divider(static_cast<int32_t>(x_cols));
  p.col_tiles = Divider(static_cast<int32_t>(col_tiles)), p.tiles = static_cast<int32_t>(tiles);
  p.positions = {Divider(p.cross.out), Divider(1)};  // rows of all images
  p.lanes = 1, p.lines = p.tile_rows * p.runs.count, p.tile = Divider(p.lines);
  plan.threads = static_cast<int>(ceil_div(p.lines * p.block_tap_groups, 32) * 32);
  plan.shared_bytes = std::max<size_t>(bytes, sizeof(A) * kStagedTaps * plan.threads);

  const int64_t tap_blocks = line_blocks * p.cross.taps;
  const int64_t wanted = ceil_div(int64_t{kWgradBlocks} * device.multiprocessors, tap_blocks * p.channels);
  p.strip = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(tiles, wanted)));
  plan.strips = ceil_div(tiles, p.strip);
  plan.blocks = plan.strips * p.channels * tap_blocks;
  p.tap_blocks = Divider(static_cast<int32_t>(tap_blocks));
  p.blocks = split(false, p.channels, static_cast<int32_t>(std::max<int64_t>(plan.strips, 1)));

  plan.cost = p.cross.taps * (40.0 * line_blocks + 20.0 * p.taps.count);
  plan.kernel = depthwise_generic_wgrad_staged_kernel<T>;
  return plan;
}

}  // namespace xsep::cuda::generic
