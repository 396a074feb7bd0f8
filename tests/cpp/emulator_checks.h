// What the tests of the host emulator share: expectations, and orders of threads.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace xsep::cuda::emulator_checks {

inline int failures = 0, checks = 0;

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// That it throws an error whose message has all the words.
template <class F>
void expect_error(F&& f, const std::string& what, const std::vector<std::string>& words) {
  try {
    f();
  } catch (const emulator::Error& error) {
    for (const std::string& word : words) {
      const bool found = std::string(error.what()).find(word) != std::string::npos;
      expect(found, what + ": no '" + word + "' in: " + error.what());
    }
    return;
  }
  expect(false, what + ": no error");
}

inline const char* const kOrders[] = {"ascending", "descending", "0", "1", "7"};
// In how many orders the result of a kernel is wrong.
template <class F>
int wrong_orders(F&& right) {
  int wrong = 0;
  for (const char* order : kOrders) {
    emulator::set_order(order);
    wrong += !right();
  }
  emulator::set_order("ascending");
  return wrong;
}

// The exit code.
inline int report() {
  std::printf("%d of %d checks of the emulator hold\n", checks - failures, checks);
  return failures != 0;
}

}  // namespace xsep::cuda::emulator_checks
