// dgrad with stride 2, wgrad, and both at once, NHWC: 3x3, 5x5 and 7x7 filters, strides 1 and 2, any dilation with
// stride 1.
//
// A thread owns a few columns of x for a vector of channels and slides down the rows of dy.  Each pixel of dy that
// arrives is multiplied with the filter into the kR rows of dx in the making, and with the kR rows of x (of u, with a
// function on load) that it meets into the kR * kR sums of dw, all in registers.  The owned columns begin where the
// first tap meets them, so with stride 2 the parity of every product is known: no tap is tested.  Through a function on
// load, dx is masked and scaled as its rows complete, and dscale and dshift are summed.
//
// dw: a thread keeps its sums over all its items, its block adds them up in shared memory in a fixed order and leaves
// one partial sum, and reduce.cuh adds those: deterministic, no atomics.  There are no more blocks than a device holds
// at once (or one for each chunk of channels), so all partials are at most 0.6 MB with 3x3 and 2.5 MB with 7x7 on an
// H100, however large x is.
//
// Filter and sums take 2 * kR * kR * kV registers: hence 2 channels a thread with 3x3 and 1 with larger filters, and
// columns instead, which share both: 2 with 3x3 and 4 else, but 2 with 7x7 through a function on load.  So both passes
// fit into one kernel even with 7x7, and dy is read once.
// A row of dy and of x is in flight while the last is multiplied; with 3x3, three.
//
// Bytes: dy and x once from DRAM, dx once; from L2 also the halo of dy around a block's columns, and of both around a
// strip.  Memory limits 3x3, instructions the larger filters.
//
//   Registers (sm_80 sm_90a); nothing is spilled from sm_37 to sm_121
//              wgrad: half, float     both: half, float      both on load: half
//   3x3        108 108, 117 118       126 139, 142 153       139 148
//   5x5         99  96,  96  96       142 149, 142 153       167 165
//   7x7        135 128, 134 128       218 223, 216 234       200 205
//   3x3 / 2    108 111, 122 124       103 115, 130 138       135 166
//   5x5 / 2     93  96,  96  96       127 137, 129 140       156 156
//   7x7 / 2    128 128, 128 138       200 209, 206 217       186 191
#pragma once

#include "nhwc.cuh"
#include "reduce.cuh"

namespace xsep::cuda {
namespace nhwc {

template <class Element, int kRows, int kStep, bool kMakesDx, bool kMakesDw, bool kReadsU>
struct BackwardTile {
  using T = Element;
  static constexpr int kR = kRows, kStride = kStep;
  static constexpr bool kDgrad = kMakesDx, kWgrad = kMakesDw, kOnLoad = kReadsU, kBoth = kDgrad && kWgrad;
  static constexpr int kV = kR == 3 ? 2 : 1;                                      // channels of a thread
  static constexpr int kCols = kR == 3 || (kR == 7 && kBoth && kOnLoad) ? 2 : 4;  // columns of x of a thread
  static constexpr int kAhead = kR == 3 ? 3 : 1;                                  // rows of dy in flight
  static constexpr int kResident = (kR == 7 ? 2 : 3) + !kBoth;                    // blocks of a multiprocessor
  static constexpr int kSums = kR * kR + (kBoth && kOnLoad ? 2 : 0);              // of a channel: dw, dscale, dshift
  static_assert(kCols % kStride == 0, "the first column of every thread meets the same taps");
};

template <class T>
struct BackwardParams {
  Grid grid;  // of rows of dy and columns of x
  Pixels dys, xs, dxs;
  const T *dy, *x, *w;
  T* dx;
  float* partials;  // [parts][kSums][C]
  int32_t C, H, W, P, Q;
  int32_t pad_top, pad_left;
  int32_t before;  // columns that the first item owns before those of x
  Divider dilation_h;
  int32_t dilation_w;
  OnLoadVectors on_load;
};

// A row of dy meets kR rows of x; the next one meets those from the kStride-th on.  du is what dx is so far, u is x
// through its function on load, and dw are a thread's sums.  Which pixel of dy the column i of x meets with the tap t
// is the same for all threads.
template <int kStride, int kR, int kCols, int kV>
__device__ __forceinline__ void move_up(float (&du)[kR][kCols][kV]) {
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
#pragma unroll
      for (int v = 0; v < kV; ++v) du[r][i][v] = r + kStride < kR ? du[r + kStride][i][v] : 0.f;
    }
  }
}

// Moves up as well, which costs nothing: the first product is added to what was the row below.
template <int kStride, int kPixels, int kTaps, int kR, int kCols, int kV>
__device__ __forceinline__ void add_to_dx(const float (&dy)[kPixels][kV], const float (&w)[kTaps][kV],
                                          float (&du)[kR][kCols][kV]) {
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        float sum = r + kStride < kR ? du[r + kStride][i][v] : 0.f;
#pragma unroll
        for (int t = i % kStride; t < kR; t += kStride) {
          sum += dy[(i - t) / kStride + (kR - 1) / kStride][v] * w[r * kR + t][v];
        }
        du[r][i][v] = sum;
      }
    }
  }
}

template <int kStride, int kPixels, int kTaps, int kR, int kCols, int kV>
__device__ __forceinline__ void add_to_dw(const float (&dy)[kPixels][kV], const float (&u)[kR][kCols][kV],
                                          float (&dw)[kTaps][kV]) {
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
#pragma unroll
      for (int t = i % kStride; t < kR; t += kStride) {
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          dw[r * kR + t][v] += dy[(i - t) / kStride + (kR - 1) / kStride][v] * u[r][i][v];
        }
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    depthwise_backward_nhwc_kernel(const BackwardParams<typename Tile::T> p) {
  using T = typename Tile::T;
  constexpr bool kDgrad = Tile::kDgrad, kWgrad = Tile::kWgrad, kOnLoad = Tile::kOnLoad;
  constexpr int kR = Tile::kR, kStride = Tile::kStride, kV = Tile::kV, kCols = Tile::kCols, kAhead = Tile::kAhead,
                kSums = Tile::kSums;
  constexpr int kLag = (kR - 1) / kStride;                   // rows of dy above its own that a row of dx meets
  constexpr int kPixels = (kCols - 1) / kStride + kLag + 1;  // of a row of dy that a thread reads
  constexpr int kOld = kR - kStride;                         // rows of x that a row of dy shares with the one above
  constexpr bool kThroughOnLoad = kDgrad && kOnLoad;

  const Grid& grid = p.grid;
  const Lane lane = this_lane<kV>(grid);
  const int slots = blockDim.x >> grid.lanes_log2;
  const bool has_channel = lane.channel < p.C;
  float* const shared = shared_memory<float>();
  float w[kR * kR][kV], dw[kR * kR][kV], dscale[kV], dshift[kV];
  if constexpr (kDgrad) {
    stage_filter<T, kR>(p.w, lane.first_channel, lane.lanes * kV, p.C, false, shared);
    __syncthreads();
    read_filter(shared, lane, w);
  }
  const Affine<kV> affine(p.on_load, kOnLoad && has_channel ? lane.channel : 0);
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    dscale[v] = dshift[v] = 0.f;
#pragma unroll
    for (int tap = 0; tap < kR * kR; ++tap) dw[tap][v] = 0.f;
  }

  for (int run = lane.part; run < grid.runs; run += grid.parts) {
    const int number = run * slots + lane.slot;
    const bool works = has_channel && number < grid.items;
    const Item at = item(grid, works ? number : 0);
    const int rows = keep(at.cols.count > 0 ? at.rows.count : 0);

    // Step k is about the row p0 + k * dilation of dy and the kR rows of x from h on; the rows of dx among these that
    // no later step meets are complete.  Steps before 0 belong to another item, but for the rows of dx.
    const int p0 = at.rows.first, w0 = at.cols.first - p.before;
    const int q0 = (w0 + p.pad_left) / kStride - kLag * p.dilation_w;
    const int begin = kDgrad ? -(at.rows.above < kLag ? at.rows.above : kLag) : 0;
    const int exist = p0 < p.P ? (p.P - 1 - p0) / p.dilation_h + 1 : -((p0 - p.P) / p.dilation_h);
    const int end = keep(exist < rows ? exist : rows);
    const int h_last = (p0 + (rows - 1) * p.dilation_h.by) * kStride - p.pad_top + (kR - 1) * p.dilation_h.by;
    const int h_end = keep(h_last < 0 ? 0 : h_last < p.H ? h_last + 1 : p.H);
    // A bit for each column of dy that a thread reads and, above these, each of x that it owns.
    const int cols =
        keep(columns_inside<kPixels>(q0, p.dilation_w, p.Q) | columns_inside<kCols>(w0, p.dilation_w, p.W) << kPixels);
    if (!works || rows == 0) continue;

    int h = (p0 + begin * p.dilation_h.by) * kStride - p.pad_top;
    const char* x = nullptr;  // a tensor that the pass does not have is null, and not to be added to
    if (kWgrad) x = reinterpret_cast<const char*>(p.x + lane.channel) + offset(p.xs, at.image, h, w0);
    const char* dy =
        reinterpret_cast<const char*>(p.dy + lane.channel) + offset(p.dys, at.image, p0 + begin * p.dilation_h.by, q0);
    char* dx = nullptr;
    if (kDgrad) dx = reinterpret_cast<char*>(p.dx + lane.channel) + offset(p.dxs, at.image, h, w0);

    // What arrives in a step.
    struct Step {
      Pixel<T, kV> dy[kPixels], x[kStride][kCols];
    };
    int h_load = h + kOld * p.dilation_h.by, to_load = begin;
    const char* x_load = kWgrad ? x + kOld * p.dilation_h.by * p.xs.row : nullptr;
    const auto load_x = [&](Pixel<T, kV>(&row)[kCols], int h, const char* x) {
      load_row(row, below(h, h_end) ? cols >> kPixels : 0, x, p.xs.next_col);
    };
    const auto load_step = [&](Step& step) {
      load_row(step.dy, to_load < end ? cols : 0, dy, p.dys.next_col);
      dy += p.dys.next_row;
      ++to_load;
      if constexpr (kWgrad) {
#pragma unroll
        for (int r = 0; r < kStride; ++r) load_x(step.x[r], h_load + r, x_load + r * p.xs.row);
        x_load += p.xs.next_row;
        h_load += kStride * p.dilation_h.by;
      }
    };

    // The window: rows of x, and of dx in the making, that a row of dy meets.
    Pixel<T, kV> raw[kR][kCols];
    float u[kR][kCols][kV], du[kR][kCols][kV];
    Step queue[kAhead];
    if constexpr (kWgrad) {
#pragma unroll
      for (int r = 0; r < kOld; ++r) load_x(raw[r], h + r * p.dilation_h.by, x + r * p.dilation_h.by * p.xs.row);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_step(queue[i]);
    const auto widen_x = [&](int r, int h) {
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        raw[r][i].widen_to(u[r][i]);
        if (kOnLoad) affine.apply(u[r][i], (cols >> (kPixels + i) & 1) && below(h, h_end));
      }
    };
    if constexpr (kWgrad) {
#pragma unroll
      for (int r = 0; r < kOld; ++r) widen_x(r, h + r * p.dilation_h.by);
    }
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        if (!kWgrad || r >= kOld) raw[r][i] = {};
#pragma unroll
        for (int v = 0; v < kV; ++v) du[r][i][v] = 0.f;
      }
    }

    const auto store_dx = [&] {
#pragma unroll
      for (int r = 0; r < kStride; ++r) {
        if (!below(h + r, p.H)) continue;
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          if (!(cols >> (kPixels + i) & 1)) continue;
          if constexpr (kThroughOnLoad) {
            float value[kV];
            raw[r][i].widen_to(value);
#pragma unroll
            for (int v = 0; v < kV; ++v) {
              const float gradient = affine.passes(affine.before_relu(value[v], v)) ? du[r][i][v] : 0.f;
              dscale[v] += gradient * (value[v] - affine.center[v]);
              dshift[v] += gradient;
              du[r][i][v] = gradient * affine.scale[v];
            }
          }
          store_pixel<T, kV>(dx + r * p.dxs.row + i * p.dxs.next_col, du[r][i]);
        }
      }
    };
    const auto next_rows = [&] {
      if (kDgrad) dx += p.dxs.next_row;
      h += kStride * p.dilation_h.by;
#pragma unroll
      for (int r = 0; r < kOld; ++r) {
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          raw[r][i] = raw[r + kStride][i];
#pragma unroll
          for (int v = 0; v < kV; ++v) u[r][i][v] = u[r + kStride][i][v];
        }
      }
    };

    int k = begin;
    while (k < end) {
#pragma unroll
      for (int turn = 0; turn < kAhead; ++turn) {
        float d[kPixels][kV];
#pragma unroll
        for (int j = 0; j < kPixels; ++j) queue[turn].dy[j].widen_to(d[j]);
        if constexpr (kWgrad) {
#pragma unroll
          for (int r = 0; r < kStride; ++r) {
#pragma unroll
            for (int i = 0; i < kCols; ++i) raw[kOld + r][i] = queue[turn].x[r][i];
            widen_x(kOld + r, h + (kOld + r) * p.dilation_h.by);
          }
        }
        load_step(queue[turn]);
        if (kDgrad) add_to_dx<kStride>(d, w, du);
        if (kWgrad && (!kDgrad || k >= 0)) add_to_dw<kStride>(d, u, dw);
        if (kDgrad && below(k, rows)) store_dx();
        next_rows();
        ++k;
      }
    }
    if constexpr (kDgrad) {
      for (; k < rows; ++k) {  // what is left of dx meets no row of dy any more
        move_up<kStride>(du);
        if (k >= 0) store_dx();
        next_rows();
      }
    }
  }

  if constexpr (kWgrad) {
    __syncthreads();
    const auto leave = [&](int sum, const float (&values)[kV]) {
#pragma unroll
      for (int v = 0; v < kV; ++v) shared[(sum * kV + v) * blockDim.x + threadIdx.x] = values[v];
    };
#pragma unroll
    for (int tap = 0; tap < kR * kR; ++tap) leave(tap, dw[tap]);
    if constexpr (kThroughOnLoad) {
      leave(kR * kR, dscale);
      leave(kR * kR + 1, dshift);
    }
    __syncthreads();
    const int channels = lane.lanes * kV;
    float* const partial = p.partials + int64_t{lane.part} * kSums * p.C + lane.first_channel;
    for (int i = threadIdx.x; i < kSums * channels; i += blockDim.x) {
      const int sum = i / channels, channel = i - sum * channels;
      if (lane.first_channel + channel >= p.C) continue;
      const float* values = shared + (sum * kV + channel % kV) * blockDim.x + channel / kV;
      float total = values[0];
      for (int slot = 1; slot < slots; ++slot) total += values[slot * lane.lanes];
      store(partial + int64_t{sum} * p.C + channel, total);
    }
  }
}

inline bool is_backward(const DepthwiseArgs& args) {
  return args.pass == Pass::kWgrad || args.pass == Pass::kDgradWgrad ||
         (args.pass == Pass::kDgrad && args.shape.stride_h == 2);
}

// Calls f with the tile of a call, which is_backward().
template <class T, class F>
decltype(auto) with_backward_tile(const DepthwiseArgs& args, F&& f) {
  return with_filter(args.shape, [&](auto r, auto stride) {
    constexpr int kR = r.value, kStride = stride.value;
    if constexpr (kStride == 2) {
      if (args.pass == Pass::kDgrad) return f(BackwardTile<T, kR, kStride, true, false, false>{});
    }
    if (args.pass == Pass::kWgrad) {
      return args.on_load.any() ? f(BackwardTile<T, kR, kStride, false, true, true>{})
                                : f(BackwardTile<T, kR, kStride, false, true, false>{});
    }
    return args.on_load.any() ? f(BackwardTile<T, kR, kStride, true, true, true>{})
                              : f(BackwardTile<T, kR, kStride, true, true, false>{});
  });
}

// At least one image.
template <class Tile>
Grid backward_grid(const DepthwiseArgs& args, const Device& device) {
  const ConvShape& s = args.shape;
  const int32_t last = (s.H - 1 + s.pad_top) / s.stride_h;  // the step that completes the last row of dx
  const int32_t steps = Tile::kDgrad ? std::max(s.P(), last + 1) : s.P(), before = s.pad_left % s.stride_w;
  const Cut cut{Tile::kV, Tile::kCols, kMaxLanes<Tile>, (s.R - 1) / s.stride_h, 4, Tile::kResident, Tile::kWgrad};
  return make_grid(cut, device, s.C, s.N, steps, s.dilation_h, s.W + before, s.dilation_w);
}

template <class Tile>
Reduction<typename Tile::T> backward_reduction(const DepthwiseArgs& args, const Device& device) {
  Reduction<typename Tile::T> r;
  if (!Tile::kWgrad) return r;
  r.partials = static_cast<const float*>(args.workspace);
  r.parts = args.shape.N == 0 ? 0 : backward_grid<Tile>(args, device).parts;
  r.channels = args.shape.C, r.taps = Tile::kR * Tile::kR, r.sums = Tile::kSums, r.channels_last = true;
  r.dw = static_cast<typename Tile::T*>(args.dw);
  r.dscale = static_cast<float*>(args.dscale), r.dshift = static_cast<float*>(args.dshift);
  return r;
}

template <class T>
std::string why_not_backward(const DepthwiseArgs& args, const Device&) {
  const std::string reason = why_not(args);
  if (!reason.empty()) return reason;
  if (!is_backward(args)) return "not wgrad, nor dgrad with stride 2";
  return with_backward_tile<T>(args, [&](auto tile) -> std::string {
    using Tile = decltype(tile);
    if (args.shape.C % Tile::kV != 0) return "the channels are not a multiple of " + std::to_string(Tile::kV);
    if (Tile::kDgrad && !aligned(args.dx, Tile::kV * sizeof(T))) return "dx is not aligned";
    const std::string reason = Tile::kWgrad ? why_not<T>(args.x, "x", Tile::kV) : "";
    return reason.empty() ? why_not<T>(args.dy, "dy", Tile::kV) : reason;
  });
}

template <class T>
int64_t backward_workspace_bytes(const DepthwiseArgs& args, const Device& device) {
  return with_backward_tile<T>(args,
                               [&](auto tile) { return backward_reduction<decltype(tile)>(args, device).bytes(); });
}

template <class Tile>
cudaError_t launch_backward(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  using T = typename Tile::T;
  const ConvShape& s = args.shape;
  const TensorRef &x = args.x, &dy = args.dy;
  BackwardParams<T> p;
  p.grid = backward_grid<Tile>(args, device);
  p.dys = Pixels::of<T>(dy.n, dy.h, dy.w, s.dilation_h, s.dilation_w);
  p.xs = Pixels::of<T>(x.n, x.h, x.w, s.stride_h * s.dilation_h, s.dilation_w);
  p.dxs = Pixels::of<T>(int64_t{s.H} * s.W * s.C, int64_t{s.W} * s.C, s.C, s.stride_h * s.dilation_h, s.dilation_w);
  p.dy = static_cast<const T*>(dy.data), p.x = static_cast<const T*>(x.data), p.w = static_cast<const T*>(args.w);
  p.dx = static_cast<T*>(args.dx), p.partials = static_cast<float*>(args.workspace);
  p.C = s.C, p.H = s.H, p.W = s.W, p.P = s.P(), p.Q = s.Q();
  p.pad_top = s.pad_top, p.pad_left = s.pad_left, p.before = s.pad_left % s.stride_w;
  p.dilation_h = Divider(s.dilation_h), p.dilation_w = s.dilation_w;
  if (Tile::kOnLoad) p.on_load = OnLoadVectors(args.on_load);
  const int taps = Tile::kR * Tile::kR, filter = Tile::kDgrad ? taps << p.grid.lanes_log2 : 0;
  const int sums = Tile::kWgrad ? Tile::kSums * p.grid.threads : 0;
  return launch(depthwise_backward_nhwc_kernel<Tile>, dim3(p.grid.blocks()), dim3(p.grid.threads),
                sizeof(float) * Tile::kV * std::max(filter, sums), stream, p);
}

template <class T>
cudaError_t run_backward(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  return with_backward_tile<T>(args, [&](auto tile) {
    using Tile = decltype(tile);
    const cudaError_t error = args.shape.N > 0 ? launch_backward<Tile>(args, device, stream) : cudaSuccess;
    if (error != cudaSuccess || !Tile::kWgrad) return error;
    return reduce_partials(backward_reduction<Tile>(args, device), stream);
  });
}

}  // namespace nhwc

template <class T>
Kernel depthwise_backward_nhwc() {
  return {"depthwise_backward_nhwc", nhwc::why_not_backward<T>, nhwc::backward_workspace_bytes<T>,
          nhwc::run_backward<T>};
}

}  // namespace xsep::cuda
