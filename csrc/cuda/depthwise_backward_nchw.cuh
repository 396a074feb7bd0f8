// The backward passes in NCHW for 3x3, 5x5 and 7x7: wgrad, dgrad+wgrad in one, and dgrad with stride 2; strides 1 and
// 2, any dilation with stride 1.  How a band is cut and moved: nchw_band.cuh.
//
// A thread owns columns of x and slides down the rows of dy, as in depthwise_backward_nhwc.cuh, but reads both from
// shared memory: dy widened with zeros for borders, x as it is.  dx leaves through shared memory in vectors.  The sums
// of dw stay in registers over all images that a block takes; at the end the block adds them in shared memory and by
// shuffles, in a fixed order, and leaves a partial sum for reduce.cuh.
//
// Bytes: dy and x once from DRAM and dx once, in vectors of 16 bytes; from L2 also the rows of dy that bands of a plane
// share; partial sums of a twentieth of x, where there are images enough for blocks to take several.  Memory limits
// 3x3, instructions the larger filters.
//
//   Registers (sm_80, sm_90a); nothing is spilled from sm_37 to sm_121
//              wgrad: half, float     both: half, float      dgrad: half, float
//   3x3         79  79,  78  80        86  96,  95  80
//   5x5        102 101,  93  89       115 128, 116 119
//   7x7        118 116, 106 118       210 210, 191 190
//   3x3 / 2     66  80,  80  80       115 116,  96  96        67  77,  66  66
//   5x5 / 2    110 107,  95  93       123 124, 121 122       101 102,  86  86
//   7x7 / 2    115 119, 114 106       214 212, 197 201       113 122, 119 119
#pragma once

#include <string>

#include "nchw_band.cuh"
#include "reduce.cuh"

namespace xsep::cuda::nchw {

// Shared memory: the zero and the windows of dy as float, x as it is, and the tiles of dx; at the end, the sums of the
// threads.
struct BackwardLayout {
  bool all_cols;  // of dy are staged
  Pitch dy, x, dx;
  int32_t x_at, dx_at;  // in elements
};

template <class T>
struct Backward {
  const T* x;
  int64_t x_n, x_c, x_h, x_row;  // strides; x_row that of the rows of a residue
  const T* dy;
  int64_t dy_n, dy_c, dy_h, dy_row;
  const T* w;
  T* dx;
  int64_t dx_c, dx_row;
  float* partials;  // [parts][channels][sums]
  OnLoad on_load;
  int32_t C, H, W, P, Q;
  int32_t pad_top, pad_left, dilation_w;
  Divider dilation_h;
  int32_t first_col, cols;    // of the threads: a column covers kStride of x
  int32_t reduce_lanes_log2;  // threads that add up one sum
  Cut cut;
  BackwardLayout layout;
  int64_t shared_bytes;
};

// Partial sums may take this share of the bytes of x.
constexpr double kPartialsShare = 0.05;

template <bool kDgrad, bool kWgrad, int kR>
constexpr int kBackwardSums = kWgrad ? kR * kR + (kDgrad ? 2 : 0) : 0;

// Adds up what the threads of each channel have, in a fixed order, and stores it.
template <int kSums>
__device__ __forceinline__ void reduce_block(const Cut& cut, const Block& block, const float (&sums)[kSums],
                                             int lanes_log2, float* partials, int channels) {
  float* const shared = shared_memory<float>();  // [kSums][threads], and a float between the rows for the banks
  const int pitch = blockDim.x + 1, a_channel = cut.tile.strips * cut.tile.cols;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) shared[i * pitch + threadIdx.x] = sums[i];
  __syncthreads();
  const int lanes = 1 << lanes_log2, lane = threadIdx.x & (lanes - 1), count = block.channels * kSums;
  for (int first = 0; first < count; first += blockDim.x >> lanes_log2) {
    const int i = first + (threadIdx.x >> lanes_log2), channel = i / kSums, sum = i % kSums;
    float total = 0;
    if (i < count) {
      for (int t = lane; t < a_channel; t += lanes) total += shared[sum * pitch + channel * a_channel + t];
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffff, total, distance);
    if (i < count && lane == 0) {
      store(partials + (int64_t{block.part} * channels + block.channel + channel) * kSums + sum, total);
    }
  }
}

// Threads whose registers a multiprocessor holds: 80, 96, 128 and 255 a thread.
template <int kR, int kStride, bool kBoth>
constexpr int kBackwardResident = kR == 7   ? (kBoth ? 256 : 512)
                                  : kR == 5 ? 512
                                  : !kBoth  ? 768
                                            : (kStride == 1 ? 640 : 512);

template <class T, int kR, int kStride, bool kDgrad, bool kWgrad>
__global__ void __launch_bounds__(resident(kBackwardResident<kR, kStride, kDgrad && kWgrad>), 1)
    depthwise_backward_nchw_kernel(const Backward<T> call) {
  constexpr int kBack = (kR - 1) / kStride;  // rows of dy before the one in line with a row of x that meet it too
  constexpr int kSums = kBackwardSums<kDgrad, kWgrad, kR>;
  [[maybe_unused]] constexpr int kUnroll = kR == 3 ? kBack + 1 : 1;
  float* const shared = shared_memory<float>();
  const BackwardLayout& layout = call.layout;
  const Block block = this_block(call.cut, call.C, call.cols);
  const Place place = this_thread(call.cut);

  // Step i is rows kStride*i - shift, ... of the x rows that are congruent to the residue modulo d; they meet the rows
  // i - kBack, ..., i of the dy rows that are congruent to dy_residue.
  const int d = call.dilation_h.by, padded = block.residue + call.pad_top;
  const int shift = padded / call.dilation_h, dy_residue = padded - shift * d;
  const int height = (call.H - 1 - block.residue) / call.dilation_h + 1;
  const int dy_height = dy_residue < call.P ? (call.P - 1 - dy_residue) / call.dilation_h + 1 : 0;
  const int begin = shift / kStride + block.step;
  const int steps = clamp((height - 1 + shift) / kStride + 1 - begin, 0, call.cut.tile.steps);
  const int row_lo = larger(kStride * begin - shift, 0), row_hi = smaller(kStride * (begin + steps) - shift, height);
  // Likewise column j is columns kStride*j - pad, ... of x, and meets the columns j - kBack*dilation, ..., j of dy.
  const int left = call.first_col + block.col, right = left + block.cols;
  const int col_lo = larger(kStride * left - call.pad_left, 0),
            col_hi = smaller(kStride * right - call.pad_left, call.W);
  const Window window(begin - kBack, steps + kBack, dy_height, left - kBack * call.dilation_w, right, call.Q,
                      layout.all_cols);

  const int my_begin = begin + place.strip * call.cut.tile.strip_steps;
  const int my_steps = smaller(call.cut.tile.strip_steps, begin + steps - my_begin);
  const bool active = place.channel < block.channels && place.col < block.cols && my_steps > 0;
  const int my_row = kStride * my_begin - shift, my_col = kStride * (left + place.col) - call.pad_left;
  const int my_row_lo = larger(my_row, row_lo), my_rows = smaller(my_row + kStride * my_steps, row_hi) - my_row_lo;

  float w[kR][kR], sums[larger(kSums, 1)] = {};
  Affine f;
  const bool has_function = call.on_load.center || call.on_load.relu;
  if (active) {
    const int channel = block.channel + place.channel;
    if constexpr (kDgrad) {
#pragma unroll
      for (int i = 0; i < kR * kR; ++i) w[i / kR][i % kR] = widen(load(call.w + int64_t{channel} * (kR * kR) + i));
    }
    if constexpr (kWgrad) f = affine_of(call.on_load, channel);
  }

  Slab<const T> dy = {call.dy + block.image * call.dy_n + block.channel * call.dy_c + dy_residue * call.dy_h +
                          window.row * call.dy_row + window.col,
                      call.dy_c,
                      call.dy_row,
                      block.channels,
                      window.rows,
                      window.cols};
  Slab<const T> x{};
  if constexpr (kWgrad) {
    x = {call.x + block.image * call.x_n + block.channel * call.x_c + block.residue * call.x_h + row_lo * call.x_row +
             col_lo,
         call.x_c,
         call.x_row,
         block.channels,
         row_hi - row_lo,
         col_hi - col_lo};
  }
  Slab<T> dx{};
  if constexpr (kDgrad) {
    dx = {call.dx + (int64_t{block.image} * call.C + block.channel) * call.dx_c + int64_t{block.residue} * call.W +
              row_lo * call.dx_row + col_lo,
          call.dx_c,
          call.dx_row,
          block.channels,
          row_hi - row_lo,
          col_hi - col_lo};
  }
  const int my_x = place.channel * layout.x.plane + (my_row - row_lo) * layout.x.row + my_col - col_lo;
  const int my_dx = place.channel * layout.dx.plane + (my_row - row_lo) * layout.dx.row + my_col - col_lo;
  const int my_dy = place.channel * layout.dy.plane + (my_begin - kBack - window.row) * layout.dy.row - window.col;

  const int images = steps > 0 ? block.images_end - block.image : 0;
  for (int image = 0; image < images; ++image) {
    if (threadIdx.x == 0) shared[kZero] = 0;
    const int dy_at = place_of(window, layout.dy, dy.first);
    T* const x_tile = shared_memory<T>() + layout.x_at + misalignment(x.first);
    T* const dx_tile = shared_memory<T>() + layout.dx_at + misalignment(dx.first);
    stage_zeros(shared + dy_at, layout.dy, block.channels, window);
    stage_widened(dy, shared + dy_at, layout.dy);
    if constexpr (kWgrad) stage(x, x_tile, layout.x);
    copies_done();
    __syncthreads();

    if (active) {
      Taps<kBack + 1> taps(dy_at + my_dy, layout.dy.row, left + place.col, -call.dilation_w, call.Q);
      // Element [k] is of the step k steps after the one that the last row of dy to arrive is in line with.
      float du[kBack + 1][kStride][kStride] = {}, u[kBack + 1][kStride][kStride] = {};
      const T *x_row = x_tile + my_x, *x_done = x_row;
      T* dx_row = dx_tile + my_dx;
      const auto inside = [&](int step, int a, int b) {  // is that pixel of a step one of this thread's?
        if (kStride == 1) return step < my_steps;
        const int row = my_row + kStride * step + a - my_row_lo;
        return static_cast<unsigned>(row) < static_cast<unsigned>(my_rows) &&
               static_cast<unsigned>(my_col + b) < static_cast<unsigned>(call.W);
      };
      // The next row of dy arrives, with it the rows of x of the step `arriving`, and the oldest rows of dx are done,
      // those of the step `leaving`.
      const auto slide = [&](int arriving, auto arrives, int leaving, auto leaves) {
        float pixels[kBack + 1];
        taps.next_row(shared, pixels);
        if constexpr (kWgrad) {
#pragma unroll
          for (int a = 0; a < kStride; ++a) {
#pragma unroll
            for (int b = 0; b < kStride; ++b) {
              const bool have = arrives.value && ((kStride == 1 && leaves.value) || inside(arriving, a, b));
              u[kBack][a][b] = have ? f(widen(x_row[a * layout.x.row + b])) : 0.0f;
            }
          }
          x_row += kStride * layout.x.row;
        }
#pragma unroll
        for (int r = 0; r < kR; ++r) {
#pragma unroll
          for (int t = 0; t < kR; ++t) {
            const float pixel = pixels[t / kStride];
            if constexpr (kDgrad) du[r / kStride][r % kStride][t % kStride] += pixel * w[r][t];
            if constexpr (kWgrad) sums[r * kR + t] += pixel * u[r / kStride][r % kStride][t % kStride];
          }
        }
        if constexpr (kDgrad && leaves.value) {
#pragma unroll
          for (int a = 0; a < kStride; ++a) {
#pragma unroll
            for (int b = 0; b < kStride; ++b) {
              if (kStride == 2 && !inside(leaving, a, b)) continue;
              float v = du[0][a][b];
              if constexpr (kWgrad) {
                if (has_function) {
                  if (u[0][a][b] <= f.floor) v = 0;
                  const float x = widen(x_done[a * layout.x.row + b]);
                  sums[kR * kR] += v * (x - f.center), sums[kR * kR + 1] += v;
                  v *= f.scale;
                }
              }
              dx_row[a * layout.dx.row + b] = narrow<T>(v);
            }
          }
          x_done += kStride * layout.x.row, dx_row += kStride * layout.dx.row;
        }
#pragma unroll
        for (int k = 0; k <= kBack; ++k) {
#pragma unroll
          for (int ab = 0; ab < kStride * kStride; ++ab) {
            const int a = ab / kStride, b = ab % kStride;
            du[k][a][b] = k < kBack ? du[k + 1][a][b] : 0;
            if (k < kBack) u[k][a][b] = u[k + 1][a][b];
          }
        }
      };
      const std::true_type yes;
      const std::false_type no;
#pragma unroll 1
      for (int i = 0; i < kBack; ++i) slide(i, yes, 0, no);
#pragma unroll kUnroll
      for (int i = kBack; i < my_steps; ++i) slide(i, yes, i - kBack, yes);
#pragma unroll 1
      for (int i = larger(my_steps - kBack, 0); i < my_steps; ++i) slide(0, no, i, yes);
    }
    __syncthreads();
    if constexpr (kDgrad) {
      store_slab(dx, dx_tile, layout.dx);
      dx.first += call.C * call.dx_c;
    }
    if constexpr (kWgrad) x.first += call.x_n;
    dy.first += call.dy_n;
  }
  if constexpr (kWgrad) reduce_block(call.cut, block, sums, call.reduce_lanes_log2, call.partials, call.C);
}

// Fills in a call; what it returns is why it cannot.
template <class T>
std::string plan_backward(const DepthwiseArgs& args, const Device& device, Backward<T>* call) {
  if (std::string reason = why_not_specialised(args); !reason.empty()) return reason;
  const ConvShape& s = args.shape;
  if (args.pass == Pass::kFprop) return "makes dx and dw";
  if (args.pass == Pass::kDgrad && s.stride_h == 1) return "leaves dgrad with stride 1 to fprop";
  const bool dgrad = args.pass != Pass::kWgrad, wgrad = args.pass != Pass::kDgrad;
  *call = {};
  call->x = static_cast<const T*>(args.x.data), call->x_n = args.x.n, call->x_c = args.x.c, call->x_h = args.x.h;
  call->dy = static_cast<const T*>(args.dy.data), call->dy_n = args.dy.n, call->dy_c = args.dy.c,
  call->dy_h = args.dy.h;
  call->w = static_cast<const T*>(args.w);
  call->dx = static_cast<T*>(args.dx);
  call->partials = static_cast<float*>(args.workspace);
  if (wgrad) call->on_load = args.on_load;
  call->C = s.C, call->H = s.H, call->W = s.W, call->P = s.P(), call->Q = s.Q();
  call->pad_top = s.pad_top, call->pad_left = s.pad_left;
  call->dilation_h = Divider(s.dilation_h), call->dilation_w = s.dilation_w;
  call->x_row = int64_t{s.dilation_h} * args.x.h, call->dy_row = int64_t{s.dilation_h} * args.dy.h;
  call->dx_c = int64_t{s.H} * s.W, call->dx_row = int64_t{s.dilation_h} * s.W;
  call->first_col = s.pad_left / s.stride_w;
  call->cols = (s.W - 1 + s.pad_left) / s.stride_w + 1 - call->first_col;

  const int back = (s.R - 1) / s.stride_h, sums = wgrad ? s.R * s.R + (dgrad ? 2 : 0) : 0;
  Problem problem{s.N, s.C, std::min(s.dilation_h, s.H), ceil_div(s.H, s.dilation_h), call->cols, 1, back};
  if (s.stride_h == 2) problem.steps = (s.H - 1 + s.pad_top) / 2 + 1 - s.pad_top / 2;
  problem.images_per_part = sums * sizeof(float) / (kPartialsShare * s.H * s.W * sizeof(T));
  const auto lay_out = [&](const Tile& t) {
    const int64_t steps = std::min(t.steps, problem.steps);
    const int64_t dy_cols = t.cols + int64_t{back} * s.dilation_w, q = call->Q;
    const int64_t rows = std::min<int64_t>(s.stride_h * steps, s.H), cols = std::min<int64_t>(s.stride_w * t.cols, s.W);
    BackwardLayout& l = call->layout;
    l.all_cols = t.tiles == 1 && call->dy_row == q && q <= 2 * dy_cols;
    l.dy = pitch_for<T, float>(steps + back, l.all_cols ? q : std::min(dy_cols, q), call->dy_row, args.dy.c,
                               t.strips * t.cols);
    l.x = pitch_for<T, T>(rows, cols, call->x_row, args.x.c, s.stride_w * t.strips * t.cols);
    l.dx = pitch_for<T, T>(rows, cols, call->dx_row, call->dx_c, -1);
    const int64_t x_at = window_bytes<T>(l.dy, t.channels);
    const int64_t dx_at = x_at + (wgrad ? tile_bytes<T>(l.x, t.channels) : 0);
    const int64_t end = dx_at + (dgrad ? tile_bytes<T>(l.dx, t.channels) : 0);
    l.x_at = static_cast<int32_t>(x_at / sizeof(T)), l.dx_at = static_cast<int32_t>(dx_at / sizeof(T));
    return std::max<int64_t>(end, int64_t{sums} * (t.threads() + 1) * sizeof(float));
  };
  if (!make_cut(problem, device, lay_out, &call->cut)) return "its tiles do not fit into shared memory";
  const Tile& t = call->cut.tile;
  call->shared_bytes = lay_out(t);
  while (call->reduce_lanes_log2 < 5 && t.channels * sums << (call->reduce_lanes_log2 + 1) <= t.threads()) {
    ++call->reduce_lanes_log2;
  }
  return "";
}

template <class T>
Reduction<T> reduction(const DepthwiseArgs& args, const Backward<T>& call) {
  Reduction<T> r;
  r.partials = call.partials;
  r.parts = call.cut.parts;
  r.channels = args.shape.C;
  r.taps = args.shape.R * args.shape.S;
  r.sums = args.pass == Pass::kWgrad ? r.taps : r.taps + 2;
  r.dw = static_cast<T*>(args.dw);
  r.dscale = static_cast<float*>(args.dscale);
  r.dshift = static_cast<float*>(args.dshift);
  return r;
}

template <class T>
cudaError_t run_backward(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  Backward<T> call;
  if (!plan_backward(args, device, &call).empty()) return cudaErrorInvalidValue;
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(call.cut.blocks)), dim3(call.cut.tile.threads()),
                  call.shared_bytes, stream, call);
  };
  const auto start_pass = [&](auto r, auto stride) -> cudaError_t {
    constexpr int kR = r.value, kStride = stride.value;
    switch (args.pass) {
      case Pass::kWgrad:
        return start(depthwise_backward_nchw_kernel<T, kR, kStride, false, true>);
      case Pass::kDgradWgrad:
        return start(depthwise_backward_nchw_kernel<T, kR, kStride, true, true>);
      default:
        if constexpr (kStride == 2) return start(depthwise_backward_nchw_kernel<T, kR, kStride, true, false>);
    }
    return cudaErrorInvalidValue;
  };
  const cudaError_t error = call.cut.blocks ? with_filter(args.shape, start_pass) : cudaSuccess;
  if (error != cudaSuccess || args.pass == Pass::kDgrad) return error;
  return reduce_partials(reduction(args, call), stream);
}

template <class T>
int64_t backward_workspace_bytes(const DepthwiseArgs& args, const Device& device) {
  Backward<T> call;
  if (args.pass == Pass::kDgrad || !plan_backward(args, device, &call).empty()) return 0;
  return reduction(args, call).bytes();
}

}  // namespace xsep::cuda::nchw

namespace xsep::cuda {

template <class T>
Kernel depthwise_backward_nchw() {
  return {"depthwise_backward_nchw",
          [](const DepthwiseArgs& args, const Device& device) {
            nchw::Backward<T> call;
            return nchw::plan_backward(args, device, &call);
          },
          nchw::backward_workspace_bytes<T>, nchw::run_backward<T>};
}

}  // namespace xsep::cuda
