// What the NCHW kernels share: how a call is cut into blocks, and how a block moves rows between global and shared
// memory.
//
// A block takes a band of rows of one plane, or whole small planes of several channels, of one image after another.
// Rows that follow each other in a dense plane are one stretch of memory, whatever their width, and so is a band.  Of a
// stretch the aligned middle moves in vectors of 16 bytes, its ends element by element.  Shared memory keeps the
// misalignment: the first element lies as far beyond a boundary of 16 bytes as it does in global memory, and rows and
// planes lie apart by numbers congruent to the tensor's strides, so that both sides of every vector are aligned.  Rows
// of slices, of tiles of wide images and of dilated calls are a stretch each.
//
// A thread owns one column of a strip of the band and slides down its rows.  Neighbouring threads read neighbouring
// columns, hence different banks; where a warp spans several planes, these lie `strips * cols` apart modulo the 32
// banks, up to the congruence, so that a bank is seldom met more than twice.
//
// With a dilation d, the rows of one residue modulo d are an image that is not dilated; a block has rows of one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "depthwise.h"
#include "device.h"
#include "divider.cuh"

namespace xsep::cuda::nchw {

constexpr int kMaxThreads = 256;

// The threads for whose registers a kernel is compiled: as many as named, or fewer where the compiler would spill for
// them.  That of CUDA 11.8 has the same instructions in more registers from Kepler, whose multiprocessors have twice as
// many, to Volta.
__host__ __device__ constexpr int resident(int threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
  return threads < kMaxThreads ? threads : kMaxThreads;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return threads < 640 ? threads : 640;
#else
  return threads;
#endif
}

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__host__ __device__ constexpr int clamp(int n, int lo, int hi) { return smaller(larger(n, lo), hi); }
__host__ __device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
__host__ __device__ constexpr int ceil_div(int n, int by) { return (n + by - 1) / by; }

// What a call consists of.  A thread makes one step after another down its column; in each, `stride` rows arrive.
struct Problem {
  int32_t images, channels;
  int32_t residues;     // of rows, modulo the dilation
  int32_t steps, cols;  // down the rows of a residue; columns of threads
  int32_t stride;
  int32_t halo;                // rows that a strip needs beyond those of its steps
  double images_per_part = 0;  // partial sums of more blocks than that allows are too many
};

// What a block takes of an image, and how many blocks there are.
struct Tile {
  int32_t channels, strips, cols;  // a thread for each
  int32_t strip_steps, steps;      // of a strip, and of all strips of a plane
  int32_t groups, bands, tiles;    // of channels, steps and columns

  __host__ __device__ int used() const { return channels * strips * cols; }
  __host__ __device__ int threads() const { return round_up(used(), 32); }
};

struct Cut {
  Tile tile;
  int32_t images, slice;  // of the call, and of a block
  int32_t parts;          // blocks that share a channel
  int64_t blocks;
  Divider tiles, bands, residues, groups, cols, strips;
};

// The cheapest cut whose blocks have the shared memory they need; false if there is none.  A block costs its threads
// times their steps: those that give results, those that fill the sums, some for what is done once, and the part of the
// halo that is staged.  A multiprocessor with fewer than 512 threads is not faster for it.
template <class SharedBytes>
bool make_cut(const Problem& p, const Device& device, const SharedBytes& shared_bytes, Cut* result) {
  constexpr int kBudget = 40 * 1024, kBlocksThatFit = 4, kOnce = 8, kBusy = 512, kBlocksToFill = 8;
  const int cols = ceil_div(p.cols, ceil_div(p.cols, kMaxThreads)), tiles = ceil_div(p.cols, cols);
  const double halo = static_cast<double>(p.halo) / p.stride;
  double lowest = INFINITY;
  Tile best{};
  for (const int limit : {std::min(kBudget, device.shared_bytes / kBlocksThatFit), device.shared_bytes}) {
    for (int threads = kMaxThreads, units = 0; threads >= 128; threads -= 32) {
      if (threads < cols || threads / cols == units) continue;
      units = threads / cols;
      for (const int length : {64, 48, 32, 24, 16, 12, 8, 6, 5, 4, 3, 2, 1}) {
        Tile t{};
        t.strips = std::min(ceil_div(p.steps, length), units);
        t.channels = std::min(p.channels, units / t.strips);
        t.cols = cols;
        t.strip_steps = ceil_div(p.steps, ceil_div(p.steps, length * t.strips) * t.strips);
        t.steps = t.strips * t.strip_steps;
        t.groups = ceil_div(p.channels, t.channels);
        t.bands = ceil_div(p.steps, t.steps);
        t.tiles = tiles;
        const double blocks = static_cast<double>(p.images) * t.groups * p.residues * t.bands * tiles;
        const double load = std::max<double>(kBusy, std::ceil(blocks / device.multiprocessors) * t.threads());
        const double cost = load * (t.strip_steps * (1 + halo / t.steps) + halo + kOnce);
        if (cost < lowest && shared_bytes(t) <= limit) lowest = cost, best = t;
      }
    }
    if (lowest < INFINITY) break;
  }
  const double a_image = static_cast<double>(best.groups) * p.residues * best.bands * tiles;  // blocks
  const double all = a_image * p.images;
  const double slice =
      std::max(all / (kBlocksToFill * device.multiprocessors),
               std::min(p.images_per_part * a_image / best.groups, all / (2 * device.multiprocessors)));
  const int images = static_cast<int>(std::clamp<double>(slice, 1, std::max(1, p.images)));
  const int64_t parts = int64_t{ceil_div(p.images, images)} * p.residues * best.bands * tiles;
  if (lowest == INFINITY || parts * best.groups > INT32_MAX) return false;
  *result = {best,
             p.images,
             images,
             static_cast<int32_t>(parts),
             parts * best.groups,
             Divider(tiles),
             Divider(best.bands),
             Divider(p.residues),
             Divider(best.groups),
             Divider(cols),
             Divider(best.strips)};
  return true;
}

// What the number of a block means.
struct Block {
  int part, image, images_end, channel, channels, residue, step, col, cols;
};

__device__ __forceinline__ Block this_block(const Cut& cut, int channels, int cols) {
  Block b;
  int i = blockIdx.x;
  const int tile = take(i, cut.tiles), band = take(i, cut.bands), residue = take(i, cut.residues);
  const int group = take(i, cut.groups);
  b.part = ((i * cut.residues.by + residue) * cut.bands.by + band) * cut.tiles.by + tile;
  b.image = i * cut.slice;
  b.images_end = smaller(cut.images - b.image, cut.slice) + b.image;
  b.channel = group * cut.tile.channels;
  b.channels = smaller(cut.tile.channels, channels - b.channel);
  b.residue = residue;
  b.step = band * cut.tile.steps;
  b.col = tile * cut.tile.cols;
  b.cols = smaller(cut.tile.cols, cols - b.col);
  return b;
}

// What the number of a thread means.  Beyond the tile's channels there are idle ones.
struct Place {
  int channel, strip, col;
};

__device__ __forceinline__ Place this_thread(const Cut& cut) {
  Place p;
  int i = threadIdx.x;
  p.col = take(i, cut.cols);
  p.strip = take(i, cut.strips);
  p.channel = i;
  return p;
}

// Why a call is not one for these kernels; empty if it may be.
inline std::string why_not_specialised(const DepthwiseArgs& args) {
  const ConvShape& s = args.shape;
  const auto apart = [](const TensorRef& t, int width) { return t.data && width > 1 && t.w != 1; };
  if (args.nhwc) return "takes NCHW";
  if (s.R != s.S || (s.R != 3 && s.R != 5 && s.R != 7)) return "takes filters 3x3, 5x5 and 7x7";
  if (s.M != 1) return "takes a channel multiplier of 1";
  if (s.stride_h != s.stride_w || s.stride_h > 2) return "takes strides 1 and 2";
  if (s.stride_h == 2 && (s.dilation_h != 1 || s.dilation_w != 1)) return "takes dilation with stride 1";
  if (apart(args.x, s.W) || apart(args.dy, s.Q())) return "takes columns that follow each other in memory";
  return "";
}

// f(R, stride) as constants.
template <class F>
cudaError_t with_filter(const ConvShape& s, const F& f) {
  const auto with_stride = [&](auto r) {
    return s.stride_h == 1 ? f(r, std::integral_constant<int, 1>{}) : f(r, std::integral_constant<int, 2>{});
  };
  return s.R == 3   ? with_stride(std::integral_constant<int, 3>{})
         : s.R == 5 ? with_stride(std::integral_constant<int, 5>{})
                    : with_stride(std::integral_constant<int, 7>{});
}

// The first number from n on that is congruent to `to` modulo m.
inline int64_t congruent(int64_t n, int64_t to, int64_t m) { return n + ((to - n) % m + m) % m; }

// How far apart rows and planes lie in shared memory, in elements.
struct Pitch {
  int32_t row, plane;
};

// For a tile of `rows` x `cols` a plane of a tensor of T with these strides, kept as To.  Planes that threads read lie
// `apart` elements from each other modulo the banks; -1: no matter, one right after the other if strides allow it.
template <class T, class To>
Pitch pitch_for(int64_t rows, int64_t cols, int64_t row_stride, int64_t plane_stride, int apart) {
  const int64_t row = congruent(cols, row_stride, kVector<T>);
  const int64_t plane = apart < 0 ? rows * row : congruent(rows * row, apart, 128 / static_cast<int>(sizeof(To)));
  const auto narrow = [](int64_t n) { return static_cast<int32_t>(std::min<int64_t>(n, INT32_MAX)); };
  return {narrow(row), narrow(congruent(plane, plane_stride, kVector<T>))};
}

// Rows of planes in global memory; T is const for inputs.
template <class T>
struct Slab {
  T* first;
  int64_t plane, row;  // strides
  int planes, rows, cols;
};

// Elements from the last boundary of 16 bytes to p.
template <class T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kVector<T>);
}

// Elements of a stretch: its ragged ends, and the vectors between them.
template <class T>
struct Stretch {
  T* p;
  int at;  // in shared memory, after the slab's first element
  int plane;
  int lane, lanes;  // of the threads that share it
  int head, vectors, ragged;

  __device__ __forceinline__ int ragged_at(int i) const { return i < head ? i : i + vectors * kVector<T>; }
  __device__ __forceinline__ int vector_at(int i) const { return head + i * kVector<T>; }
};

// Calls f for each stretch that this thread has a share in.  A warp takes one, or the block where there is only one.
template <class T, class F>
__device__ __forceinline__ void for_stretches(const Slab<T>& slab, const Pitch& pitch, const F& f) {
  int planes = slab.planes, rows = slab.rows, cols = slab.cols;
  int64_t row_stride = slab.row;
  int row_pitch = pitch.row;
  const bool joined = row_stride == cols && row_pitch == cols;
  if (joined) {  // a plane is a stretch, and perhaps they all are
    cols *= rows, rows = planes, planes = 1;
    row_stride = slab.plane, row_pitch = pitch.plane;
    if (row_stride == cols && row_pitch == cols) cols *= rows, rows = 1;
  }
  const bool one = planes == 1 && rows == 1;
  Stretch<T> s;
  s.lanes = one ? blockDim.x : 32;
  s.lane = one ? threadIdx.x : threadIdx.x % 32;
#pragma unroll 1
  for (int plane = 0, row = one ? 0 : threadIdx.x / 32;; row += one ? 1 : blockDim.x / 32) {
#pragma unroll 1
    for (; row >= rows; row -= rows) {
      if (++plane >= planes) return;
    }
    s.p = slab.first + plane * slab.plane + row * row_stride;
    s.at = plane * pitch.plane + row * row_pitch;
    s.plane = joined ? row : plane;
    s.head = smaller(cols, -misalignment(s.p) & (kVector<T> - 1));
    s.vectors = (cols - s.head) / kVector<T>;
    s.ragged = cols - s.vectors * kVector<T>;
    f(s);
  }
}

// Copies a slab as it is; its elements are there after copies_done() and a barrier.  `to` is as misaligned as its
// first.
template <class T>
__device__ __forceinline__ void stage(const Slab<const T>& slab, T* to, const Pitch& pitch) {
  for_stretches(slab, pitch, [&](const Stretch<const T>& s) {
    T* const row = to + s.at;
    for (int i = s.lane; i < s.vectors; i += s.lanes) copy_async<16>(row + s.vector_at(i), s.p + s.vector_at(i));
    for (int i = s.lane; i < s.ragged; i += s.lanes) row[s.ragged_at(i)] = load(s.p + s.ragged_at(i));
  });
}

// What becomes of a channel's elements as they are loaded.
struct Affine {
  float center = 0, scale = 1, shift = 0;
  float floor = NAN;  // 0 with a ReLU; no number is less than or equal to NaN

  __device__ __forceinline__ float operator()(float x) const {
    const float u = scale * (x - center) + shift;
    return u <= floor ? floor : u;  // NaN stays
  }
};

__device__ __forceinline__ Affine affine_of(const OnLoad& on_load, int channel) {
  Affine f;
  if (on_load.center) {
    f.center = load(static_cast<const float*>(on_load.center) + channel);
    f.scale = load(static_cast<const float*>(on_load.scale) + channel);
    f.shift = load(static_cast<const float*>(on_load.shift) + channel);
  }
  if (on_load.relu) f.floor = 0;
  return f;
}

// Stages a slab as float, on its way through registers; function_of(plane) is applied to its elements.
template <class T, class FunctionOf>
__device__ __forceinline__ void stage_through(const Slab<const T>& slab, float* to, const Pitch& pitch,
                                              const FunctionOf& function_of) {
  constexpr int kInFlight = 4, kPerWord = 4 / sizeof(T);
  using Words = Vec<uint32_t, 4>;  // 16-bit numbers would take a register each
  for_stretches(slab, pitch, [&](const Stretch<const T>& s) {
    const auto f = function_of(s.plane);
    float* const row = to + s.at;
    for (int first = s.lane; first < s.vectors; first += kInFlight * s.lanes) {
      Words words[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int i = first + k * s.lanes;
        if (i < s.vectors) words[k] = load(reinterpret_cast<const Words*>(s.p + s.vector_at(i)));
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int i = first + k * s.lanes;
        if (i >= s.vectors) break;
#pragma unroll
        for (int q = 0; q < kPerWord; ++q) {
          T x[4];
          memcpy(x, &words[k].at[q * 4 / kPerWord], sizeof x);
          Vec<float, 4> u;
#pragma unroll
          for (int j = 0; j < 4; ++j) u.at[j] = f(widen(x[j]));
          *reinterpret_cast<Vec<float, 4>*>(row + s.vector_at(i) + 4 * q) = u;
        }
      }
    }
    for (int i = s.lane; i < s.ragged; i += s.lanes) row[s.ragged_at(i)] = f(widen(load(s.p + s.ragged_at(i))));
  });
}

// Stages a slab as float, as it is.
template <class T>
__device__ __forceinline__ void stage_widened(const Slab<const T>& slab, float* to, const Pitch& pitch) {
  if constexpr (std::is_same_v<T, float>) {
    stage(slab, to, pitch);
  } else {
    stage_through(slab, to, pitch, [](int) { return [](float x) { return x; }; });
  }
}

// What a block stages of a plane: some rows and columns, those that exist; rows above and below are zeros.
struct Window {
  int above, rows, below;
  int row, col, cols;  // the first that exist, and how many columns

  __device__ __forceinline__ Window(int top, int count, int height, int left, int right, int width, bool all_cols) {
    above = clamp(-top, 0, count);
    row = top + above;
    rows = clamp(height - row, 0, count - above);
    below = count - above - rows;
    col = all_cols ? 0 : clamp(left, 0, width);
    cols = (all_cols ? width : clamp(right, col, width)) - col;
  }
};

// Where a window's first element that exists goes, in floats: after a zero, the pixel of all columns outside the
// image, and the rows above.
constexpr int kZero = 0, kFirstFloat = 8;

template <class T>
__device__ __forceinline__ int place_of(const Window& window, const Pitch& pitch, const T* first) {
  return kFirstFloat + round_up(window.above * pitch.row, kVector<T>) + misalignment(first);
}

// Bytes of the zero and the windows of some planes; and of tiles of T that are stored, or staged as they are.
template <class T>
int64_t window_bytes(const Pitch& pitch, int64_t planes) {
  return (kFirstFloat + planes * pitch.plane + 2 * kVector<T> + 3) / 4 * 16;
}
template <class T>
int64_t tile_bytes(const Pitch& pitch, int64_t planes) {
  return (planes * pitch.plane / kVector<T> + 2) * 16;
}

// Rows of zeros before and after those that exist; `to` is where these begin.
__device__ __forceinline__ void stage_zeros(float* to, const Pitch& pitch, int planes, const Window& window) {
  const int above = window.above * pitch.row, count = above + window.below * pitch.row;
  const int lanes = planes == 1 ? blockDim.x : 32;
  for (int plane = threadIdx.x / lanes; plane < planes; plane += blockDim.x / lanes) {
    float* const row = to + plane * pitch.plane - above;
    for (int i = threadIdx.x % lanes; i < count; i += lanes) row[i < above ? i : i + window.rows * pitch.row] = 0;
  }
}

// The pixels of a row of the window that a thread needs; each tap column has its own address, which moves down with
// the rows, or stays at the zero.
template <int kTaps>
struct Taps {
  int at[kTaps], step[kTaps];

  // `origin` is where column 0 of the first row is.
  __device__ __forceinline__ Taps(int origin, int pitch, int col, int col_step, int width) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const bool inside = static_cast<unsigned>(col) < static_cast<unsigned>(width);
      at[t] = inside ? origin + col : kZero;
      step[t] = inside ? pitch : 0;
      col += col_step;
    }
  }
  __device__ __forceinline__ void next_row(const float* shared, float (&pixels)[kTaps]) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      pixels[t] = shared[at[t]];
      at[t] += step[t];
    }
  }
};

// Stores what shared memory has for a slab.
template <class T>
__device__ __forceinline__ void store_slab(const Slab<T>& slab, const T* from, const Pitch& pitch) {
  for_stretches(slab, pitch, [&](const Stretch<T>& s) {
    using V = Vec<T, kVector<T>>;
    const T* const row = from + s.at;
    for (int i = s.lane; i < s.vectors; i += s.lanes) {
      const V v = *reinterpret_cast<const V*>(row + s.vector_at(i));
      store(reinterpret_cast<V*>(s.p + s.vector_at(i)), v);
    }
    for (int i = s.lane; i < s.ragged; i += s.lanes) {
      const T v = row[s.ragged_at(i)];
      store(s.p + s.ragged_at(i), v);
    }
  });
}

}  // namespace xsep::cuda::nchw
