// How a pass is cut into tiles: spans of rows and columns, what a span of outputs reads, and the layout of the
// workspace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../depthwise.h"
#include "kernels.h"

namespace xsep::cpu {

struct Span {
  int lo, hi;  // [lo, hi)
  int size() const { return hi - lo; }
};

inline Span within(Span span, int extent) {
  const int lo = std::clamp(span.lo, 0, extent);
  return {lo, std::clamp(span.hi, lo, extent)};
}

inline int floor_div(int a, int b) { return a / b - (a % b < 0); }

// Filter taps along one axis that meet one residue class of outputs: tap `taps[i]` reads offset first + i * step.
struct TapClass {
  std::vector<int> taps;
  int first = 0, step = 1;
};

// One spatial axis of the convolution.  `in` is x's extent, `out` is y's.
struct Axis {
  int in, out, kernel, stride, pad, dilation;

  // Rows of x that a span of y reads, and rows of y that a span of x receives gradient from.  Both may reach beyond
  // the tensors, where there is nothing.
  Span reads_x(Span y) const { return {y.lo * stride - pad, (y.hi - 1) * stride - pad + (kernel - 1) * dilation + 1}; }
  Span reads_dy(Span x) const {
    const Span y{-floor_div(-(x.lo + pad - (kernel - 1) * dilation), stride), floor_div(x.hi - 1 + pad, stride) + 1};
    return {y.lo, std::max(y.hi, y.lo + 1)};
  }
  // The taps of dgrad for positions x with (x + pad) % stride == residue, relative to y = (x + pad) / stride.
  TapClass dgrad_taps(int residue) const {
    TapClass result;
    std::vector<int> offsets;
    for (int k = kernel - 1; k >= 0; --k) {
      if (k * dilation % stride != residue) continue;
      result.taps.push_back(k);
      offsets.push_back(-(k * dilation / stride));
    }
    if (!offsets.empty()) result.first = offsets[0];
    if (offsets.size() > 1) result.step = offsets[1] - offsets[0];  // the same between all of them
    return result;
  }
};

// The cut of one axis into tiles.
struct Cut {
  Axis axis;
  int tiles;
  Pass pass;

  // Tile i of y (fprop, wgrad and the fused backward).
  Span y(int i) const { return even(axis.out, i); }
  // Tile i of dx.  In the fused backward, the part of x round the middle of y's tile, so that both read the same rows.
  Span x(int i) const {
    if (pass == Pass::kDgrad) return even(axis.in, i);
    return {fused_bound(i), fused_bound(i + 1)};
  }
  // What tile i of the pass stages, as far as the tensors reach.
  Span staged_x(int i) const { return within(axis.reads_x(y(i)), axis.in); }
  Span staged_dy(int i) const {
    if (pass == Pass::kWgrad) return y(i);
    const Span dgrad = within(x(i).size() > 0 ? axis.reads_dy(x(i)) : y(i), axis.out);
    if (pass == Pass::kDgrad) return dgrad;
    return {std::min(dgrad.lo, y(i).lo), std::max(dgrad.hi, y(i).hi)};
  }

 private:
  Span even(int extent, int i) const {
    return {static_cast<int>(int64_t{extent} * i / tiles), static_cast<int>(int64_t{extent} * (i + 1) / tiles)};
  }
  int fused_bound(int i) const {
    if (i == 0 || i == tiles) return i == 0 ? 0 : axis.in;
    const int64_t middle = int64_t{y(i).lo} * axis.stride - axis.pad + (axis.kernel - 1) * axis.dilation / 2;
    return static_cast<int>(std::clamp<int64_t>(middle, 0, axis.in));
  }
};

// Everything a call needs to know before it touches memory.
struct Plan {
  explicit Plan(const DepthwiseArgs& args);

  // The part of the work that a thread takes at a time: a tile of rows and columns, and a group of channel blocks.
  Cut rows, cols;
  int groups;     // [first_block(g), first_block(g + 1)) each
  int64_t items;  // of all images
  int threads;    // at most; fewer than asked for when there is little to do

  int64_t channels;
  int block;        // kBlock
  int blocks;       // that cover C
  bool direct;      // NHWC is read from and written to the tensors where nothing has to be done on the way
  Cut staged_rows;  // otherwise each tile of rows is cut into bands that fit into the nearest caches
  int bands;        // per tile of rows
  int depth;        // and has at most so many blocks
  int taps;         // M * R * S
  bool far;         // its tensors are so large that it pays to ask for what is needed next
  bool large;       // the pass goes over more than the caches hold
  bool stream;      // its outputs go past them

  // Packed filter of a block: position -> index into the M * R * S taps of a channel.  dgrad groups them by class.
  std::vector<int> order;
  std::vector<TapClass> row_classes, col_classes;  // dgrad, by residue
  std::vector<int> class_start;                    // position of [row residue][column residue] in `order`

  // Elements of the accumulation type, each region rounded up to a cache line.
  int64_t x_tile, dy_tile, out_tile, planes;     // a thread's tiles, and the last as it will lie in an NCHW tensor
  int64_t scratch;                               // their sum, per thread
  int64_t packed_w, packed_bias, packed_affine;  // shared
  int64_t sums;                                  // per thread: partial dw, then dscale and dshift, per block
  int64_t sums_per_block;
  int64_t workspace_elements() const { return packed_w + packed_bias + packed_affine + threads * (scratch + sums); }

  bool reads_x, reads_dy, makes_dx, makes_dw;

  // Of a block.  The last of a tensor that is read in place ends where the channels end, and so may share some with the
  // one before it: both then find the same.
  int64_t first_channel(int64_t b) const { return direct ? std::min(b * block, channels - block) : b * block; }
  int first_block(int group) const { return static_cast<int>(int64_t{blocks} * group / groups); }

 private:
  void cut(const DepthwiseArgs& args);
};

}  // namespace xsep::cpu
