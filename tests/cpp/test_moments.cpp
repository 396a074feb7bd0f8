// Mean and m2 of tensors on the CPU, every layout, element type and instruction set, against sums in double.

#include "../../csrc/moments.h"

#include <cstdlib>

#include "separable_cases.h"

using namespace xsep;
using namespace xsep::cases;

namespace {

void run(MomentsArgs args) {
  // Exactly the bytes asked for, so that the sanitizer guards the workspace too; they start as NaN.
  const int64_t bytes = cpu::workspace_bytes(args);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(workspace, 0xff, bytes);
  args.workspace = workspace;
  cpu::moments(args);
  std::free(workspace);
}

void test(const ConvShape& s, Dtype dtype, bool nhwc, int threads, const std::string& what) {
  const Dtype vector_type = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const int64_t plane = int64_t{s.H} * s.W;
  Random random;
  Truth x = random.draw(dtype, s.x_numel());
  Tensor tensor(dtype, nhwc, s.N, s.C, s.H, s.W, true);
  for (size_t i = 0; i < x.values.size(); ++i) {  // far from zero, differently in each channel
    x.values[i] = rounded(dtype, x.values[i] + static_cast<double>(static_cast<int64_t>(i) / plane % s.C) * 10);
  }
  tensor.fill(x.values);
  Tensor mean(vector_type, false, 1, s.C, 1, 1), m2 = mean;
  MomentsArgs args{};
  args.N = s.N, args.C = s.C, args.H = s.H, args.W = s.W, args.dtype = dtype, args.nhwc = nhwc;
  args.threads = threads, args.x = tensor.ref(), args.mean = mean.bytes.data(), args.m2 = m2.bytes.data();
  run(args);
  const Statistics truth = statistics_of(x.values, s.C, plane);
  compare(what + " mean", vector_type, mean.values(), truth.mean);
  compare(what + " m2", vector_type, m2.values(), truth.m2);
}

}  // namespace

int main() {
  for (const Named& named : kShapes)
    for (Dtype dtype : kDtypes)
      for (bool nhwc : {false, true})
        for (int isa = 0; isa < cpu::isa_count(); ++isa)
          for (int threads : {1, 3}) {
            cpu::set_isa(isa);
            test(named.shape, dtype, nhwc, threads,
                 std::string(cpu::isa_name(isa)) + " " + named.name + " " + name(dtype) + (nhwc ? " NHWC" : " NCHW") +
                     " threads " + std::to_string(threads));
          }
  std::printf("%d checks, %d failed, on %d instruction sets\n", checks, failures, cpu::isa_count());
  return failures != 0;
}
