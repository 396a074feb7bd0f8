// Division by a number that the host knows: a multiplication, an addition and a shift.
#pragma once

#include <cstdint>

#include "device.h"

namespace xsep::cuda {

// Of numbers in [0, 2^31).
struct Divider {
  int32_t by = 1;
  uint32_t multiplier = 1;
  int32_t shift = 0;

  Divider() = default;
  explicit Divider(int32_t by) : by(by) {
    while ((int64_t{1} << shift) < by) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(by);
    multiplier = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(by) + 1);
  }
};

__device__ __forceinline__ int operator/(int n, const Divider& d) {
  const uint64_t product = uint64_t{static_cast<uint32_t>(n)} * d.multiplier;
  return static_cast<int>((static_cast<uint32_t>(product >> 32) + static_cast<uint32_t>(n)) >> d.shift);
}

// n becomes the quotient; the remainder is returned.
__device__ __forceinline__ int take(int& n, const Divider& d) {
  const int quotient = n / d, remainder = n - quotient * d.by;
  n = quotient;
  return remainder;
}

}  // namespace xsep::cuda
