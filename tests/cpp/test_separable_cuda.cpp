// Every family of CUDA kernels of the training block, on every call that it takes, against naive loops in double.
// On the host emulator, in several orders of threads.

#include <map>
#include <stdexcept>

#include "cuda/emulator.h"
#include "cuda/separable_kernels.h"
#include "cuda_memory.h"
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

void test(int turn, const Problem& problem, int K, bool relu, bool slices, const cuda::Device& device,
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
  Truth y{
      pointwise(s.N, K, s.C, plane, z.values, [&](int64_t k, int64_t c) { return w_pw.values[k * s.C + c]; }),
      pointwise(s.N, K, s.C, plane, z.magnitude, [&](int64_t k, int64_t c) { return w_pw.magnitude[k * s.C + c]; })};
  if (dtype != Dtype::kFloat32) {
    // The matrix units take z in the tensors' type.
    const std::vector<double> rounding = pointwise(s.N, K, s.C, plane, absolute(z.values), [&](int64_t k, int64_t c) {
      return w_pw.magnitude[k * s.C + c] * rounding_of(dtype) / kAccumulation;
    });
    for (size_t i = 0; i < rounding.size(); ++i) y.magnitude[i] += rounding[i];
  }

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

  for (const cuda::SeparableKernel& kernel : cuda::separable_kernels(dtype)) {
    const Memory made(static_cast<int64_t>(like.bytes.size())), mean(int64_t{K} * 4), m2(int64_t{K} * 4);
    args.y = made.get(), args.mean = static_cast<float*>(mean.get()), args.m2 = static_cast<float*>(m2.get());
    if (!kernel.why_not(args, device).empty()) continue;
    ++ran[std::string(kernel.name) + " " + name(dtype)];
    const Memory workspace(kernel.workspace_bytes(args, device));
    args.workspace = workspace.get();
    std::vector<double> first;
    const char* const orders[] = {"ascending", "descending", "1"};
    for (int i = 0; i < 3; ++i) {
      if (kSanitized && i != turn % 3) continue;
      const char* order = orders[i];
      cuda::emulator::set_order(order);
      const std::string which = what + ", " + kernel.name + ", " + order;
      try {
        const cudaError_t error = kernel.run(args, device, nullptr);
        if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
      } catch (const std::exception& error) {
        ++failures;
        std::printf("FAILED %s: %s\n", which.c_str(), error.what());
        continue;
      }
      const std::vector<double> values = values_in(made, like);
      compare(which + " y", dtype, values, y);
      const Statistics truth = statistics_of(values, K, plane);
      compare(which + " mean", Dtype::kFloat32, values_in(mean, like_vector), truth.mean);
      compare(which + " m2", Dtype::kFloat32, values_in(m2, like_vector), truth.m2);
      if (first.empty()) first = values;
      ++checks;
      if (values != first) ++failures, std::printf("FAILED %s: the order changes the result\n", which.c_str());
    }
  }
}

}  // namespace

int main() {
  const cuda::Device devices[] = {{90, 132, 227 * 1024}, {70, 1, 96 * 1024}};
  int turn = 0;
  for (const Named& named : kShapes) {
    if (named.shape.M != 1 || named.shape.y_numel() > 20000) continue;
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16})
      for (bool slices : {false, true}) {
        const Load load = turn % 3 == 0 ? Load::kNothing : turn % 3 == 1 ? Load::kBoth : Load::kRelu;
        const int K = turn % 4 == 0 ? 1 : turn % 4 == 1 ? 37 : 136;
        const bool relu = turn % 5 < 2;
        test(turn, Problem(named.shape, dtype, load), K, relu, slices, devices[turn % 2],
             std::string(named.name) + " " + name(dtype) + name(load) + (slices ? " slices" : "") + " K " +
                 std::to_string(K) + (relu ? " relu between" : ""));
        ++turn;
      }
  }
  for (const auto& [family, count] : ran) std::printf("%s: %d calls\n", family.c_str(), count);
  if (ran.size() != 5) ++failures, std::printf("FAILED: not every family ran\n");
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
