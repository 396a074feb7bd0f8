// Mean and sum of squared deviations of the channels of a tensor, from those of its tiles.
//
// A kernel that stores y, [pixels][channels], leaves in the workspace the moments of every `rows` pixels of it:
//
//   [tiles][2][channels]     the mean less the pivot, and m2
//
// where the pivot of a channel is its first number in the tile, which y has.  Less a pivot, means are as small as the
// deviations, so that neither a tile's mean nor the difference of two loses what the numbers have in common: mean / std
// may be 1e4 and beyond.
//
// A block merges up to kFan tiles of 32 channels into a larger one by Chan's formula: a warp takes every eighth, and
// the warps' results are merged in their order.  The result depends on the numbers alone.  Launches follow until one
// tile is left.  Bytes: the moments and the tiles' first pixels once, of which a second launch has 1 / kFan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"

namespace xsep::cuda {

// Of `count` numbers.
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  __device__ __forceinline__ void merge(float other_count, float other_mean, float other_m2) {
    const float all = count + other_count, share = all > 0 ? other_count / all : 0.f;
    const float apart = other_mean - mean;
    mean += apart * share;
    m2 += other_m2 + apart * apart * (count * share);
    count = all;
  }
};

constexpr int kMomentsLanes = 32, kMomentsWarps = 8, kFan = 256;

template <class T>
struct MomentsParams {
  const T* y;
  const float* tiles;
  float* merged;     // of all tiles but for the last launch,
  float *mean, *m2;  // of the last one
  int64_t pixels, rows;
  int32_t channels, parts, chunks;  // tiles, blocks side by side
};

template <class T>
__global__ void __launch_bounds__(kMomentsLanes* kMomentsWarps) merge_moments_kernel(const MomentsParams<T> p) {
  Moments* const of_warps = shared_memory<Moments>();  // [kMomentsWarps][kMomentsLanes]
  const int lane = threadIdx.x % kMomentsLanes, warp = threadIdx.x / kMomentsLanes;
  const int group = static_cast<int>(blockIdx.x) / p.chunks;
  const int channel = (static_cast<int>(blockIdx.x) - group * p.chunks) * kMomentsLanes + lane;
  const int first = group * kFan, end = p.parts - first < kFan ? p.parts : first + kFan;
  const auto pivot = [&](int part) { return widen(load(p.y + part * p.rows * p.channels + channel)); };
  const bool exists = channel < p.channels;
  const float reference = exists && first < end ? pivot(first) : 0.f;
  Moments sum;
  if (exists) {
    const float* const tiles = p.tiles + channel;
#pragma unroll 4
    for (int part = first + warp; part < end; part += kMomentsWarps) {
      const int64_t left = p.pixels - part * p.rows, at = int64_t{part} * 2 * p.channels;
      sum.merge(static_cast<float>(left < p.rows ? left : p.rows), pivot(part) - reference + load(tiles + at),
                load(tiles + at + p.channels));
    }
  }
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || !exists) return;
  for (int other = 1; other < kMomentsWarps; ++other) {
    const Moments& o = of_warps[other * kMomentsLanes + lane];
    sum.merge(o.count, o.mean, o.m2);
  }
  if (p.mean) {
    store(p.mean + channel, reference + sum.mean);
    store(p.m2 + channel, sum.m2);
  } else {
    float* const to = p.merged + int64_t{group} * 2 * p.channels + channel;
    store(to, sum.mean);
    store(to + p.channels, sum.m2);
  }
}

// What merge_moments() reads and what it needs besides, for tiles of `rows` pixels.
inline int64_t moments_bytes(int64_t pixels, int64_t rows, int64_t channels) {
  int64_t tiles = 0, parts = (pixels + rows - 1) / rows;
  for (tiles = parts; parts > kFan; tiles += parts) parts = (parts + kFan - 1) / kFan;
  return tiles * 2 * channels * static_cast<int64_t>(sizeof(float));
}

// No pixels give zeros.
template <class T>
cudaError_t merge_moments(const T* y, float* workspace, int64_t pixels, int64_t rows, int32_t channels, float* mean,
                          float* m2, cudaStream_t stream) {
  MomentsParams<T> p{};
  p.y = y, p.pixels = pixels, p.channels = channels, p.chunks = (channels - 1) / kMomentsLanes + 1;
  for (;; rows *= kFan) {
    p.tiles = workspace, p.rows = rows, p.parts = static_cast<int32_t>((pixels + rows - 1) / rows);
    p.merged = workspace += int64_t{p.parts} * 2 * channels;
    const bool last = p.parts <= kFan;
    if (last) p.mean = mean, p.m2 = m2;
    const int64_t groups = std::max((p.parts - 1) / kFan + 1, 1);
    const cudaError_t error =
        launch(merge_moments_kernel<T>, dim3(static_cast<unsigned>(groups * p.chunks)),
               dim3(kMomentsLanes * kMomentsWarps), kMomentsLanes * kMomentsWarps * sizeof(Moments), stream, p);
    if (error != cudaSuccess || last) return error;
  }
}

}  // namespace xsep::cuda
