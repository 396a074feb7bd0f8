// wgrad for any filter, stride, dilation, padding, multiplier and alignment, in both layouts.
//
// A thread sums kTaps taps of one channel, neighbours (modulo stride/gcd(stride, dilation)) along the axis that slides,
// at one tap of the other axis.  It takes runs of positions of dy along the axis that slides and slides the window of x
// over each: a dy and an x loaded make kTaps products.  A block of up to 256 threads takes some channels, up to eight
// groups of taps, and a strip of the runs of the batch; its threads run along channels in NHWC and along columns in
// NCHW.  Those that share taps add up in shared memory, in a fixed order, and leave a partial sum in the workspace;
// reduce.cuh adds the partials of the strips.
//
// Bytes: with G = S * ceil(R / kTaps) groups of taps, where R taps slide, dy and x are loaded G times (dy) and up to
// G * (1 + (kTaps - 1) / run) times (x), from L1 but for ceil(G / 8) times that blocks read them from L2; blocks that
// read the same are neighbours in the grid, so DRAM sees both once.  The partials are at most those of 4 blocks a
// multiprocessor, or one dw.  Instructions limit it, and in NCHW with columns that slide L1, because neighbouring
// lanes are a run apart.
#pragma once

#include <numeric>

#include "correlate.cuh"
#include "depthwise.h"
#include "reduce.cuh"

namespace xsep::cuda::generic {

constexpr int kWgradThreads = 256, kWgradBlocks = 4;  // of a block; blocks of a multiprocessor
constexpr int kWgradTapGroups = 8;                    // of a block, at most
constexpr int kWgradLoads = 4;                        // of dy, and as many of x, in flight together

struct WgradAxis {
  int32_t in, out, taps;  // extents
  int32_t stride, pad, dilation;
};

template <class T>
struct WgradParams {
  using A = accumulate_t<T>;

  Pixels<const T> x, dy;
  Functions<A> function;
  A* partials;  // [strips][channels][taps]

  int32_t N, channels;  // of dy
  Divider multiplier;
  WgradAxis slide, cross;
  Divider in_step;  // of x, between taps of a group and between positions of a run
  Groups runs;      // of positions that slide
  bool slide_rows;
  Positions positions;

  Groups taps;  // that slide
  Divider cross_taps;
  int32_t tap_groups;  // taps.count * cross_taps
  int32_t w_slide, w_cross, filter;

  // A block takes `lanes` channels, `block_tap_groups` of tap_groups, and the runs of a strip, `lines` at a time.
  int32_t lanes, lines, block_tap_groups;
  int32_t strip;
  Divider tile;  // lanes * lines
  Split threads;
  Divider tap_blocks;
  Split blocks;

  // Of depthwise_generic_wgrad_staged.cuh.  Its strip counts tiles.
  Divider tile_cols, x_cols, line_runs, line_blocks, col_tiles;
  int32_t tile_rows, tiles;
};

// Adds what the lines of a block have, `apart` threads apart, and writes it to the workspace.
template <class T, int kTaps, class A>
__device__ __forceinline__ void store_sums(const WgradParams<T>& p, int strip, int channel, int cross_tap,
                                           int first_tap, bool works, int line, int apart, A (&sums)[kTaps]) {
  add_positions(works ? line : p.lines, p.lines, apart, shared_memory<A>(), sums);
  if (!works || line != 0) return;
  A* const partials = p.partials + (int64_t{strip} * p.channels + channel) * p.filter + cross_tap * p.w_cross;
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const int64_t tap = first_tap + int64_t{p.taps.spacing.by} * j;
    if (tap < p.taps.extent) store(partials + tap * p.w_slide, sums[j]);
  }
}

template <class T, int kTaps>
__global__ void __launch_bounds__(kWgradThreads, 2) depthwise_generic_wgrad_kernel(WgradParams<T> p) {
  using A = accumulate_t<T>;

  int block = blockIdx.x, thread = threadIdx.x;
  const int tap_block = take(block, p.tap_blocks), in_tile = take(thread, p.tile);
  const auto [group, strip] = p.blocks(block);
  const auto [lane, line] = p.threads(in_tile);
  const int channel = group * p.lanes + lane, tap_group = tap_block * p.block_tap_groups + thread;
  const bool works = thread < p.block_tap_groups && tap_group < p.tap_groups && channel < p.channels;
  int taps_group = tap_group;
  const int cross_tap = take(taps_group, p.cross_taps), first_tap = p.taps.first(taps_group);
  const int in_channel = channel / p.multiplier;
  Function<A> function;
  if (works) function = p.function.of(in_channel);

  A sums[kTaps] = {};
  if (works && first_tap < p.taps.extent) {
    const Position first = p.positions.at(int64_t{strip} * p.strip);
    const int tap_in = first_tap * p.slide.dilation - p.slide.pad;
    const int cross_tap_in = cross_tap * p.cross.dilation - p.cross.pad;
    for (int i = line; i < p.strip; i += p.lines) {
      const Position at = p.positions.after(first, i);
      if (at.n >= p.N) break;
      const int out_slide = p.runs.first(p.slide_rows ? at.row : at.col), out_cross = p.slide_rows ? at.col : at.row;
      const int in_cross = out_cross * p.cross.stride + cross_tap_in;
      if (out_slide >= p.runs.extent || in_cross < 0 || in_cross >= p.cross.in) continue;
      const int in_slide = out_slide * p.slide.stride + tap_in;
      const Range existing = inside(in_slide, p.in_step, p.slide.in);
      const Range range = common({0, p.runs.members(out_slide)}, {existing.lo - (kTaps - 1), existing.hi});
      if (range.lo >= range.hi) continue;
      const int64_t dy_step = p.runs.spacing.by * p.dy.slide, x_step = p.in_step.by * p.x.slide;
      const FixedGlobal<T> dy{p.dy.at(at.n, channel, out_slide, out_cross) + range.lo * dy_step, dy_step};
      const Moving<T> x{p.x.at(at.n, in_channel, in_slide, in_cross) + range.lo * x_step, x_step, existing, function};
      correlate<kWgradLoads>(range, dy, x, sums);
    }
  }

  store_sums(p, strip, channel, cross_tap, first_tap, works, line, p.threads.channels_inner ? p.lanes : 1, sums);
}

inline WgradAxis wgrad_axis(int in, int out, int taps, int stride, int pad, int dilation) {
  return {in, out, taps, out > 1 ? stride : 1, pad, taps > 1 ? dilation : 1};  // of no importance otherwise
}

template <class T>
struct WgradPlan {
  WgradParams<T> params;
  int64_t strips, blocks;
  int threads;
  size_t shared_bytes;
  double cost;  // instructions for a position of dy
  void (*kernel)(WgradParams<T>);
};

template <class T, int kTaps>
WgradPlan<T> wgrad_plan(const DepthwiseArgs& args, const Device& device, bool slide_rows) {
  using A = accumulate_t<T>;
  const ConvShape& s = args.shape;
  const bool nhwc = args.nhwc;
  WgradPlan<T> plan{};
  WgradParams<T>& p = plan.params;
  const WgradAxis rows = wgrad_axis(s.H, s.P(), s.R, s.stride_h, s.pad_top, s.dilation_h);
  const WgradAxis cols = wgrad_axis(s.W, s.Q(), s.S, s.stride_w, s.pad_left, s.dilation_w);
  p.slide_rows = slide_rows;
  p.slide = slide_rows ? rows : cols, p.cross = slide_rows ? cols : rows;
  p.w_slide = slide_rows ? s.S : 1, p.w_cross = slide_rows ? 1 : s.S, p.filter = s.R * s.S;
  p.x = pixels<T>(args.x, slide_rows), p.dy = pixels<T>(args.dy, slide_rows);
  p.function = functions<A>(args.on_load);
  p.partials = static_cast<A*>(args.workspace);
  p.N = s.N, p.channels = s.K(), p.multiplier = Divider(s.M);

  const int gcd = std::gcd(p.slide.stride, p.slide.dilation), out_step = p.slide.dilation / gcd;
  p.in_step = Divider(static_cast<int32_t>(std::min<int64_t>(int64_t{p.slide.stride} * out_step, INT32_MAX)));
  p.taps = groups(p.slide.taps, p.slide.stride / gcd, kTaps);
  p.cross_taps = Divider(p.cross.taps);
  p.tap_groups = p.taps.count * p.cross.taps;

  // Runs: long, but enough of them to occupy the device; short where neighbouring lanes are a run apart.
  const int64_t threads = int64_t{s.N} * p.channels * p.tap_groups * p.cross.out * std::min(out_step, p.slide.out);
  const int64_t wanted = int64_t{kWgradBlocks} * device.multiprocessors * kWgradThreads;
  const int64_t steps = ceil_div(p.slide.out, out_step), longest = nhwc || slide_rows ? 128 : 16;
  const int64_t cuts =
      std::max(std::min(ceil_div(wanted, std::max<int64_t>(threads, 1)), ceil_div(steps, 8)), ceil_div(steps, longest));
  const int run = static_cast<int>(ceil_div(steps, cuts));
  p.runs = groups(p.slide.out, out_step, run);
  p.positions = {Divider(slide_rows ? p.runs.count : p.cross.out), Divider(slide_rows ? p.cross.out : p.runs.count)};

  p.block_tap_groups = static_cast<int32_t>(ceil_div(p.tap_groups, ceil_div(p.tap_groups, kWgradTapGroups)));
  const int64_t positions = int64_t{s.N} * p.runs.count * p.cross.out;
  const Tile tile(nhwc, p.channels, positions, kWgradThreads / p.block_tap_groups);
  p.lanes = tile.channels, p.lines = tile.positions;
  p.tile = Divider(p.lanes * p.lines), p.threads = split(nhwc, p.lanes, p.lines);
  plan.threads = static_cast<int>(ceil_div(p.tile.by * p.block_tap_groups, 32) * 32);
  plan.shared_bytes = sizeof(A) * kTaps * plan.threads;

  const int64_t tap_blocks = ceil_div(p.tap_groups, p.block_tap_groups), channel_blocks = ceil_div(p.channels, p.lanes);
  const int64_t chunks = ceil_div(positions, p.lines);
  const int64_t wanted_strips = ceil_div(int64_t{kWgradBlocks} * device.multiprocessors, tap_blocks * channel_blocks);
  p.strip =
      static_cast<int32_t>(p.lines * std::clamp<int64_t>(ceil_div(chunks, wanted_strips), 1, (1 << 30) / p.lines));
  plan.strips = ceil_div(positions, p.strip);
  plan.blocks = plan.strips * channel_blocks * tap_blocks;
  p.tap_blocks = Divider(static_cast<int32_t>(tap_blocks));
  p.blocks = split(nhwc, static_cast<int32_t>(channel_blocks), static_cast<int32_t>(std::max<int64_t>(plan.strips, 1)));

  const double load = nhwc || slide_rows ? 7 : 70;
  plan.cost = p.tap_groups * ((80 + load * (kTaps - 1)) / run + 2 * load + kTaps);
  plan.kernel = depthwise_generic_wgrad_kernel<T, kTaps>;
  return plan;
}

}  // namespace xsep::cuda::generic
