// The training block's gradients, NHWC: 3x3 filters, strides 1 and 2 of each axis, any padding, any dilation; channel
// multiplier 1.  Neither z nor its gradient is stored.
//
// Where y had statistics, through_statistics_kernel first puts the whole gradient of y together, once, since every
// chunk of channels reads it.  Then a block of separable_backward_nhwc_kernel takes a chunk of 64 channels of x and
// region after region: a rectangle of pixels of x (or some whole images), with the box of pixels of y that these meet.
//
//   1. z of the box's own pixels, in shared memory; zeros elsewhere.
//   2. The gradient of y and the pointwise weights stream past in stages of 64 bytes of y's channels.  Each stage goes
//      into two products: dz = dy w_pw, whose sums stay in registers, and dw_pw = dy' z, complete for the stage, which
//      is added to the block's sums in the workspace.  The block reads those back itself, so nobody waits for them.
//   3. dz, rounded, takes the place of z.  A warp takes pixels of x and gathers what their taps meet: one number of dz
//      for dx and for dw_dw alike.  dx goes through the function on load.
//
// Each pixel of y is one block's own: of z and of dw_pw nothing is made twice.  dz is, around a region: 1.27 times for
// 14x14 pixels, once for whole images.
//
// Bytes, s an element: 2 s Y + s Y for the gradient of y, then x once, dy once and dx once from DRAM, s (2 X + Y). From
// L2 dy once more for each chunk, w_pw for each region, and the sums of dw_pw: 512 bytes read and written for each
// channel of y and region, beside 512 of dy (256 pixels, 16 bits).  All sums are added in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "reduce.cuh"
#include "separable_fprop_nhwc.cuh"
#include "through_statistics.cuh"

namespace xsep::cuda {
namespace separable {

// A tile of kM pixels of y; a warp multiplies kM / 4 (kM / 2) pixels with 32 channels of x.
template <class Element, int kPixels, bool kOnTensorCores>
struct BackwardTile {
  using T = Element;
  static constexpr int kM = kPixels, kN = 64;
  static constexpr bool kMma = kOnTensorCores, kVectors = true;
  static constexpr int kV = 4;                                                               // channels, of z
  static constexpr int kVector = kVectorBytes / sizeof(T), kK = kStageRowBytes / sizeof(T);  // elements
  static constexpr int kWarps = kM > 128 ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kWarpsN = 2, kWarpN = kN / kWarpsN, kWarpM = kM / (kWarps / kWarpsN);
  static constexpr int kRows = kWarpM / 8, kCols = kWarpN / 4;  // sums of a lane, of dz
  static constexpr int kResident = kWarps > 4 ? 2 : 3;          // blocks of a multiprocessor, where memory allows
  static constexpr int kPitch = kN * sizeof(T) + kVectorBytes;  // of z and dz
  static constexpr int kStages = 2, kStageBytes = (kM + kN) * kStagePitch;
  static constexpr int kRegionBytes = 64;
  static constexpr int kSharedBytes =
      kM * (kPitch + static_cast<int>(sizeof(int))) + kStages * kStageBytes + kRegionBytes;

  // Of dw_pw a warp makes kWarpK channels of y of a stage times 16 of x.
  static constexpr int kWarpK = kK / (kWarps / 4);
  static_assert(kWarpM % 16 == 0 && (!kMma || kWarpK % 16 == 0), "whole products of tensor cores");
};

// A stretch of an axis of x, and the positions of y that it meets or that are its own.
struct Stretch {
  int first, count;  // of x
  int from, to;      // of y
  int own_from, own_to;
};

// One axis of x, cut into stretches.
struct Cuts {
  int32_t extent, out, stride, pad, dilation;
  int32_t length;  // of a stretch
  Divider stretches;

  Cuts() = default;
  Cuts(int32_t extent, int32_t out, int32_t stride, int32_t pad, int32_t dilation, int32_t length)
      : extent(extent),
        out(out),
        stride(stride),
        pad(pad),
        dilation(dilation),
        length(length),
        stretches((extent - 1) / length + 1) {}
};

// Strides are 1 or 2: shifts round down.
__device__ __forceinline__ Stretch stretch(const Cuts& cuts, int number) {
  const int shift = cuts.stride - 1, up = cuts.stride - 1;
  Stretch s;
  s.first = number * cuts.length;
  const int end = smaller(s.first + cuts.length, cuts.extent);
  s.count = end - s.first;
  const bool last = number == cuts.stretches.by - 1;
  s.own_from = smaller((s.first + up) >> shift, cuts.out);
  s.own_to = last ? cuts.out : smaller((end + up) >> shift, cuts.out);
  const int from = larger((s.first + cuts.pad - 2 * cuts.dilation + up) >> shift, 0);
  const int to = smaller((end - 1 + cuts.pad) >> shift, cuts.out - 1) + 1;
  s.from = s.own_from, s.to = s.own_to;
  if (from < to) {
    const bool owns = s.own_from < s.own_to;
    s.from = owns ? smaller(from, s.own_from) : from;
    s.to = owns ? larger(to, s.own_to) : to;
  }
  return s;
}

template <class T>
struct BackwardParams {
  FpropParams<T> z;       // how z is made; its y and w_pw are not used
  const T *dy, *w_pw_t;   // [pixels][K], [C][K]
  T* dx;                  // dense
  float *sums, *sums_pw;  // [regions][9 or 11][C], [parts][K][C]
  Cuts rows, cols;
  int32_t N, images;  // images: of a region
  int32_t regions, parts;
  Divider chunks;
};

// Where a region lies.
struct Region {
  Stretch rows, cols;
  int image, images;

  __device__ __forceinline__ int box_rows() const { return rows.to - rows.from; }
  __device__ __forceinline__ int box_cols() const { return cols.to - cols.from; }
  __device__ __forceinline__ int box() const { return images * box_rows() * box_cols(); }
};

template <class T>
__device__ __forceinline__ Region region(const BackwardParams<T>& p, int number) {
  Region at;
  at.cols = stretch(p.cols, take(number, p.cols.stretches));
  at.rows = stretch(p.rows, take(number, p.rows.stretches));
  at.image = number * p.images;
  at.images = smaller(p.images, p.N - at.image);
  return at;
}

// z of rows p_from to p_to and columns q_from to q_to of the box's images, where they lie in it.
template <class Tile>
__device__ __forceinline__ void make_z_of(const BackwardParams<typename Tile::T>& p, const Region& at, int channels,
                                          int p_from, int p_to, int q_from, int q_to, char* z) {
  using T = typename Tile::T;
  constexpr int kLanes = Tile::kN / Tile::kV, kRun = 8;
  const int rows = p_to - p_from, runs = (q_to - q_from - 1) / kRun + 1, items = at.images * rows * runs;
  const int channel = channels + threadIdx.x % kLanes * Tile::kV;
  if (q_from >= q_to || channel >= p.z.C) return;
  for (int item = threadIdx.x / kLanes; item < items; item += Tile::kThreads / kLanes) {
    const int line = item / runs, n = line / rows, row = p_from + line - n * rows;
    const int q = q_from + (item - line * runs) * kRun, count = smaller(q_to - q, kRun);
    const int pixel = ((at.image + n) * p.z.P.by + row) * p.z.Q.by + q;
    const int in_box = (n * at.box_rows() + row - at.rows.from) * at.box_cols() + q - at.cols.from;
    char* const to = z + in_box * Tile::kPitch + threadIdx.x % kLanes * Tile::kV * static_cast<int>(sizeof(T));
    if (p.z.slides) {
      slide<Tile>(p.z, channel, pixel, count, to, Tile::kPitch);
    } else {
      gather<Tile>(p.z, channel, pixel, count, to, Tile::kPitch);
    }
  }
}

// Asks for 64 bytes of y's channels from k on: of the box's pixels, and of the weights of the chunk.  What does not
// exist is zeros, since it is multiplied.
template <class Tile>
__device__ __forceinline__ void fetch_stage(const BackwardParams<typename Tile::T>& p, const int* pixels, int channels,
                                            int k, char* stage) {
  constexpr int kPerRow = kStageRowBytes / kVectorBytes;
  static_assert((Tile::kM + Tile::kN) * kPerRow % Tile::kThreads == 0, "the same number for each thread");
#pragma unroll
  for (int i = 0; i < (Tile::kM + Tile::kN) * kPerRow / Tile::kThreads; ++i) {
    const int number = i * Tile::kThreads + threadIdx.x, row = number / kPerRow, column = number % kPerRow;
    const int from = k + column * Tile::kVector, weights = channels + row - Tile::kM;
    const int pixel = row < Tile::kM ? pixels[row] : weights < p.z.C ? weights : -1;
    char* const to = stage + row * kStagePitch + column * kVectorBytes;
    if (pixel >= 0 && from < p.z.K) {
      copy_async<kVectorBytes>(to, (row < Tile::kM ? p.dy : p.w_pw_t) + int64_t{pixel} * p.z.K + from);
    } else {
      *reinterpret_cast<Vec<uint32_t, 4>*>(to) = Vec<uint32_t, 4>{};
    }
  }
}

// Adds to the block's sums of dw_pw, [K][C] from channel `channels` on, what a stage gives: kWarpK channels of y from k
// on times 16 of x.  The first region's are stored.
template <class Tile>
__device__ __forceinline__ void add_to_dw_pw(const char* dy, const char* z, int k, int K, int channel, int C,
                                             bool first, float* sums) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % 32, group = lane / 4, number = lane % 4;
  if constexpr (Tile::kMma) {
    constexpr int kTiles = Tile::kWarpK / 16;
    float made[2 * kTiles][4] = {};
    dy += (lane / 16 * 8 + lane % 8) * kStagePitch + lane / 8 % 2 * kVectorBytes;
    z += lane % 16 * Tile::kPitch + lane / 16 * kVectorBytes;
#pragma unroll 2
    for (int pixel = 0; pixel < Tile::kM; pixel += 16) {
      uint32_t pair[4];
      load_transposed(pair, z + pixel * Tile::kPitch);
      const uint32_t b[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        load_transposed(a, dy + pixel * kStagePitch + 32 * i);
#pragma unroll
        for (int h = 0; h < 2; ++h) multiply_add<T>(&made[2 * i][2 * h], &made[2 * i + 1][2 * h], a, b[h]);
      }
    }
    channel += 2 * number, k += group;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (k + 8 * i >= K || channel + 8 * h >= C) continue;
        auto* const to = reinterpret_cast<Vec<float, 2>*>(sums + int64_t{k + 8 * i} * C + channel + 8 * h);
        Vec<float, 2> sum{{made[i][2 * h], made[i][2 * h + 1]}};
        if (!first) {
          const Vec<float, 2> before = load_own(to);
          sum.at[0] += before.at[0], sum.at[1] += before.at[1];
        }
        store(to, sum);
      }
    }
  } else {
    constexpr int kOfLane = Tile::kWarpK / 8;
    float made[kOfLane][4] = {};
    dy += group * sizeof(T), z += 4 * number * sizeof(T);
#pragma unroll 4
    for (int pixel = 0; pixel < Tile::kM; ++pixel) {
      const auto b = *reinterpret_cast<const Vec<T, 4>*>(z + pixel * Tile::kPitch);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const float a = widen(reinterpret_cast<const T*>(dy + pixel * kStagePitch)[8 * i]);
#pragma unroll
        for (int v = 0; v < 4; ++v) made[i][v] += a * widen(b.at[v]);
      }
    }
    channel += 4 * number, k += group;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      if (k + 8 * i >= K || channel >= C) continue;
      auto* const to = reinterpret_cast<Vec<float, 4>*>(sums + int64_t{k + 8 * i} * C + channel);
      Vec<float, 4> sum{{made[i][0], made[i][1], made[i][2], made[i][3]}};
      if (!first) {
        const Vec<float, 4> before = load_own(to);
#pragma unroll
        for (int v = 0; v < 4; ++v) sum.at[v] += before.at[v];
      }
      store(to, sum);
    }
  }
}

// dz of a warp's pixels and channels, rounded, into shared memory.
template <class Tile, int kRows, int kCols>
__device__ __forceinline__ void put_dz(const float (&dz)[kRows][kCols], char* to) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % 32;
  to += lane / 4 * Tile::kPitch + lane % 4 * 2 * static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kCols; j += 2) {
      auto* const pair = reinterpret_cast<Vec<T, 2>*>(to + 8 * i * Tile::kPitch + 4 * j * static_cast<int>(sizeof(T)));
      *pair = Vec<T, 2>{{narrow<T>(dz[i][j]), narrow<T>(dz[i][j + 1])}};
    }
  }
}

// Through a ReLU between the convolutions: zeros where z is not above zero.
template <class Tile>
__device__ __forceinline__ void mask_dz(const char* z, char* dz) {
  using Vector = Vec<typename Tile::T, Tile::kVector>;
  for (int i = threadIdx.x; i < Tile::kM * Tile::kPitch / kVectorBytes; i += Tile::kThreads) {
    const Vector of_z = reinterpret_cast<const Vector*>(z)[i];
    Vector& masked = reinterpret_cast<Vector*>(dz)[i];
#pragma unroll
    for (int v = 0; v < Tile::kVector; ++v) {
      if (widen(of_z.at[v]) <= 0) masked.at[v] = typename Tile::T{};
    }
  }
}

// Step 3, for two channels of a lane.  A warp takes runs of pixels; `dw`, `dscale` and `dshift` are its sums.
template <class Tile>
__device__ __forceinline__ void gather_dx(const BackwardParams<typename Tile::T>& p, const Region& at, int channel,
                                          const char* dz, float (&dw)[9][2], float (&dscale)[2], float (&dshift)[2]) {
  using T = typename Tile::T;
  constexpr int kV = 2, kRun = 4;
  float w[9][kV];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
    for (int v = 0; v < kV; ++v) w[tap][v] = widen(load(p.z.w_dw + int64_t{channel + v} * 9 + tap));
  }
  const Affine<kV> affine(p.z.on_load, channel);
  const char* const x = reinterpret_cast<const char*>(p.z.x + channel);
  dz += threadIdx.x % 32 * kV * sizeof(T);
  const int runs = (at.cols.count - 1) / kRun + 1, items = at.images * at.rows.count * runs;
  for (int item = threadIdx.x / 32; item < items; item += Tile::kWarps) {
    const int line = item / runs, n = line / at.rows.count, h = at.rows.first + line - n * at.rows.count;
    const int first = at.cols.first + (item - line * runs) * kRun;
    const int count = smaller(at.cols.first + at.cols.count - first, kRun);
    const char* const from = x + (at.image + n) * p.z.image + h * p.z.row + first * p.z.col;
    Pixel<T, kV> pixels[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) pixels[i].load_if(i < count, from + i * p.z.col);
    int row[3];  // of the box, or -1
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const int above = h + p.z.pad_top - r * p.z.dilation_h, in_box = (above >> (p.z.stride_h - 1)) - at.rows.from;
      const bool meets = !(above & (p.z.stride_h - 1)) && below(in_box, at.box_rows());
      row[r] = meets ? (n * at.box_rows() + in_box) * at.box_cols() : -1;
    }
    T* to = p.dx + (int64_t{at.image + n} * p.z.H + h) * p.z.W * p.z.C + int64_t{first} * p.z.C + channel;
#pragma unroll
    for (int i = 0; i < kRun; ++i, to += p.z.C) {
      if (i >= count) break;
      float value[kV], u[kV], du[kV] = {};
      pixels[i].widen_to(value);
#pragma unroll
      for (int v = 0; v < kV; ++v) u[v] = value[v];
      if (p.z.has_on_load) affine.apply(u, true);
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const int before = first + i + p.z.pad_left - s * p.z.dilation_w;
        const int column = (before >> (p.z.stride_w - 1)) - at.cols.from;
        if ((before & (p.z.stride_w - 1)) || !below(column, at.box_cols())) continue;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          if (row[r] < 0) continue;
          const auto met = *reinterpret_cast<const Vec<T, kV>*>(dz + (row[r] + column) * Tile::kPitch);
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            const float d = widen(met.at[v]);
            du[v] += d * w[3 * r + s][v];
            dw[3 * r + s][v] += d * u[v];
          }
        }
      }
      if (p.z.has_on_load) {
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          const float gradient = affine.passes(affine.before_relu(value[v], v)) ? du[v] : 0.f;
          dscale[v] += gradient * (value[v] - affine.center[v]);
          dshift[v] += gradient;
          du[v] = gradient * affine.scale[v];
        }
      }
      nhwc::store_pixel<T, kV>(reinterpret_cast<char*>(to), du);
    }
  }
}

// Turing, whose products of 16 channels are two, needs a few registers more, and holds one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBackwardResident = 1;
#else
constexpr int kBackwardResident = 4;
#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads,
                                  Tile::kResident < kBackwardResident ? Tile::kResident : kBackwardResident)
    separable_backward_nhwc_kernel(const BackwardParams<typename Tile::T> p) {
  using T = typename Tile::T;
  constexpr int kM = Tile::kM, kN = Tile::kN, kRows = Tile::kRows, kCols = Tile::kCols;
  char* const z = shared_memory<char>();  // [kM][kPitch]; later dz
  char* const stages = z + kM * Tile::kPitch;
  // Where the block is lies in shared memory too: registers are for sums.
  Region& at = *reinterpret_cast<Region*>(stages + Tile::kStages * Tile::kStageBytes);
  int* const pixels = reinterpret_cast<int*>(stages + Tile::kStages * Tile::kStageBytes + Tile::kRegionBytes);  // or -1
  static_assert(sizeof(Region) <= Tile::kRegionBytes);
  static_assert(kM * Tile::kPitch <= Tile::kStages * Tile::kStageBytes, "z has room where stages were");
  float* const of_warps = reinterpret_cast<float*>(stages);  // [kWarps][11][kN], when no stage is needed any more
  static_assert(Tile::kWarps * 11 * kN * static_cast<int>(sizeof(float)) <= Tile::kStages * Tile::kStageBytes);
  int part = static_cast<int>(blockIdx.x);
  const int channels = take(part, p.chunks) * kN, C = p.z.C, K = p.z.K;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / Tile::kWarpsN * Tile::kWarpM, warp_column = warp % Tile::kWarpsN * Tile::kWarpN;

  for (int number = part; number < p.regions; number += p.parts) {
    if (threadIdx.x == 0) at = region(p, number);
    __syncthreads();  // it is known where this one is, and nobody reads any more what the one before left
    const int box_rows = at.box_rows(), box_cols = at.box_cols(), box = at.box();
    for (int i = threadIdx.x; i < kM; i += Tile::kThreads) {
      const int line = i / larger(box_cols, 1), n = line / larger(box_rows, 1);
      const int row = at.rows.from + line - n * box_rows, col = at.cols.from + i - line * box_cols;
      pixels[i] = i < box ? ((at.image + n) * p.z.P.by + row) * p.z.Q.by + col : -1;
    }
    for (int i = threadIdx.x; i < kM * Tile::kPitch / kVectorBytes; i += Tile::kThreads) {
      reinterpret_cast<Vec<uint32_t, 4>*>(z)[i] = Vec<uint32_t, 4>{};
    }
    __syncthreads();  // pixels are there, and zeros
    fetch_stage<Tile>(p, pixels, channels, 0, stages);
    copies_group();
    make_z_of<Tile>(p, at, channels, at.rows.own_from, at.rows.own_to, at.cols.own_from, at.cols.own_to, z);

    float dz[kRows][kCols] = {};
    int stage = 0;
    for (int k = 0; k < K; k += Tile::kK) {
      copies_done_but<0>();
      __syncthreads();  // this stage is there, z too, and nobody reads the other one
      const char* const dy = stages + stage * Tile::kStageBytes;
      stage ^= 1;
      if (k + Tile::kK < K) fetch_stage<Tile>(p, pixels, channels, k + Tile::kK, stages + stage * Tile::kStageBytes);
      copies_group();
      multiply<Tile>(dy + warp_row * kStagePitch, kStagePitch, dy + (kM + warp_column) * kStagePitch, dz);
      const int in_stage = warp / 4 * Tile::kWarpK, column = warp % 4 * 16;
      add_to_dw_pw<Tile>(dy + in_stage * sizeof(T), z + column * sizeof(T), k + in_stage, K, channels + column, C,
                         number == part, p.sums_pw + int64_t{part} * K * C);
    }
    __syncthreads();  // z is not needed any more
    put_dz<Tile>(dz, z + warp_row * Tile::kPitch + warp_column * static_cast<int>(sizeof(T)));
    if (p.z.relu) {  // z again, of the whole box, where stages were
      make_z_of<Tile>(p, at, channels, at.rows.from, at.rows.to, at.cols.from, at.cols.to, stages);
      __syncthreads();  // it is there, and dz
      mask_dz<Tile>(stages, z);
    }
    __syncthreads();  // dz is there

    const int channel = channels + 2 * lane, count = p.z.has_on_load ? 11 : 9;
    float dw[9][2] = {}, dscale[2] = {}, dshift[2] = {};
    if (channel < C) gather_dx<Tile>(p, at, channel, z, dw, dscale, dshift);
    const auto leave = [&](int sum, const float (&values)[2]) {
#pragma unroll
      for (int v = 0; v < 2; ++v) of_warps[(warp * 11 + sum) * kN + 2 * lane + v] = values[v];
    };
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) leave(tap, dw[tap]);
    leave(9, dscale), leave(10, dshift);
    __syncthreads();  // the warps' sums are there
    for (int i = threadIdx.x; i < count * kN; i += Tile::kThreads) {
      if (channels + i % kN >= C) continue;
      float sum = of_warps[i];
      for (int other = 1; other < Tile::kWarps; ++other) sum += of_warps[other * 11 * kN + i];
      store(p.sums + (int64_t{number} * count + i / kN) * C + channels + i % kN, sum);
    }
  }
}

// How a call is cut.
struct Regions {
  int32_t rows = 0, cols = 0, images = 1;  // of x; rows are 0 where no region fits
  int32_t count = 0;
};

// The fewest regions whose boxes have at most `most` pixels of y.
inline Regions cut_regions(const ConvShape& s, int32_t most) {
  // A stretch of n positions of x comes with at most (n - 1 + extra) / stride + 1 of y.
  const auto extra = [](int32_t before, int32_t after, int32_t dilation) {
    return std::max(2 * dilation - before, 0) + before + std::max(after - 2 * dilation, 0);
  };
  const int32_t extra_h = extra(s.pad_top, s.pad_bottom, s.dilation_h);
  const int32_t extra_w = extra(s.pad_left, s.pad_right, s.dilation_w);
  Regions best;
  int64_t fewest = INT64_MAX;
  for (int32_t parts = 1; parts <= s.W; parts += parts / 8 + 1) {
    const int32_t cols = (s.W - 1) / parts + 1, box_cols = std::min((cols - 1 + extra_w) / s.stride_w + 1, s.Q());
    const int32_t across = parts == 1 ? s.Q() : box_cols, down = most / across;
    const int32_t rows = down >= s.P() ? s.H : std::min(down * s.stride_h - extra_h, s.H - 1);
    if (rows < 1) continue;
    const int64_t regions = int64_t{(s.H - 1) / rows + 1} * ((s.W - 1) / cols + 1);
    if (regions >= fewest) continue;
    fewest = regions;
    best.rows = (s.H - 1) / static_cast<int32_t>((s.H - 1) / rows + 1) + 1, best.cols = cols;
  }
  if (best.rows == 0) return best;
  if (fewest == 1) best.images = std::clamp(most / (s.P() * s.Q()), 1, std::max(s.N, 1));
  const int64_t count = fewest * ((s.N - 1) / best.images + 1);
  best.count = s.N == 0 ? 0 : static_cast<int32_t>(std::min<int64_t>(count, INT32_MAX));
  return best;
}

// Calls f with the largest tile that fits, holds a region, and gives most multiprocessors a block.
template <class T, bool kMma, class F>
auto with_backward_tile(const SeparableArgs& args, const Device& device, F&& f) {
  if constexpr (kMma) {
    using Large = BackwardTile<T, 256, true>;
    const Regions cut = cut_regions(args.shape, Large::kM);
    const int64_t blocks = int64_t{cut.count} * ((args.shape.C - 1) / Large::kN + 1);
    const bool alone = cut_regions(args.shape, 128).rows == 0;
    if (Large::kSharedBytes <= device.shared_bytes && (alone || blocks >= device.multiprocessors)) return f(Large{});
    return f(BackwardTile<T, 128, true>{});
  } else {
    return f(BackwardTile<T, 64, false>{});
  }
}

// How a call uses its workspace: the whole gradient of y, then the sums.
template <class Tile>
struct BackwardPlan {
  using T = typename Tile::T;
  Regions cut;
  int32_t chunks, parts;
  int64_t gradient_bytes, sums_bytes, sums_pw_bytes;

  BackwardPlan(const SeparableArgs& args, const Device& device) : cut(cut_regions(args.shape, Tile::kM)) {
    const ConvShape& s = args.shape;
    const auto lines = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    chunks = (s.C - 1) / Tile::kN + 1;
    const int32_t most = std::max(device.multiprocessors * Tile::kResident / chunks, 1);
    const int32_t rounds = (cut.count - 1) / most + 1;
    parts = cut.count == 0 ? 0 : (cut.count - 1) / rounds + 1;
    gradient_bytes = args.mean_made ? lines(pixels(args) * args.K * static_cast<int64_t>(sizeof(T))) : 0;
    sums_bytes = lines(int64_t{cut.count} * (args.on_load.any() ? 11 : 9) * s.C * static_cast<int64_t>(sizeof(float)));
    sums_pw_bytes = int64_t{parts} * args.K * s.C * static_cast<int64_t>(sizeof(float));
  }
};

template <class T, bool kMma>
std::string why_not_backward(const SeparableArgs& args, const Device& device) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  const ConvShape& s = args.shape;
  if (!args.backward) return "it makes gradients";
  if (args.activation == Activation::kRelu6) return "it has no gradients of ReLU6";
  if (s.R != 3 || s.S != 3) return "the filter is not 3x3";
  if (s.stride_h > 2 || s.stride_w > 2) return "a stride is above 2";
  const std::string reason = why_not_any<T, kMma>(args, device);
  if (!reason.empty()) return reason;
  if (s.C % kVector != 0 || args.K % kVector != 0) {
    return "the channels are not multiples of " + std::to_string(kVector);
  }
  const std::string x = nhwc::why_not<T>(args.x, "x", 4);
  if (!x.empty()) return x;
  for (const void* tensor : {args.dy, args.y_made, args.w_pw_t, static_cast<const void*>(args.dx)}) {
    if (!aligned(tensor, kVectorBytes)) return "a tensor is not aligned to 16 bytes";
  }
  if (!aligned(args.w_dw, 4 * sizeof(T))) return "w_dw is not aligned";
  return with_backward_tile<T, kMma>(args, device, [&](auto tile) -> std::string {
    using Tile = decltype(tile);
    if (Tile::kSharedBytes > device.shared_bytes) return "the card has too little shared memory";
    const Regions cut = cut_regions(s, Tile::kM);
    if (cut.rows == 0) return "what one pixel of x meets takes more than " + std::to_string(Tile::kM) + " pixels of y";
    if (int64_t{cut.count} * ((s.C - 1) / Tile::kN + 1) >= INT32_MAX) return "too many pixels";
    return "";
  });
}

template <class T, bool kMma>
int64_t backward_workspace_bytes(const SeparableArgs& args, const Device& device) {
  return with_backward_tile<T, kMma>(args, device, [&](auto tile) {
    const BackwardPlan<decltype(tile)> plan(args, device);
    return plan.gradient_bytes + plan.sums_bytes + plan.sums_pw_bytes;
  });
}

template <class T, bool kMma>
cudaError_t run_backward(const SeparableArgs& args, const Device& device, cudaStream_t stream) {
  const ConvShape& s = args.shape;
  return with_backward_tile<T, kMma>(args, device, [&](auto tile) {
    using Tile = decltype(tile);
    const BackwardPlan<Tile> plan(args, device);
    char* const workspace = static_cast<char*>(args.workspace);
    BackwardParams<T> p{};
    p.z = fprop_params<T>(args);
    p.dy = static_cast<const T*>(args.dy), p.w_pw_t = static_cast<const T*>(args.w_pw_t);
    p.dx = static_cast<T*>(args.dx);
    p.sums = reinterpret_cast<float*>(workspace + plan.gradient_bytes);
    p.sums_pw = reinterpret_cast<float*>(workspace + plan.gradient_bytes + plan.sums_bytes);
    p.rows = Cuts(s.H, s.P(), s.stride_h, s.pad_top, s.dilation_h, plan.cut.rows);
    p.cols = Cuts(s.W, s.Q(), s.stride_w, s.pad_left, s.dilation_w, plan.cut.cols);
    p.N = s.N, p.images = plan.cut.images, p.regions = plan.cut.count, p.parts = plan.parts;
    p.chunks = Divider(plan.chunks);
    if (p.regions > 0) {
      if (args.mean_made) {
        T* const whole = reinterpret_cast<T*>(workspace);
        const cudaError_t error = through_statistics(args, static_cast<int32_t>(pixels(args)), whole, stream);
        if (error != cudaSuccess) return error;
        p.dy = whole;
      }
      const cudaError_t error =
          launch(separable_backward_nhwc_kernel<Tile>, dim3(static_cast<unsigned>(p.parts * plan.chunks)),
                 dim3(Tile::kThreads), static_cast<size_t>(Tile::kSharedBytes), stream, p);
      if (error != cudaSuccess) return error;
    }
    Reduction<T> of_dw;
    of_dw.partials = p.sums, of_dw.parts = p.regions, of_dw.channels = s.C, of_dw.taps = 9;
    of_dw.sums = args.on_load.any() ? 11 : 9, of_dw.channels_last = true;
    of_dw.dw = static_cast<T*>(args.dw_dw), of_dw.dscale = args.dscale, of_dw.dshift = args.dshift;
    const cudaError_t error = reduce_partials(of_dw, stream);
    if (error != cudaSuccess) return error;
    Reduction<T> of_dw_pw;
    of_dw_pw.partials = p.sums_pw, of_dw_pw.parts = p.parts;
    of_dw_pw.channels = args.K, of_dw_pw.taps = of_dw_pw.sums = s.C;
    of_dw_pw.dw = static_cast<T*>(args.dw_pw);
    return reduce_partials(of_dw_pw, stream);
  });
}

}  // namespace separable

template <class T>
SeparableKernel separable_backward_nhwc() {
  return {"separable_backward_nhwc", separable::why_not_backward<T, false>,
          separable::backward_workspace_bytes<T, false>, separable::run_backward<T, false>};
}

template <class T>
SeparableKernel separable_backward_nhwc_mma() {
  constexpr bool kMma = sizeof(T) == 2;  // of float there is no such family
  return {"separable_backward_nhwc_mma", separable::why_not_backward<T, kMma>,
          separable::backward_workspace_bytes<T, kMma>, separable::run_backward<T, kMma>};
}

}  // namespace xsep::cuda
