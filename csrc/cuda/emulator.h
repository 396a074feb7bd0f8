// Runs the CUDA sources on the host: every kernel unmodified, one fiber per thread, blocks one after another.
//
// device.h includes this file where XSEP_EMULATE_CUDA is defined and g++ compiles the .cu files as C++ (-x c++
// -Wno-unknown-pragmas, for #pragma unroll); emulator.cpp is linked with them.  It finds what a GPU would not tell:
//
//   a missing barrier          shared memory starts as NaN, and a warp runs from barrier to barrier before the next
//                              one starts, or all run abreast, in an order that can be changed: it reads NaN or stale
//                              data in some order
//   a missing copies_done()    the destination of copy_async() is NaN until then
//   a missing tma_wait()       likewise, of tma_load(); what would wait for ever is an Error, and so is a box that the
//                              hardware does not take
//   an access out of bounds    with AddressSanitizer: every access touches its own bytes, shared memory has exactly
//                              its size
//   a misaligned access, global access to shared memory, divergent barriers, a lane that a shuffle waits for in vain,
//   a launch beyond the limits of a device: an Error that says where, thrown by launch()
//
// and counts global traffic, but for the boxes of tma_load(), see start_counting().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../dtype.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

namespace xsep::cuda::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which threads run between two barriers, and blocks: "ascending" and "descending", in which a warp that
// shuffles or votes goes on before the next one starts, or a number, the seed of a shuffle that differs from barrier to
// barrier, in which all threads come to a shuffle or vote before the first goes on.  The environment variable
// XSEP_EMULATE_ORDER is its first value.
void set_order(const std::string& order);

// Global traffic of a launch.
//
// The emulator runs the lanes of a warp one after another, so which accesses one instruction of a warp makes is a
// model: the k-th access of each lane from the same source line since the lane's last barrier, shuffle or vote.  Where
// lanes take the same path this is what the hardware does.  A lane that skips an access which others make at that line
// is paired with their earlier ones until the next barrier: bytes, counts and distinct sectors stay exact, sectors
// are then those of a warp whose lanes drift apart.  Accesses of a block are replayed in the order of their number
// since the barrier, all warps abreast, through a model of the L1 of one multiprocessor: lines of 128 bytes whose four
// sectors are filled one by one, fully associative, least recently used first out, loads only (stores write through).
struct Traffic {
  int64_t accesses[5] = {};      // of threads, by log2 of their width in bytes
  int64_t warp_accesses = 0;     // instructions of warps
  int64_t sectors = 0;           // of 32 bytes: the distinct ones of each warp access, summed
  int64_t distinct_sectors = 0;  // of the launch: no kernel can do with fewer

  int64_t bytes() const;
};

struct Launch {
  std::string kernel;  // empty where the linker keeps no name of it
  dim3 grid, block;
  size_t shared_bytes;
  Traffic loads = {}, stores = {};
  int64_t load_sectors_after_cache = 0;
};

struct CacheModel {
  int64_t bytes = 128 * 1024;
  int multiprocessors = 1;  // block b runs on multiprocessor b % multiprocessors, each with a cache that starts empty
  int resident_blocks = 1;  // that run abreast on a multiprocessor
};

void start_counting(const CacheModel& cache = {});
std::vector<Launch> stop_counting();  // the launches since start_counting()

// What follows is for the functions that kernels call.

// A place in the source, for messages.
struct Site {
  const char* file;
  int line;
  const char* function;

  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                    const char* function = __builtin_FUNCTION()) {
  return {file, line, function};
}

struct Block {
  uintptr_t shared = 0;
  size_t shared_bytes = 0;
  bool counting = false;
};
inline Block block;  // that runs

enum class Direction { kLoad, kStore };
enum class WarpOp { kShuffle, kVote, kSync };

struct Config {
  dim3 grid, block;
  size_t shared_bytes;
  const void* kernel;
  void (*body)(const void* arguments);
  const void* arguments;
};

// What tma_load() copies: in elements, channels first; strides in bytes.
struct Box {
  const void* data;
  int64_t element_bytes, extents[4], strides[4], from[4];
  int size[2];
};

void run(const Config& config);
void check_global(const void* p, int bytes, Direction direction, const Site& site);
void barrier(const Site& site);
void copy_async(void* shared, const void* global, int bytes, const Site& site);
void copies_done();
void copies_group();
void copies_done_but(int newest);
void tma_init(uint64_t* barrier, const Site& site);
void tma_load(void* shared, const Box& box, uint64_t* barrier, int bytes, const Site& site);
void tma_wait(uint64_t* barrier, int parity, const Site& site);

// Waits for the lanes in mask.  kShuffle: the value of lane source; kVote: the lanes whose value is not zero.
uint64_t exchange(WarpOp op, unsigned mask, uint64_t value, int source, const Site& site);

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize; }

template <class T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(WarpOp::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The accesses of one instruction of a thread.
template <class V>
constexpr bool is_access_v =
    std::is_trivially_copyable_v<V> && (sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);

inline void global_access(const void* p, int bytes, Direction direction, const Site& site) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (block.counting || at % bytes != 0 || at - block.shared < block.shared_bytes) {
    check_global(p, bytes, direction, site);
  }
}

}  // namespace xsep::cuda::emulator

inline void __syncthreads(const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  xsep::cuda::emulator::barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  xsep::cuda::emulator::exchange(xsep::cuda::emulator::WarpOp::kSync, mask, 0, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  const int first = xsep::cuda::emulator::lane() & ~(width - 1);
  return xsep::cuda::emulator::shuffle(mask, value, first + (source & (width - 1)), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  const int lane = xsep::cuda::emulator::lane();
  const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
  return xsep::cuda::emulator::shuffle(mask, value, inside ? lane + static_cast<int>(delta) : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  const int lane = xsep::cuda::emulator::lane(), source = lane ^ lane_mask;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return xsep::cuda::emulator::shuffle(mask, value, inside ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  return static_cast<unsigned>(
      xsep::cuda::emulator::exchange(xsep::cuda::emulator::WarpOp::kVote, mask, predicate != 0, 0, site));
}

inline int __any_sync(unsigned mask, int predicate,
                      const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      const xsep::cuda::emulator::Site& site = xsep::cuda::emulator::here()) {
  return __ballot_sync(mask, predicate == 0, site) == 0;
}

// The same names as in device.h, with the same meaning.
namespace xsep::cuda {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::block.shared);
}

template <class V>
V load(const V* p, const emulator::Site& site = emulator::here()) {
  static_assert(emulator::is_access_v<V>);
  emulator::global_access(p, sizeof(V), emulator::Direction::kLoad, site);
  V value;
  std::memcpy(static_cast<void*>(&value), p, sizeof(V));
  return value;
}

template <class V>
V load_own(const V* p, const emulator::Site& site = emulator::here()) {
  return load(p, site);
}

template <class V>
void store(V* p, const V& value, const emulator::Site& site = emulator::here()) {
  static_assert(emulator::is_access_v<V>);
  emulator::global_access(p, sizeof(V), emulator::Direction::kStore, site);
  std::memcpy(static_cast<void*>(p), &value, sizeof(V));
}

template <int kBytes>
void copy_async(void* shared, const void* global, const emulator::Site& site = emulator::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, kBytes, site);
}

inline void copies_done() { emulator::copies_done(); }
inline void copies_group() { emulator::copies_group(); }
template <int kNewest>
void copies_done_but() {
  emulator::copies_done_but(kNewest);
}

template <class T>
accumulate_t<T> widen(T value) {
  return to_float(value);
}

template <class T>
T narrow(accumulate_t<T> value) {
  return from_float<T>(value);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  static_assert((0 + ... + sizeof(Params)) <= 4096, "a kernel's parameters take at most 4 KB");
  static_assert((true && ... && std::is_trivially_copyable_v<Params>), "a kernel's parameters are copied as bytes");
  const auto call = [&] { kernel(static_cast<Params>(args)...); };
  const auto body = [](const void* arguments) { (*static_cast<decltype(call)*>(arguments))(); };
  emulator::run({grid, block, shared_bytes, reinterpret_cast<const void*>(kernel), body, &call});
  return cudaSuccess;
}

}  // namespace xsep::cuda
