// What the tests of depthwise kernels share: shapes named by what they try, tensors in memory, and the truth.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "depthwise.h"
#include "reference.h"

namespace xsep::cases {

struct Named {
  const char* name;
  ConvShape shape;
};

inline const Named kShapes[] = {
    {"plain_3x3", {2, 5, 9, 11, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"channel_tail", {1, 21, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"whole_blocks", {1, 64, 7, 10, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"wide", {1, 3, 5, 93, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"tall", {1, 16, 150, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"wider_than_a_tile", {1, 2, 3, 2100, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"valid_5x5", {2, 17, 12, 13, 5, 5, 1, 1, 1, 0, 0, 0, 0, 1, 1}},
    {"7x7", {1, 16, 7, 7, 7, 7, 1, 1, 1, 3, 3, 3, 3, 1, 1}},
    {"stride2_even", {1, 16, 12, 14, 3, 3, 1, 2, 2, 0, 1, 0, 1, 1, 1}},
    {"stride2_odd_5x5", {1, 18, 13, 15, 5, 5, 1, 2, 2, 2, 2, 2, 2, 1, 1}},
    {"stride2_7x7", {1, 16, 20, 70, 7, 7, 1, 2, 2, 3, 3, 3, 3, 1, 1}},
    {"stride3", {1, 4, 17, 19, 3, 3, 1, 3, 3, 1, 1, 1, 1, 1, 1}},
    {"stride_beyond_kernel", {1, 16, 11, 11, 2, 2, 1, 3, 4, 0, 0, 0, 0, 1, 1}},
    {"mixed_strides", {2, 16, 11, 23, 3, 5, 1, 1, 2, 1, 0, 3, 2, 1, 1}},
    {"dilated", {1, 20, 15, 14, 3, 3, 1, 1, 1, 2, 2, 2, 2, 2, 2}},
    {"dilated_stride2", {1, 16, 15, 17, 3, 3, 1, 2, 2, 2, 2, 3, 3, 2, 3}},
    {"dilated_stride_with_common_divisor", {1, 3, 41, 31, 5, 3, 1, 4, 6, 12, 10, 4, 5, 6, 4}},
    {"multiplier", {2, 9, 8, 9, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"multiplier_stride2", {1, 16, 9, 8, 3, 3, 2, 2, 2, 1, 1, 0, 1, 1, 1}},
    {"row_filter", {1, 16, 4, 40, 1, 7, 1, 1, 1, 0, 0, 3, 3, 1, 1}},
    {"column_filter", {1, 16, 40, 4, 9, 1, 1, 1, 1, 4, 4, 0, 0, 1, 1}},
    {"large_filter", {1, 16, 20, 20, 13, 13, 1, 1, 1, 6, 6, 6, 6, 1, 1}},
    {"31x31", {1, 3, 14, 35, 31, 31, 1, 1, 1, 15, 15, 15, 15, 1, 1}},
    {"signal", {2, 5, 1, 300, 1, 31, 1, 1, 1, 0, 0, 30, 0, 1, 1}},
    {"signal_stride2", {1, 4, 1, 150, 1, 9, 2, 1, 2, 0, 0, 4, 4, 1, 2}},
    {"long_rows", {1, 12, 3, 1304, 1, 5, 1, 1, 1, 0, 0, 2, 2, 1, 1}},
    {"long_rows_dilated_stride3", {1, 20, 3, 2200, 1, 4, 1, 1, 3, 0, 0, 4, 5, 1, 2}},
    {"long_columns_dilated_stride2", {1, 8, 270, 40, 3, 3, 1, 2, 1, 2, 2, 1, 1, 2, 1}},
    {"filter_beyond_shared_memory", {1, 8, 1, 800, 1, 800, 1, 1, 1, 0, 0, 3, 3, 1, 1}},
    {"even_filter", {1, 16, 9, 9, 4, 2, 1, 1, 1, 1, 2, 0, 1, 1, 1}},
    {"pad_beyond_kernel", {1, 5, 4, 4, 3, 3, 1, 1, 1, 4, 5, 6, 3, 1, 1}},
    {"one_pixel", {3, 16, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"many_small_images", {19, 24, 3, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"one_by_one_filter", {1, 24, 6, 5, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1}},
    {"one_by_one_stride2", {1, 16, 6, 5, 1, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1}},
    {"one_by_one_strides", {2, 24, 40, 50, 1, 1, 1, 3, 2, 0, 0, 0, 0, 1, 1}},
    {"one_channel", {2, 1, 17, 18, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"no_images", {0, 16, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
};

// Whether a program's arguments, the beginnings of names, ask for a shape; without arguments all are.
inline bool wanted(const Named& named, int count, char** names) {
  bool found = count <= 1;
  for (int i = 1; i < count; ++i) found |= std::strncmp(named.name, names[i], std::strlen(names[i])) == 0;
  return found;
}

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16};
inline const char* name(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

inline std::vector<double> absolute(std::vector<double> v) {
  for (double& x : v) x = std::abs(x);
  return v;
}

inline double rounded(Dtype dtype, double value) {
  return with_dtype(dtype, [&](auto tag) -> double {
    using T = typename decltype(tag)::type;
    return to_float(from_float<T>(static_cast<accumulate_t<T>>(value)));
  });
}

// A tensor in memory, in one of the layouts, with an element type; indexed as NCHW doubles.  Its bytes are exactly
// those of a dense tensor, so that AddressSanitizer sees any access beyond them, or, for a slice, of a tensor larger in
// all extents but N, in which nothing is aligned.  All is NaN until it is filled.
struct Tensor {
  Tensor(Dtype dtype, bool nhwc, int64_t N, int64_t C, int64_t H, int64_t W, bool slice = false)
      : dtype(dtype),
        size(dtype == Dtype::kFloat64   ? 8
             : dtype == Dtype::kFloat32 ? 4
                                        : 2),
        N(N),
        C(C),
        H(H),
        W(W) {
    const int64_t c = C + (slice ? 3 : 0), h = H + (slice ? 2 : 0), w = W + (slice ? 3 : 0);
    if (nhwc) {
      strides = {nullptr, h * w * c, 1, w * c, c};
    } else {
      strides = {nullptr, c * h * w, h * w, w, 1};
    }
    if (slice) first = strides.c + strides.h + strides.w;
    bytes.assign(N * c * h * w * size, static_cast<char>(0xff));
  }

  void fill(const std::vector<double>& values) {
    each([&](auto tag, int64_t logical, int64_t at) {
      using T = typename decltype(tag)::type;
      const T value = from_float<T>(static_cast<accumulate_t<T>>(values[logical]));
      std::memcpy(&bytes[at * sizeof(T)], &value, sizeof(T));
    });
  }
  std::vector<double> values() const {
    std::vector<double> result(N * C * H * W);
    each([&](auto tag, int64_t logical, int64_t at) {
      typename decltype(tag)::type value;
      std::memcpy(&value, &bytes[at * sizeof value], sizeof value);
      result[logical] = to_float(value);
    });
    return result;
  }
  // As an argument of a call; `memory` holds the bytes.
  TensorRef ref(const void* memory) const {
    TensorRef result = strides;
    result.data = static_cast<const char*>(memory) + first * size;
    return result;
  }
  TensorRef ref() const { return ref(bytes.data()); }

  Dtype dtype;
  int64_t size, N, C, H, W;
  TensorRef strides;
  int64_t first = 0;
  std::vector<char> bytes;

 private:
  template <class F>
  void each(F&& f) const {
    with_dtype(dtype, [&](auto tag) {
      int64_t logical = 0;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < C; ++c)
          for (int64_t h = 0; h < H; ++h)
            for (int64_t w = 0; w < W; ++w)
              f(tag, logical++, first + n * strides.n + c * strides.c + h * strides.h + w * strides.w);
    });
  }
};

// On the emulator a call takes ten times as long under the sanitizers: it is made in one order of threads only.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

inline int failures = 0, checks = 0;

// What a result should be.  magnitude[i] is the sum of |products|: the accumulation error is a few units of it, the
// last rounding one of the value.
struct Truth {
  std::vector<double> values, magnitude;
};

constexpr double kAccumulation = 2e-6;  // in float
inline double rounding_of(Dtype dtype) {
  return dtype == Dtype::kFloat16 ? 4.9e-4 : dtype == Dtype::kBFloat16 ? 3.95e-3 : 0;
}

inline void compare(const std::string& what, Dtype dtype, const std::vector<double>& ours, const Truth& truth) {
  const double accumulate = dtype == Dtype::kFloat64 ? 1e-14 : kAccumulation;
  const double round = std::max(rounding_of(dtype), accumulate);
  const double tiny = dtype == Dtype::kFloat16 ? 3e-8 : 1e-37;  // half an ulp of a subnormal
  ++checks;
  for (size_t i = 0; i < truth.values.size(); ++i) {
    const double value = truth.values[i], bound = accumulate * truth.magnitude[i] + round * std::abs(value) + tiny;
    if (!(std::abs(ours[i] - value) <= bound)) {
      std::printf("FAILED %s: element %zu is %.9g, not %.9g (bound %.2g)\n", what.c_str(), i, ours[i], value, bound);
      ++failures;
      return;
    }
  }
}

// What is done to x as it is loaded.
enum class Load { kNothing, kRelu, kAffine, kBoth };
inline const char* name(Load load) {
  constexpr const char* kNames[] = {"", " relu", " affine", " on_load"};
  return kNames[static_cast<int>(load)];
}

// Inputs of one shape and element type, exact in it, and what the passes make of them.
struct Problem {
  Problem(const ConvShape& shape, Dtype dtype, Load load)
      : shape(shape),
        dtype(dtype),
        vector_type(dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32),
        relu(load == Load::kRelu || load == Load::kBoth),
        affine(load == Load::kAffine || load == Load::kBoth),
        cancellation(affine ? 5 : 0) {
    const ConvShape& s = shape;
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<double>& v, int64_t count) {
      v.resize(count);
      for (double& value : v) value = rounded(dtype, normal(random));
    };
    draw(x, s.x_numel()), draw(w, s.w_numel()), draw(dy, s.y_numel()), draw(bias, s.K());
    draw(center, s.C), draw(scale, s.C), draw(shift, s.C);

    u = x;
    for (size_t i = 0; i < u.size(); ++i) {
      const int64_t c = channel(i);
      if (affine) u[i] = scale[c] * (x[i] - center[c]) + shift[c];
      if (relu && u[i] <= 0) u[i] = 0;
    }
    const std::vector<double> size_u = absolute(u), size_w = absolute(w), size_dy = absolute(dy);

    y = {reference::fprop(s, u, w), reference::fprop(s, size_u, size_w)};
    for (double& v : y.magnitude) v += cancellation;
    y_bias = y;
    const int64_t plane = int64_t{s.P()} * s.Q();
    for (size_t i = 0; i < y.values.size(); ++i) {
      const double b = bias[static_cast<int64_t>(i) / plane % s.K()];
      y_bias.values[i] += b, y_bias.magnitude[i] += std::abs(b);
    }
    differentiate(size_dy);
  }

  // What the gradient `dy` of y gives; size_dy is the magnitude of each of its numbers.
  void differentiate(const std::vector<double>& size_dy) {
    const ConvShape& s = shape;
    std::vector<double> slope(x.size(), 1.0);
    for (size_t i = 0; i < u.size(); ++i) {
      if (relu && u[i] <= 0) slope[i] = 0;
    }
    dw = {reference::wgrad(s, dy, u), reference::wgrad(s, size_dy, absolute(u))};
    for (double& v : dw.magnitude) v += cancellation;
    du = {reference::dgrad(s, dy, w), reference::dgrad(s, size_dy, absolute(w))};

    dx = du;
    dscale = dshift = {std::vector<double>(s.C), std::vector<double>(s.C, 5.0)};
    for (size_t i = 0; i < x.size(); ++i) {
      const int64_t c = channel(i);
      dx.values[i] *= slope[i];
      if (!affine) continue;
      dscale.values[c] += dx.values[i] * (x[i] - center[c]);
      dscale.magnitude[c] += dx.magnitude[i] * std::abs(x[i] - center[c]);
      dshift.values[c] += dx.values[i], dshift.magnitude[c] += dx.magnitude[i];
      dx.values[i] *= scale[c], dx.magnitude[i] *= std::abs(scale[c]);
    }
  }

  const ConvShape shape;
  const Dtype dtype, vector_type;
  const bool relu, affine;
  const double cancellation;  // in u
  std::vector<double> x, u, w, dy, bias, center, scale, shift;
  Truth y, y_bias, dw;
  Truth du;  // dgrad alone
  Truth dx;  // with respect to x, through what is done on load
  Truth dscale, dshift;

 private:
  int64_t channel(size_t i) const { return static_cast<int64_t>(i) / (int64_t{shape.H} * shape.W) % shape.C; }
};

}  // namespace xsep::cases
