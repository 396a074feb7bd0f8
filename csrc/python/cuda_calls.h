// What the bindings need of the CUDA kernels and of the CUDA runtime, without CUDA's headers: the host compiler
// compiles the bindings.  On the emulator there is one card, a model of an H100.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/separable.h"
#include "../depthwise.h"

namespace xsep::cuda {

struct Kernel;
struct SeparableKernel;

struct Card {
  std::string name;
  int arch;  // 10 * major + minor of the compute capability
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

// The cards of this machine; none without a driver.
const std::vector<Card>& cards();

// The CUDA version of the driver, such as 13000; 0 without one.
int driver_version();

// Why this binary has no code for a card, or nothing.  Opens a context on it.
std::string why_no_code(int card);

// The names of the families of an element type, in order of preference.
std::vector<std::string> families(Dtype dtype);
std::vector<std::string> families_off_at_first(Dtype dtype);
void set_enabled(Dtype dtype, const std::string& name, bool enabled);

// Each family of the call's element type with the reason why it does not run the call; one has none.
std::vector<std::pair<std::string, std::string>> why_not(const DepthwiseArgs& args, int card);

// The family that runs the call: the first that takes it, or the named one, switched off or not.  Throws
// std::runtime_error if none takes it, std::domain_error if the named one does not.
const Kernel& select(const DepthwiseArgs& args, int card, const std::string& family);
std::string name(const Kernel& kernel);
int64_t workspace_bytes(const Kernel& kernel, const DepthwiseArgs& args, int card);

// Starts the kernel on a stream of the card.  Throws std::runtime_error naming kernel and problem.
void run(const Kernel& kernel, const DepthwiseArgs& args, int card, uintptr_t stream);

// The same of the training block's kernels.
std::vector<std::string> separable_families(Dtype dtype);
void set_separable_enabled(Dtype dtype, const std::string& name, bool enabled);
std::vector<std::pair<std::string, std::string>> why_not(const SeparableArgs& args, int card);
const SeparableKernel& select(const SeparableArgs& args, int card, const std::string& family);
std::string name(const SeparableKernel& kernel);
int64_t workspace_bytes(const SeparableKernel& kernel, const SeparableArgs& args, int card);
void run(const SeparableKernel& kernel, const SeparableArgs& args, int card, uintptr_t stream);

}  // namespace xsep::cuda
