// Tensors of a call by the names of its arguments' fields: addresses, or (address, strides) of what is read in place.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "../depthwise.h"

namespace xsep {

template <class Field>
using Fields = std::initializer_list<std::pair<const char*, Field*>>;

template <class Field, class Value>
bool assign(const Fields<Field>& fields, const std::string& name, Value&& value) {
  for (const auto& [known, field] : fields) {
    if (name == known) return *field = value(), true;
  }
  return false;
}

inline void assign_named(const pybind11::dict& tensors, const Fields<TensorRef>& images,
                         const Fields<const void*>& inputs, const Fields<void*>& outputs) {
  for (const auto& [key, value] : tensors) {
    const auto name = key.cast<std::string>();
    const auto located = [&, &value = value]() -> TensorRef {
      const auto [address, s] = value.template cast<std::pair<uintptr_t, std::array<int64_t, 4>>>();
      return {reinterpret_cast<const void*>(address), s[0], s[1], s[2], s[3]};
    };
    const auto address = [&, &value = value] { return reinterpret_cast<void*>(value.template cast<uintptr_t>()); };
    if (!assign(images, name, located) && !assign(inputs, name, address) && !assign(outputs, name, address)) {
      throw std::invalid_argument("no tensor of a call is named '" + name + "'");
    }
  }
}

inline void require_tensors(bool there, const char* what) {
  if (!there) throw std::invalid_argument(std::string("a call needs ") + what);
}

inline void* checked_workspace(uintptr_t workspace) {
  if (workspace % 64 != 0) throw std::invalid_argument("workspace must be aligned to 64 bytes");
  return reinterpret_cast<void*>(workspace);
}

inline int checked_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1; got " + std::to_string(threads));
  return threads;
}

}  // namespace xsep
