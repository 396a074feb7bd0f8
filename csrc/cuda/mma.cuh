// Matrix products of a warp on tensor cores: 16x8 sums of float from 16x16 and 16x8 numbers of 16 bits.
//
// Lane l is number t = l % 4 of group g = l / 4.  Of the sums it holds rows g and g + 8 of columns 2t and 2t + 1; of
// both factors a register holds two numbers that are neighbours along the sum, which is how load_matrices() leaves them
// from rows in shared memory that have that axis contiguous.
//
// sm_80 and newer multiply both types, sm_75 float16.  This, tma.cuh and device.h are all that knows GPU or emulator.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.h"

namespace xsep::cuda {

template <class T>
constexpr int kMmaArch = std::is_same_v<T, half_t>       ? 75
                         : std::is_same_v<T, bfloat16_t> ? 80
                                                         : 1000000;

#if defined(XSEP_EMULATE_CUDA)

template <class T>
constexpr bool built_for_mma() {
  return !std::is_same_v<T, float>;
}

inline uintptr_t checked_row(const void* row) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  if (address % 16 != 0) throw emulator::Error("load_matrices() of a row that is not aligned to 16 bytes");
  if (address - emulator::block.shared >= emulator::block.shared_bytes) {
    throw emulator::Error("load_matrices() of what is not shared memory");
  }
  return address;
}

// Four 8x8 matrices: lane l passes row l % 8 of matrix l / 8, 16 bytes in shared memory, and gets numbers 2t and 2t + 1
// of row g of each.
inline void load_matrices(uint32_t (&to)[4], const void* row, const emulator::Site& site = emulator::here()) {
  const int lane = emulator::lane();
  const uintptr_t mine = checked_row(row);
  for (int i = 0; i < 4; ++i) {
    const auto from = emulator::shuffle(0xffffffffu, mine, 8 * i + lane / 4, site);
    std::memcpy(&to[i], reinterpret_cast<const char*>(from) + 4 * (lane % 4), 4);
  }
}

// The same of the matrices transposed: numbers 2t and 2t + 1 of column g, for factors whose rows lie along the sum.
inline void load_transposed(uint32_t (&to)[4], const void* row, const emulator::Site& site = emulator::here()) {
  const int lane = emulator::lane();
  const uintptr_t mine = checked_row(row);
  for (int i = 0; i < 4; ++i) {
    for (int which = 0; which < 2; ++which) {
      const auto from = emulator::shuffle(0xffffffffu, mine, 8 * i + lane % 4 * 2 + which, site);
      std::memcpy(reinterpret_cast<char*>(&to[i]) + 2 * which, reinterpret_cast<const char*>(from) + 2 * (lane / 4), 2);
    }
  }
}

// sums += a * b; `above` are those of row g, `below` of row g + 8.
template <class T>
void multiply_add(float* above, float* below, const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulator::Site& site = emulator::here()) {
  static uint32_t registers[32][warpSize][6];  // of each lane of a block
  const int lane = emulator::lane(), group = lane / 4, number = lane % 4;
  auto& of_warp = registers[threadIdx.x / warpSize];
  std::memcpy(of_warp[lane], a, sizeof a);
  std::memcpy(of_warp[lane] + 4, b, sizeof b);
  __syncwarp(0xffffffffu, site);
  const auto half = [](uint32_t word, int which) { return to_float(T{static_cast<uint16_t>(word >> (16 * which))}); };
  for (int k = 0; k < 16; ++k) {
    const int from = k % 8 / 2, upper = k / 8;
    for (int column = 0; column < 2; ++column) {
      const float factor = half(of_warp[4 * (2 * number + column) + from][4 + upper], k % 2);
      above[column] += half(of_warp[4 * group + from][2 * upper], k % 2) * factor;
      below[column] += half(of_warp[4 * group + from][2 * upper + 1], k % 2) * factor;
    }
  }
  __syncwarp(0xffffffffu, site);  // before the next product
}

#else

// Cards run the code of the newest architecture not above their own; where that has no tensor cores, the functions
// below are empty.
template <class T>
constexpr bool built_for_mma() {
#if defined(__CUDA_ARCH_LIST__)
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch >= 10 * kMmaArch<T>) return true;
  }
#endif
  return false;
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void multiply_add(float* above, float* below, const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, half_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(above[0]), "+f"(above[1]), "+f"(below[0]), "+f"(below[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(above[0]), "+f"(above[1]), "+f"(below[0]), "+f"(below[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif __CUDA_ARCH__ >= 750
  if constexpr (std::is_same_v<T, half_t>) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(above[0]), "+f"(above[1]), "+f"(below[0]), "+f"(below[1])
          : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
  }
#endif
}

#endif

}  // namespace xsep::cuda
