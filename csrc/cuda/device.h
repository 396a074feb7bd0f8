// The only header that knows whether a kernel runs on a GPU or on the host emulator.
//
// Kernels reach global memory through load() and store() and nothing else, so that the emulator can check and count
// every access; a vector of 16 bytes is one access.
#pragma once

#include <cstdint>

#include "../dtype.h"

#if defined(XSEP_EMULATE_CUDA)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace xsep::cuda {

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// N elements that one instruction loads or stores.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

#if !defined(XSEP_EMULATE_CUDA)

// This block's dynamic shared memory as an array of T.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

namespace detail {

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

// Reads global memory that nothing writes during the kernel.
template <class V>
__device__ __forceinline__ V load(const V* p) {
  using Word = typename detail::Word<sizeof(V)>::type;
  const Word word = __ldg(reinterpret_cast<const Word*>(p));
  V value;
  memcpy(&value, &word, sizeof(V));
  return value;
}

// Reads global memory that this thread wrote.
template <class V>
__device__ __forceinline__ V load_own(const V* p) {
  using Word = typename detail::Word<sizeof(V)>::type;
  const Word word = *reinterpret_cast<const Word*>(p);
  V value;
  memcpy(&value, &word, sizeof(V));
  return value;
}

template <class V>
__device__ __forceinline__ void store(V* p, const V& value) {
  using Word = typename detail::Word<sizeof(V)>::type;
  Word word;
  memcpy(&word, &value, sizeof(V));
  *reinterpret_cast<Word*>(p) = word;
}

// Copies 4, 8 or 16 bytes from global to shared memory; the thread that asked may read them after copies_done(), the
// block after a barrier that follows it.  From sm_80 on the copy goes past the registers and needs no waiting.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
#else
  using Word = typename detail::Word<kBytes>::type;
  *static_cast<Word*>(shared) = __ldg(static_cast<const Word*>(global));
#endif
}

__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// For copies that overlap: what a thread asked for since its last group is a group, which may be empty;
// copies_done_but<n>() waits for all but the newest n of them.
__device__ __forceinline__ void copies_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kNewest>
__device__ __forceinline__ void copies_done_but() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(half_t value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(bfloat16_t value) { return __uint_as_float(uint32_t{value.bits} << 16); }

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T narrow(accumulate_t<T> value) {
  if constexpr (std::is_same_v<T, half_t>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x};
  } else {
    return value;
  }
}

// Starts a kernel; its error, if any, is one of the launch itself.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  return cudaGetLastError();
}

#endif

}  // namespace xsep::cuda
