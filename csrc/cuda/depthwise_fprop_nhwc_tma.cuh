// fprop, and dgrad with stride 1, NHWC, by bulk copies (TMA) for sm_90 and newer: 3x3, 5x5 and 7x7 filters, strides 1
// and 2, no dilation.
//
// A block makes a strip of rows of y, some columns wide, for some vectors of channels.  Rows of x pass through a ring
// of boxes in shared memory: while one is multiplied the next ones are on their way, asked for by one thread, whatever
// the registers hold.  Borders are zeros that the copy engine fills in, so nothing is tested and no address is computed
// but by that thread.  A thread makes a few columns for a vector of channels and slides down the rows as in
// depthwise_fprop_nhwc.cuh: the filter and the sums of the rows of y in flight are in registers.
//
// A function on load is not taken: zeros beside the image would have to stay zeros, and here they look like any other.
//
// Bytes: x once from DRAM and y once; from L2 also the halo of a block (2 columns of 32 and more, kR - 1 rows of a
// strip).  Each pixel is read from shared memory by (kCols - 1 + kR) / kCols threads.  Memory limits 3x3.
// Shared memory: four boxes, 18 KB for 3x3 over 64 channels of float, and the filter.
//
//   Registers (sm_90a, sm_100, sm_120); nothing is spilled
//              half             float
//   3x3         80,  86,  86     93,  90,  91
//   5x5         95,  95,  95     96,  96,  96
//   7x7        192, 204, 202    157, 158, 158
//   3x3 / 2     80,  80,  80     82,  84,  84
//   5x5 / 2     91,  88,  91     89,  90,  90
//   7x7 / 2    167, 168, 167    143, 147, 147
//
// Off until the self-test has passed on the card, as it has on an H100.
#pragma once

#include "depthwise_fprop_nhwc.cuh"
#include "tma.cuh"

namespace xsep::cuda {
namespace nhwc {

constexpr int kBoxes = 4;  // in the ring

// Who does what in a block: `lanes` vectors of channels, neighbours in memory, times `slots` groups of columns.
struct TmaGrid {
  int32_t lanes_log2, slots;
  int32_t rows;  // of y in a strip
  int32_t box_cols, box_bytes, box_pitch;
  Divider chunks, col_tiles, strips;  // then images
  int64_t blocks;
};

template <class T>
struct TmaParams {
  TmaGrid grid;
  Pixels out;
  const T *w, *bias;
  T* y;
  int32_t C, P, Q;
  int32_t pad_top, pad_left;  // may be negative
  bool flip;
};

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    depthwise_fprop_nhwc_tma_kernel(const XSEP_GRID_CONSTANT TensorMap map, const TmaParams<typename Tile::T> p) {
#if defined(XSEP_EMULATE_CUDA) || __CUDA_ARCH__ >= 900
  using T = typename Tile::T;
  constexpr int kR = Tile::kR, kStride = Tile::kStride, kV = Tile::kV, kCols = Tile::kCols;
  constexpr int kPixels = (kCols - 1) * kStride + kR;  // of an input row that a thread reads
  constexpr int kLag = (kR - 1) / kStride;             // output rows in flight beside the one that completes

  const TmaGrid& grid = p.grid;
  Lane lane;
  lane.lanes = 1 << grid.lanes_log2;
  lane.lane = threadIdx.x & (lane.lanes - 1);
  lane.slot = threadIdx.x >> grid.lanes_log2;
  int image = blockIdx.x;
  lane.first_channel = take(image, grid.chunks) * lane.lanes * kV;
  lane.channel = lane.first_channel + lane.lane * kV;
  const int first_col = take(image, grid.col_tiles) * grid.slots * kCols;
  const int first_row = take(image, grid.strips) * grid.rows;
  const int rows = grid.rows < p.P - first_row ? grid.rows : p.P - first_row;
  const int h0 = first_row * kStride - p.pad_top, w0 = first_col * kStride - p.pad_left;
  const int steps = (rows - 1) * kStride + kR;

  // Shared memory: the barriers, the filter, the boxes.
  uint64_t* const barriers = shared_memory<uint64_t>();
  float* const filter = reinterpret_cast<float*>(barriers + kBoxes);
  char* boxes = reinterpret_cast<char*>(filter + kR * kR * kV * lane.lanes);
  boxes += (kTmaAlignment - reinterpret_cast<uintptr_t>(boxes) % kTmaAlignment) % kTmaAlignment;
  const auto ask_for = [&](int row) {
    const int at = row % kBoxes;
    tma_load(boxes + at * grid.box_pitch, map, lane.first_channel, w0, h0 + row, image, barriers + at, grid.box_bytes);
  };
  if (threadIdx.x == 0) {
    tma_init(barriers, kBoxes);
    for (int row = 0; row < kBoxes && row < steps; ++row) ask_for(row);
  }
  stage_filter<T, kR>(p.w, lane.first_channel, lane.lanes * kV, p.C, p.flip, filter);
  __syncthreads();

  const bool has_channel = lane.channel < p.C;
  float w[kR * kR][kV], bias[kV];
  read_filter(filter, lane, w);
#pragma unroll
  for (int v = 0; v < kV; ++v) bias[v] = has_channel && p.bias ? widen(load(p.bias + lane.channel + v)) : 0.f;
  const int col = first_col + lane.slot * kCols;
  const int stores = has_channel ? columns_inside<kCols>(col, 1, p.Q) : 0;
  char* y = reinterpret_cast<char*>(p.y + lane.channel) + offset(p.out, image, first_row, col);
  const char* const pixels = boxes + (lane.slot * kCols * kStride * lane.lanes + lane.lane) * (kV * sizeof(T));
  const int next_pixel = lane.lanes * kV * sizeof(T);

  float sums[kLag + 1][kCols][kV];  // of the output rows in flight, the first to complete first
#pragma unroll
  for (int k = 0; k <= kLag; ++k) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int v = 0; v < kV; ++v) sums[k][c][v] = bias[v];
    }
  }
  const auto multiply = [&](int row, auto phase) {
    constexpr int kPhase = phase.value;
    const int at = row % kBoxes;
    tma_wait(barriers + at, row / kBoxes % 2);
    float u[kPixels][kV];
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const auto pixel = *reinterpret_cast<const Vec<T, kV>*>(pixels + at * grid.box_pitch + j * next_pixel);
#pragma unroll
      for (int v = 0; v < kV; ++v) u[j][v] = widen(pixel.at[v]);
    }
    __syncthreads();
    if (threadIdx.x == 0 && row + kBoxes < steps) ask_for(row + kBoxes);
    // In phase 0 one output row completes and another begins: the sums move up as they take their first product.
#pragma unroll
    for (int k = kPhase == 0 ? 0 : 1; k <= kLag; ++k) {
      const int r = kR - 1 - k * kStride + kPhase;
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          float sum = kPhase != 0 ? sums[k][c][v] : k < kLag ? sums[k + 1][c][v] : bias[v];
#pragma unroll
          for (int t = 0; t < kR; ++t) sum += u[c * kStride + t][v] * w[r * kR + t][v];
          sums[k][c][v] = sum;
        }
      }
    }
  };

  for (int row = 0; row < steps; row += kStride) {
    multiply(row, std::integral_constant<int, 0>{});
    if (row >= kLag * kStride) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        if (stores >> c & 1) store_pixel<T, kV>(y + c * p.out.next_col, sums[0][c]);
      }
      y += p.out.next_row;
    }
    if constexpr (kStride == 2) {
      if (row + 1 < steps) multiply(row + 1, std::integral_constant<int, 1>{});
    }
  }
#endif
}

template <class Tile>
TmaGrid make_tma_grid(const Device& device, int32_t channels, int32_t images, int32_t P, int32_t Q) {
  constexpr int kV = Tile::kV, kCols = Tile::kCols, kStride = Tile::kStride, kR = Tile::kR;
  TmaGrid grid{};
  const int32_t vectors = channels / kV;
  constexpr int kVectorBytes = kV * sizeof(typename Tile::T);
  const int32_t wanted_lanes = std::max(std::min(vectors, kMaxLanes<Tile>), kTmaGrain / kVectorBytes);
  while ((1 << grid.lanes_log2) < wanted_lanes) ++grid.lanes_log2;
  const int32_t lanes = 1 << grid.lanes_log2;
  const int32_t most_slots = std::min(kThreads / lanes, ((256 - kR) / kStride + 1) / kCols);
  // Tiles of about the same width.
  const int32_t groups = (Q - 1) / kCols + 1, col_tiles = (groups - 1) / most_slots + 1;
  grid.slots = (groups - 1) / col_tiles + 1;
  grid.box_cols = (grid.slots * kCols - 1) * kStride + kR;
  grid.box_bytes = grid.box_cols * lanes * kVectorBytes;
  grid.box_pitch = (grid.box_bytes + kTmaAlignment - 1) / kTmaAlignment * kTmaAlignment;
  grid.chunks = Divider((vectors - 1) / lanes + 1);
  grid.col_tiles = Divider(col_tiles);
  // Long strips have few halos; short ones fill the card twice over, if there are rows for it.
  const int64_t columns = int64_t{images} * grid.chunks.by * col_tiles;
  const int64_t wanted = (2 * int64_t{device.multiprocessors} * Tile::kResident + columns - 1) / columns;
  const int32_t strips = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, (P - 1) / (2 * kR) + 1));
  grid.rows = (P - 1) / strips + 1;
  grid.strips = Divider((P - 1) / grid.rows + 1);
  grid.blocks = columns * grid.strips.by;
  return grid;
}

template <class Tile>
size_t tma_shared_bytes(const TmaGrid& grid) {
  const size_t filter = sizeof(float) * (Tile::kR * Tile::kR * Tile::kV << grid.lanes_log2);
  return kBoxes * sizeof(uint64_t) + filter + kTmaAlignment + kBoxes * static_cast<size_t>(grid.box_pitch);
}

// What is copied from, boxes left out.
template <class T>
TensorView tma_view(const DepthwiseArgs& args) {
  const ConvShape& s = args.shape;
  const bool fprop = args.pass == Pass::kFprop;
  const TensorRef& in = fprop ? args.x : args.dy;
  TensorView view{in.data, args.dtype, {s.C, fprop ? s.W : s.Q(), fprop ? s.H : s.P(), s.N}, {}, 0, 0};
  const int64_t strides[] = {in.w, in.h, in.n}, size = sizeof(T);
  int64_t below = (s.C * size + kTmaGrain - 1) / kTmaGrain * kTmaGrain;
  for (int i = 0; i < 3; ++i) {
    // Where an axis has one place its stride says nothing (image[None] has that of a pixel): any that nests will do.
    view.strides[i] = view.extents[i + 1] == 1 ? below : strides[i] * size;
    below = view.strides[i] * view.extents[i + 1];
  }
  return view;
}

template <class T>
std::string why_not_fprop_tma(const DepthwiseArgs& args, const Device& device) {
  const std::string reason = why_not_fprop<T>(args, device);
  if (!reason.empty()) return reason;
  if (device.arch < 90) return "the card has no bulk copies (sm_90 and newer do)";
  if (args.shape.dilation_h != 1 || args.shape.dilation_w != 1) return "the dilation is not 1";
  if (args.pass == Pass::kFprop && args.on_load.any()) return "it applies no function on load";
  const std::string no_map = why_not_tensor_map(tma_view<T>(args));
  return no_map.empty() ? why_no_tma() : no_map;
}

template <class T>
cudaError_t run_fprop_tma(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  const ConvShape& s = args.shape;
  const bool fprop = args.pass == Pass::kFprop;
  if (s.N == 0) return cudaSuccess;

  TmaParams<T> p{};
  p.w = static_cast<const T*>(args.w);
  p.bias = fprop ? static_cast<const T*>(args.bias) : nullptr;
  p.y = static_cast<T*>(fprop ? args.y : args.dx);
  p.C = s.C, p.P = fprop ? s.P() : s.H, p.Q = fprop ? s.Q() : s.W;
  p.pad_top = fprop ? s.pad_top : s.R - 1 - s.pad_top;
  p.pad_left = fprop ? s.pad_left : s.S - 1 - s.pad_left;
  p.flip = !fprop;
  p.out = Pixels::of<T>(int64_t{p.P} * p.Q * s.C, int64_t{p.Q} * s.C, s.C, 1, 1);

  return with_filter(s, [&](auto r, auto stride) {
    using Tile = FpropTile<T, r.value, stride.value, false>;
    p.grid = make_tma_grid<Tile>(device, s.C, s.N, p.P, p.Q);
    TensorView view = tma_view<T>(args);
    view.box_channels = Tile::kV << p.grid.lanes_log2;
    view.box_cols = p.grid.box_cols;
    TensorMap map;
    if (!make_tensor_map(view, &map)) return cudaErrorInvalidValue;
    return launch(depthwise_fprop_nhwc_tma_kernel<Tile>, dim3(static_cast<unsigned>(p.grid.blocks)),
                  dim3(static_cast<unsigned>(p.grid.slots << p.grid.lanes_log2)), tma_shared_bytes<Tile>(p.grid),
                  stream, map, p);
  });
}

}  // namespace nhwc

template <class T>
Kernel depthwise_fprop_nhwc_tma() {
  return {"depthwise_fprop_nhwc_tma", nhwc::why_not_fprop_tma<T>, nhwc::no_workspace, nhwc::run_fprop_tma<T>, true};
}

}  // namespace xsep::cuda
