// Every family of CUDA kernels, on every call that it takes: passes, layouts, element types, functions on load, dense
// and sliced inputs, against naive loops in double.  On a GPU, or on the host emulator, there in several orders of
// threads.
//
//   g++ -std=c++17 -DXSEP_EMULATE_CUDA ...            or, with the sources of csrc/cuda,
//   nvcc -std=c++17 -arch=sm_70 -x cu -Icsrc ...      exit code 77: there is no GPU

#include <exception>
#include <iterator>

#include "cases.h"
#include "cuda_cases.h"
#include "cuda/depthwise.h"

using namespace xsep;
using namespace xsep::cases;

namespace {

// A tensor with a copy of its bytes where kernels can reach it.
struct Buffer {
  explicit Buffer(const Tensor& tensor) : tensor(tensor), memory(tensor.bytes) {}
  Buffer(Tensor tensor, const std::vector<double>& values) : Buffer((tensor.fill(values), tensor)) {}

  TensorRef ref() const { return tensor.ref(memory.get()); }
  std::vector<double> values() {
    tensor.bytes = memory.bytes();
    return tensor.values();
  }

  Tensor tensor;
  Memory memory;
};

Tensor vector(Dtype dtype, int64_t count) { return {dtype, false, 1, count, 1, 1}; }

// One problem in one layout, its inputs in memory.
class Case {
 public:
  Case(const Problem& problem, bool nhwc, bool slices, const cuda::Device& device, const std::string& what)
      : problem_(problem),
        device_(device),
        what_(what),
        x_({problem.dtype, nhwc, s().N, s().C, s().H, s().W, slices}, problem.x),
        dy_({problem.dtype, nhwc, s().N, s().K(), s().P(), s().Q(), slices}, problem.dy),
        w_(vector(problem.dtype, s().w_numel()), problem.w),
        bias_(vector(problem.dtype, s().K()), problem.bias),
        center_(vector(problem.vector_type, s().C), problem.center),
        scale_(vector(problem.vector_type, s().C), problem.scale),
        shift_(vector(problem.vector_type, s().C), problem.shift) {
    args_.shape = s(), args_.dtype = problem.dtype, args_.nhwc = nhwc;
    args_.x = x_.ref(), args_.dy = dy_.ref(), args_.w = w_.memory.get();
    if (problem.affine) args_.on_load = {center_.memory.get(), scale_.memory.get(), shift_.memory.get(), false};
    args_.on_load.relu = problem.relu;
  }

  void run() {
    run(Pass::kFprop, " fprop", false);
    run(Pass::kFprop, " fprop with bias", true);
    run(Pass::kDgrad, " dgrad", false);
    run(Pass::kWgrad, " wgrad", false);
    run(Pass::kDgradWgrad, " dgrad_wgrad", true);
    if (problem_.affine) run(Pass::kDgradWgrad, " dgrad_wgrad without dscale and dshift", false);
  }

 private:
  const ConvShape& s() const { return problem_.shape; }

  // All families that take the pass.
  void run(Pass pass, const std::string& name, bool all_arguments) {
    args_.pass = pass;
    args_.bias = pass == Pass::kFprop && all_arguments ? bias_.memory.get() : nullptr;
    const cuda::Kernel* first = nullptr;
    for (const cuda::Kernel& kernel : cuda::kernels(problem_.dtype)) {
      if (!kernel.why_not(args_, device_).empty()) continue;
      if (!first && !kernel.off_at_first) first = &kernel;
      std::vector<char> result;
      for (size_t i = 0; i < std::size(kOrders); ++i) {
        if (kSanitized && i != checks % std::size(kOrders)) continue;
        const char* order = kOrders[i];
        set_order(order);
        const std::string what = what_ + name + ", " + kernel.name + ", " + order;
        try {
          run(kernel, all_arguments, what, result);
        } catch (const std::exception& error) {
          fail(what, error.what());
        }
      }
    }
    ++checks;
    if (!first || cuda::choose(args_, device_) != first) fail(what_ + name, "not the first family that takes it");
  }

  // `result`: the bytes of an earlier run, which must be the same.
  void run(const cuda::Kernel& kernel, bool all_arguments, const std::string& what, std::vector<char>& result) {
    const Problem& p = problem_;
    const bool nhwc = args_.nhwc, gradients = all_arguments && p.affine;
    DepthwiseArgs args = args_;
    Memory workspace(kernel.workspace_bytes(args, device_));
    args.workspace = workspace.get();
    Buffer y({p.dtype, nhwc, s().N, s().K(), s().P(), s().Q()}), dx({p.dtype, nhwc, s().N, s().C, s().H, s().W});
    Buffer dw(vector(p.dtype, s().w_numel()));
    Buffer dscale(vector(p.vector_type, s().C)), dshift(vector(p.vector_type, s().C));
    const bool makes_y = args.pass == Pass::kFprop,
               makes_dx = args.pass == Pass::kDgrad || args.pass == Pass::kDgradWgrad,
               makes_dw = args.pass == Pass::kWgrad || args.pass == Pass::kDgradWgrad,
               makes_vectors = args.pass == Pass::kDgradWgrad && gradients;
    if (makes_y) args.y = y.memory.get();
    if (makes_dx) args.dx = dx.memory.get();
    if (makes_dw) args.dw = dw.memory.get();
    if (makes_vectors) args.dscale = dscale.memory.get(), args.dshift = dshift.memory.get();

    const cudaError_t error = kernel.run(args, device_, nullptr);
    if (error != cudaSuccess) return fail(what, cudaGetErrorString(error));
    std::vector<char> bytes;
    const auto check = [&](bool made, const char* name, Buffer& buffer, const Truth& truth) {
      if (!made) return;
      compare(what + name, buffer.tensor.dtype, buffer.values(), truth);
      bytes.insert(bytes.end(), buffer.tensor.bytes.begin(), buffer.tensor.bytes.end());
    };
    check(makes_y, "", y, args.bias ? p.y_bias : p.y);
    check(makes_dx, " dx", dx, args.pass == Pass::kDgrad ? p.du : p.dx);
    check(makes_dw, " dw", dw, p.dw);
    check(makes_vectors, " dscale", dscale, p.dscale);
    check(makes_vectors, " dshift", dshift, p.dshift);
    ++checks;
    if (!result.empty() && bytes != result) fail(what, "the result differs from that of an earlier run");
    result = std::move(bytes);
  }

  static void fail(const std::string& what, const std::string& why) {
    ++failures;
    std::printf("FAILED %s: %s\n", what.c_str(), why.c_str());
  }

  const Problem& problem_;
  const cuda::Device device_;
  const std::string what_;
  const Buffer x_, dy_, w_, bias_, center_, scale_, shift_;
  DepthwiseArgs args_{};
};

}  // namespace

// Arguments, if any: only shapes whose names begin with one of them.
int main(int count, char** names) {
  const std::vector<cuda::Device> devices = cases::devices();
  if (devices.empty()) {
    std::printf("no GPU: skipped\n");
    return 77;
  }
  for (const Named& named : kShapes) {
    if (!wanted(named, count, names)) continue;
    for (Dtype dtype : kDtypes)
      for (Load load : {Load::kNothing, Load::kRelu, Load::kAffine, Load::kBoth}) {
        const Problem problem(named.shape, dtype, load);
        for (bool nhwc : {false, true})
          for (bool slices : {false, true}) {
            const cuda::Device& device = devices[(slices + static_cast<int>(load)) % devices.size()];
            Case(problem, nhwc, slices, device,
                 std::string(named.name) + " " + name(dtype) + (nhwc ? " NHWC" : " NCHW") + name(load) +
                     (slices ? " slices" : ""))
                .run();
          }
      }
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
