// Recycled memory under random allocations and releases: outputs never overlap, keep what was written to them while
// others come and go, and what waits stays within its limit.

#include "../../csrc/cpu/memory.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

using namespace xsep::cpu;

namespace {

constexpr int64_t kMega = 1 << 20;
int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

struct Output {
  char* memory;
  int64_t bytes;
  int64_t tag;

  // The tag in every page, and in the last bytes.
  template <class F>
  void each(F f) const {
    for (int64_t at = 0; at + 8 <= bytes; at += 4096) f(reinterpret_cast<int64_t*>(memory + at));
    f(reinterpret_cast<int64_t*>(memory + (bytes - 8) / 8 * 8));
  }
  void write() const {
    each([&](int64_t* p) { *p = tag; });
  }
  bool kept() const {
    bool all = true;
    each([&](int64_t* p) { all &= *p == tag; });
    return all;
  }
};

void test_random(int64_t limit, unsigned seed) {
  set_limit(limit);
  std::mt19937 random(seed);
  std::vector<Output> live;
  for (int64_t step = 0; step < 3000; ++step) {
    if (live.empty() || (live.size() < 24 && random() % 2)) {
      const int64_t bytes = kMega + random() % (random() % 8 ? 4 * kMega : 60 * kMega);
      Output output{static_cast<char*>(allocate(bytes)), bytes, step};
      expect(output.memory && reinterpret_cast<uintptr_t>(output.memory) % 4096 == 0, "memory aligned to 4096");
      if (!output.memory) return;
      output.write();
      live.push_back(output);
    } else {
      std::swap(live[random() % live.size()], live.back());
      expect(live.back().kept(), "an output keeps its contents");
      release(live.back().memory);
      live.pop_back();
      expect(waiting_bytes() <= limit, "what waits stays within the limit");
    }
    if (step % 500 == 499) {
      release_waiting();
      expect(waiting_bytes() == 0, "nothing waits after release_waiting()");
    }
  }
  for (const Output& output : live) {
    expect(output.kept(), "an output keeps its contents to the end");
    release(output.memory);
  }
}

// Sizes that come in turn, one at a time, are cut from the same memory.
void test_one_at_a_time() {
  set_limit(1024 * kMega);
  release_waiting();
  for (int round = 0; round < 20; ++round) {
    for (const int64_t size : {64 * kMega, 3 * kMega + 4096, 17 * kMega, 40 * kMega}) {
      void* const memory = allocate(size);
      expect(memory, "memory for outputs in turn");
      release(memory);
    }
  }
  expect(waiting_bytes() <= 64 * kMega, "no more waits than the largest output");
}

}  // namespace

int main() {
  if (!recycles()) {
    std::printf("nothing is recycled here: skipped\n");
    return 77;
  }
  test_one_at_a_time();
  unsigned seed = 0;
  for (const int64_t limit : {int64_t{0}, 100 * kMega, 4096 * kMega}) test_random(limit, ++seed);
  release(&failures);  // of others: ignored
  expect(!allocate(int64_t{1} << 60), "more than there are addresses gives null");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
