#include "plan.h"

namespace xsep::cpu {
namespace {

// Of a tile of one tensor: a part of a second-level cache that leaves room for what streams through it.
constexpr int64_t kStagedBytes = 96 * 1024;
constexpr int kMaxDepth = 8;
constexpr int64_t kMacsPerThread = 64 * 1024;  // about 3 us of work: less is not worth a thread
constexpr int kItemsPerThread = 4;             // at least, so that threads end at about the same time

// Of an NHWC tensor that a row of a tile reads, in cache lines.  Some ten rows of it, those in use and those asked for
// ahead, share a second-level cache; the fused backward goes over a tile of both tensors twice.
constexpr int kRowLines = 1280, kFusedRowLines = 512;
constexpr int kFusedRows = 8;
constexpr int kGroupLines = 8;  // of a pixel, at least: memory likes long stretches

// A tensor of more bytes than the first, and tensors of more than the second together, do not stay in a last-level
// cache.  Tensors of more than the third are asked for in advance: nearer ones the hardware fetches as fast, without
// instructions.
constexpr int64_t kLargeBytes = 24 << 20, kStreamBytes = 32 << 20, kFarBytes = 12 << 20;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct Extent {
  int x = 0, dy = 0, out = 0;  // largest over the tiles
};

Extent largest(const Cut& cut, bool reads_x, bool reads_dy) {
  Extent e;
  for (int i = 0; i < cut.tiles; ++i) {
    if (reads_x) e.x = std::max(e.x, cut.staged_x(i).size());
    if (reads_dy) e.dy = std::max(e.dy, cut.staged_dy(i).size());
    e.out = std::max(e.out, cut.pass == Pass::kFprop ? cut.y(i).size() : cut.x(i).size());
  }
  return e;
}

// The axis that a pass cuts evenly.
int extent(const Cut& cut) { return cut.pass == Pass::kDgrad ? cut.axis.in : cut.axis.out; }

// The fewest pieces that `fits` takes, at most `limit`.
template <class F>
int fewest(int limit, F&& fits) {
  int low = 0, high = 1;  // low pieces are too few
  while (high < limit && !fits(high)) low = high, high = std::min(limit, 2 * high);
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (fits(middle) ? high : low) = middle;
  }
  return high;
}

}  // namespace

// Tiles are as wide and as tall as the caches allow: a row of all channels is one stretch of memory.
void Plan::cut(const DepthwiseArgs& args) {
  const ConvShape& s = args.shape;
  const bool fused = args.pass == Pass::kDgradWgrad;
  const int lines = makes_dw ? kFusedRowLines : kRowLines;
  cols.tiles = ceil_div(extent(cols), (direct ? lines : kRowLines) / kGroupLines);
  const Extent col = largest(cols, reads_x, reads_dy), whole = largest(rows, reads_x, reads_dy);
  const auto staged_bytes = [&](const Extent& row) {
    return (int64_t{row.x} * col.x + int64_t{row.dy} * col.dy) * block * 4;
  };
  const int64_t budget = kStagedBytes * (makes_dw ? 2 : 1), wanted = int64_t{kItemsPerThread} * args.threads;
  // Several blocks of a small image, so that what the arithmetic does for a tile pays.
  depth = s.M == 1
              ? static_cast<int>(std::clamp<int64_t>(budget / std::max<int64_t>(staged_bytes(whole), 1), 1, kMaxDepth))
              : 1;
  while (depth > 1 && int64_t{s.N} * cols.tiles * ceil_div(blocks, depth) < wanted) --depth;
  groups = ceil_div(blocks, direct ? std::max(kGroupLines, lines / ceil_div(extent(cols), cols.tiles)) : depth);
  rows.tiles = fused ? ceil_div(extent(rows), kFusedRows) : 1;
  const int64_t per_row = int64_t{s.N} * cols.tiles * groups;
  if (per_row > 0 && per_row * rows.tiles < wanted) {
    rows.tiles = std::max(rows.tiles, std::min(ceil_div(extent(rows), 4), ceil_div(wanted, per_row)));
  }
  staged_rows = rows;
  bands = direct ? 1 : fewest(ceil_div(extent(rows), rows.tiles), [&](int count) {
    staged_rows.tiles = rows.tiles * count;
    return staged_bytes(largest(staged_rows, reads_x, reads_dy)) * depth <= budget;
  });
  staged_rows.tiles = rows.tiles * bands;
}

Plan::Plan(const DepthwiseArgs& args) {
  const ConvShape& s = args.shape;
  const bool half = args.dtype == Dtype::kFloat16 || args.dtype == Dtype::kBFloat16;
  const int line = args.dtype == Dtype::kFloat64 ? 8 : 16;
  const Pass pass = args.pass;
  reads_x = pass != Pass::kDgrad;
  reads_dy = pass != Pass::kFprop;
  makes_dx = pass == Pass::kDgrad || pass == Pass::kDgradWgrad;
  makes_dw = pass == Pass::kWgrad || pass == Pass::kDgradWgrad;

  block = line;
  channels = s.C;
  blocks = ceil_div(s.C, block);
  direct = args.nhwc && s.M == 1 && !args.on_load.any() && s.C >= block;
  taps = s.M * s.R * s.S;
  rows = {{s.H, s.P(), s.R, s.stride_h, s.pad_top, s.dilation_h}, 1, pass};
  cols = {{s.W, s.Q(), s.S, s.stride_w, s.pad_left, s.dilation_w}, 1, pass};
  cut(args);
  const Extent row = largest(staged_rows, reads_x, reads_dy), col = largest(cols, reads_x, reads_dy);

  items = int64_t{s.N} * rows.tiles * cols.tiles * groups;
  const int64_t macs = s.y_numel() * s.R * s.S;
  threads = static_cast<int>(std::clamp<int64_t>(macs / kMacsPerThread, 1, std::max(1, args.threads)));
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const int64_t size = 64 / (half ? 2 * line : line);
  const int64_t all = (s.x_numel() * (pass == Pass::kDgradWgrad ? 2 : 1) + s.y_numel()) * size;
  far = all > kFarBytes;
  large = (pass == Pass::kFprop ? s.y_numel() : s.x_numel()) * size > kLargeBytes;
  // Vectors that go out in place cost nothing more past the caches, and leave them to the inputs; others are copied.
  stream = direct ? all > kStreamBytes : large;

  if (makes_dx) {
    for (int a = 0; a < s.stride_h; ++a) row_classes.push_back(rows.axis.dgrad_taps(a));
    for (int b = 0; b < s.stride_w; ++b) col_classes.push_back(cols.axis.dgrad_taps(b));
    for (const TapClass& a : row_classes)
      for (const TapClass& b : col_classes) {
        class_start.push_back(static_cast<int>(order.size()));
        for (int m = 0; m < s.M; ++m)
          for (int r : a.taps)
            for (int t : b.taps) order.push_back((m * s.R + r) * s.S + t);
      }
  } else {
    for (int t = 0; t < taps; ++t) order.push_back(t);
  }

  const int staged = direct ? 0 : depth * block;
  x_tile = round_up(int64_t{row.x} * col.x * staged, line);
  dy_tile = round_up(int64_t{row.dy} * col.dy * staged, line);
  out_tile = makes_dx || pass == Pass::kFprop ? round_up(int64_t{row.out} * col.out * staged, line) : 0;
  planes = stream && !args.nhwc ? round_up(out_tile / depth, line) : 0;
  scratch = x_tile + dy_tile + out_tile + planes;

  packed_w = pass == Pass::kWgrad ? 0 : round_up(int64_t{blocks} * taps * block, line);
  packed_bias = round_up(int64_t{blocks} * s.M * block, line);
  packed_affine = args.on_load.any() ? 3 * round_up(int64_t{blocks} * block, line) : 0;
  sums_per_block = (int64_t{taps} + (args.on_load.any() ? 2 : 0)) * block;
  sums = makes_dw ? round_up(blocks * sums_per_block, line) : 0;
}

}  // namespace xsep::cpu
