// fprop, and dgrad with stride 1, NHWC: 3x3, 5x5 and 7x7 filters, strides 1 and 2, any dilation with stride 1.  dgrad
// with stride 1 is fprop of dy with the filter turned round and the padding that is left of its halo.
//
// A thread makes a few columns of y for a vector of channels and slides down the rows of x.  The filter is in
// registers, widened, and so are the sums of the rows of y that the next row of x meets; they move up for free, as the
// first product of a row is added to the sum below.  A row of x is in flight while the one above is multiplied, and so
// is the next.  Rows above and below the image are not multiplied, columns beside it are zeros by a predicate.
//
// Vectors: 4 channels with 3x3 (16 bytes of float), 2 with larger filters.  Twice as many would double the registers of
// the filter; a second column shares them, and most of its pixels.  With 4 channels x 2 columns of half, 512 threads of
// a multiprocessor have 32 new bytes each under way and load each pixel twice; with 8 channels x 1 column 384 would,
// and load it three times.  7x7 has 4 columns of half, and 2 of float for its registers.
//
// Bytes: x once from DRAM and y once; from L2 also the halo of a block (16 columns of most and kR - 1 more, strips of
// rows and kR - 1 more).  Memory limits 3x3; 5x5 of half is on the border, instructions limit 7x7.
//
//   Registers (sm_80, sm_90a); nothing is spilled from sm_37 to sm_121
//              half         float         on load: half    float
//   3x3        122, 112     144, 146      142, 128         157, 167
//   5x5        122, 128     142, 146      156, 144         150, 167
//   7x7        212, 232     206, 212      228, 236         224, 243
//   3x3 / 2    122, 112     152, 154      148, 128         167, 168
//   5x5 / 2    122, 126     144, 146      144, 168         154, 168
//   7x7 / 2    198, 204     212, 216      218, 226         219, 249
#pragma once

#include "nhwc.cuh"

namespace xsep::cuda {
namespace nhwc {

template <class Element, int kRows, int kStep, bool kReadsU>
struct FpropTile {
  using T = Element;
  static constexpr int kR = kRows, kStride = kStep;
  static constexpr bool kOnLoad = kReadsU, kHalf = sizeof(T) == 2;
  static constexpr int kV = kR == 3 ? 4 : 2;                                 // channels of a thread
  static constexpr int kCols = kR == 7 && kHalf ? 4 : 2;                     // columns of y of a thread
  static constexpr int kAhead = 2;                                           // rows of x in flight
  static constexpr int kResident = kR == 7 ? 2 : kHalf && !kOnLoad ? 4 : 3;  // blocks of a multiprocessor
};

template <class T>
struct FpropParams {
  Grid grid;
  Pixels in, out;
  const T *x, *w, *bias;
  T* y;
  int32_t C, H, W, Q;
  int32_t pad_top, pad_left;  // pads may be negative
  bool flip;
  Divider dilation_h;
  int32_t dilation_w;
  OnLoadVectors on_load;
};

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    depthwise_fprop_nhwc_kernel(const FpropParams<typename Tile::T> p) {
  using T = typename Tile::T;
  constexpr bool kOnLoad = Tile::kOnLoad;
  constexpr int kR = Tile::kR, kStride = Tile::kStride, kV = Tile::kV, kCols = Tile::kCols, kAhead = Tile::kAhead;
  constexpr int kPixels = (kCols - 1) * kStride + kR;  // of an input row that a thread reads
  constexpr int kLag = (kR - 1) / kStride;             // output rows in flight beside the one that completes
  static_assert(kAhead % kStride == 0, "the phase of a row is that of its place in the queue");

  const Grid& grid = p.grid;
  const Lane lane = this_lane<kV>(grid);
  const int number = lane.part * (blockDim.x >> grid.lanes_log2) + lane.slot;
  const bool works = lane.channel < p.C && number < grid.items;
  const Item at = item(grid, works ? number : 0);
  const int rows = keep(at.cols.count > 0 ? at.rows.count : 0);

  // Of the input rows h0, h0 + dilation, ... of the strip, those from begin on and above h_end are multiplied: none
  // below the image, and above it those that share a turn of the loop with others or complete an output row.
  const int h0 = at.rows.first * kStride - p.pad_top, w0 = at.cols.first * kStride - p.pad_left;
  const int steps = (rows - 1) * kStride + kR;
  const int above = h0 < 0 ? (-h0 - 1) / p.dilation_h + 1 : 0;
  const int begin = (above < kLag * kStride ? above : kLag * kStride) / kAhead * kAhead;
  const int last = h0 + (steps - 1) * p.dilation_h.by, h_end = keep(last < 0 ? 0 : last < p.H ? last + 1 : p.H);

  int h_load = h0 + begin * p.dilation_h.by;
  const char* x = reinterpret_cast<const char*>(p.x + (works ? lane.channel : 0)) + offset(p.in, at.image, h_load, w0);
  // A bit for each input column that a thread reads and, above these, each output column.
  const int cols = keep(columns_inside<kPixels>(w0, p.dilation_w, p.W) |
                        columns_inside<kCols>(at.cols.first, p.dilation_w, p.Q) << kPixels);
  const auto load_next = [&](Pixel<T, kV>(&row)[kPixels]) {
    load_row(row, below(h_load, h_end) ? cols : 0, x, p.in.next_col);
    h_load += p.dilation_h.by;
    x += p.in.next_row;
  };
  Pixel<T, kV> queue[kAhead][kPixels];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_next(queue[i]);

  float* const filter = shared_memory<float>();
  stage_filter<T, kR>(p.w, lane.first_channel, lane.lanes * kV, p.C, p.flip, filter);
  __syncthreads();
  if (!works || rows == 0) return;
  float w[kR * kR][kV], bias[kV];
  read_filter(filter, lane, w);
#pragma unroll
  for (int v = 0; v < kV; ++v) bias[v] = p.bias ? widen(load(p.bias + lane.channel + v)) : 0.f;
  const Affine<kV> affine(p.on_load, kOnLoad ? lane.channel : 0);

  char* y = reinterpret_cast<char*>(p.y + lane.channel) + offset(p.out, at.image, at.rows.first, at.cols.first);
  float sums[kLag + 1][kCols][kV];  // of the output rows in flight, the first to complete first
#pragma unroll
  for (int k = 0; k <= kLag; ++k) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int v = 0; v < kV; ++v) sums[k][c][v] = bias[v];
    }
  }
  const auto store_row = [&] {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      if (cols >> (kPixels + c) & 1) store_pixel<T, kV>(y + c * p.out.next_col, sums[0][c]);
    }
    y += p.out.next_row;
  };

  int row = begin / kStride - kLag;  // of the strip, the first to complete
  while (h_load - kAhead * p.dilation_h.by < h_end) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int phase = i % kStride;
      float u[kPixels][kV];
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        queue[i][j].widen_to(u[j]);
        if (kOnLoad) affine.apply(u[j], (cols >> j & 1) && below(h_load - kAhead * p.dilation_h.by, h_end));
      }
      load_next(queue[i]);
      // In phase 0 one output row completes and another begins: the sums move up as they take their first product.
#pragma unroll
      for (int k = phase == 0 ? 0 : 1; k <= kLag; ++k) {
        const int r = kR - 1 - k * kStride + phase;
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            float sum = phase != 0 ? sums[k][c][v] : k < kLag ? sums[k + 1][c][v] : bias[v];
#pragma unroll
            for (int t = 0; t < kR; ++t) sum += u[c * kStride + t][v] * w[r * kR + t][v];
            sums[k][c][v] = sum;
          }
        }
      }
      if (phase == 0) {
        if (below(row, rows)) store_row();
        ++row;
      }
    }
  }
  for (; row < rows; ++row) {  // the input rows that are left are below the image
#pragma unroll
    for (int k = 0; k <= kLag; ++k) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
#pragma unroll
        for (int v = 0; v < kV; ++v) sums[k][c][v] = k < kLag ? sums[k + 1][c][v] : bias[v];
      }
    }
    if (row >= 0) store_row();
  }
}

inline bool is_fprop(const DepthwiseArgs& args) {
  return args.pass == Pass::kFprop || (args.pass == Pass::kDgrad && args.shape.stride_h == 1);
}

template <class T>
std::string why_not_fprop(const DepthwiseArgs& args, const Device&) {
  const std::string reason = why_not(args);
  if (!reason.empty()) return reason;
  if (!is_fprop(args)) return "not fprop, nor dgrad with stride 1";
  const bool fprop = args.pass == Pass::kFprop;
  const int vector = args.shape.R == 3 ? FpropTile<T, 3, 1, false>::kV : FpropTile<T, 5, 1, false>::kV;
  if (args.shape.C % vector != 0) return "the channels are not a multiple of " + std::to_string(vector);
  if (!aligned(fprop ? args.y : args.dx, vector * sizeof(T))) return "the output is not aligned";
  return why_not<T>(fprop ? args.x : args.dy, fprop ? "x" : "dy", vector);
}

template <class T>
cudaError_t run_fprop(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  const ConvShape& s = args.shape;
  const bool fprop = args.pass == Pass::kFprop;
  const TensorRef& in = fprop ? args.x : args.dy;
  const int32_t P = fprop ? s.P() : s.H, Q = fprop ? s.Q() : s.W;
  if (s.N == 0) return cudaSuccess;

  FpropParams<T> p{};
  p.x = static_cast<const T*>(in.data), p.w = static_cast<const T*>(args.w);
  p.bias = fprop ? static_cast<const T*>(args.bias) : nullptr;
  p.y = static_cast<T*>(fprop ? args.y : args.dx);
  p.C = s.C, p.H = fprop ? s.H : s.P(), p.W = fprop ? s.W : s.Q(), p.Q = Q;
  p.dilation_h = Divider(s.dilation_h), p.dilation_w = s.dilation_w;
  p.pad_top = fprop ? s.pad_top : s.dilation_h * (s.R - 1) - s.pad_top;
  p.pad_left = fprop ? s.pad_left : s.dilation_w * (s.S - 1) - s.pad_left;
  p.flip = !fprop;
  if (fprop) p.on_load = OnLoadVectors(args.on_load);
  p.in = Pixels::of<T>(in.n, in.h, in.w, s.dilation_h, s.dilation_w);
  p.out = Pixels::of<T>(int64_t{P} * Q * s.C, int64_t{Q} * s.C, s.C, s.dilation_h, s.dilation_w);

  const auto start = [&](auto tile) {
    using Tile = decltype(tile);
    const Cut cut{Tile::kV, Tile::kCols, kMaxLanes<Tile>, (s.R - 1) / s.stride_h, 4, Tile::kResident, false};
    p.grid = make_grid(cut, device, s.C, s.N, P, s.dilation_h, Q, s.dilation_w);
    const size_t shared = sizeof(float) * (Tile::kR * Tile::kR * Tile::kV << p.grid.lanes_log2);
    return launch(depthwise_fprop_nhwc_kernel<Tile>, dim3(p.grid.blocks()), dim3(p.grid.threads), shared, stream, p);
  };
  return with_filter(s, [&](auto r, auto stride) {
    return fprop && args.on_load.any() ? start(FpropTile<T, r.value, stride.value, true>{})
                                       : start(FpropTile<T, r.value, stride.value, false>{});
  });
}

inline int64_t no_workspace(const DepthwiseArgs&, const Device&) { return 0; }

}  // namespace nhwc

template <class T>
Kernel depthwise_fprop_nhwc() {
  return {"depthwise_fprop_nhwc", nhwc::why_not_fprop<T>, nhwc::no_workspace, nhwc::run_fprop<T>};
}

}  // namespace xsep::cuda
