// Compiled by nvcc, or as C++ for the emulator.

#include "cuda_calls.h"

#include <mutex>
#include <stdexcept>

#include "../cuda/depthwise.h"
#include "../cuda/separable_kernels.h"

namespace xsep::cuda {

namespace {

void require(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(what + ": CUDA error " + std::to_string(error) + ", " + cudaGetErrorString(error));
  }
}

std::string text(const std::string& pass, const ConvShape& s, Dtype dtype, bool nhwc) {
  const char* dtypes[] = {"float32", "float64", "float16", "bfloat16"};
  const auto list = [](std::initializer_list<int> values, const char* between) {
    std::string joined;
    for (const int value : values) joined += (joined.empty() ? "" : between) + std::to_string(value);
    return joined;
  };
  return pass + ", " + dtypes[static_cast<int>(dtype)] + (nhwc ? " NHWC" : " NCHW") + ", x " +
         list({s.N, s.C, s.H, s.W}, "x") + ", w " + list({s.K(), 1, s.R, s.S}, "x") + ", stride " +
         list({s.stride_h, s.stride_w}, ", ") + ", pad " +
         list({s.pad_top, s.pad_bottom, s.pad_left, s.pad_right}, ", ") + ", dilation " +
         list({s.dilation_h, s.dilation_w}, ", ");
}

std::string text(const DepthwiseArgs& args) {
  const char* passes[] = {"fprop", "dgrad", "wgrad", "dgrad_wgrad"};
  return text(passes[static_cast<int>(args.pass)], args.shape, args.dtype, args.nhwc);
}

std::string text(const SeparableArgs& args) {
  return text("block with " + std::to_string(args.K) + " channels", args.shape, args.dtype, args.nhwc);
}

const std::vector<Kernel>& table(const DepthwiseArgs& args) { return kernels(args.dtype); }
const std::vector<SeparableKernel>& table(const SeparableArgs& args) { return separable_kernels(args.dtype); }

#if defined(XSEP_EMULATE_CUDA)

std::vector<Card> find_cards() { return {{"host emulator", 90, 132, 227 * 1024}}; }

// The emulator runs one kernel at a time.
class CardGuard {
 public:
  explicit CardGuard(int) : lock_(mutex()) {}

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  std::lock_guard<std::mutex> lock_;
};

#else

std::vector<Card> find_cards() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) return {};
  require(error, "cannot count the CUDA devices");
  std::vector<Card> found(count);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    require(cudaGetDeviceProperties(&properties, i), "cannot ask CUDA device " + std::to_string(i));
    found[i] = {properties.name, 10 * properties.major + properties.minor, properties.multiProcessorCount,
                static_cast<int>(properties.sharedMemPerBlockOptin)};
  }
  return found;
}

// The current device of this thread is the card while it lives.
class CardGuard {
 public:
  explicit CardGuard(int card) {
    require(cudaGetDevice(&before_), "no current CUDA device");
    if (card != before_) require(cudaSetDevice(card), "cannot use CUDA device " + std::to_string(card));
    changed_ = card != before_;
  }
  ~CardGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  CardGuard(const CardGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

__global__ void probe() {}

#endif

Device device(int card) {
  const Card& found = cards().at(card);
  return {found.arch, found.multiprocessors, found.shared_bytes};
}

template <class Family>
std::vector<std::string> names(const std::vector<Family>& table) {
  std::vector<std::string> found;
  for (const Family& kernel : table) found.push_back(kernel.name);
  return found;
}

template <class Args>
std::vector<std::pair<std::string, std::string>> reasons(const Args& args, int card) {
  const auto* const chosen = choose(args, device(card));
  bool after = false;
  std::vector<std::pair<std::string, std::string>> found;
  for (const auto& kernel : table(args)) {
    std::string reason = kernel.why_not(args, device(card));
    if (&kernel == chosen) {
      after = true;
    } else if (reason.empty()) {
      reason = after ? std::string("comes after ") + chosen->name : "is switched off";
    }
    found.emplace_back(kernel.name, reason);
  }
  return found;
}

template <class Args>
const auto& selected(const Args& args, int card, const std::string& family) {
  if (family.empty()) {
    const auto* const chosen = choose(args, device(card));
    if (chosen == nullptr) throw std::runtime_error("no CUDA kernel takes " + text(args));
    return *chosen;
  }
  for (const auto& kernel : table(args)) {
    if (family != kernel.name) continue;
    const std::string reason = kernel.why_not(args, device(card));
    if (!reason.empty()) throw std::domain_error(family + " does not take " + text(args) + ": " + reason);
    return kernel;
  }
  throw std::domain_error("there is no kernel family '" + family + "' for " + text(args));
}

template <class Family, class Args>
void start(const Family& kernel, const Args& args, int card, uintptr_t stream) {
  const CardGuard guard(card);
  const cudaError_t error = kernel.run(args, device(card), reinterpret_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) require(error, std::string(kernel.name) + " failed in " + text(args));
}

}  // namespace

const std::vector<Card>& cards() {
  static const std::vector<Card> found = find_cards();
  return found;
}

#if defined(XSEP_EMULATE_CUDA)

int driver_version() { return 0; }

std::string why_no_code(int) { return ""; }

#else

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string why_no_code(int card) {
  const CardGuard guard(card);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is told here, and nowhere else
  return cudaGetErrorString(error);
}

#endif

std::vector<std::string> families(Dtype dtype) { return names(kernels(dtype)); }

std::vector<std::string> families_off_at_first(Dtype dtype) {
  std::vector<std::string> names;
  for (const Kernel& kernel : kernels(dtype)) {
    if (kernel.off_at_first) names.push_back(kernel.name);
  }
  return names;
}

std::vector<std::pair<std::string, std::string>> why_not(const DepthwiseArgs& args, int card) {
  return reasons(args, card);
}

const Kernel& select(const DepthwiseArgs& args, int card, const std::string& family) {
  return selected(args, card, family);
}

std::string name(const Kernel& kernel) { return kernel.name; }

int64_t workspace_bytes(const Kernel& kernel, const DepthwiseArgs& args, int card) {
  return kernel.workspace_bytes(args, device(card));
}

void run(const Kernel& kernel, const DepthwiseArgs& args, int card, uintptr_t stream) {
  start(kernel, args, card, stream);
}

std::vector<std::string> separable_families(Dtype dtype) { return names(separable_kernels(dtype)); }

std::vector<std::pair<std::string, std::string>> why_not(const SeparableArgs& args, int card) {
  return reasons(args, card);
}

const SeparableKernel& select(const SeparableArgs& args, int card, const std::string& family) {
  return selected(args, card, family);
}

std::string name(const SeparableKernel& kernel) { return kernel.name; }

int64_t workspace_bytes(const SeparableKernel& kernel, const SeparableArgs& args, int card) {
  return kernel.workspace_bytes(args, device(card));
}

void run(const SeparableKernel& kernel, const SeparableArgs& args, int card, uintptr_t stream) {
  start(kernel, args, card, stream);
}

}  // namespace xsep::cuda
