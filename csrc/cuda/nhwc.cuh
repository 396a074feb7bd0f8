// What the NHWC kernels share: who computes what, pixels, the filter, the function on load.
//
// An item is a strip of rows of a few columns of an image.  A thread takes one vector of channels of an item and slides
// down its rows.  A block takes `lanes` vectors, neighbours in memory, times some items, numbered columns first, then
// strips, then images: its threads read the pixels that they share from L1, and a small image idles no lane.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "depthwise.h"
#include "divider.cuh"

namespace xsep::cuda::nhwc {

// One axis dealt out to items.  An item owns up to `run` positions, `step` apart: with dilation these share inputs.
struct Axis {
  int32_t extent, step, run;
  int32_t longest;   // positions of one residue modulo step
  int32_t items;     // some may own nothing
  Divider residues;  // as far as they occur

  Axis() = default;
  Axis(int32_t extent, int32_t step, int32_t run)
      : extent(extent), step(step), run(run), longest((extent - 1) / step + 1), residues(std::min(step, extent)) {
    items = residues.by * ((longest - 1) / run + 1);
  }
};

// What an item owns of an axis.
struct Span {
  int first, count;
  int above;  // positions of the same residue before the first
};

__device__ __forceinline__ Span span(const Axis& axis, int item) {
  const int residue = take(item, axis.residues), above = item * axis.run;
  const int all = residue + (axis.longest - 1) * axis.step < axis.extent ? axis.longest : axis.longest - 1;
  const int left = all - above;
  return {residue + above * axis.step, left < 0 ? 0 : left < axis.run ? left : axis.run, above};
}

// Which blocks a call has, and what they take.  Runs of items fill a block each; block b takes the chunk b % chunks of
// the channels and the runs b / chunks, b / chunks + parts, ...
struct Grid {
  Axis rows, cols;
  int32_t items;                // of all images
  int32_t threads, lanes_log2;  // of a block
  int32_t runs, parts;
  Divider chunks, row_items, col_items;

  unsigned blocks() const { return static_cast<unsigned>(int64_t{parts} * chunks.by); }
};

constexpr int kThreads = 128;  // of a block, at most

// How a kernel wants its work cut.
struct Cut {
  int vector, cols;  // channels, columns of a thread
  int max_lanes;     // of a block
  int halo, setup;   // an item of n rows takes n + halo steps, and `setup` more to begin
  int resident;      // blocks that a multiprocessor holds
  bool one_wave;     // no more blocks than are resident: they keep sums
};

// At least 64 contiguous bytes of a pixel, and else as many columns as there may be, that their halo costs little.
template <class Tile>
constexpr int kMaxLanes = std::max<int>(16, 64 / (Tile::kV * sizeof(typename Tile::T)));

// For `rows` x `cols` positions of `images` images, at least one each.  Long strips have few halos, short ones keep all
// multiprocessors busy: the best length takes the fewest steps one after another.
inline Grid make_grid(const Cut& cut, const Device& device, int32_t channels, int32_t images, int32_t rows,
                      int32_t row_step, int32_t cols, int32_t col_step) {
  const int32_t vectors = channels / cut.vector, longest = (rows - 1) / row_step + 1;
  Grid grid{};
  grid.cols = Axis(cols, col_step, cut.cols);
  grid.col_items = Divider(grid.cols.items);
  grid.threads = kThreads;
  while ((1 << grid.lanes_log2) < std::min(vectors, cut.max_lanes)) ++grid.lanes_log2;
  grid.chunks = Divider(((vectors - 1) >> grid.lanes_log2) + 1);
  const int64_t resident = int64_t{device.multiprocessors} * cut.resident;
  const auto deal = [&] {
    const int32_t most = cut.one_wave ? std::max(static_cast<int32_t>(resident / grid.chunks.by), 1) : INT32_MAX;
    grid.runs = (grid.items - 1) / (grid.threads >> grid.lanes_log2) + 1;
    grid.parts = std::min(grid.runs, most);
  };
  const auto cut_rows = [&](int32_t strips) {
    grid.rows = Axis(rows, row_step, (longest - 1) / strips + 1);
    grid.row_items = Divider(grid.rows.items);
    grid.items = grid.cols.items * grid.rows.items * images;
    deal();
  };
  int64_t least = INT64_MAX;
  int32_t best = 1;
  for (int32_t strips = 1; strips <= longest; strips += strips / 4 + 1) {
    cut_rows(strips);
    const int64_t waves = (grid.blocks() + resident - 1) / resident, turns = (grid.runs - 1) / grid.parts + 1;
    const int64_t cost = waves * turns * (grid.rows.run + cut.halo + cut.setup);
    if (cost < least) least = cost, best = strips;
  }
  cut_rows(best);
  while (grid.blocks() < static_cast<unsigned>(device.multiprocessors) && grid.threads > 32) {
    grid.threads /= 2;
    deal();
  }
  return grid;
}

// What a thread takes of a block's channels.
struct Lane {
  int lanes, lane;             // vectors
  int first_channel, channel;  // the block's, the thread's
  int part, slot;              // of items
};

template <int kV>
__device__ __forceinline__ Lane this_lane(const Grid& grid) {
  Lane at;
  at.lanes = 1 << grid.lanes_log2;
  at.lane = threadIdx.x & (at.lanes - 1);
  at.slot = threadIdx.x >> grid.lanes_log2;
  at.part = blockIdx.x;
  at.first_channel = take(at.part, grid.chunks) * at.lanes * kV;
  at.channel = at.first_channel + at.lane * kV;
  return at;
}

struct Item {
  int image;
  Span rows, cols;
};

__device__ __forceinline__ Item item(const Grid& grid, int number) {
  const int col = take(number, grid.col_items), row = take(number, grid.row_items);
  return {number, span(grid.rows, row), span(grid.cols, col)};
}

// Distances between the pixels of a tensor, in bytes.
struct Pixels {
  int64_t image, row, col;
  int64_t next_row, next_col;  // of a thread

  template <class T>
  static Pixels of(int64_t image, int64_t row, int64_t col, int64_t row_step, int64_t col_step) {
    const int64_t size = sizeof(T);
    return {image * size, row * size, col * size, row_step * row * size, col_step * col * size};
  }
};

__device__ __forceinline__ int64_t offset(const Pixels& p, int image, int row, int col) {
  return image * p.image + row * p.row + col * p.col;
}

// A value that loops use, in a register of its own: the compiler would rather find it anew, from threadIdx on, in every
// turn.  All lanes of a warp must call it.
__device__ __forceinline__ int keep(int value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }

__device__ __forceinline__ bool below(int n, int end) { return static_cast<unsigned>(n) < static_cast<unsigned>(end); }

// A bit for each of kCount columns, `step` apart, that lies in [0, extent).
template <int kCount>
__device__ __forceinline__ int columns_inside(int first, int step, int extent) {
  int bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= below(first + i * step, extent) << i;
  return bits;
}

// A vector of channels of a pixel as it was loaded, in words: queues of 16-bit numbers would take twice the registers.
template <class T, int kV>
struct Pixel {
  static constexpr int kBytes = sizeof(T) * kV, kWords = (kBytes + 3) / 4;
  uint32_t word[kWords];

  __device__ __forceinline__ void load_if(bool inside, const char* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = 0;
    if (!inside) return;
    if constexpr (kBytes == 2) {
      word[0] = load(reinterpret_cast<const Vec<uint16_t, 1>*>(p)).at[0];
    } else {
      const auto words = load(reinterpret_cast<const Vec<uint32_t, kWords>*>(p));
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = words.at[i];
    }
  }
  __device__ __forceinline__ void widen_to(float (&values)[kV]) const {
    Vec<T, kV> vector;
    memcpy(&vector, word, kBytes);
#pragma unroll
    for (int v = 0; v < kV; ++v) values[v] = widen(vector.at[v]);
  }
};

// Pixels of a row: zeros where a bit of `inside` is not set.
template <class T, int kV, int kCount>
__device__ __forceinline__ void load_row(Pixel<T, kV> (&row)[kCount], int inside, const char* p, int64_t next_col) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) row[i].load_if(inside >> i & 1, p + i * next_col);
}

template <class T, int kV>
__device__ __forceinline__ void store_pixel(char* p, const float (&values)[kV]) {
  Vec<T, kV> vector;
#pragma unroll
  for (int v = 0; v < kV; ++v) vector.at[v] = narrow<T>(values[v]);
  store(reinterpret_cast<Vec<T, kV>*>(p), vector);
}

// The filters of `channels` channels of a block, as many as exist, in shared memory: [kR * kR][channels].
template <class T, int kR>
__device__ __forceinline__ void stage_filter(const T* w, int first, int channels, int end, bool flip, float* filter) {
  constexpr int kTaps = kR * kR;
  const int exist = end - first < channels ? end - first : channels;
  for (int i = threadIdx.x; i < exist * kTaps; i += blockDim.x) {
    const int channel = i / kTaps, tap = i - channel * kTaps;
    filter[(flip ? kTaps - 1 - tap : tap) * channels + channel] = widen(load(w + int64_t{first} * kTaps + i));
  }
}

template <int kTaps, int kV>
__device__ __forceinline__ void read_filter(const float* filter, const Lane& at, float (&w)[kTaps][kV]) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int v = 0; v < kV; ++v) w[tap][v] = filter[(tap * at.lanes + at.lane) * kV + v];
  }
}

// The function on load of a call, and of a thread's channels.
struct OnLoadVectors {
  const float *center, *scale, *shift;
  float floor;  // what is not above it is zero: 0 with relu, else NaN, which no number is compared to

  OnLoadVectors() : OnLoadVectors(OnLoad{}) {}
  explicit OnLoadVectors(const OnLoad& f)
      : center(static_cast<const float*>(f.center)),
        scale(static_cast<const float*>(f.scale)),
        shift(static_cast<const float*>(f.shift)),
        floor(f.relu ? 0.f : NAN) {}
};

template <int kV>
struct Affine {
  float center[kV], scale[kV], shift[kV], floor;

  __device__ __forceinline__ Affine(const OnLoadVectors& f, int channel) : floor(f.floor) {
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      center[v] = f.center ? load(f.center + channel + v) : 0.f;
      scale[v] = f.center ? load(f.scale + channel + v) : 1.f;
      shift[v] = f.center ? load(f.shift + channel + v) : 0.f;
    }
  }
  __device__ __forceinline__ float before_relu(float x, int v) const { return scale[v] * (x - center[v]) + shift[v]; }
  __device__ __forceinline__ bool passes(float value) const { return !(value <= floor); }
  __device__ __forceinline__ void apply(float (&x)[kV], bool inside) const {
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const float value = before_relu(x[v], v);
      x[v] = inside && passes(value) ? value : 0.f;
    }
  }
};

// Why no NHWC kernel takes a call; empty if one may.
inline std::string why_not(const DepthwiseArgs& args) {
  const ConvShape& s = args.shape;
  if (!args.nhwc) return "the layout is NCHW";
  if (s.R != s.S || (s.R != 3 && s.R != 5 && s.R != 7)) return "the filter is not 3x3, 5x5 or 7x7";
  if (s.stride_h != s.stride_w || s.stride_h > 2) return "the strides are not both 1 or both 2";
  if (s.M != 1) return "the channel multiplier is not 1";
  if (s.stride_h == 2 && (s.dilation_h != 1 || s.dilation_w != 1)) return "stride 2 with dilation";
  const int64_t rows = int64_t{s.H} + s.pad_top + s.pad_bottom + 16 * int64_t{s.dilation_h};
  const int64_t cols = int64_t{s.W} + s.pad_left + s.pad_right + 16 * int64_t{s.dilation_w};
  if (rows > INT32_MAX || cols > INT32_MAX || rows > INT32_MAX / std::max(s.N, 1) / cols) return "too many pixels";
  return "";
}

inline bool aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

template <class T>
std::string why_not(const TensorRef& t, const char* name, int vector) {
  if (t.c == 1 && aligned(t.data, vector * sizeof(T)) && t.n % vector == 0 && t.h % vector == 0 && t.w % vector == 0) {
    return "";
  }
  return std::string(name) + " is not aligned to vectors of " + std::to_string(vector) + " channels";
}

// Calls f with R and the stride as constants.
template <class F>
decltype(auto) with_filter(const ConvShape& s, F&& f) {
  const auto with_stride = [&](auto r) {
    return s.stride_h == 1 ? f(r, std::integral_constant<int, 1>{}) : f(r, std::integral_constant<int, 2>{});
  };
  if (s.R == 3) return with_stride(std::integral_constant<int, 3>{});
  if (s.R == 5) return with_stride(std::integral_constant<int, 5>{});
  return with_stride(std::integral_constant<int, 7>{});
}

}  // namespace xsep::cuda::nhwc
