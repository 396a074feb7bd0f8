// fprop and dgrad for any filter, stride, dilation, padding, multiplier and alignment, in both layouts.
//
// A thread makes groups of kOutputs outputs of one channel, along the axis that slides (the one that costs fewest
// instructions): those of a group lie so far apart that they meet the same inputs, and for each tap of the other axis,
// an input that is loaded serves them all.  Its groups are a run, as long as leaves enough threads; what the taps meet
// is the same for all of them but for a shift, and found once.  A block of 128 threads takes some channels and some
// runs: its threads run along channels in NHWC and along columns in NCHW, whichever are neighbours in memory; small
// planes and images share a block.  The filters of its channels are in shared memory, widened and, for dgrad, flipped;
// above 24 KB in pieces, and then runs are of one group.
//
// dgrad gathers: the taps that an output meets, one in stride/gcd(stride, dilation), are an arithmetic progression: no
// division in the loop over taps.  Through a function on load it multiplies what it stores, and leaves the sums of
// dscale and dshift in the workspace.
//
// Bytes: the input once from DRAM, its re-reads, S * (R + kOutputs - 1) / kOutputs a value where R taps slide, from L1;
// the output once; the filters once a block, from L2.  Instructions limit it.
#pragma once

#include <numeric>
#include <utility>

#include "correlate.cuh"
#include "depthwise.h"
#include "reduce.cuh"

namespace xsep::cuda::generic {

constexpr int kConvThreads = 128;
// Blocks of a multiprocessor, at least: without it, ptxas spills for the sake of more.  That of CUDA 11.8 does
// so for the sake of four, from Maxwell to Volta.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 500 && __CUDA_ARCH__ < 750
constexpr int kConvBlocks = 3;
#else
constexpr int kConvBlocks = 4;
#endif
constexpr int kConvMaxGroups = 8;         // of a run
constexpr int kConvThreadsWanted = 2048;  // of a multiprocessor, before a run has more than one group
constexpr int kOutputs = 8;               // of a group
// Taps whose loads are in flight together, for filters that are short and long where they slide.
constexpr int kShortTaps = 3;
template <class T>
constexpr int kLongTaps = sizeof(T) == 8 ? kShortTaps : 8;  // doubles would not fit into the registers
constexpr int kFilterBytes = 24 * 1024;

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// One axis, as its outputs see it.
struct ConvAxis {
  int32_t in, out;  // extents
  Divider taps;
  int32_t stride, pad, dilation;
  int32_t gcd, inverse;       // of stride and dilation; of dilation/gcd modulo stride/gcd
  int32_t phases;             // progressions of taps that an output meets: fprop has several if stride > gcd
  Divider tap_step, in_step;  // of a progression
  int32_t spacing;            // of the outputs of a group
};

// The first tap, of the filter as it is in shared memory, that an output meets, and the input that it reads there.
struct Start {
  int tap, in;
};

template <bool kDgrad>
__device__ __forceinline__ Start start(const ConvAxis& a, int output) {
  if (!kDgrad) return {0, output * a.stride - a.pad};
  const int h = output + a.pad, taps = a.taps.by;
  if (a.stride == 1) return {0, h - (taps - 1) * a.dilation};
  if (h % a.gcd != 0) return {taps, 0};
  const int lowest = static_cast<int>(int64_t{h / a.gcd} * a.inverse % a.tap_step.by);
  if (lowest >= taps) return {taps, 0};
  const int highest = lowest + (taps - 1 - lowest) / a.tap_step * a.tap_step.by;
  return {taps - 1 - highest, (h - highest * a.dilation) / a.stride};
}

template <class T>
struct ConvParams {
  using A = accumulate_t<T>;

  Pixels<const T> in, x;  // x: of dgrad through a function on load
  Pixels<T> out;
  Functions<A> function;
  const T *w, *bias;
  A* sums;  // [strips][2][channels], or null

  int32_t N, channels;  // of the output
  int32_t filters;      // dgrad: of an output, channels c * filters ... of the input
  Divider multiplier;   // fprop: of an input, channels c * multiplier ... of the output
  int64_t w_slide, w_cross;
  ConvAxis slide, cross;
  int32_t filter_lines;             // of a channel, slide.taps each: filters * cross.taps
  Divider piece_lines, piece_taps;  // in shared memory at a time
  int32_t pitch;                    // between taps there: odd, so that lanes store into different banks

  bool slide_rows, whole_vectors;   // whole_vectors: the outputs of a group are aligned neighbours in memory
  Groups runs;                      // of outputs
  int32_t run_groups, group_shift;  // groups of a run, and how many inputs of the window lie between two of them
  Positions positions;              // runs x outputs of the other axis
  int32_t lanes, lines;             // channels and positions of a block
  Split threads, blocks;
};

// The piece of the filters that begins at a line and a tap: [piece_lines][piece_taps][pitch].
template <bool kDgrad, class T>
__device__ __forceinline__ void stage_filters(const ConvParams<T>& p, int first_channel, int first_line, int first_tap,
                                              accumulate_t<T>* filters) {
  const int count = p.lanes * p.piece_lines.by * p.piece_taps.by;
  for (int i = threadIdx.x; i < count; i += kConvThreads) {
    int lane = i, line, tap;  // neighbouring threads read neighbours in memory
    if (p.slide_rows) {
      line = take(lane, p.piece_lines), tap = take(lane, p.piece_taps);
    } else {
      tap = take(lane, p.piece_taps), line = take(lane, p.piece_lines);
    }
    accumulate_t<T>* const to = filters + (line * p.piece_taps.by + tap) * p.pitch + lane;
    line += first_line, tap += first_tap;
    const int channel = first_channel + lane;
    if (channel >= p.channels || line >= p.filter_lines || tap >= p.slide.taps.by) continue;
    const int m = line / p.cross.taps;
    int cross_tap = line - m * p.cross.taps.by;
    if (kDgrad) tap = p.slide.taps.by - 1 - tap, cross_tap = p.cross.taps.by - 1 - cross_tap;
    const int64_t filter = int64_t{channel} * p.filters + m, taps = int64_t{p.slide.taps.by} * p.cross.taps.by;
    *to = widen(load(p.w + filter * taps + tap * p.w_slide + cross_tap * p.w_cross));
  }
}

template <class T, int kTaps, bool kDgrad>
__global__ void __launch_bounds__(kConvThreads, kConvBlocks) depthwise_generic_conv_kernel(ConvParams<T> p) {
  using A = accumulate_t<T>;
  A* const filters = shared_memory<A>();

  const auto [channel_block, strip] = p.blocks(blockIdx.x);
  const auto [lane, line] = p.threads(threadIdx.x);
  const Position at = p.positions.after(p.positions.at(int64_t{strip} * p.lines), line);
  const int channel = channel_block * p.lanes + lane;
  const int first_out = p.runs.first(p.slide_rows ? at.row : at.col), out_cross = p.slide_rows ? at.col : at.row;
  const bool works = lane < p.lanes && line < p.lines && channel < p.channels && at.n < p.N && first_out < p.slide.out;

  Start slide{}, cross{};
  Function<A> function;
  A bias = 0, totals[2] = {};
  if (works) {
    slide = start<kDgrad>(p.slide, first_out), cross = start<kDgrad>(p.cross, out_cross);
    function = p.function.of(kDgrad ? channel : channel / p.multiplier);
    if (p.bias) bias = widen(load(p.bias + channel));
  }
  // What the outputs of the first group meet; those of the others meet the same, shifted.
  const Range all_taps = inside(slide.tap, p.slide.tap_step, p.slide.taps.by);
  const Range all_inputs = inside(slide.in, p.slide.in_step, p.slide.in);
  const Range cross_inputs = inside(cross.in, p.cross.in_step, p.cross.in);
  const Range all_cross = common(inside(cross.tap, p.cross.tap_step, p.cross.taps.by), cross_inputs);
  const bool in_pieces = p.piece_lines.by < p.filter_lines || p.piece_taps.by < p.slide.taps.by;

  const int64_t in_step = p.slide.in_step.by * p.in.slide, in_cross_step = p.cross.in_step.by * p.in.cross;
  const int64_t out_step = p.runs.spacing.by * p.out.slide, x_step = p.runs.spacing.by * p.x.slide;
  const T* in = p.in.at(at.n, kDgrad ? int64_t{channel} * p.filters : channel / p.multiplier, slide.in, cross.in);
  const T* x = p.x.at(at.n, channel, first_out, out_cross);
  T* out = p.out.at(at.n, channel, first_out, out_cross);

  for (int group = 0; group < p.run_groups; ++group) {
    const int shift = group * p.group_shift;
    const int outputs = works ? p.runs.members(first_out + p.runs.spacing.by * shift) : 0;
    A sums[kOutputs];
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) sums[j] = bias;

    for (int line0 = 0; line0 < p.filter_lines; line0 += p.piece_lines.by) {
      for (int tap0 = 0; tap0 < p.slide.taps.by; tap0 += p.piece_taps.by) {
        if (group == 0 || in_pieces) {
          __syncthreads();
          stage_filters<kDgrad>(p, channel_block * p.lanes, line0, tap0, filters);
          __syncthreads();
        }
        if (outputs == 0) continue;
        const int line1 = smaller(line0 + p.piece_lines.by, p.filter_lines);
        for (int phase = 0; phase < (kDgrad ? 1 : p.slide.phases); ++phase) {
          const int tap = slide.tap + phase - tap0;
          Range taps = all_taps, existing = all_inputs;
          if (in_pieces || phase > 0) {
            taps = inside(tap, p.slide.tap_step, smaller(p.piece_taps.by, p.slide.taps.by - tap0));
            existing = inside(slide.in + phase * p.slide.dilation, p.slide.in_step, p.slide.in);
          }
          existing = {existing.lo - shift, existing.hi - shift};
          const Range range = common(taps, {existing.lo - (kOutputs - 1), existing.hi});
          if (range.lo >= range.hi) continue;
          for (int m = line0 / p.cross.taps; m * p.cross.taps.by < line1; ++m) {
            const int m_line = m * p.cross.taps.by - line0;  // in the piece
            Range across = all_cross;
            if (in_pieces) {
              const int low = larger(-m_line, 0), high = smaller(line1 - line0 - m_line, p.cross.taps.by);
              across = common(inside(cross.tap - low, p.cross.tap_step, high - low), cross_inputs);
            }
            const T* next = in + m * p.in.c + phase * p.slide.dilation * p.in.slide + (shift + range.lo) * in_step +
                            across.lo * in_cross_step;
            const int first_line = m_line + cross.tap + across.lo * p.cross.tap_step.by;
            const A* filter =
                filters + (first_line * p.piece_taps.by + tap + range.lo * p.slide.tap_step.by) * p.pitch + lane;
            for (int i = across.lo; i < across.hi; ++i) {
              correlate<kTaps>(range, FixedShared<A>{filter, p.slide.tap_step.by * p.pitch},
                               Moving<T>{next, in_step, existing, kDgrad ? Function<A>{} : function}, sums);
              next += in_cross_step;
              filter += p.cross.tap_step.by * p.piece_taps.by * p.pitch;
            }
          }
        }
      }
    }

    if (kDgrad && p.function.any) {
      const T* next = x + shift * x_step;
#pragma unroll
      for (int j = 0; j < kOutputs; ++j, next += x_step) {
        if (j >= outputs) break;
        const A value = widen(load(next));
        if (function.relu && function.before_relu(value) <= 0) sums[j] = 0;
        totals[0] += sums[j] * (value - function.center);
        totals[1] += sums[j];
        sums[j] *= function.scale;
      }
    }
    T* next = out + shift * out_step;
    if (p.whole_vectors && outputs == kOutputs) {
#pragma unroll
      for (int j = 0; j < kOutputs; j += kVector<T>) {
        Vec<T, kVector<T>> vector;
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) vector.at[k] = narrow<T>(sums[j + k]);
        store(reinterpret_cast<Vec<T, kVector<T>>*>(next + j), vector);
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < kOutputs; ++j, next += out_step) {
      if (j >= outputs) break;
      store(next, narrow<T>(sums[j]));
    }
  }

  if (!kDgrad || !p.sums) return;
  add_positions(lane < p.lanes ? line : p.lines, p.lines, p.threads.channels_inner ? p.lanes : 1, filters, totals);
  if (lane >= p.lanes || channel >= p.channels || line != 0) return;
  A* const sums = p.sums + int64_t{strip} * 2 * p.channels + channel;
  store(sums, totals[0]);
  store(sums + p.channels, totals[1]);
}

// The inverse of a modulo n, which have no common divisor.
inline int32_t inverse(int64_t a, int64_t n) {
  int64_t r0 = n, r1 = a % n, t0 = 0, t1 = 1;
  while (r1 != 0) {
    const int64_t q = r0 / r1;
    r0 = std::exchange(r1, r0 - q * r1);
    t0 = std::exchange(t1, t0 - q * t1);
  }
  return static_cast<int32_t>((t0 + n) % n);
}

// x and y are the extents of the tensors.
inline ConvAxis conv_axis(bool dgrad, bool slides, int x, int y, int taps, int stride, int pad, int dilation) {
  if (y == 1) stride = 1;  // of no importance: keep them small
  if (taps == 1) dilation = 1;
  const int gcd = std::gcd(stride, dilation);
  const int64_t lcm = std::min<int64_t>(int64_t{stride} * (dilation / gcd), INT32_MAX);
  ConvAxis a{};
  a.in = dgrad ? y : x, a.out = dgrad ? x : y;
  a.taps = Divider(taps), a.stride = stride, a.pad = pad, a.dilation = dilation, a.gcd = gcd;
  a.inverse = inverse(dilation / gcd, stride / gcd);
  a.phases = slides && !dgrad ? std::min(stride / gcd, taps) : 1;
  a.tap_step = Divider(slides || dgrad ? stride / gcd : 1);
  a.in_step = Divider(dgrad ? dilation / gcd : slides ? static_cast<int32_t>(lcm) : dilation);
  a.spacing = std::min(dgrad ? static_cast<int32_t>(lcm) : dilation / gcd, a.out);
  return a;
}

template <class T>
struct ConvPlan {
  ConvParams<T> params;
  int64_t strips, blocks;
  size_t shared_bytes;
  double cost;  // instructions of all threads, or of as many as occupy the device
  void (*kernel)(ConvParams<T>);
};

template <class T, int kTaps>
ConvPlan<T> conv_plan(const DepthwiseArgs& args, const Device& device, bool slide_rows) {
  using A = accumulate_t<T>;
  const ConvShape& s = args.shape;
  const bool dgrad = args.pass != Pass::kFprop, nhwc = args.nhwc;
  ConvPlan<T> plan{};
  ConvParams<T>& p = plan.params;
  const ConvAxis rows = conv_axis(dgrad, slide_rows, s.H, s.P(), s.R, s.stride_h, s.pad_top, s.dilation_h);
  const ConvAxis cols = conv_axis(dgrad, !slide_rows, s.W, s.Q(), s.S, s.stride_w, s.pad_left, s.dilation_w);
  p.slide_rows = slide_rows;
  p.slide = slide_rows ? rows : cols, p.cross = slide_rows ? cols : rows;
  p.w_slide = slide_rows ? s.S : 1, p.w_cross = slide_rows ? 1 : s.S;
  p.in = pixels<T>(dgrad ? args.dy : args.x, slide_rows);
  p.x = pixels<T>(args.x, slide_rows);
  p.out = dgrad ? pixels<T>(args.dx, nhwc, s.C, s.H, s.W, slide_rows)
                : pixels<T>(args.y, nhwc, s.K(), s.P(), s.Q(), slide_rows);
  p.w = static_cast<const T*>(args.w);
  if (!dgrad) p.bias = static_cast<const T*>(args.bias);
  if (args.pass != Pass::kDgrad) p.function = functions<A>(args.on_load);
  if (args.dscale || args.dshift) p.sums = static_cast<A*>(args.workspace);
  p.N = s.N, p.channels = dgrad ? s.C : s.K();
  p.filters = dgrad ? s.M : 1, p.multiplier = Divider(s.M);
  p.filter_lines = p.filters * p.cross.taps.by;

  // Runs are of one group unless there are threads enough and the filters stay in shared memory.  In NCHW, where
  // columns slide, the groups of a run lie far apart, so that those of neighbouring lanes are neighbours.
  const int64_t rounds = ceil_div(p.slide.out, int64_t{p.slide.spacing} * kOutputs);  // of `spacing` groups
  const int64_t lines_of_runs = int64_t{s.N} * p.slide.spacing * p.cross.out;
  const int64_t groups_of_call = lines_of_runs * rounds * p.channels;
  const auto tile = [&](int64_t run_rounds) {
    return Tile(nhwc, p.channels, lines_of_runs * ceil_div(rounds, run_rounds), kConvThreads);
  };
  const int room = kFilterBytes / static_cast<int>(sizeof(A));
  int64_t of_run = 1;
  if (p.filter_lines * int64_t{p.slide.taps.by} * (tile(1).channels | 1) <= room) {
    of_run = std::clamp<int64_t>(groups_of_call / (int64_t{kConvThreadsWanted} * device.multiprocessors), 1,
                                 std::min<int64_t>(kConvMaxGroups, rounds));
  }
  const int64_t runs = ceil_div(rounds, of_run);  // times spacing
  p.run_groups = static_cast<int32_t>(ceil_div(rounds, runs));
  const bool apart = !nhwc && !slide_rows;
  p.group_shift = static_cast<int32_t>(apart ? runs * kOutputs : kOutputs);
  p.runs = {p.slide.out, apart ? kOutputs : kOutputs * p.run_groups, Divider(p.slide.spacing),
            static_cast<int32_t>(runs * p.slide.spacing)};
  p.positions = {Divider(slide_rows ? p.runs.count : p.cross.out), Divider(slide_rows ? p.cross.out : p.runs.count)};

  const Tile of_block = tile(of_run);
  p.lanes = of_block.channels, p.lines = of_block.positions;
  p.threads = split(nhwc, p.lanes, p.lines);
  p.whole_vectors = apart && p.slide.spacing == 1 && p.out.n % kVector<T> == 0 && p.out.c % kVector<T> == 0 &&
                    p.out.cross % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p.out.data) % 16 == 0;
  const int64_t channel_blocks = ceil_div(p.channels, p.lanes);
  const int64_t positions = int64_t{s.N} * p.runs.count * p.cross.out;
  plan.strips = ceil_div(positions, p.lines);
  plan.blocks = channel_blocks * plan.strips;
  p.blocks = split(nhwc, static_cast<int32_t>(channel_blocks),
                   static_cast<int32_t>(std::clamp<int64_t>(plan.strips, 1, INT32_MAX)));

  const int taps = p.slide.taps.by;
  p.pitch = p.lanes | 1;
  p.piece_taps = Divider(std::min(taps, room / p.pitch));
  p.piece_lines = Divider(std::clamp(room / p.pitch / taps, 1, p.filter_lines));
  plan.shared_bytes = sizeof(A) * std::max(p.piece_lines.by * p.piece_taps.by * p.pitch, 2 * kConvThreads);

  // Instructions, as in the code for sm_80.
  const double taps_met = ceil_div(taps, p.slide.tap_step.by), blocks = ceil_div(taps_met, kTaps);
  const double lines = p.filters * double(ceil_div(p.cross.taps.by, p.cross.tap_step.by)) * p.slide.phases;
  const double load = apart ? 10 : 4;  // lanes that are not neighbours in memory
  const double of_group =
      150 + lines * (40 + load * (blocks * kTaps + kOutputs - 1) + 30 * blocks + (kOutputs + 2) * taps_met);
  plan.cost = (200 / p.run_groups + of_group) * std::max(double(groups_of_call), 512.0 * device.multiprocessors);
  plan.kernel = dgrad ? depthwise_generic_conv_kernel<T, kTaps, true> : depthwise_generic_conv_kernel<T, kTaps, false>;
  return plan;
}

template <class T>
ConvPlan<T> conv_plan(const DepthwiseArgs& args, const Device& device) {
  ConvPlan<T> best = conv_plan<T, kShortTaps>(args, device, true);
  for (const ConvPlan<T>& other :
       {conv_plan<T, kShortTaps>(args, device, false), conv_plan<T, kLongTaps<T>>(args, device, true),
        conv_plan<T, kLongTaps<T>>(args, device, false)}) {
    if (other.cost < best.cost) best = other;
  }
  return best;
}

// Of dscale and dshift, before they are added.
template <class T>
Reduction<T> conv_reduction(const DepthwiseArgs& args, const ConvPlan<T>& plan) {
  using A = accumulate_t<T>;
  Reduction<T> r;
  r.partials = plan.params.sums, r.parts = plan.strips;
  r.channels = plan.params.channels, r.sums = 2, r.channels_last = true;
  r.dscale = static_cast<A*>(args.dscale), r.dshift = static_cast<A*>(args.dshift);
  return r;
}

template <class T>
cudaError_t conv(const DepthwiseArgs& args, const Device& device, cudaStream_t stream) {
  const ConvPlan<T> plan = conv_plan<T>(args, device);
  if (plan.blocks > 0) {
    const cudaError_t error = launch(plan.kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(kConvThreads),
                                     plan.shared_bytes, stream, plan.params);
    if (error != cudaSuccess) return error;
  }
  if (!args.dscale && !args.dshift) return cudaSuccess;
  return reduce_partials(conv_reduction(args, plan), stream);
}

}  // namespace xsep::cuda::generic
