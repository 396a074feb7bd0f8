// The whole gradient of a block's y, [pixels][K], where its mean and m2 had gradients too:
//
//   dy + dmean / count + 2 (y - mean) dm2
//
// A warp takes 32 vectors of channels, whose numbers it keeps, of some pixels, four at a time.  Bytes: dy and y once,
// the gradient once; memory limits it.
#pragma once

#include <cstdint>

#include "device.h"
#include "divider.cuh"
#include "separable.h"

namespace xsep::cuda {

constexpr int kThroughThreads = 256, kThroughPixels = 16;  // pixels of a warp

template <class T>
constexpr int kThroughVector = 16 / sizeof(T);

template <class T>
struct ThroughStatisticsParams {
  const T *dy, *y;  // [pixels][K]; dy may be null
  T* to;
  const float *mean, *dmean, *dm2;
  float count;
  int32_t pixels, K;
  Divider chunks;  // of 32 vectors
};

template <class T>
__global__ void __launch_bounds__(kThroughThreads) through_statistics_kernel(const ThroughStatisticsParams<T> p) {
  constexpr int kVector = kThroughVector<T>, kAtOnce = 4;
  using Vector = Vec<T, kVector>;
  int group = static_cast<int>(blockIdx.x);
  const int channel = (take(group, p.chunks) * 32 + static_cast<int>(threadIdx.x) % 32) * kVector;
  if (channel >= p.K) return;
  float mean[kVector], offset[kVector], slope[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    mean[v] = load(p.mean + channel + v);
    offset[v] = load(p.dmean + channel + v) / p.count, slope[v] = 2 * load(p.dm2 + channel + v);
  }
  const int first = (group * (kThroughThreads / 32) + static_cast<int>(threadIdx.x) / 32) * kThroughPixels;
  const int end = smaller(first + kThroughPixels, p.pixels);
  for (int pixel = first; pixel < end; pixel += kAtOnce) {
    Vector dy[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (pixel + i >= end) continue;
      const int64_t at = int64_t{pixel + i} * p.K + channel;
      dy[i] = p.dy ? load(reinterpret_cast<const Vector*>(p.dy + at)) : Vector{};
      y[i] = load(reinterpret_cast<const Vector*>(p.y + at));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (pixel + i >= end) continue;
      Vector whole;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        whole.at[v] = narrow<T>(widen(dy[i].at[v]) + offset[v] + (widen(y[i].at[v]) - mean[v]) * slope[v]);
      }
      store(reinterpret_cast<Vector*>(p.to + int64_t{pixel + i} * p.K + channel), whole);
    }
  }
}

// `pixels` of y, at least one; K is a multiple of the vector, tensors are aligned to it.
template <class T>
cudaError_t through_statistics(const SeparableArgs& args, int32_t pixels, T* to, cudaStream_t stream) {
  ThroughStatisticsParams<T> p{};
  p.dy = static_cast<const T*>(args.dy), p.y = static_cast<const T*>(args.y_made), p.to = to;
  p.mean = args.mean_made, p.dmean = args.dmean, p.dm2 = args.dm2;
  p.pixels = pixels, p.K = args.K, p.count = static_cast<float>(pixels);
  constexpr int32_t kChunk = 32 * kThroughVector<T>;
  p.chunks = Divider((args.K - 1) / kChunk + 1);
  const int64_t groups = (pixels - 1) / (kThroughThreads / 32 * kThroughPixels) + 1;
  return launch(through_statistics_kernel<T>, dim3(static_cast<unsigned>(groups * p.chunks.by)), dim3(kThroughThreads),
                0, stream, p);
}

}  // namespace xsep::cuda
