// Element types, and how a run-time value becomes a type or a constant: with_dtype and with_int, no macros.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace xsep {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// Storage only: kernels convert to float on load and round once on store.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class T>
struct type_tag {
  using type = T;
};

// What products of T are accumulated in.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class F>
decltype(auto) with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(type_tag<float>{});
    case Dtype::kFloat64:
      return f(type_tag<double>{});
    case Dtype::kFloat16:
      return f(type_tag<half_t>{});
    case Dtype::kBFloat16:
      return f(type_tag<bfloat16_t>{});
  }
  throw std::invalid_argument("dtype must be 0 (float32), 1 (float64), 2 (float16) or 3 (bfloat16); got " +
                              std::to_string(static_cast<int>(dtype)));
}

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

inline float to_float(bfloat16_t value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float to_float(half_t value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, rest = value.bits & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    bits = (rest << 13) + (112u << 23);
  } else {  // zero or subnormal: rest * 2^-24 is exact in float
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &magnitude, sizeof bits);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T from_float(accumulate_t<T> value) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if constexpr (std::is_same_v<T, bfloat16_t>) {
      if (magnitude > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
      return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
    } else {
      const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
      uint32_t half;
      if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
      } else if (magnitude >= 0x477ff000u) {  // 65520 and above rounds to infinity
        half = 0x7c00u;
      } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lines the subnormal up with float's last bits
        float shifted;
        std::memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        std::memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000u;
      } else {
        half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      }
      return {static_cast<uint16_t>(sign | half)};
    }
  }
}

}  // namespace xsep
