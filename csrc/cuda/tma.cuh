// Bulk copies of boxes of a tensor into shared memory (TMA), which sm_90 and newer have: a thread asks for a box, the
// copy engine finds the addresses, fills what lies outside of the tensor with zeros, and tells a barrier in shared
// memory when all bytes are there.
//
// One box at a time belongs to a barrier.  A thread may ask for the next one after a __syncthreads() that follows the
// last read of the one before; whoever reads a box calls tma_wait() first, with the parity of the number of boxes that
// the barrier has had before: 0, 1, 0, ...
//
// This and device.h are all that knows GPU or emulator.
#pragma once

#include <cstdint>
#include <string>

#include "device.h"

#if defined(XSEP_EMULATE_CUDA)
#define XSEP_HAS_TMA 1
#elif !defined(__CUDACC_RTC__) && CUDART_VERSION >= 12000
#include <cuda.h>  // types alone: what it declares is looked up in the driver
#define XSEP_HAS_TMA 1
#else
#define XSEP_HAS_TMA 0
#endif

// Kernels take a TensorMap by its address among their parameters.
#if XSEP_HAS_TMA && !defined(XSEP_EMULATE_CUDA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700)
#define XSEP_GRID_CONSTANT __grid_constant__
#else
#define XSEP_GRID_CONSTANT
#endif

namespace xsep::cuda {

// What is copied from: channels, columns, rows, images of a tensor in NHWC, and the box to be copied of the first two.
struct TensorView {
  const void* data;    // aligned to 16 bytes
  Dtype dtype;         // not float64
  int64_t extents[4];  // C, W, H, N
  int64_t strides[3];  // of W, H, N in bytes: multiples of 16, and each of the one before
  int box_channels;    // a multiple of 16 bytes
  int box_cols;        // at most 256
  int64_t element_bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
};

constexpr int kTmaAlignment = 128;  // of a box in shared memory, in bytes
constexpr int kTmaGrain = 16;       // bytes: tensors are aligned to them, strides and channels of a box multiples
constexpr int64_t kTmaMaxStride = int64_t{1} << 40;

// Why a tensor cannot be described to the copy engine, by the rules of cuTensorMapEncodeTiled(); empty if it can.
inline std::string why_not_tensor_map(const TensorView& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % kTmaGrain != 0) return "the input is not aligned to 16 bytes";
  int64_t inner = 1, below = view.extents[0] * view.element_bytes();  // the stride inside, the bytes that it spans
  for (int i = 0; i < 3; ++i) {
    const int64_t stride = view.strides[i];
    if (stride % kTmaGrain != 0) return "the input's pixels are not aligned to 16 bytes";
    if (stride <= 0 || stride < below || stride % inner != 0) return "the input's axes overlap or do not nest";
    if (stride >= kTmaMaxStride) return "a stride of the input is beyond 2^40 bytes";
    inner = stride, below = stride * view.extents[i + 1];
  }
  return "";
}

#if defined(XSEP_EMULATE_CUDA)

using TensorMap = TensorView;
inline std::string why_no_tma() { return ""; }
inline bool make_tensor_map(const TensorView& view, TensorMap* map) { return *map = view, true; }

// A barrier for boxes is eight bytes of shared memory.  One thread makes them ready, before a __syncthreads().
inline void tma_init(uint64_t* barriers, int count, const emulator::Site& site = emulator::here()) {
  for (int i = 0; i < count; ++i) emulator::tma_init(barriers + i, site);
}

// Asks for the box whose first pixel is (n, h, w), from channel c on; it has so many bytes.
inline void tma_load(void* shared, const TensorMap& map, int c, int w, int h, int n, uint64_t* barrier, int bytes,
                     const emulator::Site& site = emulator::here()) {
  const emulator::Box box{map.data,
                          map.element_bytes(),
                          {map.extents[0], map.extents[1], map.extents[2], map.extents[3]},
                          {map.element_bytes(), map.strides[0], map.strides[1], map.strides[2]},
                          {c, w, h, n},
                          {map.box_channels, map.box_cols}};
  emulator::tma_load(shared, box, barrier, bytes, site);
}

inline void tma_wait(uint64_t* barrier, int parity, const emulator::Site& site = emulator::here()) {
  emulator::tma_wait(barrier, parity, site);
}

#else

#if XSEP_HAS_TMA

using TensorMap = CUtensorMap;

// cuTensorMapEncodeTiled() of the driver, or null.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) return function;
    cudaGetLastError();  // it is told by why_no_tma(), and nowhere else
    return static_cast<void*>(nullptr);
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Cards that have bulk copies run code for older ones where there is no other; the kernels are empty there.
constexpr bool built_for_tma() {
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch >= 900) return true;
  }
  return false;
}

inline std::string why_no_tma() {
  if (!built_for_tma()) return "this installation has no code for sm_90 or newer";
  return tensor_map_encoder() ? "" : "the driver has no tensor maps";
}

inline bool make_tensor_map(const TensorView& view, TensorMap* map) {
  const CUtensorMapDataType type = view.dtype == Dtype::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : view.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint64_t extents[4], strides[3];
  for (int i = 0; i < 4; ++i) extents[i] = view.extents[i];
  for (int i = 0; i < 3; ++i) strides[i] = view.strides[i];
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(view.box_channels), static_cast<cuuint32_t>(view.box_cols), 1, 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  return tensor_map_encoder()(map, type, 4, const_cast<void*>(view.data), extents, strides, box, every,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#else

struct TensorMap {};
inline std::string why_no_tma() { return "the CUDA toolkit that built this is older than 12"; }
inline bool make_tensor_map(const TensorView&, TensorMap*) { return false; }

#endif

#if __CUDA_ARCH__ >= 900 && XSEP_HAS_TMA

// An address in the block's own memory is one in its cluster's; where that has to be said so, sm_120 needs a stack.
#if __CUDACC_VER_MAJOR__ >= 13
#define XSEP_TMA_TO "shared::cta"
#else
#define XSEP_TMA_TO "shared::cluster"
#endif

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void tma_init(uint64_t* barriers, int count) {
  for (int i = 0; i < count; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + i)) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine has to see it
}

__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, int c, int w, int h, int n,
                                         uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.tensor.4d." XSEP_TMA_TO
               ".global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
               "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void tma_wait(uint64_t* barrier, int parity) {
  int done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.s32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

#else  // kernels that copy so are not run there

__device__ __forceinline__ void tma_init(uint64_t*, int) {}
__device__ __forceinline__ void tma_load(void*, const TensorMap&, int, int, int, int, uint64_t*, int) {}
__device__ __forceinline__ void tma_wait(uint64_t*, int) {}

#endif

#endif

}  // namespace xsep::cuda
