// The CPU's training block, forward and backward, every layout, element type and instruction set, against naive loops
// in double; its inference form too.

#include "../../csrc/separable.h"

#include <cstdlib>

#include "separable_cases.h"

using namespace xsep;
using namespace xsep::cases;

namespace {

void run(SeparableArgs args) {
  // Exactly the bytes asked for, so that the sanitizer guards the workspace too; they start as NaN.
  const int64_t bytes = cpu::workspace_bytes(args);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(workspace, 0xff, bytes);
  args.workspace = workspace;
  cpu::separable(args);
  std::free(workspace);
}

void test(Problem problem, int K, bool relu, bool nhwc, int threads, const std::string& what) {
  const ConvShape& s = problem.shape;
  const Dtype dtype = problem.dtype, vector_type = problem.vector_type;
  const int64_t N = s.N, C = s.C, plane = int64_t{s.P()} * s.Q(), count = N * plane;
  Random random;
  const Truth w_pw = random.draw(dtype, int64_t{K} * C), dy = random.draw(dtype, N * K * plane, 1.0 / 64),
              bias = random.draw(dtype, K), dmean = random.draw(vector_type, K),
              dm2 = random.draw(vector_type, K, 1.0 / std::max<int64_t>(count, 64));
  const auto weight = [&](int64_t k, int64_t c) { return w_pw.values[k * C + c]; };
  const auto size = [&](int64_t k, int64_t c) { return w_pw.magnitude[k * C + c]; };

  Truth z = problem.y;
  if (relu) {
    for (double& v : z.values) v = std::max(v, 0.0);
  }
  const Truth y{pointwise(N, K, C, plane, z.values, weight), pointwise(N, K, C, plane, z.magnitude, size)};

  Tensor x(dtype, nhwc, N, C, s.H, s.W, true);
  x.fill(problem.x);
  const Tensor w = vector_of(dtype, problem.w), pw = vector_of(dtype, w_pw.values);
  const Tensor center = vector_of(vector_type, problem.center), scale = vector_of(vector_type, problem.scale),
               shift = vector_of(vector_type, problem.shift);
  SeparableArgs args{};
  args.shape = s, args.K = K, args.dtype = dtype, args.nhwc = nhwc, args.threads = threads;
  args.x = x.ref(), args.w = w.bytes.data(), args.w_pw = pw.bytes.data();
  if (problem.affine) args.on_load = {center.bytes.data(), scale.bytes.data(), shift.bytes.data(), false};
  args.on_load.relu = problem.relu;
  if (relu) args.between.low = 0;

  Tensor made(dtype, nhwc, N, K, s.P(), s.Q()), mean(vector_type, false, 1, K, 1, 1), m2 = mean;
  args.statistics = true, args.y = made.bytes.data(), args.mean = mean.bytes.data(), args.m2 = m2.bytes.data();
  run(args);
  compare(what + " y", dtype, made.values(), y);
  const std::vector<double> values = made.values();
  const Statistics truth = statistics_of(values, K, plane);
  const auto each = [&](auto&& f) {
    for (int64_t i = 0; i < N * K * plane; ++i) f(i / plane % K, i);
  };
  compare(what + " mean", vector_type, mean.values(), truth.mean);
  compare(what + " m2", vector_type, m2.values(), truth.m2);

  const auto backward = [&](bool statistics, bool with_dy) {
    const Truth g =
        gradient_of_y(with_dy ? &dy : nullptr, values, count, plane, statistics ? &truth.mean : nullptr, dmean, dm2);
    const Truth dw_pw = differentiate(problem, K, relu, w_pw, z, g);

    SeparableArgs call = args;
    call.backward = true, call.statistics = statistics;
    Tensor dy_tensor(dtype, nhwc, N, K, s.P(), s.Q(), true);
    dy_tensor.fill(dy.values);
    if (with_dy) call.dy = dy_tensor.ref();
    const Tensor dmean_tensor = vector_of(vector_type, dmean.values), dm2_tensor = vector_of(vector_type, dm2.values);
    call.y_made = made.ref(), call.mean_made = mean.bytes.data();
    call.dmean = dmean_tensor.bytes.data(), call.dm2 = dm2_tensor.bytes.data();
    Tensor dx(dtype, nhwc, N, C, s.H, s.W), dw(dtype, false, C, 1, s.R, s.S), dpw(dtype, false, K, C, 1, 1);
    Tensor dscale(vector_type, false, 1, C, 1, 1), dshift = dscale;
    call.dx = dx.bytes.data(), call.dw = dw.bytes.data(), call.dw_pw = dpw.bytes.data();
    if (problem.affine) call.dscale = dscale.bytes.data(), call.dshift = dshift.bytes.data();
    run(call);
    const std::string which = what + (statistics ? " statistics" : "") + (with_dy ? "" : " without dy");
    compare(which + " dx", dtype, dx.values(), problem.dx);
    compare(which + " dw", dtype, dw.values(), problem.dw);
    compare(which + " dw_pw", dtype, dpw.values(), dw_pw);
    if (!problem.affine) return;
    compare(which + " dscale", vector_type, dscale.values(), problem.dscale);
    compare(which + " dshift", vector_type, dshift.values(), problem.dshift);
  };
  backward(true, true);
  backward(true, false);
  backward(false, true);

  // Inference: biases, clamps and a residual.
  const Truth residual = random.draw(dtype, N * K * plane);
  z = problem.y_bias;
  for (double& v : z.values) v = std::min(std::max(v, 0.0), 6.0);
  Truth expected{pointwise(N, K, C, plane, z.values, weight), pointwise(N, K, C, plane, z.magnitude, size)};
  each([&](int64_t k, int64_t i) {
    const double sum = expected.values[i] + bias.values[k] + residual.values[i];
    expected.values[i] = std::min(std::max(sum, 0.0), 6.0);
    expected.magnitude[i] += bias.magnitude[k] + residual.magnitude[i];
  });
  Tensor residual_tensor(dtype, nhwc, N, K, s.P(), s.Q(), true);
  residual_tensor.fill(residual.values);
  const Tensor w_bias = vector_of(dtype, problem.bias), bias_tensor = vector_of(dtype, bias.values);
  args.statistics = false, args.w_bias = w_bias.bytes.data(), args.bias = bias_tensor.bytes.data();
  args.residual = residual_tensor.ref(), args.between = args.after = {0, 6};
  run(args);
  compare(what + " inference", dtype, made.values(), expected);
}

}  // namespace

int main() {
  int turn = 0;
  for (const Named& named : kShapes) {
    if (named.shape.M != 1 || named.shape.y_numel() > 60000) continue;
    for (Dtype dtype : kDtypes)
      for (int isa = 0; isa < cpu::isa_count(); ++isa, ++turn) {
        const Load load = turn % 3 == 0 ? Load::kNothing : turn % 3 == 1 ? Load::kBoth : Load::kRelu;
        const int K = turn % 4 == 0 ? 1 : turn % 4 == 1 ? 37 : 16;
        const bool relu = turn % 2 == 0, nhwc = turn % 5 < 3;
        cpu::set_isa(isa);
        test(Problem(named.shape, dtype, load), K, relu, nhwc, 1 + turn % 3,
             std::string(cpu::isa_name(isa)) + " " + named.name + " " + name(dtype) + (nhwc ? " NHWC" : " NCHW") +
                 name(load) + " K " + std::to_string(K) + (relu ? " relu between" : ""));
      }
  }
  std::printf("%d checks, %d failed, on %d instruction sets\n", checks, failures, cpu::isa_count());
  return failures != 0;
}
