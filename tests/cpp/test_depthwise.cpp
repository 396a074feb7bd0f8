// Every pass, layout, element type and instruction set against naive loops in double, on shapes named by what they try.

#include <cstdlib>

#include "cases.h"

using namespace xsep;
using namespace xsep::cases;

namespace {

void run(DepthwiseArgs args) {
  // Exactly the bytes asked for, so that the sanitizer guards the workspace too; they start as NaN.
  const int64_t bytes = cpu::workspace_bytes(args);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(workspace, 0xff, bytes);
  args.workspace = workspace;
  cpu::depthwise(args);
  std::free(workspace);
}

void test(const Problem& problem, bool nhwc, int threads, const std::string& what) {
  const ConvShape& s = problem.shape;
  const Dtype dtype = problem.dtype, vector_type = problem.vector_type;
  const auto vector = [&](Dtype type, const std::vector<double>& values) {
    Tensor t(type, false, 1, static_cast<int64_t>(values.size()), 1, 1);
    t.fill(values);
    return t;
  };
  Tensor x(dtype, nhwc, s.N, s.C, s.H, s.W), dy(dtype, nhwc, s.N, s.K(), s.P(), s.Q());
  x.fill(problem.x), dy.fill(problem.dy);
  const Tensor w = vector(dtype, problem.w), bias = vector(dtype, problem.bias);
  const Tensor center = vector(vector_type, problem.center), scale = vector(vector_type, problem.scale),
               shift = vector(vector_type, problem.shift);

  DepthwiseArgs args{};
  args.shape = s, args.dtype = dtype, args.nhwc = nhwc, args.threads = threads;
  args.x = x.ref(), args.dy = dy.ref(), args.w = w.bytes.data();
  if (problem.affine) args.on_load = {center.bytes.data(), scale.bytes.data(), shift.bytes.data(), false};
  args.on_load.relu = problem.relu;

  Tensor y(dtype, nhwc, s.N, s.K(), s.P(), s.Q());
  args.pass = Pass::kFprop, args.y = y.bytes.data(), args.bias = bias.bytes.data();
  run(args);
  compare(what + " fprop", dtype, y.values(), problem.y_bias);
  args.bias = nullptr;

  Tensor dw(dtype, false, s.K(), 1, s.R, s.S);
  args.pass = Pass::kWgrad, args.dw = dw.bytes.data();
  run(args);
  compare(what + " wgrad", dtype, dw.values(), problem.dw);

  if (!args.on_load.any()) {
    Tensor dx(dtype, nhwc, s.N, s.C, s.H, s.W);
    args.pass = Pass::kDgrad, args.dx = dx.bytes.data();
    run(args);
    compare(what + " dgrad", dtype, dx.values(), problem.du);
  }

  Tensor dx(dtype, nhwc, s.N, s.C, s.H, s.W), dw2(dtype, false, s.K(), 1, s.R, s.S);
  Tensor dscale(vector_type, false, 1, s.C, 1, 1), dshift(vector_type, false, 1, s.C, 1, 1);
  args.pass = Pass::kDgradWgrad, args.dx = dx.bytes.data(), args.dw = dw2.bytes.data();
  if (problem.affine) args.dscale = dscale.bytes.data(), args.dshift = dshift.bytes.data();
  run(args);
  compare(what + " dgrad_wgrad dx", dtype, dx.values(), problem.dx);
  compare(what + " dgrad_wgrad dw", dtype, dw2.values(), problem.dw);
  if (problem.affine) {
    compare(what + " dscale", vector_type, dscale.values(), problem.dscale);
    compare(what + " dshift", vector_type, dshift.values(), problem.dshift);
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
  for (const Named& named : kShapes)
    for (Dtype dtype : kDtypes)
      for (Load load : {Load::kNothing, Load::kBoth}) {
        const Problem problem(named.shape, dtype, load);
        for (int isa = 0; isa < cpu::isa_count(); ++isa)
          for (bool nhwc : {false, true}) {
            cpu::set_isa(isa);
            const int threads = 1 + (&named - kShapes) % 3;
            test(problem, nhwc, threads,
                 std::string(cpu::isa_name(isa)) + " " + named.name + " " + name(dtype) + (nhwc ? " NHWC" : " NCHW") +
                     name(load));
          }
      }
  std::printf("%d checks, %d failed, on %d instruction sets\n", checks, failures, cpu::isa_count());
  return failures != 0;
}
