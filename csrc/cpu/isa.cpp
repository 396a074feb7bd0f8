#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../depthwise.h"

namespace xsep::cpu {
namespace {

std::vector<const Isa*> supported() {
  std::vector<const Isa*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and so F16C
  [[maybe_unused]] const bool avx512 = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(XSEP_HAS_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::isa);
#endif
#if defined(XSEP_HAS_AVX512)
  if (avx512) found.push_back(&avx512::isa);
#endif
#if defined(XSEP_HAS_AVX2)
  if (fma) found.push_back(&avx2::isa);
#endif
#endif
  found.push_back(&scalar::isa);
  return found;
}

const std::vector<const Isa*>& table() {
  static const std::vector<const Isa*> isas = supported();
  return isas;
}

// torch's variable caps torch's own kernels; whoever sets it means all of the process.
int initial() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = cap ? cap : "";
  const auto skip = [&](const std::string& isa) {
    if (name == "default") return isa != "scalar";
    if (name == "avx2") return isa.rfind("avx512", 0) == 0;
    return false;
  };
  int i = 0;
  while (skip(table()[i]->name)) ++i;
  return i;
}

std::atomic<int>& current() {
  static std::atomic<int> index{initial()};
  return index;
}

}  // namespace

int isa_count() { return static_cast<int>(table().size()); }

const char* isa_name(int index) { return table().at(index)->name; }

int current_isa() { return current(); }

void set_isa(int index) {
  if (index < 0 || index >= isa_count()) throw std::invalid_argument("no instruction set " + std::to_string(index));
  current() = index;
}

const Isa& isa_in_use() { return *table()[current()]; }

}  // namespace xsep::cpu
