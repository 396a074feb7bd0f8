// The emulator's bulk copies: what arrives and when, and what the hardware would not do.

#include <cmath>
#include <string>
#include <vector>

#include "cuda/tma.cuh"
#include "emulator_checks.h"

using namespace xsep;
using namespace xsep::cuda;
using namespace xsep::cuda::emulator_checks;

namespace {

constexpr int kC = 8, kW = 5, kH = 6, kN = 2;  // of the tensor
constexpr int kBoxC = 4, kBoxW = 3, kBox = kBoxC * kBoxW;
alignas(16) float tensor[kN * kH * kW * kC];

TensorView view() {
  return {tensor, Dtype::kFloat32, {kC, kW, kH, kN}, {4 * kC, 4 * kC * kW, 4 * kC * kW * kH}, kBoxC, kBoxW};
}

float at(int c, int w, int h, int n) {
  const bool inside = c >= 0 && c < kC && w >= 0 && w < kW && h >= 0 && h < kH && n >= 0 && n < kN;
  return inside ? tensor[((n * kH + h) * kW + w) * kC + c] : 0;
}

enum class Mistake { kNone, kNoWait, kEarly, kNoInit, kTwice, kNobodyAsks, kBytes, kAlignment };

// Copies `rows` boxes one below the other through a ring of two, and adds 1 to each.
template <Mistake kMistake>
__global__ void rows_kernel(const XSEP_GRID_CONSTANT TensorMap map, int c, int w, int h, int n, int rows, float* out) {
  uint64_t* const barriers = shared_memory<uint64_t>();
  char* start = reinterpret_cast<char*>(barriers + 2);
  start += (kTmaAlignment - reinterpret_cast<uintptr_t>(start) % kTmaAlignment) % kTmaAlignment;
  if (kMistake == Mistake::kAlignment) start += 64;
  constexpr int kPitch = 128, kBytes = kBox * sizeof(float) + (kMistake == Mistake::kBytes ? 16 : 0);
  const auto ask_for = [&](int row) {
    tma_load(start + row % 2 * kPitch, map, c, w, h + row, n, barriers + row % 2, kBytes);
  };
  if (threadIdx.x == 0) {
    if (kMistake != Mistake::kNoInit) tma_init(barriers, 2);
    if (kMistake != Mistake::kNobodyAsks) ask_for(0);
    if (kMistake == Mistake::kTwice) ask_for(0);
    if (rows > 1) ask_for(1);
  }
  __syncthreads();
  for (int row = 0; row < rows; ++row) {
    if (kMistake != Mistake::kNoWait) tma_wait(barriers + row % 2, row / 2 % 2);
    const float value = reinterpret_cast<float*>(start + row % 2 * kPitch)[threadIdx.x];
    if (kMistake != Mistake::kEarly) __syncthreads();
    if (threadIdx.x == 0 && row + 2 < rows) ask_for(row + 2);
    store(out + row * kBox + threadIdx.x, value + 1);
  }
}

template <Mistake kMistake = Mistake::kNone>
bool copies_rows(int c, int w, int h, int n, int rows, const TensorView& from = view()) {
  std::vector<float> out(rows * kBox, NAN);
  TensorMap map;
  make_tensor_map(from, &map);
  launch(rows_kernel<kMistake>, dim3(1), dim3(kBox), 1024, nullptr, map, c, w, h, n, rows, out.data());
  for (int i = 0; i < rows * kBox; ++i) {
    if (!(out[i] == at(c + i % kBoxC, w + i / kBoxC % kBoxW, h + i / kBox, n) + 1)) return false;
  }
  return true;
}

void boxes() {
  const auto right = [](int c, int w, int h, int n, int rows) {
    return wrong_orders([&] { return copies_rows(c, w, h, n, rows); }) == 0;
  };
  expect(right(0, 0, 0, 0, 6), "rows of an image");
  expect(right(4, 2, 0, 1, 6), "the second image, the last channels and columns");
  expect(right(4, 4, 4, 1, 4), "what lies beyond is zero");
  expect(right(-2, -1, -3, 0, 9), "what lies before is zero");
  expect(right(0, 0, 0, -1, 2) && right(0, 0, 0, kN, 2), "an image that does not exist is zero");
}

void mistakes() {
  expect(wrong_orders([] { return copies_rows<Mistake::kNoWait>(0, 0, 0, 0, 2); }) == 5, "a missing tma_wait()");
  expect_error([] { copies_rows<Mistake::kEarly>(0, 0, 0, 0, 6); }, "a box that is asked for too early",
               {"nobody has asked for", "thread (1, 0, 0)"});
  const auto error = [](auto&& f, const std::string& what, const std::string& words) {
    expect_error([&] { f(); }, what, {words, "thread (0, 0, 0)"});
  };
  error([] { copies_rows<Mistake::kNoInit>(0, 0, 0, 0, 2); }, "a barrier that is not ready", "nobody has made ready");
  error([] { copies_rows<Mistake::kTwice>(0, 0, 0, 0, 2); }, "two boxes at a time", "nobody has waited for");
  error([] { copies_rows<Mistake::kNobodyAsks>(0, 0, 0, 0, 2); }, "no box", "nobody has asked for");
  error([] { copies_rows<Mistake::kBytes>(0, 0, 0, 0, 2); }, "other bytes", "64 bytes, of a box of 48");
  error([] { copies_rows<Mistake::kAlignment>(0, 0, 0, 0, 2); }, "alignment", "not aligned to 128 bytes");
  const auto of = [&](const TensorView& from, const std::string& what, const std::string& words) {
    error([&] { copies_rows(0, 0, 0, 0, 2, from); }, what, words);
  };
  TensorView from = view();
  from.data = tensor + 1;
  of(from, "a tensor anywhere", "not aligned to 16 bytes");
  from = view(), from.strides[0] = 4 * (kC + 1);
  of(from, "strides", "strides are not multiples of 16 bytes");
  from = view(), from.strides[0] = 0;
  of(from, "a pixel again and again", "axes overlap");
  from = view(), from.strides[2] = 4 * kC * kW;
  of(from, "images that overlap", "axes overlap");
  from = view(), from.strides[2] += 4 * kC;
  of(from, "images that begin within a row", "do not nest");
  from = view(), from.extents[2] = 0;
  of(from, "no rows", "an empty tensor");
  from = view(), from.box_channels = 3, from.box_cols = 4;
  of(from, "channels of a box", "not a multiple of 16 bytes");
  from = view(), from.box_channels = 4, from.box_cols = 257;
  of(from, "a wide box", "beyond shared memory");
}

}  // namespace

int main() {
  for (int i = 0; i < kN * kH * kW * kC; ++i) tensor[i] = static_cast<float>(i + 1);
  boxes();
  mistakes();
  return report();
}
