// The table of kernel families and the choice among them.

#include "depthwise.h"

#include <atomic>
#include <type_traits>

namespace xsep::cuda {

template <class T>
Kernel depthwise_fprop_nhwc();
template <class T>
Kernel depthwise_fprop_nhwc_tma();
template <class T>
Kernel depthwise_backward_nhwc();
template <class T>
Kernel depthwise_fprop_nchw();
template <class T>
Kernel depthwise_backward_nchw();
template <class T>
Kernel depthwise_generic();

namespace {

template <class T>
std::vector<Kernel> families() {
  if constexpr (std::is_same_v<T, double>) {
    return {depthwise_generic<T>()};
  } else {
    return {depthwise_fprop_nhwc_tma<T>(), depthwise_fprop_nhwc<T>(),    depthwise_backward_nhwc<T>(),
            depthwise_fprop_nchw<T>(),     depthwise_backward_nchw<T>(), depthwise_generic<T>()};
  }
}

uint32_t off_at_first(Dtype dtype) {
  uint32_t bits = 0;
  for (size_t i = 0; i < kernels(dtype).size(); ++i) bits |= uint32_t{kernels(dtype)[i].off_at_first} << i;
  return bits;
}

// A bit for each family of an element type that is switched off.
std::atomic<uint32_t>& disabled(Dtype dtype) {
  static std::atomic<uint32_t> bits[4] = {{off_at_first(static_cast<Dtype>(0))},
                                          {off_at_first(static_cast<Dtype>(1))},
                                          {off_at_first(static_cast<Dtype>(2))},
                                          {off_at_first(static_cast<Dtype>(3))}};
  return bits[static_cast<int>(dtype)];
}

}  // namespace

const std::vector<Kernel>& kernels(Dtype dtype) {
  return with_dtype(dtype, [](auto tag) -> const std::vector<Kernel>& {
    static const std::vector<Kernel> table = families<typename decltype(tag)::type>();
    return table;
  });
}

const Kernel* choose(const DepthwiseArgs& args, const Device& device) {
  const std::vector<Kernel>& table = kernels(args.dtype);
  const uint32_t off = disabled(args.dtype);
  for (size_t i = 0; i < table.size(); ++i) {
    if (!(off >> i & 1u) && table[i].why_not(args, device).empty()) return &table[i];
  }
  return nullptr;
}

void set_enabled(Dtype dtype, const std::string& name, bool enabled) {
  const std::vector<Kernel>& table = kernels(dtype);
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
