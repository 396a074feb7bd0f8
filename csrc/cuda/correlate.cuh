// What the generic kernels share: how outputs and taps are grouped along an axis, and the one inner loop.
//
// Every pass is, along one axis of the image (`slide`; the other is `cross`), a correlation of two sequences
//
//   sums[j] += fixed(i) * moving(i + j)      0 <= j < kWindow
//
//            fixed (i)      moving            sums (j)      with stride s, dilation d and g = gcd(s, d)
//   fprop    filter taps    x                 outputs       taps s/g apart, outputs d/g apart, x in steps of s*d/g
//   dgrad    filter taps    dy                outputs       taps s/g apart, outputs s*d/g apart, dy in steps of d/g
//   wgrad    dy             x                 filter taps   dy d/g apart, taps s/g apart, x in steps of s*d/g
//
// because tap r of output p meets x at p*s + r*d - pad.  A thread holds the sums and a window of `moving` in registers,
// so that a value loaded once serves kWindow products, whatever stride and dilation are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../depthwise.h"
#include "device.h"
#include "divider.cuh"

namespace xsep::cuda::generic {

// [lo, hi), empty if lo >= hi.
struct Range {
  int lo, hi;
};

__device__ __forceinline__ Range common(Range a, Range b) { return {larger(a.lo, b.lo), smaller(a.hi, b.hi)}; }

// The i >= 0 with 0 <= first + i * step < extent.
__device__ __forceinline__ Range inside(int first, const Divider& step, int extent) {
  return {first < 0 ? (-first - 1) / step + 1 : 0, first < extent ? (extent - 1 - first) / step + 1 : 0};
}

// The numbers below `extent` in groups of `size`, whose members lie `spacing` apart.  The last groups may be short, or
// empty.
struct Groups {
  int32_t extent, size;
  Divider spacing;
  int32_t count;

  __device__ __forceinline__ int first(int group) const {
    const int residue = group - group / spacing * spacing.by;
    return (group - residue) * size + residue;
  }
  __device__ __forceinline__ int members(int first) const {
    return first < extent ? smaller(size, (extent - 1 - first) / spacing + 1) : 0;
  }
};

inline Groups groups(int extent, int64_t spacing, int size) {
  spacing = std::min<int64_t>(spacing, extent);
  const int64_t blocks = (extent + spacing * size - 1) / (spacing * size);
  return {extent, size, Divider(static_cast<int32_t>(spacing)), static_cast<int32_t>(spacing * blocks)};
}

// Positions of a batch of images of rows x cols of them, numbered with the columns fastest.
struct Position {
  int n, row, col;
};

struct Positions {
  Divider rows, cols;

  __device__ __forceinline__ Position at(int64_t i) const {
    const int64_t line = i <= INT32_MAX ? static_cast<int>(i) / cols : i / cols.by;
    const int n = static_cast<int>(line <= INT32_MAX ? static_cast<int>(line) / rows : line / rows.by);
    return {n, static_cast<int>(line - int64_t{n} * rows.by), static_cast<int>(i - line * cols.by)};
  }
  // `steps` after p.
  __device__ __forceinline__ Position after(Position p, int steps) const {
    int more = p.col + steps;
    p.col = take(more, cols);
    more += p.row;
    p.row = take(more, rows);
    p.n += more;
    return p;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many channels and positions a block takes at a time with `threads` threads: in NHWC channels first, up to 32 and
// whole sectors of them if there are many; in NCHW positions first.
struct Tile {
  Tile(bool nhwc, int32_t all_channels, int64_t all_positions, int threads) {
    if (nhwc) {
      const int64_t even = ceil_div(all_channels, ceil_div(all_channels, 32));
      channels = static_cast<int32_t>(even > 8 ? ceil_div(even, 8) * 8 : even);
      positions = static_cast<int32_t>(std::clamp<int64_t>(all_positions, 1, std::max(1, threads / channels)));
    } else {
      positions = static_cast<int32_t>(std::clamp<int64_t>(all_positions, 1, threads));
      channels = std::min(all_channels, threads / positions);
    }
  }
  int32_t channels, positions;
};

// How numbers of threads, or of blocks, split into channels and positions.  The one whose neighbours are neighbours in
// memory runs fastest.
struct Split {
  struct Pair {
    int channel, position;
  };

  Divider inner;
  bool channels_inner;

  __device__ __forceinline__ Pair operator()(int i) const {
    const int rest = take(i, inner);
    return channels_inner ? Pair{rest, i} : Pair{i, rest};
  }
};

inline Split split(bool channels_inner, int32_t channels, int32_t positions) {
  return {Divider(channels_inner ? channels : positions), channels_inner};
}

// A tensor whose rows and columns are called slide and cross, or the other way round.
template <class T>
struct Pixels {
  T* data;
  int64_t n, c, slide, cross;

  __device__ __forceinline__ T* at(int image, int64_t channel, int along, int across) const {
    return data + image * n + channel * c + along * slide + across * cross;
  }
};

template <class T>
Pixels<const T> pixels(const TensorRef& t, bool slide_rows) {
  return {static_cast<const T*>(t.data), t.n, t.c, slide_rows ? t.h : t.w, slide_rows ? t.w : t.h};
}

// A dense output.
template <class T>
Pixels<T> pixels(void* data, bool nhwc, int64_t channels, int64_t rows, int64_t cols, bool slide_rows) {
  const int64_t c = nhwc ? 1 : rows * cols, w = nhwc ? channels : 1, h = cols * w;
  return {static_cast<T*>(data), channels * rows * cols, c, slide_rows ? h : w, slide_rows ? w : h};
}

// u = relu(scale * (x - center) + shift) for one channel.
template <class A>
struct Function {
  bool any = false, relu = false;
  A center = 0, scale = 1, shift = 0;

  __device__ __forceinline__ A before_relu(A x) const { return scale * (x - center) + shift; }
  __device__ __forceinline__ A operator()(A x) const {
    const A u = before_relu(x);
    return relu && u <= 0 ? A{0} : u;
  }
};

template <class A>
struct Functions {
  const A *center = nullptr, *scale = nullptr, *shift = nullptr;
  bool any = false, relu = false;

  __device__ __forceinline__ Function<A> of(int channel) const {
    Function<A> f;
    f.any = any, f.relu = relu;
    if (center) f.center = load(center + channel), f.scale = load(scale + channel), f.shift = load(shift + channel);
    return f;
  }
};

template <class A>
Functions<A> functions(const OnLoad& f) {
  return {static_cast<const A*>(f.center), static_cast<const A*>(f.scale), static_cast<const A*>(f.shift), f.any(),
          f.relu};
}

// The sequence that slides past the sums: zero outside of `existing`, else a function of what is in memory.
template <class T>
struct Moving {
  using A = accumulate_t<T>;

  const T* next;  // of the number that is fetched next; it need not exist
  int64_t step;
  Range existing;
  Function<A> f;

  __device__ __forceinline__ bool exists(int i) const {
    return static_cast<unsigned>(i - existing.lo) < static_cast<unsigned>(existing.hi - existing.lo);
  }
  // Numbers i to i + kCount - 1, all of whose loads are in flight before the first is used.
  template <int kCount>
  __device__ __forceinline__ void fetch(int i, A* to) {
    T values[kCount];
    if (i >= existing.lo && i + kCount <= existing.hi) {
#pragma unroll
      for (int k = 0; k < kCount; ++k, next += step) values[k] = load(next);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k, next += step) values[k] = exists(i + k) ? load(next) : T{};
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[k] = widen(values[k]);
    if (!f.any) return;
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[k] = exists(i + k) ? f(to[k]) : A{0};
  }
};

// The same in shared memory, where all of it exists.
template <class A>
struct MovingShared {
  const A* next;
  int step;

  template <int kCount>
  __device__ __forceinline__ void fetch(int, A* to) {
#pragma unroll
    for (int k = 0; k < kCount; ++k, next += step) to[k] = *next;
  }
};

// The sequence that does not slide: numbers `step` apart, in shared memory or in a tensor.
template <class A>
struct FixedShared {
  const A* at;
  int step;

  __device__ __forceinline__ A get(int k) const { return at[k * step]; }
  __device__ __forceinline__ void advance(int count) { at += count * step; }
};

template <class T>
struct FixedGlobal {
  const T* at;
  int64_t step;

  __device__ __forceinline__ T get(int k) const { return load(at + k * step); }
  __device__ __forceinline__ void advance(int count) { at += count * step; }
};

template <int kWindow, class A>
__device__ __forceinline__ void add_products(A factor, const A* window, A (&sums)[kWindow]) {
#pragma unroll
  for (int j = 0; j < kWindow; ++j) sums[j] += factor * window[j];
}

// The loop of the header comment for i in `range`, which is not empty, kBlock of them at a time, whose loads are all in
// flight before the first is used.  `fixed` and `moving` begin at range.lo.
template <int kBlock, int kWindow, class A, class Fixed, class Moving>
__device__ __forceinline__ void correlate(Range range, Fixed fixed, Moving moving, A (&sums)[kWindow]) {
  using F = decltype(fixed.get(0));
  F factors[kBlock];
  A window[kWindow - 1 + kBlock];
  int left = range.hi - range.lo;
#pragma unroll
  for (int b = 0; b < kBlock; ++b) factors[b] = b < left ? fixed.get(b) : F{};
  moving.template fetch<kWindow - 1 + kBlock>(range.lo, window);
  while (true) {
    if (left >= kBlock) {
#pragma unroll
      for (int b = 0; b < kBlock; ++b) add_products<kWindow>(widen(factors[b]), window + b, sums);
    } else {
#pragma unroll
      for (int b = 0; b < kBlock - 1; ++b) {
        if (b >= left) break;  // rather than multiply by zero: the number may be infinite
        add_products<kWindow>(widen(factors[b]), window + b, sums);
      }
    }
    left -= kBlock;
    if (left <= 0) break;
    fixed.advance(kBlock);
#pragma unroll
    for (int b = 0; b < kBlock; ++b) factors[b] = b < left ? fixed.get(b) : F{};
#pragma unroll
    for (int k = 0; k < kWindow - 1; ++k) window[k] = window[k + kBlock];
    moving.template fetch<kBlock>(range.hi - left + kWindow - 1, window + kWindow - 1);
  }
}

// Adds what the threads of a block hold for `count` positions that lie `apart` threads apart, in a fixed order: the
// first position gets the sums.  Threads with nothing to add say `count`.  `shared` has room for kCount numbers a
// thread.
template <int kCount, class A>
__device__ __forceinline__ void add_positions(int position, int count, int apart, A* shared, A (&sums)[kCount]) {
  __syncthreads();  // for what `shared` held before
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared[k * blockDim.x + threadIdx.x] = sums[k];
  for (int half; count > 1; count = half) {
    half = (count + 1) / 2;
    __syncthreads();
    if (position + half >= count) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      A* const mine = shared + k * blockDim.x + threadIdx.x;
      *mine += mine[half * apart];
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) sums[k] = shared[k * blockDim.x + threadIdx.x];
}

}  // namespace xsep::cuda::generic
