// Every family of CUDA kernels of the training block, on every call that it takes, against naive loops in double.
// Built and run as test_cuda.cpp.

#include <iterator>
#include <map>
#include <stdexcept>

#include "cuda/separable_kernels.h"
#include "cuda_cases.h"
#include "separable_cases.h"

using namespace xsep;
using namespace xsep::cases;

namespace {

std::vector<double> values_in(const Memory& memory, Tensor like) {
  like.bytes = memory.bytes();
  return like.values();
}

// The families that ran.
std::map<std::string, int> ran;

// Calls `check(which)` after each run of a kernel that takes the call, in several orders of threads; with the sanitizer
// in one.  `outputs` are what it writes.
template <class F>
void each_run(int turn, cuda::SeparableArgs args, const cuda::Device& device, const std::string& what,
              const std::vector<const Memory*>& outputs, F&& check) {
  for (const cuda::SeparableKernel& kernel : cuda::separable_kernels(args.dtype)) {
    if (!kernel.why_not(args, device).empty()) continue;
    ++ran[std::string(kernel.name) + " " + name(args.dtype)];
    const Memory workspace(kernel.workspace_bytes(args, device));
    args.workspace = workspace.get();
    std::vector<std::vector<char>> first;
    for (size_t i = 0; i < std::size(kOrders); ++i) {
      if (kSanitized && i != turn % std::size(kOrders)) continue;
      set_order(kOrders[i]);
      const std::string which = what + ", " + kernel.name + ", " + kOrders[i];
      for (const Memory* output : outputs) output->spoil();
      try {
        const cudaError_t error = kernel.run(args, device, nullptr);
        if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
      } catch (const std::exception& error) {
        ++failures;
        std::printf("FAILED %s: %s\n", which.c_str(), error.what());
        continue;
      }
      check(which);
      std::vector<std::vector<char>> made;
      for (const Memory* output : outputs) made.push_back(output->bytes());
      if (first.empty()) first = made;
      ++checks;
      if (made != first) ++failures, std::printf("FAILED %s: the order changes the result\n", which.c_str());
    }
  }
}

void test(int turn, Problem problem, int K, bool relu, bool slices, const cuda::Device& device,
          const std::string& what) {
  const ConvShape& s = problem.shape;
  const Dtype dtype = problem.dtype;
  const int64_t plane = int64_t{s.P()} * s.Q();
  Random random;
  const Truth w_pw = random.draw(dtype, int64_t{K} * s.C);
  Truth z = problem.y;
  if (relu) {
    for (double& v : z.values) v = std::max(v, 0.0);
  }
  const auto pointwise_of = [&](const Truth& of) {
    const auto each = [&](const std::vector<double>& values, const std::vector<double>& weights) {
      return pointwise(s.N, K, s.C, plane, values, [&](int64_t k, int64_t c) { return weights[k * s.C + c]; });
    };
    // The matrix units take z in the tensors' type.
    std::vector<double> size = of.magnitude;
    const double rounding = dtype == Dtype::kFloat32 ? 0 : rounding_of(dtype) / kAccumulation;
    for (size_t i = 0; i < size.size(); ++i) size[i] += rounding * std::abs(of.values[i]);
    return Truth{each(of.values, w_pw.values), each(size, w_pw.magnitude)};
  };
  const Truth y = pointwise_of(z);

  Tensor x(dtype, true, s.N, s.C, s.H, s.W, slices);
  x.fill(problem.x);
  const Memory x_bytes(x.bytes), w(vector_of(dtype, problem.w).bytes), pw(vector_of(dtype, w_pw.values).bytes),
      center(vector_of(Dtype::kFloat32, problem.center).bytes), scale(vector_of(Dtype::kFloat32, problem.scale).bytes),
      shift(vector_of(Dtype::kFloat32, problem.shift).bytes);
  const Tensor like(dtype, true, s.N, K, s.P(), s.Q()), like_vector(Dtype::kFloat32, false, 1, K, 1, 1);
  cuda::SeparableArgs args{};
  args.shape = s, args.K = K, args.dtype = dtype, args.nhwc = true;
  if (relu) args.activation = cuda::Activation::kRelu;
  args.x = x.ref(x_bytes.get()), args.w_dw = w.get(), args.w_pw = pw.get();
  if (problem.affine) args.on_load = {center.get(), scale.get(), shift.get(), false};
  args.on_load.relu = problem.relu;

  const Memory made(static_cast<int64_t>(like.bytes.size())), mean(int64_t{K} * 4), m2(int64_t{K} * 4);
  args.y = made.get(), args.mean = static_cast<float*>(mean.get()), args.m2 = static_cast<float*>(m2.get());
  each_run(turn, args, device, what, {&made, &mean, &m2}, [&](const std::string& which) {
    const std::vector<double> values = values_in(made, like);
    compare(which + " y", dtype, values, y);
    const Statistics truth = statistics_of(values, K, plane);
    compare(which + " mean", Dtype::kFloat32, values_in(mean, like_vector), truth.mean);
    compare(which + " m2", Dtype::kFloat32, values_in(m2, like_vector), truth.m2);
  });

  // Inference: biases, clamps and a residual.
  const auto clamp = [](double& v) { v = std::min(std::max(v, 0.0), 6.0); };
  const Truth bias = random.draw(dtype, K), residual = random.draw(dtype, s.N * K * plane);
  Truth z_clamped = problem.y_bias;
  for (double& v : z_clamped.values) clamp(v);
  Truth inferred = pointwise_of(z_clamped);
  for (size_t i = 0; i < inferred.values.size(); ++i) {
    const int64_t k = static_cast<int64_t>(i) / plane % K;
    inferred.values[i] += bias.values[k] + residual.values[i], clamp(inferred.values[i]);
    inferred.magnitude[i] += bias.magnitude[k] + residual.magnitude[i];
  }
  Tensor residual_tensor(dtype, true, s.N, K, s.P(), s.Q(), slices);
  residual_tensor.fill(residual.values);
  const Memory w_bias_bytes(vector_of(dtype, problem.bias).bytes), bias_bytes(vector_of(dtype, bias.values).bytes),
      residual_bytes(residual_tensor.bytes);
  cuda::SeparableArgs inference = args;
  inference.mean = inference.m2 = nullptr;
  inference.w_dw_bias = w_bias_bytes.get(), inference.bias = bias_bytes.get();
  inference.residual = residual_tensor.ref(residual_bytes.get());
  inference.activation = inference.out_activation = cuda::Activation::kRelu6;
  each_run(turn, inference, device, what + " inference", {&made},
           [&](const std::string& which) { compare(which + " y", dtype, values_in(made, like), inferred); });

  const int64_t count = s.N * plane;
  const Truth dy = random.draw(dtype, K * count, 1.0 / 64), y_made = random.draw(dtype, K * count),
              mean_made = random.draw(Dtype::kFloat32, K), dmean = random.draw(Dtype::kFloat32, K),
              dm2 = random.draw(Dtype::kFloat32, K, 1.0 / std::max<int64_t>(count, 64));
  const bool statistics = turn % 4 < 2;
  const Truth g = gradient_of_y(&dy, y_made.values, count, plane, statistics ? &mean_made : nullptr, dmean, dm2);
  const double rounding = dtype == Dtype::kFloat32 ? 0 : rounding_of(dtype) / kAccumulation;
  const Truth dw_pw = differentiate(problem, K, relu, w_pw, z, g, rounding);
  Tensor filled = like;
  filled.fill(dy.values);
  const Memory dy_bytes(filled.bytes);
  filled.fill(y_made.values);
  const Memory y_bytes(filled.bytes);
  const auto vector = [](const Truth& t) { return vector_of(Dtype::kFloat32, t.values).bytes; };
  const Memory mean_bytes(vector(mean_made)), dmean_bytes(vector(dmean)), dm2_bytes(vector(dm2));
  std::vector<double> transposed(w_pw.values.size());
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < s.C; ++c) transposed[c * K + k] = w_pw.values[k * s.C + c];
  const Memory pw_t(vector_of(dtype, transposed).bytes);
  const Tensor like_x(dtype, true, s.N, s.C, s.H, s.W), like_w(dtype, false, s.C, 1, s.R, s.S),
      like_pw(dtype, false, K, s.C, 1, 1), like_sums(Dtype::kFloat32, false, 1, s.C, 1, 1);
  const auto memory_of = [](const Tensor& t) { return static_cast<int64_t>(t.bytes.size()); };
  const Memory dx(memory_of(like_x)), dw(memory_of(like_w)), dpw(memory_of(like_pw)), dscale(memory_of(like_sums)),
      dshift(memory_of(like_sums));
  args.backward = true, args.w_pw_t = pw_t.get(), args.dy = dy_bytes.get();
  if (statistics) {
    args.y_made = y_bytes.get(), args.mean_made = static_cast<const float*>(mean_bytes.get());
    args.dmean = static_cast<const float*>(dmean_bytes.get()), args.dm2 = static_cast<const float*>(dm2_bytes.get());
  }
  args.dx = dx.get(), args.dw_dw = dw.get(), args.dw_pw = dpw.get();
  std::vector<const Memory*> outputs = {&dx, &dw, &dpw};
  if (problem.affine) {
    args.dscale = static_cast<float*>(dscale.get()), args.dshift = static_cast<float*>(dshift.get());
    outputs.insert(outputs.end(), {&dscale, &dshift});
  }
  each_run(turn, args, device, what + (statistics ? " statistics" : ""), outputs, [&](const std::string& which) {
    compare(which + " dx", dtype, values_in(dx, like_x), problem.dx);
    compare(which + " dw", dtype, values_in(dw, like_w), problem.dw);
    compare(which + " dw_pw", dtype, values_in(dpw, like_pw), dw_pw);
    if (!problem.affine) return;
    compare(which + " dscale", Dtype::kFloat32, values_in(dscale, like_sums), problem.dscale);
    compare(which + " dshift", Dtype::kFloat32, values_in(dshift, like_sums), problem.dshift);
  });
}

}  // namespace

int main(int count, char** names) {
  const std::vector<cuda::Device> devices = cases::devices();
  if (devices.empty()) {
    std::printf("no GPU: skipped\n");
    return 77;
  }
  int turn = 0;
  const auto next = [&](const char* shape_name, const ConvShape& shape, Dtype dtype, int K, bool slices) {
    const Load load = turn / 4 % 3 == 0 ? Load::kNothing : turn / 4 % 3 == 1 ? Load::kBoth : Load::kRelu;
    const bool relu = turn % 5 < 2;
    test(turn, Problem(shape, dtype, load), K, relu, slices, devices[turn % devices.size()],
         std::string(shape_name) + " " + name(dtype) + name(load) + (slices ? " slices" : "") + " K " +
             std::to_string(K) + (relu ? " relu between" : ""));
    ++turn;
  };
  for (const Named& named : kShapes) {
    if (!wanted(named, count, names) || named.shape.M != 1 || named.shape.y_numel() > 20000) continue;
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (bool slices : {false, true}) {
        next(named.name, named.shape, dtype, turn % 4 == 0 ? 1 : turn % 4 == 1 ? 37 : 136, slices);
      }
      // The kernels of gradients take 3x3 filters and channels that fill their vectors.
      ConvShape shape = named.shape;
      shape.C = (shape.C + 7) / 8 * 8;
      if (shape.R == 3 && shape.S == 3 && shape.y_numel() < 20000) next(named.name, shape, dtype, 24, false);
    }
  }
  for (const auto& [family, calls] : ran) std::printf("%s: %d calls\n", family.c_str(), calls);
  const bool every = count <= 1 && devices.front().arch >= 80;  // older cards have no tensor cores for some
  if (every && ran.size() != 10) ++failures, std::printf("FAILED: not every family ran\n");
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
