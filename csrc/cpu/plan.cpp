#include "plan.h"
#include <cstdlib>

namespace xsep::cpu {
namespace {

const int64_t kTileBytes = getenv("XT") ? atoi(getenv("XT"))*1024 : 24 * 1024;       // staged data of a tile: most of a 32 KB first-level cache
const int kMaxCols = getenv("XC") ? atoi(getenv("XC")) : 40;                    // of a tile; wider images are cut evenly
constexpr int64_t kMacsPerThread = 64 * 1024;   // about 3 us of work: less is not worth a thread

int group_lines() { static int v = getenv("XG") ? atoi(getenv("XG")) : 8; return v; }
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

}  // namespace

Plan::Plan(const DepthwiseArgs& args) {
  const ConvShape& s = args.shape;
  const int accumulator_bytes = args.dtype == Dtype::kFloat64 ? 8 : 4;
  const int line = 64 / accumulator_bytes;
  const bool half = args.dtype == Dtype::kFloat16 || args.dtype == Dtype::kBFloat16;
  const Pass pass = args.pass;
  reads_x = pass != Pass::kDgrad;
  reads_dy = pass != Pass::kFprop;
  makes_dx = pass == Pass::kDgrad || pass == Pass::kDgradWgrad;
  makes_dw = pass == Pass::kWgrad || pass == Pass::kDgradWgrad;

  direct = args.nhwc && s.M == 1 && !args.on_load.any();
  block = !args.nhwc ? 1 : half ? 2 * line : line;  // a line of the tensor or of the tile, whichever is longer
  blocks = ceil_div(s.C, block);
  taps = s.M * s.R * s.S;

  rows = {{s.H, s.P(), s.R, s.stride_h, s.pad_top, s.dilation_h}, 1, pass};
  cols = {{s.W, s.Q(), s.S, s.stride_w, s.pad_left, s.dilation_w}, 1, pass};
  const auto extent = [pass](const Cut& cut) { return pass == Pass::kDgrad ? cut.axis.in : cut.axis.out; };
  // NCHW vectors run along rows, so there a tile is as wide as the image unless a few rows of it would not fit.
  const int max_cols = args.nhwc ? kMaxCols : 1024;
  cols.tiles = ceil_div(extent(cols), max_cols);
  const Extent col = largest(cols, reads_x, reads_dy);
  const auto staged_bytes = [&](int tiles) {
    rows.tiles = tiles;
    const Extent row = largest(rows, reads_x, reads_dy);
    const int64_t x = int64_t{row.x} * col.x, dy = int64_t{row.dy} * col.dy * s.M * (args.nhwc || !makes_dw ? 1 : 2);
    return (x + dy) * block * accumulator_bytes;
  };
  // The fewest tiles that fit; halving first, so that tall images take few steps.
  int tiles = 1;
  while (tiles < extent(rows) && staged_bytes(tiles) > kTileBytes) tiles = std::min(extent(rows), 2 * tiles);
  while (tiles > 1 && staged_bytes(tiles - 1) <= kTileBytes) --tiles;
  rows.tiles = tiles;
  const Extent row = largest(rows, reads_x, reads_dy);

  whole_blocks = direct ? s.C / block : 0;
  whole_groups = ceil_div(whole_blocks, group_lines());
  groups = whole_groups + blocks - whole_blocks;
  items = int64_t{s.N} * rows.tiles * cols.tiles * groups;
  const int64_t macs = s.y_numel() * s.R * s.S;
  threads = static_cast<int>(std::clamp<int64_t>(macs / kMacsPerThread, 1, std::max(1, args.threads)));
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));

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

  if (args.nhwc) {
    x_tile = int64_t{row.x} * col.x * block;
    dy_tile = int64_t{row.dy} * col.dy * block;
    wgrad_dy_tile = 0;
    out_tile = makes_dx || pass == Pass::kFprop ? int64_t{row.out} * col.out * block : 0;
  } else {
    // Split by the strides' residues, each part rounded up to whole rows and columns.
    const int64_t pitch = ceil_div(col.x, s.stride_w);
    x_tile = int64_t{s.stride_h} * s.stride_w * ceil_div(row.x, s.stride_h) * pitch + kSlack;
    dy_tile = int64_t{row.dy} * col.dy + kSlack;
    wgrad_dy_tile = makes_dw ? (row.dy + 1) * pitch + kSlack : 0;
    out_tile = pass == Pass::kFprop ? row.out * pitch + kSlack
               : makes_dx           ? s.stride_w * (ceil_div(row.out, s.stride_h) * int64_t{col.dy} + kSlack)
                                    : 0;
  }
  if (!reads_x) x_tile = 0;
  if (!makes_dx) dy_tile = args.nhwc && reads_dy ? dy_tile : 0;
  x_tile = round_up(x_tile, line);
  dy_tile = round_up(dy_tile, line);
  wgrad_dy_tile = round_up(wgrad_dy_tile, line);
  out_tile = round_up(out_tile, line);
  scratch = x_tile + (args.nhwc ? 1 : s.M) * dy_tile + wgrad_dy_tile + out_tile;

  packed_w = pass == Pass::kWgrad ? 0 : round_up(int64_t{blocks} * taps * block, line);
  packed_bias = round_up(int64_t{blocks} * s.M * block, line);
  packed_affine = args.on_load.any() ? 3 * round_up(int64_t{blocks} * block, line) : 0;
  sums_per_block = (int64_t{taps} + (args.on_load.any() ? 2 : 0)) * block;
  sums = makes_dw ? round_up(blocks * sums_per_block, line) : 0;
}

}  // namespace xsep::cpu
