// The table of the training block's kernel families, and the choice among them.

#include "separable_kernels.h"

#include <atomic>
#include <stdexcept>
#include <type_traits>

namespace xsep::cuda {

template <class T>
SeparableKernel separable_fprop_nhwc();
template <class T>
SeparableKernel separable_fprop_nhwc_mma();
template <class T>
SeparableKernel separable_backward_nhwc();
template <class T>
SeparableKernel separable_backward_nhwc_mma();

namespace {

template <class T>
std::vector<SeparableKernel> families() {
  if constexpr (std::is_same_v<T, double>) {
    return {};
  } else if constexpr (std::is_same_v<T, float>) {
    return {separable_fprop_nhwc<T>(), separable_backward_nhwc<T>()};
  } else {
    return {separable_fprop_nhwc_mma<T>(), separable_fprop_nhwc<T>(), separable_backward_nhwc_mma<T>(),
            separable_backward_nhwc<T>()};
  }
}

// A bit for each family of an element type that is switched off.
std::atomic<uint32_t>& disabled(Dtype dtype) {
  static std::atomic<uint32_t> bits[4] = {};
  return bits[static_cast<int>(dtype)];
}

}  // namespace

const std::vector<SeparableKernel>& separable_kernels(Dtype dtype) {
  return with_dtype(dtype, [](auto tag) -> const std::vector<SeparableKernel>& {
    static const std::vector<SeparableKernel> table = families<typename decltype(tag)::type>();
    return table;
  });
}

const SeparableKernel* choose(const SeparableArgs& args, const Device& device) {
  const std::vector<SeparableKernel>& table = separable_kernels(args.dtype);
  const uint32_t off = disabled(args.dtype);
  for (size_t i = 0; i < table.size(); ++i) {
    if (!(off >> i & 1u) && table[i].why_not(args, device).empty()) return &table[i];
  }
  return nullptr;
}

void set_separable_enabled(Dtype dtype, const std::string& name, bool enabled) {
  const std::vector<SeparableKernel>& table = separable_kernels(dtype);
  for (size_t i = 0; i < table.size(); ++i) {
    if (name != table[i].name) continue;
    if (enabled) {
      disabled(dtype) &= ~(1u << i);
    } else {
      disabled(dtype) |= 1u << i;
    }
    return;
  }
  throw std::invalid_argument("there is no kernel family '" + name + "' for this dtype");
}

}  // namespace xsep::cuda
