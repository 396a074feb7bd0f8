#include "separable_plan.h"

#include <unistd.h>

namespace xsep::cpu {
namespace {

// Of the depthwise results of a tile, which the matrix product reads once for every two panels of weights: what the
// second-level cache holds beside the panels.  The weights are read once a tile, from further away, so that a tile has
// some pixels whatever its channels take; in backward the sums for their gradient are read and written too, and strips
// do not depend on the machine, so that gradients do not.
constexpr int64_t kUsualCache = 512 * 1024;
constexpr int64_t tile_bytes(int64_t cache) { return cache / 16 * 7; }
constexpr int kLeastPixels = 48, kLeastPixelsBackward = 96, kMostPixels = 256;
constexpr int kTileRows = 4;  // where a row does not fit, so that tiles share few rows of x

constexpr int64_t kStagedBytes = 128 * 1024;  // of x and dx, for some blocks of channels together
constexpr int64_t kMacsPerThread = 256 * 1024;
constexpr int kItemsPerThread = 4;  // fewer are dealt out evenly
constexpr int kGroupsPerThread = 16;

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), kUsualCache, 4 * kUsualCache);
  return size;
#else
  return kUsualCache;
#endif
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Not NHWC: a plan that reads tensors in place packs its filters otherwise.
DepthwiseArgs depthwise_args(const SeparableArgs& args, Pass pass) {
  DepthwiseArgs d{};
  d.pass = pass, d.shape = args.shape, d.dtype = args.dtype, d.nhwc = false;
  d.x = args.x, d.w = args.w, d.on_load = args.on_load, d.threads = 1;
  if (pass == Pass::kFprop) d.bias = args.w_bias;
  d.dw = args.dw, d.dscale = args.dscale, d.dshift = args.dshift;
  return d;
}

int most_pixels(int64_t channels, const SeparableArgs& args, int least, int64_t cache) {
  const int64_t size = args.dtype == Dtype::kFloat64 ? 8 : 4;
  return static_cast<int>(std::clamp<int64_t>(tile_bytes(cache) / (channels * size), least, kMostPixels));
}

// Few items are as many for each thread.
int evened(int64_t others, int pieces, int limit, int threads) {
  const auto even = [&](int count) { return others * count % threads == 0; };
  if (others * pieces >= int64_t{kItemsPerThread} * threads) return pieces;
  for (int count = pieces; count <= limit && count < pieces + threads; ++count) {
    if (even(count)) return count;
  }
  return std::min(limit, std::max<int>(pieces, ceil_div(threads, std::max<int64_t>(others, 1))));
}

}  // namespace

void SeparablePlan::cut_forward(const SeparableArgs& args) {
  const int P = args.shape.P(), Q = args.shape.Q();
  const int most = most_pixels(channels, args, kLeastPixels, second_level_cache());
  const bool whole_rows = int64_t{Q} * std::min(P, kTileRows) <= most;
  const int tile_rows = whole_rows ? std::min(P, most / Q) : std::min(P, kTileRows);
  cols.tiles = whole_rows ? 1 : ceil_div(Q, std::max(1, most / tile_rows));
  rows.tiles = evened(int64_t{args.shape.N} * cols.tiles, ceil_div(P, tile_rows), P, std::max(1, args.threads));
  items = int64_t{args.shape.N} * rows.tiles * cols.tiles;
  pixels = ceil_div(P, rows.tiles) * ceil_div(Q, cols.tiles);
}

void SeparablePlan::cut_backward(const SeparableArgs& args) {
  const int P = args.shape.P(), Q = args.shape.Q();
  const int most =
      most_pixels(std::max<int64_t>(channels, int64_t{k_blocks} * block), args, kLeastPixelsBackward, kUsualCache);
  strip_rows = std::clamp((most + Q / 2) / Q, std::min(P, 2), P);
  cols.tiles = 1;
  rows.tiles = evened(args.shape.N, 1, ceil_div(P, strip_rows), std::max(1, args.threads));
  items = int64_t{args.shape.N} * rows.tiles;
  pixels = strip_rows * Q;
}

std::vector<Strip> SeparablePlan::strips(int part) const {
  const Span dz = rows.staged_dy(part), dx = rows.x(part);
  const int count = ceil_div(dz.size(), strip_rows);
  std::vector<Strip> found;
  int kept = dz.lo, done = dx.lo;
  for (int i = 0; i < count; ++i) {
    const int lo = dz.lo + static_cast<int>(int64_t{dz.size()} * i / count);
    const int hi = dz.lo + static_cast<int>(int64_t{dz.size()} * (i + 1) / count);
    int complete = done;
    if (i + 1 == count) {
      complete = dx.hi;
    } else {
      while (complete < dx.hi && rows.axis.reads_dy({complete, complete + 1}).hi <= hi) ++complete;
    }
    found.push_back({{lo, hi}, {done, complete}, kept});
    done = complete;
    kept = done < dx.hi ? std::clamp(rows.axis.reads_dy({done, done + 1}).lo, kept, hi) : hi;
  }
  return found;
}

SeparablePlan::SeparablePlan(const SeparableArgs& args)
    : fprop_args(depthwise_args(args, Pass::kFprop)),
      grad_args(depthwise_args(args, args.backward ? Pass::kDgradWgrad : Pass::kFprop)),
      fprop(fprop_args),
      grad(grad_args),
      block(fprop.block),
      blocks(fprop.blocks),
      k_blocks(ceil_div(args.K, block)),
      channels(int64_t{blocks} * block),
      rows{fprop.rows.axis, 1, grad_args.pass},
      cols{fprop.cols.axis, 1, grad_args.pass},
      strip_rows(0) {
  const ConvShape& s = args.shape;
  args.backward ? cut_backward(args) : cut_forward(args);
  const int64_t macs = int64_t{s.N} * s.P() * s.Q() * s.C * args.K;
  threads = static_cast<int>(std::clamp<int64_t>(macs / kMacsPerThread, 1, std::max(1, args.threads)));
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  groups = static_cast<int>(std::min<int64_t>(items, int64_t{kGroupsPerThread} * threads));

  // Pixels of x and of dx that a tile or strip has.
  int64_t x_pixels = 0, dx_pixels = 0;
  const auto x_rows = [&](Span y) { return int64_t{within(rows.axis.reads_x(y), s.H).size()}; };
  for (int i = 0; i < rows.tiles; ++i) {
    if (!args.backward) {
      for (int j = 0; j < cols.tiles; ++j) {
        x_pixels = std::max(x_pixels, x_rows(rows.y(i)) * cols.staged_x(j).size());
      }
      continue;
    }
    for (const Strip& strip : strips(i)) {
      x_pixels = std::max(x_pixels, x_rows(strip.dz) * s.W);
      dx_pixels = std::max(dx_pixels, int64_t{strip.dx.size()} * s.W);
      dz_rows = std::max(dz_rows, strip.dz.hi - strip.kept);
    }
  }
  const int64_t size = args.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t staged = std::max<int64_t>(1, (x_pixels + dx_pixels) * block * size);
  depth = static_cast<int>(std::clamp<int64_t>(kStagedBytes / staged, 1, std::min(kTogether, blocks)));

  Regions of_call(block), of_thread(block);
  fprop_w = of_call.add(fprop.packed_w);
  fprop_bias = of_call.add(fprop.packed_bias);
  fprop_affine = of_call.add(fprop.packed_affine);
  x_tile = of_thread.add(x_pixels * depth * block);
  if (args.backward) {
    // z, and the gradient of y: a strip has them the other way round than the last.
    const int64_t most = pixels * std::max<int64_t>(channels, int64_t{k_blocks} * block);
    z_tile = of_thread.add(most);
    panels = of_thread.add(most);
    grad_w = of_call.add(grad.packed_w);
    grad_bias = of_call.add(grad.packed_bias);
    grad_affine = of_call.add(grad.packed_affine);
    w_pw = of_call.add(channels * args.K);
    y_affine = of_call.add(3 * int64_t{k_blocks} * block);
    dz_tile = of_thread.add(int64_t{dz_rows} * s.Q() * channels);
    out_tile = of_thread.add(dx_pixels * depth * block);
    sums = of_thread.add(grad.sums);
    dw_pw = of_thread.add(int64_t{k_blocks} * block * s.C);
  } else {
    w_pw = of_call.add(int64_t{k_blocks} * block * s.C);
    bias = of_call.add(int64_t{k_blocks} * block);
    z_tile = of_thread.add(pixels * channels);
    panels = of_thread.add(int64_t{kTogether} * pixels * block);
    if (args.statistics) statistics = of_call.add(groups * int64_t{k_blocks} * block * 2 * 2);  // in double
  }
  shared = of_call.size();
  per_thread = of_thread.size();
}

}  // namespace xsep::cpu
