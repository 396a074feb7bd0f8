// Every pass, layout, element type and instruction set against naive loops in double, on shapes named by what they try.
//
// Inputs and outputs lie in buffers of exactly their size, so that AddressSanitizer sees any access beyond them.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "depthwise.h"
#include "reference.h"

using namespace xsep;

namespace {

struct Named {
  const char* name;
  ConvShape shape;
};

const Named kShapes[] = {
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
    {"multiplier", {2, 9, 8, 9, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"multiplier_stride2", {1, 16, 9, 8, 3, 3, 2, 2, 2, 1, 1, 0, 1, 1, 1}},
    {"row_filter", {1, 16, 4, 40, 1, 7, 1, 1, 1, 0, 0, 3, 3, 1, 1}},
    {"column_filter", {1, 16, 40, 4, 9, 1, 1, 1, 1, 4, 4, 0, 0, 1, 1}},
    {"large_filter", {1, 16, 20, 20, 13, 13, 1, 1, 1, 6, 6, 6, 6, 1, 1}},
    {"even_filter", {1, 16, 9, 9, 4, 2, 1, 1, 1, 1, 2, 0, 1, 1, 1}},
    {"pad_beyond_kernel", {1, 5, 4, 4, 3, 3, 1, 1, 1, 4, 5, 6, 3, 1, 1}},
    {"one_pixel", {3, 16, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"one_by_one_filter", {1, 24, 6, 5, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1}},
    {"one_by_one_stride2", {1, 16, 6, 5, 1, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1}},
    {"one_channel", {2, 1, 17, 18, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"no_images", {0, 16, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
};

double rounded(Dtype dtype, double value) {
  return with_dtype(dtype, [&](auto tag) -> double {
    using T = typename decltype(tag)::type;
    return to_float(from_float<T>(static_cast<accumulate_t<T>>(value)));
  });
}

// A tensor in memory: dense, in one of the layouts, with an element type.  Indexed as NCHW doubles.
struct Tensor {
  Tensor(Dtype dtype, bool nhwc, int64_t N, int64_t C, int64_t H, int64_t W)
      : dtype(dtype),
        nhwc(nhwc),
        N(N),
        C(C),
        H(H),
        W(W),
        size(dtype == Dtype::kFloat64   ? 8
             : dtype == Dtype::kFloat32 ? 4
                                        : 2),
        bytes(N * C * H * W * size, static_cast<char>(0xff)) {}  // all ones: NaN in every type

  void fill(const std::vector<double>& values) {
    each([&](int64_t logical, int64_t at) {
      with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T value = from_float<T>(static_cast<accumulate_t<T>>(values[logical]));
        std::memcpy(&bytes[at * sizeof(T)], &value, sizeof(T));
      });
    });
  }
  std::vector<double> values() const {
    std::vector<double> result(N * C * H * W);
    each([&](int64_t logical, int64_t at) {
      with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        T value;
        std::memcpy(&value, &bytes[at * sizeof(T)], sizeof(T));
        result[logical] = to_float(value);
      });
    });
    return result;
  }
  TensorRef ref() const {
    if (nhwc) return {bytes.data(), H * W * C, 1, W * C, C};
    return {bytes.data(), C * H * W, H * W, W, 1};
  }
  template <class F>
  void each(F&& f) const {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t h = 0; h < H; ++h)
          for (int64_t w = 0; w < W; ++w)
            f(((n * C + c) * H + h) * W + w, nhwc ? ((n * H + h) * W + w) * C + c : ((n * C + c) * H + h) * W + w);
  }

  Dtype dtype;
  bool nhwc;
  int64_t N, C, H, W;
  size_t size;
  std::vector<char> bytes;
};

int failures = 0, checks = 0;

void compare(const std::string& what, Dtype dtype, const std::vector<double>& ours, const std::vector<double>& truth,
             const std::vector<double>& magnitude) {
  // magnitude[i] is the sum of |products|: the accumulation error is a few units of it, the last rounding one of truth.
  const double accumulate = dtype == Dtype::kFloat64 ? 1e-14 : 2e-6;
  const double round = dtype == Dtype::kFloat16 ? 4.9e-4 : dtype == Dtype::kBFloat16 ? 3.95e-3 : accumulate;
  const double tiny = dtype == Dtype::kFloat16 ? 3e-8 : 1e-37;  // half an ulp of a subnormal
  ++checks;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double bound = accumulate * magnitude[i] + round * std::abs(truth[i]) + tiny;
    if (!(std::abs(ours[i] - truth[i]) <= bound)) {
      std::printf("FAILED %s: element %zu is %.9g, not %.9g (bound %.2g)\n", what.c_str(), i, ours[i], truth[i], bound);
      ++failures;
      return;
    }
  }
}

std::vector<double> absolute(std::vector<double> v) {
  for (double& x : v) x = std::abs(x);
  return v;
}

void run(cpu::DepthwiseArgs args) {
  // Exactly the bytes asked for, so that the sanitizer guards the workspace too; they start as NaN.
  const int64_t bytes = cpu::workspace_bytes(args);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(workspace, 0xff, bytes);
  args.workspace = workspace;
  cpu::depthwise(args);
  std::free(workspace);
}

void test(const Named& named, Dtype dtype, bool nhwc, bool on_load, int threads, const std::string& what) {
  const ConvShape& s = named.shape;
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t count) {
    std::vector<double> v(count);
    for (double& x : v) x = rounded(dtype, normal(random));
    return v;
  };
  const std::vector<double> x = draw(s.x_numel()), w = draw(s.w_numel()), dy = draw(s.y_numel()), bias = draw(s.K());
  const std::vector<double> center = draw(s.C), scale = draw(s.C), shift = draw(s.C);

  // Exact in every type: the on-load vectors are drawn in it, but u itself is rounded only to the accumulation type.
  std::vector<double> u = x, slope(x.size(), 1.0);
  const int64_t plane = int64_t{s.H} * s.W;
  if (on_load) {
    for (size_t i = 0; i < u.size(); ++i) {
      const int64_t c = static_cast<int64_t>(i) / plane % s.C;
      const double v = scale[c] * (x[i] - center[c]) + shift[c];
      u[i] = v <= 0 ? 0 : v;
      slope[i] = v <= 0 ? 0 : 1;
    }
  }

  Tensor tx(dtype, nhwc, s.N, s.C, s.H, s.W), tdy(dtype, nhwc, s.N, s.K(), s.P(), s.Q());
  Tensor tw(dtype, false, s.K(), 1, s.R, s.S), tb(dtype, false, 1, s.K(), 1, 1);
  tx.fill(x), tdy.fill(dy), tw.fill(w), tb.fill(bias);
  const Dtype vector_type = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  Tensor tc(vector_type, false, 1, s.C, 1, 1), ts(vector_type, false, 1, s.C, 1, 1),
      th(vector_type, false, 1, s.C, 1, 1);
  tc.fill(center), ts.fill(scale), th.fill(shift);

  cpu::DepthwiseArgs args{};
  args.shape = s, args.dtype = dtype, args.nhwc = nhwc, args.threads = threads;
  args.x = tx.ref(), args.dy = tdy.ref(), args.w = tw.bytes.data();
  if (on_load) args.on_load = {tc.bytes.data(), ts.bytes.data(), th.bytes.data(), true};

  std::vector<double> y = reference::fprop(s, u, w), y_size = reference::fprop(s, absolute(u), absolute(w));
  for (size_t i = 0; i < y.size(); ++i) y[i] += bias[i / (s.P() * s.Q()) % s.K()];
  Tensor ty(dtype, nhwc, s.N, s.K(), s.P(), s.Q());
  args.pass = cpu::Pass::kFprop, args.y = ty.bytes.data(), args.bias = tb.bytes.data();
  run(args);
  for (double& v : y_size) v += 5;  // the bias, and the cancellation in u
  compare(what + " fprop", dtype, ty.values(), y, y_size);
  args.bias = nullptr;

  const std::vector<double> dw = reference::wgrad(s, dy, u);
  std::vector<double> dw_size = reference::wgrad(s, absolute(dy), absolute(u));
  for (double& v : dw_size) v += on_load ? 5 : 0;
  Tensor tdw(dtype, false, s.K(), 1, s.R, s.S);
  args.pass = cpu::Pass::kWgrad, args.dw = tdw.bytes.data();
  run(args);
  compare(what + " wgrad", dtype, tdw.values(), dw, dw_size);

  std::vector<double> dx = reference::dgrad(s, dy, w), dx_size = reference::dgrad(s, absolute(dy), absolute(w));
  if (!on_load) {
    Tensor tdx(dtype, nhwc, s.N, s.C, s.H, s.W);
    args.pass = cpu::Pass::kDgrad, args.dx = tdx.bytes.data();
    run(args);
    compare(what + " dgrad", dtype, tdx.values(), dx, dx_size);
  }

  std::vector<double> dscale(s.C), dshift(s.C), dscale_size(s.C, 5.0), dshift_size(s.C, 5.0);
  if (on_load) {
    for (size_t i = 0; i < dx.size(); ++i) {
      const int64_t c = static_cast<int64_t>(i) / plane % s.C;
      const double du = dx[i] * slope[i];
      dscale[c] += du * (x[i] - center[c]), dscale_size[c] += dx_size[i] * std::abs(x[i] - center[c]);
      dshift[c] += du, dshift_size[c] += dx_size[i];
      dx[i] = du * scale[c], dx_size[i] *= std::abs(scale[c]);
    }
  }
  Tensor tdx(dtype, nhwc, s.N, s.C, s.H, s.W), tdw2(dtype, false, s.K(), 1, s.R, s.S);
  Tensor tds(vector_type, false, 1, s.C, 1, 1), tdh(vector_type, false, 1, s.C, 1, 1);
  args.pass = cpu::Pass::kDgradWgrad, args.dx = tdx.bytes.data(), args.dw = tdw2.bytes.data();
  if (on_load) args.dscale = tds.bytes.data(), args.dshift = tdh.bytes.data();
  run(args);
  compare(what + " dgrad_wgrad dx", dtype, tdx.values(), dx, dx_size);
  compare(what + " dgrad_wgrad dw", dtype, tdw2.values(), dw, dw_size);
  if (on_load) {
    compare(what + " dscale", vector_type, tds.values(), dscale, dscale_size);
    compare(what + " dshift", vector_type, tdh.values(), dshift, dshift_size);
  }
}

// Every half and bfloat16 pattern converts to float and back unchanged, and ties go to even.
void test_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const half_t h{static_cast<uint16_t>(bits)};
    const bfloat16_t b{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(h)) && from_float<half_t>(to_float(h)).bits != bits) ++failures;
    if (!std::isnan(to_float(b)) && from_float<bfloat16_t>(to_float(b)).bits != bits) ++failures;
    if (std::isnan(to_float(h)) != std::isnan(to_float(from_float<half_t>(to_float(h))))) ++failures;
  }
  const float tie = 1.0f + 1.0f / 2048;
  if (to_float(from_float<half_t>(tie)) != 1.0f || from_float<half_t>(65520.0f).bits != 0x7c00) ++failures;
  if (failures) std::printf("FAILED conversions\n");
}

}  // namespace

int main() {
  test_conversions();
  for (int isa = 0; isa < cpu::isa_count(); ++isa) {
    cpu::set_isa(isa);
    for (const Named& named : kShapes)
      for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16})
        for (bool nhwc : {false, true})
          for (bool on_load : {false, true}) {
            const int threads = 1 + (&named - kShapes) % 3;
            const char* types[] = {"float32", "float64", "float16", "bfloat16"};
            test(named, dtype, nhwc, on_load, threads,
                 std::string(cpu::isa_name(isa)) + " " + named.name + " " + types[static_cast<int>(dtype)] +
                     (nhwc ? " NHWC" : " NCHW") + (on_load ? " on_load" : ""));
          }
  }
  std::printf("%d checks, %d failed, on %d instruction sets\n", checks, failures, cpu::isa_count());
  return failures != 0;
}
