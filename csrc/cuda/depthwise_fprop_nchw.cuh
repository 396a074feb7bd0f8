// fprop in NCHW, and dgrad with stride 1, which is fprop of dy with the flipped filter: 3x3, 5x5 and 7x7, strides 1 and
// 2, any dilation with stride 1.  How a band is cut and moved: nchw_band.cuh.
//
// The sums of the rows of y that the next row of x meets are in registers, and so is the filter; a thread reads R
// neighbouring columns of a row from shared memory, where x is widened and borders are zeros, and leaves its output
// there, whence the block stores it in vectors.
//
// Bytes: x once from DRAM and y once, both in vectors of 16 bytes; from L2 also the R - stride rows that bands of a
// plane share.  Shared memory: R reads of 4 bytes an output and some 8 bytes for staging, which by the numbers of an
// H100 takes a third of the time of DRAM with 3x3 of float, and 0.6 of it with 3x3 of half or 7x7 of float.  Memory
// limits it (7x7 of half: multiply-adds).
//
//   Registers (sm_80, sm_90a); nothing is spilled from sm_37 to sm_121
//              half         float
//   3x3         63,  64      60,  62
//   5x5         94,  93      80,  89
//   7x7        114, 120     122, 120
//   3x3 / 2     63,  64      61,  64
//   5x5 / 2     94,  90      89,  87
//   7x7 / 2    114, 120     122, 122
#pragma once

#include <string>

#include "nchw_band.cuh"

namespace xsep::cuda::nchw {

// Shared memory: the zero and the windows of x as float, then the outputs.
struct FpropLayout {
  bool all_cols;  // are staged
  Pitch x, y;
  int32_t y_at;  // in elements
};

template <class T>
struct Fprop {
  const T* x;
  int64_t x_n, x_c, x_h, x_row;  // strides; x_row that of the rows of a residue
  const T *w, *bias;
  T* y;
  int64_t y_c, y_row;
  OnLoad on_load;
  bool flip;              // the filter
  int32_t C, H, W, P, Q;  // of x and y
  int32_t pad_top, pad_left, dilation_w;
  Divider dilation_h;
  Cut cut;
  FpropLayout layout;
  int64_t shared_bytes;
};

// Threads whose registers a multiprocessor holds: 64, 96 and 128 a thread.
template <int kR>
constexpr int kFpropResident = kR == 3   ? 1024
                               : kR == 5 ? 640
                                         : 512;

template <class T, int kR, int kStride>
__global__ void __launch_bounds__(resident(kFpropResident<kR>), 1) depthwise_fprop_nchw_kernel(const Fprop<T> call) {
  constexpr int kOpen = (kR - 1) / kStride;  // output rows that have begun when one ends
  float* const shared = shared_memory<float>();
  const FpropLayout& layout = call.layout;
  const Block block = this_block(call.cut, call.C, call.Q);
  const Place place = this_thread(call.cut);

  // Step m makes output row residue + d*m, from input rows residue - pad + d*(stride*m + r): those are the rows
  // stride*m + r + shift of the ones that are congruent to `first` modulo d.
  const int d = call.dilation_h.by, from = block.residue - call.pad_top;
  const int shift = from >= 0 ? from / call.dilation_h : -((-from - 1) / call.dilation_h) - 1, first = from - shift * d;
  const int steps = smaller(call.cut.tile.steps, (call.P - 1 - block.residue) / call.dilation_h + 1 - block.step);
  if (steps <= 0) return;
  const int left = kStride * block.col - call.pad_left;
  const Window window(kStride * block.step + shift, kStride * (steps - 1) + kR,
                      first < call.H ? (call.H - 1 - first) / call.dilation_h + 1 : 0, left,
                      left + kStride * (block.cols - 1) + call.dilation_w * (kR - 1) + 1, call.W, layout.all_cols);
  const int step = place.strip * call.cut.tile.strip_steps;
  const int my_steps = smaller(call.cut.tile.strip_steps, steps - step);
  const bool active = place.channel < block.channels && place.col < block.cols && my_steps > 0;

  float w[kR][kR], bias = 0;
  if (active) {
    const int channel = block.channel + place.channel;
#pragma unroll
    for (int i = 0; i < kR * kR; ++i) {
      w[i / kR][i % kR] = widen(load(call.w + int64_t{channel} * (kR * kR) + (call.flip ? kR * kR - 1 - i : i)));
    }
    if (call.bias) bias = widen(load(call.bias + channel));
  }

  Slab<const T> x = {call.x + block.image * call.x_n + block.channel * call.x_c + first * call.x_h +
                         window.row * call.x_row + window.col,
                     call.x_c,
                     call.x_row,
                     block.channels,
                     window.rows,
                     window.cols};
  Slab<T> y = {call.y + (int64_t{block.image} * call.C + block.channel) * call.y_c + int64_t{block.residue} * call.Q +
                   block.step * call.y_row + block.col,
               call.y_c,
               call.y_row,
               block.channels,
               steps,
               block.cols};
  const int my_x = place.channel * layout.x.plane + (kStride * step - window.above) * layout.x.row - window.col;
  const int my_y = place.channel * layout.y.plane + step * layout.y.row + place.col;

  for (int image = block.image; image < block.images_end; ++image) {
    if (threadIdx.x == 0) shared[kZero] = 0;
    const int x_at = place_of(window, layout.x, x.first);
    T* const y_tile = shared_memory<T>() + layout.y_at + misalignment(y.first);
    stage_zeros(shared + x_at, layout.x, block.channels, window);
    if (call.on_load.center || call.on_load.relu) {
      stage_through(x, shared + x_at, layout.x,
                    [&](int plane) { return affine_of(call.on_load, block.channel + plane); });
    } else {
      stage_widened(x, shared + x_at, layout.x);
    }
    copies_done();
    __syncthreads();

    if (active) {
      Taps<kR> taps(x_at + my_x, layout.x.row, left + kStride * place.col, call.dilation_w, call.W);
      T* y_row = y_tile + my_y;
      float sums[kOpen + 1];  // of the output rows that are open, the oldest first, and the one that begins
#pragma unroll
      for (float& sum : sums) sum = bias;
      // Multiplies the next row, which is tap row kTap of the oldest open row, tap row kTap - kStride of the next, ...
      const auto multiply = [&](auto tap) {
        float pixels[kR];
        taps.next_row(shared, pixels);
#pragma unroll
        for (int t = 0; t < kR; ++t) {
#pragma unroll
          for (int k = 0, r = tap.value; r >= 0; ++k, r -= kStride) sums[k] += pixels[t] * w[r][t];
        }
      };
      // The last row of the oldest; the next one becomes the oldest.
      const auto finish = [&] {
        multiply(std::integral_constant<int, kR - 1>{});
        const float sum = sums[0];
#pragma unroll
        for (int k = 0; k < kOpen; ++k) sums[k] = sums[k + 1];
        sums[kOpen] = bias;
        return sum;
      };
      const auto make_step = [&] {
        if constexpr (kStride == 2) multiply(std::integral_constant<int, kR - 2>{});
        return finish();
      };
      finish();
#pragma unroll 1
      for (int i = 1; i < kOpen; ++i) make_step();
      for (int i = 0; i < my_steps; ++i) {
        *y_row = narrow<T>(make_step());
        y_row += layout.y.row;
      }
    }
    __syncthreads();
    store_slab(y, y_tile, layout.y);
    x.first += call.x_n;
    y.first += call.C * call.y_c;
  }
}

// Fills in a call; what it returns is why it cannot.
template <class T>
std::string plan_fprop(const DepthwiseArgs& args, const Device& device, Fprop<T>* call) {
  if (std::string reason = why_not_specialised(args); !reason.empty()) return reason;
  const ConvShape& s = args.shape;
  const bool dgrad = args.pass == Pass::kDgrad;
  if (args.pass != Pass::kFprop && !(dgrad && s.stride_h == 1)) return "makes fprop, and dgrad with stride 1";
  const TensorRef& x = dgrad ? args.dy : args.x;
  *call = {};
  call->x = static_cast<const T*>(x.data), call->x_n = x.n, call->x_c = x.c, call->x_h = x.h;
  call->w = static_cast<const T*>(args.w);
  call->C = s.C, call->H = s.H, call->W = s.W, call->P = s.P(), call->Q = s.Q();
  call->pad_top = s.pad_top, call->pad_left = s.pad_left;
  call->dilation_h = Divider(s.dilation_h), call->dilation_w = s.dilation_w;
  if (dgrad) {
    call->y = static_cast<T*>(args.dx);
    call->flip = true;
    std::swap(call->H, call->P), std::swap(call->W, call->Q);
    call->pad_top = s.dilation_h * (s.R - 1) - s.pad_top, call->pad_left = s.dilation_w * (s.R - 1) - s.pad_left;
  } else {
    call->y = static_cast<T*>(args.y);
    call->bias = static_cast<const T*>(args.bias);
    call->on_load = args.on_load;
  }
  call->x_row = int64_t{s.dilation_h} * x.h;
  call->y_c = int64_t{call->P} * call->Q, call->y_row = int64_t{s.dilation_h} * call->Q;

  const Problem problem{s.N,
                        s.C,
                        std::min(s.dilation_h, call->P),
                        ceil_div(call->P, s.dilation_h),
                        call->Q,
                        s.stride_h,
                        s.R - s.stride_h};
  const auto lay_out = [&](const Tile& t) {
    const int64_t steps = std::min(t.steps, problem.steps), rows = s.stride_h * (steps - 1) + s.R;
    const int64_t width = int64_t{s.stride_w} * (t.cols - 1) + int64_t{s.dilation_w} * (s.R - 1) + 1;
    FpropLayout& l = call->layout;
    l.all_cols = t.tiles == 1 && call->x_row == call->W && call->W <= 2 * width;
    l.x = pitch_for<T, float>(rows, l.all_cols ? call->W : std::min<int64_t>(width, call->W), call->x_row, x.c,
                              t.strips * t.cols);
    l.y = pitch_for<T, T>(steps, t.cols, call->y_row, call->y_c, -1);
    const int64_t y_at = window_bytes<T>(l.x, t.channels);
    l.y_at = static_cast<int32_t>(y_at / sizeof(T));
    return y_at + tile_bytes<T>(l.y, t.channels);
  };
  if (!make_cut(problem, device, lay_out, &call->cut)) return "its tiles do not fit into shared memory";
  call->shared_bytes = lay_out(call->cut.tile);
  return "";
}

template <class T>
cudaError_t run_fprop(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  Fprop<T> call;
  if (!plan_fprop(args, device, &call).empty()) return cudaErrorInvalidValue;
  if (call.cut.blocks == 0) return cudaSuccess;
  return with_filter(args.shape, [&](auto r, auto stride) {
    return launch(depthwise_fprop_nchw_kernel<T, r.value, stride.value>, dim3(static_cast<unsigned>(call.cut.blocks)),
                  dim3(call.cut.tile.threads()), call.shared_bytes, stream, call);
  });
}

}  // namespace xsep::cuda::nchw

namespace xsep::cuda {

template <class T>
Kernel depthwise_fprop_nchw() {
  return {"depthwise_fprop_nchw",
          [](const DepthwiseArgs& args, const Device& device) {
            nchw::Fprop<T> call;
            return nchw::plan_fprop(args, device, &call);
          },
          [](const DepthwiseArgs&, const Device&) { return int64_t{0}; }, nchw::run_fprop<T>};
}

}  // namespace xsep::cuda
