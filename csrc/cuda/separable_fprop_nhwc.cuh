// The training block's forward pass, NHWC: y = pointwise(activation(depthwise(u))) with u made of x on load, and the
// statistics of y; in inference with biases, a residual and an activation of y instead.  Any filter, stride, padding
// and dilation; channel multiplier 1.
//
// A block takes kM pixels of y, neighbours in memory.  It first makes the depthwise results of all input channels for
// them, in shared memory, each once; then the pointwise weights stream past these in stages of 128 output channels x
// 64 bytes of input channels, a few ahead, and 128 channels of y are finished at a time: rounded, stored 16 bytes at
// once, and, for the statistics, summed up as they were rounded.
//
//   z         [kM][pitch]           shared memory; a pitch is an odd multiple of 16 bytes, so that 8 rows of 16 bytes
//   stages    [kStages][128][80]    lie in different banks
//   moments   [3][warps of pixels][128]
//
// A warp multiplies 32 (16) pixels with 32 or 64 channels: lane l is number t = l % 4 of group g = l / 4 and holds
// pixels g, g + 8, ... and channels 2t, 2t + 1, 8 + 2t, ...  That is how tensor cores deal sums out; without them lanes
// multiply what they hold, which differs in one function.
//
// Bytes: x once from DRAM, y once.  From L2 the rows of x round a tile's (3 for 1 at worst, where L1 keeps none) and,
// for every tile, all of w_pw: 2 kM / sizeof(T) flops a byte of it.  The moments are 8 bytes for kM numbers of y.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "mma.cuh"
#include "moments.cuh"
#include "nhwc.cuh"
#include "separable_kernels.h"

namespace xsep::cuda {
namespace separable {

using nhwc::Affine;
using nhwc::aligned;
using nhwc::below;
using nhwc::OnLoadVectors;
using nhwc::Pixel;

constexpr int kVectorBytes = 16;
constexpr int kN = 128, kStageRowBytes = 64, kStagePitch = kStageRowBytes + kVectorBytes;
constexpr int kStages = 3, kStageBytes = kN * kStagePitch;

// kInVectors: channels come 16 bytes at a time, or 4 where they are convolved; else one by one.
template <class Element, int kPixels, bool kOnTensorCores, bool kInVectors>
struct FpropTile {
  using T = Element;
  static constexpr int kM = kPixels;
  static constexpr bool kMma = kOnTensorCores, kVectors = kInVectors;
  static constexpr int kV = kVectors ? 4 : 1;
  static constexpr int kVector = kVectorBytes / sizeof(T), kK = kStageRowBytes / sizeof(T);  // elements
  static constexpr int kWarps = kM > 32 ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kWarpsM = kM > 32 ? kM / 32 : 1, kWarpsN = kWarps / kWarpsM;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kRows = kWarpM / 8, kCols = kWarpN / 4;  // sums of a lane
  static constexpr int kResident = kWarps > 4 ? 2 : 4;          // blocks of a multiprocessor, where memory allows
  static_assert(kWarpM % 16 == 0 && kWarpN % 32 == 0, "whole products of tensor cores, and whole vectors of y");

  __host__ __device__ static constexpr int steps(int channels) { return (channels - 1) / kK + 1; }
  __host__ __device__ static constexpr int pitch(int steps) { return steps * kStageRowBytes + kVectorBytes; }
  static int64_t shared_bytes(int channels) {
    return int64_t{kM} * pitch(steps(channels)) + kStages * kStageBytes + int64_t{3 * kWarpsM * kN} * sizeof(float);
  }
};

template <class T>
struct FpropParams {
  const T *x, *w_dw, *w_pw;
  T* y;
  float* moments;           // of tiles, or null
  int64_t image, row, col;  // strides of x, in bytes
  int32_t pixels, C, K;     // of y, of x, of y
  int32_t H, W, R, S;
  int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  Divider P, Q;
  OnLoadVectors on_load;
  bool has_on_load, relu;   // relu: of z
  bool slides;              // 3x3, and pixels that are neighbours share columns
  int32_t lanes_log2, run;  // of the depthwise part: vectors of channels side by side, pixels of a thread
  // Of inference; null and without limits elsewhere.
  const T *w_dw_bias = nullptr, *bias = nullptr;
  const char* residual = nullptr;
  int64_t residual_image = 0, residual_row = 0, residual_col = 0;  // strides, in bytes
  float z_high = INFINITY, low = -INFINITY, high = INFINITY;       // the limits of z, beside relu, and of y
  bool finishes = false;                                           // something of these is y's
};

struct Position {
  int n, p, q;
};

template <class T>
__device__ __forceinline__ Position position(const FpropParams<T>& p, int pixel) {
  Position at;
  at.q = take(pixel, p.Q);
  at.p = take(pixel, p.P);
  at.n = pixel;
  return at;
}

// NaN stays.
__device__ __forceinline__ float clamped(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// A pixel of z, rounded, into shared memory.  The bias is loaded for each: there are no registers to hold it.
template <class T, int kV>
__device__ __forceinline__ void put(char* to, float (&sums)[kV], const FpropParams<T>& p, int channel) {
  if (p.w_dw_bias) {
    const auto bias = load(reinterpret_cast<const Vec<T, kV>*>(p.w_dw_bias + channel));
#pragma unroll
    for (int v = 0; v < kV; ++v) sums[v] += widen(bias.at[v]);
  }
  Vec<T, kV> z;
#pragma unroll
  for (int v = 0; v < kV; ++v) z.at[v] = narrow<T>(clamped(sums[v], p.relu ? 0.f : -INFINITY, p.z_high));
  *reinterpret_cast<Vec<T, kV>*>(to) = z;
}

// `count` pixels of z of a 3x3 filter whose columns are neighbours, from number `pixel` on, for a vector of channels.
// Along a row of y, the sums of three pixels are in flight; each column of x is loaded once, one ahead of its use.
template <class Tile>
__device__ __forceinline__ void slide(const FpropParams<typename Tile::T>& p, int channel, int pixel, int count,
                                      char* z, int pitch) {
  using T = typename Tile::T;
  constexpr int kV = Tile::kV, kTaps = 9;
  Vec<T, kV> filter[kTaps];  // tap i of channel v is number 9 v + i
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    filter[i] = load(reinterpret_cast<const Vec<T, kV>*>(p.w_dw + int64_t{channel} * kTaps) + i);
  }
  float w[kTaps][kV];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
#pragma unroll
    for (int v = 0; v < kV; ++v) w[i][v] = widen(filter[(v * kTaps + i) / kV].at[(v * kTaps + i) % kV]);
  }
  const Affine<kV> affine(p.on_load, channel);
  const char* const x = reinterpret_cast<const char*>(p.x + channel);
  while (count > 0) {
    const Position at = position(p, pixel);
    const int in_row = p.Q.by - at.q < count ? p.Q.by - at.q : count;
    const int h = at.p * p.stride_h - p.pad_top;
    int col = at.q - p.pad_left;
    const char* from = x + at.n * p.image + h * p.row + col * p.col;
    const int64_t next_row = p.dilation_h * p.row;
    const bool rows[3] = {below(h, p.H), below(h + p.dilation_h, p.H), below(h + 2 * p.dilation_h, p.H)};
    Pixel<T, kV> ahead[3];
    const auto load_column = [&] {
#pragma unroll
      for (int r = 0; r < 3; ++r) ahead[r].load_if(rows[r] && below(col, p.W), from + r * next_row);
    };
    load_column();
    float sums[2][kV] = {};  // of the two pixels before whose last column the next one comes
    for (int i = -2; i < in_row; ++i) {
      float u[3][kV], done[kV];
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        ahead[r].widen_to(u[r]);
        if (p.has_on_load) affine.apply(u[r], rows[r] && below(col, p.W));
      }
      ++col, from += p.col;
      if (i + 1 < in_row) load_column();
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        done[v] = sums[0][v], sums[0][v] = sums[1][v], sums[1][v] = 0;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          done[v] += u[r][v] * w[3 * r + 2][v];
          sums[0][v] += u[r][v] * w[3 * r + 1][v];
          sums[1][v] += u[r][v] * w[3 * r][v];
        }
      }
      if (i >= 0) put(z + i * pitch, done, p, channel);
    }
    z += in_row * pitch, pixel += in_row, count -= in_row;
  }
}

// The same for any filter: each pixel gathers what its taps meet, a few at a time, which share the weights.
template <class Tile>
__device__ __forceinline__ void gather(const FpropParams<typename Tile::T>& p, int channel, int pixel, int count,
                                       char* z, int pitch) {
  using T = typename Tile::T;
  constexpr int kV = Tile::kV, kAtOnce = 4;
  const Affine<kV> affine(p.on_load, channel);
  const char* const x = reinterpret_cast<const char*>(p.x + channel);
  const int taps = p.R * p.S;
  for (int first = 0; first < count; first += kAtOnce) {
    const int left = count - first;
    int h[kAtOnce], w[kAtOnce];
    const char* from[kAtOnce];
    float sums[kAtOnce][kV] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Position at = position(p, pixel + first + (i < left ? i : 0));
      h[i] = at.p * p.stride_h - p.pad_top, w[i] = at.q * p.stride_w - p.pad_left;
      from[i] = x + at.n * p.image + h[i] * p.row + w[i] * p.col;
    }
    const T* weights = p.w_dw + int64_t{channel} * taps;
    for (int r = 0; r < p.R; ++r) {
      for (int s = 0; s < p.S; ++s, ++weights) {
        const int down = r * p.dilation_h, right = s * p.dilation_w;
        Pixel<T, kV> pixels[kAtOnce];
        bool inside[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          inside[i] = i < left && below(h[i] + down, p.H) && below(w[i] + right, p.W);
          pixels[i].load_if(inside[i], from[i] + down * p.row + right * p.col);
        }
        float weight[kV];
#pragma unroll
        for (int v = 0; v < kV; ++v) weight[v] = widen(load(weights + v * taps));
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float u[kV];
          pixels[i].widen_to(u);
          if (p.has_on_load) affine.apply(u, inside[i]);
#pragma unroll
          for (int v = 0; v < kV; ++v) sums[i][v] += u[v] * weight[v];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i < left) put(z + (first + i) * pitch, sums[i], p, channel);
    }
  }
}

// z of the block's pixels, and zeros up to whole stages of channels.  Runs of pixels lie side by side before vectors of
// channels do, so that threads that share rows of x are there at the same time.
template <class Tile>
__device__ __forceinline__ void make_z(const FpropParams<typename Tile::T>& p, int first_pixel, char* z, int pitch) {
  using T = typename Tile::T;
  const int lanes = 1 << p.lanes_log2, lane = threadIdx.x & (lanes - 1), runs = Tile::kM / p.run;
  const int vectors = (p.C - 1) / Tile::kV + 1, items = runs * (((vectors - 1) >> p.lanes_log2) + 1);
  for (int item = threadIdx.x >> p.lanes_log2; item < items; item += Tile::kThreads >> p.lanes_log2) {
    const int group = item / runs, first = (item - group * runs) * p.run;
    const int channel = ((group << p.lanes_log2) + lane) * Tile::kV, left = p.pixels - first_pixel - first;
    if (channel >= p.C) continue;
    const int count = left < p.run ? left : p.run;
    char* const to = z + first * pitch + channel * sizeof(T);
    if (p.slides) {
      slide<Tile>(p, channel, first_pixel + first, count, to, pitch);
    } else {
      gather<Tile>(p, channel, first_pixel + first, count, to, pitch);
    }
  }
  const int beyond = (pitch - kVectorBytes) / static_cast<int>(sizeof(T)) - p.C;
  for (int i = threadIdx.x; i < Tile::kM * beyond; i += Tile::kThreads) {
    const int row = i / beyond;
    reinterpret_cast<T*>(z + row * pitch)[p.C + i - row * beyond] = T{};
  }
}

// Asks for output channels n to n + kN of the weights, input channels from k on.  Rows beyond the last are left out:
// what they give is not stored.  Columns beyond the last are zeros.
template <class Tile>
__device__ __forceinline__ void fetch(const FpropParams<typename Tile::T>& p, int n, int k, char* stage) {
  using T = typename Tile::T;
  constexpr int kPerRow = kStageRowBytes / kVectorBytes;
  static_assert(kN * kPerRow % Tile::kThreads == 0, "the same number for each thread");
#pragma unroll
  for (int i = 0; i < kN * kPerRow / Tile::kThreads; ++i) {
    const int number = i * Tile::kThreads + threadIdx.x, row = number / kPerRow, column = number % kPerRow;
    const int channel = k + column * Tile::kVector;
    if (n + row >= p.K) continue;
    char* const to = stage + row * kStagePitch + column * kVectorBytes;
    const T* const from = p.w_pw + int64_t{n + row} * p.C + channel;
    if constexpr (Tile::kVectors) {
      if (channel < p.C) {
        copy_async<kVectorBytes>(to, from);
      } else {
        *reinterpret_cast<Vec<uint32_t, 4>*>(to) = Vec<uint32_t, 4>{};
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kVector; ++j) {
        reinterpret_cast<T*>(to)[j] = channel + j < p.C ? load(from + j) : T{};
      }
    }
  }
}

// Adds what a stage gives, of 64 bytes of each of the warp's rows of z and of the weights.
template <class Tile, int kRows, int kCols>
__device__ __forceinline__ void multiply(const char* z, int pitch, const char* weights, float (&sums)[kRows][kCols]) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % 32;
  if constexpr (Tile::kMma) {
    z += lane % 16 * pitch + lane / 16 * kVectorBytes;
    weights += (lane / 16 * 8 + lane % 8) * kStagePitch + lane / 8 % 2 * kVectorBytes;
#pragma unroll
    for (int k = 0; k < kStageRowBytes; k += 2 * kVectorBytes) {
      uint32_t a[kRows / 2][4];
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) load_matrices(a[i], z + 16 * i * pitch + k);
#pragma unroll
      for (int j = 0; j < kCols / 4; ++j) {
        uint32_t pair[4];
        load_matrices(pair, weights + 16 * j * kStagePitch + k);
        const uint32_t b[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int column = 4 * j + 2 * h;
            multiply_add<T>(&sums[2 * i][column], &sums[2 * i + 1][column], a[i], b[h]);
          }
        }
      }
    }
  } else {
    using Vector = Vec<T, Tile::kVector>;
    z += lane / 4 * pitch, weights += lane % 4 * 2 * kStagePitch;
#pragma unroll 1
    for (int k = 0; k < kStageRowBytes; k += kVectorBytes) {
      Vector a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const Vector*>(z + 8 * i * pitch + k);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const Vector b = *reinterpret_cast<const Vector*>(weights + (j / 2 * 8 + j % 2) * kStagePitch + k);
#pragma unroll
        for (int v = 0; v < Tile::kVector; ++v) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) sums[i][j] += widen(a[i].at[v]) * widen(b.at[v]);
        }
      }
    }
  }
}

// The eight columns of a lane from `first` on, as the warp leaves them for the block's moments: [3][kWarpsM][kN].
template <class Tile, int kRows, int kCols>
__device__ __forceinline__ void leave_moments(const float (&sums)[kRows][kCols], int first, int rows_left, int warp_row,
                                              int warp_column, float* moments) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, group = lane / 4, number = lane % 4;
  Moments of[8];
  float pivots[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    pivots[j] = __shfl_sync(kAll, sums[0][first + j], number);
    float deviations[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool exists = 8 * i + group < rows_left;
      deviations[i] = exists ? sums[i][first + j] - pivots[j] : 0.f;
      of[j].count += exists ? 1.f : 0.f;
      of[j].mean += deviations[i];
    }
    of[j].mean /= of[j].count > 1 ? of[j].count : 1.f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float deviation = 8 * i + group < rows_left ? deviations[i] - of[j].mean : 0.f;
      of[j].m2 += deviation * deviation;
    }
  }
  // Lanes that hold the same columns merge them, and each keeps half of what it had: in the end column g.
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
    const bool upper = group & half;
    const float count = __shfl_xor_sync(kAll, of[0].count, 4 * half);
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const Moments sent = upper ? of[j] : of[j + half];
      if (upper) of[j] = of[j + half];
      const float mean = __shfl_xor_sync(kAll, sent.mean, 4 * half), m2 = __shfl_xor_sync(kAll, sent.m2, 4 * half);
      of[j].merge(count, mean, m2);
    }
  }
  const int at = warp_row * kN + warp_column + 4 * first + 2 * number;  // of the lane's first column
  if (group == 0) {
#pragma unroll
    for (int j = 0; j < 8; ++j) moments[at + j / 2 * 8 + j % 2] = pivots[j];
  }
  float* const mine = moments + at + group / 2 * 8 + group % 2;
  mine[Tile::kWarpsM * kN] = of[0].mean;
  mine[2 * Tile::kWarpsM * kN] = of[0].m2;
}

// Merges what the warps left and puts it in the workspace: a thread takes a channel.
template <class Tile>
__device__ __forceinline__ void store_moments(const float* moments, int first_pixel, int pixels, int n, int K,
                                              float* to) {
  if (threadIdx.x >= kN || n + static_cast<int>(threadIdx.x) >= K) return;
  const float* const mine = moments + threadIdx.x;
  constexpr int kNext = Tile::kWarpsM * kN;
  Moments sum;
#pragma unroll
  for (int i = 0; i < Tile::kWarpsM; ++i) {
    const int left = pixels - first_pixel - i * Tile::kWarpM, count = left < Tile::kWarpM ? left : Tile::kWarpM;
    if (count <= 0) break;
    sum.merge(static_cast<float>(count), mine[i * kN] - mine[0] + mine[kNext + i * kN], mine[2 * kNext + i * kN]);
  }
  to += (int64_t{first_pixel} / Tile::kM * 2) * K + n + threadIdx.x;
  store(to, sum.mean);
  store(to + K, sum.m2);
}

// Two channels of a pixel, rounded, in words.
template <class T>
struct Pair {
  static constexpr int kWords = 2 * sizeof(T) / 4;
  uint32_t word[kWords];

  Pair() = default;
  __device__ __forceinline__ Pair(float a, float b) {
    const Vec<T, 2> both{{narrow<T>(a), narrow<T>(b)}};
    memcpy(word, &both, sizeof both);
  }
  __device__ __forceinline__ void add_to(float& a, float& b) const {
    Vec<T, 2> both;
    memcpy(&both, word, sizeof both);
    a += widen(both.at[0]), b += widen(both.at[1]);
  }
};

// Eight columns of a row of a lane become vectors of neighbouring channels: lanes t exchange pairs until each holds a
// whole vector, of which there are then as many as pairs were.  Vectors become columns likewise.
template <class T>
__device__ __forceinline__ void transpose(Pair<T> (&pairs)[4]) {
  constexpr int kPairs = kVectorBytes / sizeof(Pair<T>);  // of a vector
  const int number = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit < kPairs; bit *= 2) {
    const bool upper = number & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
#pragma unroll
      for (int k = 0; k < Pair<T>::kWords; ++k) {
        uint32_t &low = pairs[i].word[k], &high = pairs[i | bit].word[k];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
        low = upper ? got : low, high = upper ? high : got;
      }
    }
  }
}

// What transpose() leaves a lane in pairs[j] of eight columns: the first channel of the vector, among theirs.
template <class Tile>
__device__ __forceinline__ int channel_of(int j) {
  constexpr int kPairs = Tile::kVector / 2;
  const int number = threadIdx.x % 4;
  return 8 * (j + number % kPairs) + number / kPairs * Tile::kVector;
}

// Inference: adds the bias and the residual to the sums of a warp's pixels and channels from `channel` on, and clamps
// them.  A thread reads the residual as it stores y, 16 bytes at once.
template <class Tile, int kRows, int kCols>
__device__ __forceinline__ void finish(const FpropParams<typename Tile::T>& p, float (&sums)[kRows][kCols],
                                       int first_pixel, int channel) {
  using T = typename Tile::T;
  constexpr int kPairs = Tile::kVector / 2;
  const int group = threadIdx.x % 32 / 4, number = threadIdx.x % 4;
  if (p.bias) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int at = channel + j / 2 * 8 + 2 * number + j % 2;
      const float bias = at < p.K ? widen(load(p.bias + at)) : 0.f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] += bias;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (p.residual) {
      // Kept, or the compiler would find all addresses once, and hold them.
      const int pixel = nhwc::keep(first_pixel + 8 * i + group);
      const Position from = position(p, pixel);
      const auto row = reinterpret_cast<const T*>(p.residual + from.n * p.residual_image + from.p * p.residual_row +
                                                  from.q * p.residual_col);
#pragma unroll
      for (int first = 0; first < kCols; first += 8) {
        Pair<T> pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j += kPairs) {
          const int at = channel + 4 * first + channel_of<Tile>(j);
          Vec<T, Tile::kVector> vector{};
          if (pixel < p.pixels && at < p.K) {
            if constexpr (Tile::kVectors) {
              vector = load(reinterpret_cast<const Vec<T, Tile::kVector>*>(row + at));
            } else {
#pragma unroll
              for (int v = 0; v < Tile::kVector; ++v) vector.at[v] = at + v < p.K ? load(row + at + v) : T{};
            }
          }
          memcpy(&pairs[j], &vector, kVectorBytes);
        }
        transpose(pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j].add_to(sums[i][first + 2 * j], sums[i][first + 2 * j + 1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kCols; ++j) sums[i][j] = clamped(sums[i][j], p.low, p.high);
  }
}

// y of a warp's pixels and channels from `channel` on: 16 bytes a thread, 64 neighbouring bytes for each pixel.
template <class Tile, int kRows, int kCols>
__device__ __forceinline__ void store_y(const FpropParams<typename Tile::T>& p, const float (&sums)[kRows][kCols],
                                        int first_pixel, int channel) {
  using T = typename Tile::T;
  constexpr int kPairs = kVectorBytes / sizeof(Pair<T>), kVector = Tile::kVector;
  const int group = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int pixel = first_pixel + 8 * i + group;
    T* const row = p.y + int64_t{pixel} * p.K;
#pragma unroll
    for (int first = 0; first < kCols; first += 8) {
      Pair<T> pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = Pair<T>(sums[i][first + 2 * j], sums[i][first + 2 * j + 1]);
      transpose(pairs);
#pragma unroll
      for (int j = 0; j < 4; j += kPairs) {
        const int at = channel + 4 * first + channel_of<Tile>(j);
        if (pixel >= p.pixels || at >= p.K) continue;
        Vec<T, kVector> vector;
        memcpy(&vector, &pairs[j], kVectorBytes);
        if constexpr (Tile::kVectors) {
          store(reinterpret_cast<Vec<T, kVector>*>(row + at), vector);
        } else {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            if (at + v < p.K) store(row + at + v, vector.at[v]);
          }
        }
      }
    }
  }
}

// The memory of Turing's multiprocessors holds one block of any tile, which may then have all registers.  Volta's holds
// one or two; there the compiler spills where two must have room.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700 && __CUDA_ARCH__ < 800
constexpr int kFpropResident = 1;
#else
constexpr int kFpropResident = 4;
#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, smaller(Tile::kResident, kFpropResident))
    separable_fprop_nhwc_kernel(const FpropParams<typename Tile::T> p) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kK = Tile::kK;
  const int steps = Tile::steps(p.C), pitch = Tile::pitch(steps);
  char* const z = shared_memory<char>();
  char* const stages = z + Tile::kM * pitch;
  float* const moments = reinterpret_cast<float*>(stages + kStages * kStageBytes);
  const int first_pixel = static_cast<int>(blockIdx.x) * Tile::kM;
  const int warp_row = threadIdx.x / 32 / Tile::kWarpsN, warp_column = threadIdx.x / 32 % Tile::kWarpsN * Tile::kWarpN;
  const int warp_pixel = first_pixel + warp_row * Tile::kWarpM;

  int next_n = 0, next_k = 0, next_stage = 0;  // that will be fetched
  const auto fetch_next = [&] {
    if (next_n < p.K) fetch<Tile>(p, next_n, next_k, stages + next_stage * kStageBytes);
    copies_group();
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
    next_k += kK;
    if (next_k >= p.C) next_k = 0, next_n += kN;
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch_next();
  make_z<Tile>(p, first_pixel, z, pitch);

  int stage = 0;
  for (int n = 0; n < p.K; n += kN) {
    float sums[kRows][kCols] = {};
    for (int step = 0; step < steps; ++step) {
      copies_done_but<kStages - 2>();
      __syncthreads();  // this stage is there, z too, and nobody reads the one that is fetched next
      fetch_next();
      multiply<Tile>(z + warp_row * Tile::kWarpM * pitch + step * kStageRowBytes, pitch,
                     stages + stage * kStageBytes + warp_column * kStagePitch, sums);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (p.finishes) finish<Tile>(p, sums, warp_pixel, n + warp_column);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) sums[i][j] = widen(narrow<T>(sums[i][j]));
    }
    store_y<Tile>(p, sums, warp_pixel, n + warp_column);
    if (!p.moments) continue;
#pragma unroll
    for (int first = 0; first < kCols; first += 8) {
      leave_moments<Tile>(sums, first, p.pixels - warp_pixel, warp_row, warp_column, moments);
    }
    __syncthreads();  // the next one is above: moments are read before others are left
    store_moments<Tile>(moments, first_pixel, p.pixels, n, p.K, p.moments);
  }
}

inline int64_t pixels(const SeparableArgs& args) { return int64_t{args.shape.N} * args.shape.P() * args.shape.Q(); }

// Whether a call's channels come in vectors.
template <class T>
bool in_vectors(const SeparableArgs& args) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  return args.shape.C % kVector == 0 && args.K % kVector == 0 && aligned(args.w_pw, kVectorBytes) &&
         aligned(args.y, kVectorBytes) && aligned(args.w_dw, 4 * sizeof(T)) && aligned(args.w_dw_bias, 4 * sizeof(T)) &&
         nhwc::why_not<T>(args.x, "x", 4).empty() &&
         (!args.residual.data || nhwc::why_not<T>(args.residual, "residual", kVector).empty());
}

// Calls f with the largest tile that fits and gives each multiprocessor a block.  Below 32 pixels the weights take
// longer to read than to multiply, so that smaller tiles are for want of memory alone.
template <class T, bool kMma, class F>
auto with_tile(const SeparableArgs& args, const Device& device, F&& f) {
  const auto fits = [&](auto tile) {
    using Tile = decltype(tile);
    const bool enough = Tile::kM <= 32 || pixels(args) > int64_t{Tile::kM} * (device.multiprocessors - 1);
    return enough && Tile::shared_bytes(args.shape.C) <= device.shared_bytes;
  };
  if (!in_vectors<T>(args)) return f(FpropTile<T, 16, kMma, false>{});
  if constexpr (kMma || sizeof(T) == 4) {  // numbers of 16 bits are widened in registers, for which 128 are too few
    if (fits(FpropTile<T, 128, kMma, true>{})) return f(FpropTile<T, 128, kMma, true>{});
  }
  if (fits(FpropTile<T, 64, kMma, true>{})) return f(FpropTile<T, 64, kMma, true>{});
  if (fits(FpropTile<T, 32, kMma, true>{})) return f(FpropTile<T, 32, kMma, true>{});
  return f(FpropTile<T, 16, kMma, true>{});
}

// Why no kernel of the block takes a call, forward or backward; empty if one may.
template <class T, bool kMma>
std::string why_not_any(const SeparableArgs& args, const Device& device) {
  const ConvShape& s = args.shape;
  if (!args.nhwc) return "the layout is NCHW";
  if (s.M != 1) return "the channel multiplier is not 1";
  if (kMma && device.arch < kMmaArch<T>) return "the card has no tensor cores for this type";
  if (kMma && !built_for_mma<T>()) return "this installation has no code for tensor cores";
  if (pixels(args) > INT32_MAX - 128) return "too many pixels";
  const int64_t rows = int64_t{s.H} + s.pad_top + s.pad_bottom, cols = int64_t{s.W} + s.pad_left + s.pad_right;
  if (rows > INT32_MAX / 2 || cols > INT32_MAX / 2) return "the image is too large";
  if (args.x.c != 1) return "the channels of x are not neighbours";
  return "";
}

template <class T, bool kMma>
std::string why_not(const SeparableArgs& args, const Device& device) {
  if (args.backward) return "it makes no gradients";
  const std::string reason = why_not_any<T, kMma>(args, device);
  if (!reason.empty()) return reason;
  if (args.residual.data && args.K > 1 && args.residual.c != 1) return "the residual's channels are not neighbours";
  const int64_t bytes = FpropTile<T, 16, kMma, true>::shared_bytes(args.shape.C);
  if (bytes > device.shared_bytes) {
    return "16 pixels of " + std::to_string(args.shape.C) + " channels take " + std::to_string(bytes) +
           " bytes of shared memory, of " + std::to_string(device.shared_bytes);
  }
  return "";
}

template <class T, bool kMma>
int64_t workspace_bytes(const SeparableArgs& args, const Device& device) {
  if (!args.mean) return 0;
  return with_tile<T, kMma>(args, device,
                            [&](auto tile) { return moments_bytes(pixels(args), decltype(tile)::kM, args.K); });
}

template <class T>
FpropParams<T> fprop_params(const SeparableArgs& args) {
  const ConvShape& s = args.shape;
  const int64_t size = sizeof(T);
  FpropParams<T> p{};
  p.x = static_cast<const T*>(args.x.data), p.w_dw = static_cast<const T*>(args.w_dw);
  p.w_pw = static_cast<const T*>(args.w_pw), p.y = static_cast<T*>(args.y);
  p.image = args.x.n * size, p.row = args.x.h * size, p.col = args.x.w * size;
  p.pixels = static_cast<int32_t>(pixels(args)), p.C = s.C, p.K = args.K;
  p.H = s.H, p.W = s.W, p.R = s.R, p.S = s.S;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w, p.pad_top = s.pad_top, p.pad_left = s.pad_left;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.P = Divider(s.P()), p.Q = Divider(s.Q());
  p.on_load = OnLoadVectors(args.on_load), p.has_on_load = args.on_load.any();
  p.relu = args.activation != Activation::kNone;
  p.w_dw_bias = static_cast<const T*>(args.w_dw_bias), p.bias = static_cast<const T*>(args.bias);
  p.residual = static_cast<const char*>(args.residual.data);
  p.residual_image = args.residual.n * size, p.residual_row = args.residual.h * size;
  p.residual_col = args.residual.w * size;
  if (args.activation == Activation::kRelu6) p.z_high = 6;
  if (args.out_activation != Activation::kNone) p.low = 0;
  if (args.out_activation == Activation::kRelu6) p.high = 6;
  p.finishes = p.bias || p.residual || args.out_activation != Activation::kNone;
  p.slides = s.R == 3 && s.S == 3 && s.stride_w == 1 && s.dilation_w == 1;
  return p;
}

template <class T, bool kMma>
cudaError_t run(const SeparableArgs& args, const Device& device, cudaStream_t stream) {
  const int32_t C = args.shape.C;
  FpropParams<T> p = fprop_params<T>(args);
  float* const moments = static_cast<float*>(args.workspace);
  p.moments = args.mean ? moments : nullptr;
  return with_tile<T, kMma>(args, device, [&](auto tile) {
    using Tile = decltype(tile);
    if (p.pixels > 0) {
      while (p.lanes_log2 < 5 && (Tile::kV << p.lanes_log2) < C) ++p.lanes_log2;
      p.run = std::max(4, Tile::kM / (Tile::kThreads >> p.lanes_log2));
      const unsigned blocks = static_cast<unsigned>((p.pixels - 1) / Tile::kM + 1);
      const cudaError_t error = launch(separable_fprop_nhwc_kernel<Tile>, dim3(blocks), dim3(Tile::kThreads),
                                       static_cast<size_t>(Tile::shared_bytes(C)), stream, p);
      if (error != cudaSuccess) return error;
    }
    if (!args.mean) return cudaSuccess;
    return merge_moments(p.y, moments, p.pixels, Tile::kM, args.K, args.mean, args.m2, stream);
  });
}

}  // namespace separable

template <class T>
SeparableKernel separable_fprop_nhwc() {
  return {"separable_fprop_nhwc", separable::why_not<T, false>, separable::workspace_bytes<T, false>,
          separable::run<T, false>};
}

template <class T>
SeparableKernel separable_fprop_nhwc_mma() {
  constexpr bool kMma = sizeof(T) == 2;  // of float there is no such family
  return {"separable_fprop_nhwc_mma", separable::why_not<T, kMma>, separable::workspace_bytes<T, kMma>,
          separable::run<T, kMma>};
}

}  // namespace xsep::cuda
