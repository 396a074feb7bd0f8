// Adds the sums that the blocks of a backward kernel left in the workspace, and writes dw [, dscale, dshift].
//
// A backward kernel writes `parts` partial arrays of the accumulation type, each complete: `sums` numbers a channel, of
// which the first `taps` are dw's and the last two, if there are more, those of dscale and dshift.  Within a part
// channels or sums run fastest, as suits the kernel that wrote it:
//
//   Reduction<T> r;
//   r.partials = workspace;  r.parts = parts;           // [parts][sums][channels] or [parts][channels][sums]
//   r.channels = C;  r.taps = R * S;  r.sums = taps [+ 2];
//   r.channels_last = true;                             // [sums][channels]
//   r.dw = dw;  r.dscale = dscale;  r.dshift = dshift;  // the last two may be null
//   return reduce_partials(r, stream);
//
// A block adds 32 numbers of a part, one a lane, so that warps read whole sectors; its warps share the parts and their
// sums meet in shared memory.  All orders are fixed: the result depends on the numbers alone.  No parts give zeros.
// Bytes: the partials once, most of them still in L2; what limits it is latency, hence up to 1024 threads for 32
// numbers, each with eight loads in flight.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"

namespace xsep::cuda {

template <class T>
struct Reduction {
  const accumulate_t<T>* partials = nullptr;
  int64_t parts = 0;
  int32_t channels = 0, taps = 0, sums = 0;
  bool channels_last = false;
  T* dw = nullptr;  // [channels][taps]
  accumulate_t<T>* dscale = nullptr;
  accumulate_t<T>* dshift = nullptr;

  int64_t bytes() const { return parts * channels * sums * static_cast<int64_t>(sizeof(accumulate_t<T>)); }
};

constexpr int kReduceLanes = 32, kReduceMaxWarps = 32, kReducePartsPerThread = 8;

template <class T>
__global__ void __launch_bounds__(kReduceLanes* kReduceMaxWarps) reduce_partials_kernel(Reduction<T> r) {
  using A = accumulate_t<T>;
  A* const of_warps = shared_memory<A>();  // [warps][kReduceLanes]
  const int lane = threadIdx.x % kReduceLanes, warp = threadIdx.x / kReduceLanes, warps = blockDim.x / kReduceLanes;
  const int64_t count = int64_t{r.channels} * r.sums, i = int64_t{blockIdx.x} * kReduceLanes + lane;
  A sum = 0;
  if (i < count) {
    const A* const p = r.partials + i;
#pragma unroll kReducePartsPerThread
    for (int64_t part = warp; part < r.parts; part += warps) sum += load(p + part * count);
  }
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || i >= count) return;
  for (int other = 1; other < warps; ++other) sum += of_warps[other * kReduceLanes + lane];

  const int64_t fastest = r.channels_last ? r.channels : r.sums, slow = i / fastest, fast = i - slow * fastest;
  const int64_t channel = r.channels_last ? fast : slow, which = r.channels_last ? slow : fast;
  if (which < r.taps) {
    store(r.dw + channel * r.taps + which, narrow<T>(sum));
  } else if (A* const vector = which == r.taps ? r.dscale : r.dshift) {
    store(vector + channel, sum);
  }
}

template <class T>
cudaError_t reduce_partials(const Reduction<T>& r, cudaStream_t stream) {
  const int64_t warps = std::clamp<int64_t>(r.parts / kReducePartsPerThread, 1, kReduceMaxWarps);
  const int64_t blocks = (int64_t{r.channels} * r.sums + kReduceLanes - 1) / kReduceLanes;
  const unsigned threads = static_cast<unsigned>(warps * kReduceLanes);
  return launch(reduce_partials_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(threads),
                threads * sizeof(accumulate_t<T>), stream, r);
}

}  // namespace xsep::cuda
