// One depthwise convolution: the problem description that every backend shares.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace xsep {

struct ConvShape {
  int32_t N, C, H, W;  // x
  int32_t R, S;        // filter
  int32_t M;           // channel multiplier: filter c*M + m reads channel c
  int32_t stride_h, stride_w;
  int32_t pad_top, pad_bottom, pad_left, pad_right;
  int32_t dilation_h, dilation_w;

  int32_t K() const { return C * M; }  // channels of y
  int32_t P() const { return (H + pad_top + pad_bottom - dilation_h * (R - 1) - 1) / stride_h + 1; }
  int32_t Q() const { return (W + pad_left + pad_right - dilation_w * (S - 1) - 1) / stride_w + 1; }
  int64_t x_numel() const { return int64_t{N} * C * H * W; }
  int64_t w_numel() const { return int64_t{K()} * R * S; }
  int64_t y_numel() const { return int64_t{N} * K() * P() * Q(); }
};

// Throws std::invalid_argument naming the extent that does not fit.  Extents are int32, counts int64.
inline void check(const ConvShape& s) {
  const auto require = [](bool fits, const char* name, int64_t value, const char* rule) {
    if (!fits) throw std::invalid_argument(std::string(name) + " must be " + rule + "; got " + std::to_string(value));
  };
  require(s.N >= 0, "N", s.N, "at least 0");
  using Named = std::pair<const char*, int32_t>;
  const Named sizes[] = {{"C", s.C},
                         {"H", s.H},
                         {"W", s.W},
                         {"R", s.R},
                         {"S", s.S},
                         {"M", s.M},
                         {"stride_h", s.stride_h},
                         {"stride_w", s.stride_w},
                         {"dilation_h", s.dilation_h},
                         {"dilation_w", s.dilation_w}};
  const Named pads[] = {
      {"pad_top", s.pad_top}, {"pad_bottom", s.pad_bottom}, {"pad_left", s.pad_left}, {"pad_right", s.pad_right}};
  for (const auto& [name, value] : sizes) require(value >= 1, name, value, "at least 1");
  for (const auto& [name, value] : pads) require(value >= 0, name, value, "at least 0");
  constexpr int64_t kMax = INT32_MAX;
  const int64_t padded_h = int64_t{s.H} + s.pad_top + s.pad_bottom, padded_w = int64_t{s.W} + s.pad_left + s.pad_right;
  const int64_t span_h = int64_t{s.dilation_h} * (s.R - 1) + 1, span_w = int64_t{s.dilation_w} * (s.S - 1) + 1;
  require(padded_h <= kMax, "padded height", padded_h, "at most 2^31 - 1");
  require(padded_w <= kMax, "padded width", padded_w, "at most 2^31 - 1");
  require(span_h <= padded_h, "filter height", span_h, "at most the padded input height");
  require(span_w <= padded_w, "filter width", span_w, "at most the padded input width");
  require(int64_t{s.C} * s.M <= kMax, "C * M", int64_t{s.C} * s.M, "at most 2^31 - 1");
}

}  // namespace xsep
