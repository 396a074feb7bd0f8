// The host emulator on kernels that are right, in every order of threads, and on kernels with a planted mistake.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.h"
#include "emulator_checks.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace xsep;
using namespace xsep::cuda;
using namespace xsep::cuda::emulator_checks;

namespace {

constexpr unsigned kAll = 0xffffffff;

std::vector<float> ramp(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i);
  return x;
}

// A block reverses its part of x through shared memory, kRounds times.
template <bool kFirstBarrier, bool kSecondBarrier, int kRounds>
__global__ void __launch_bounds__(64) reverse_kernel(const float* x, float* y) {
  float* const tile = shared_memory<float>();
  const int first = blockIdx.x * blockDim.x, t = threadIdx.x;
  float value = load(x + first + t);
  for (int i = 0; i < kRounds; ++i) {
    tile[t] = value;
    if (kFirstBarrier) __syncthreads();
    value = tile[blockDim.x - 1 - t];
    if (kSecondBarrier) __syncthreads();
  }
  store(y + first + t, value);
}

template <bool kFirstBarrier, bool kSecondBarrier>
bool reverses(int threads) {
  constexpr int kRounds = 3;
  const int blocks = 5;
  const std::vector<float> x = ramp(blocks * threads);
  std::vector<float> y(x.size(), NAN);
  launch(reverse_kernel<kFirstBarrier, kSecondBarrier, kRounds>, dim3(blocks), dim3(threads), threads * sizeof(float),
         nullptr, x.data(), y.data());
  bool right = true;
  for (int i = 0; i < blocks * threads; ++i) {
    right &= y[i] == static_cast<float>(i / threads * threads + threads - 1 - i % threads);
  }
  return right;
}

// Each warp meets at a shuffle after it read what another one wrote; then it writes over that.
template <bool kBarrier>
__global__ void rewrite_kernel(float* y) {
  float* const tile = shared_memory<float>();
  const int t = threadIdx.x;
  tile[t] = static_cast<float>(t);
  __syncthreads();
  const float value = __shfl_sync(kAll, tile[blockDim.x - 1 - t], t % 32);
  if (kBarrier) __syncthreads();
  tile[t] = __shfl_sync(kAll, -1.f, t % 32);
  store(y + t, value);
}

template <bool kBarrier>
bool rewrites() {
  float y[96];
  launch(rewrite_kernel<kBarrier>, dim3(1), dim3(96), sizeof y, nullptr, y);
  bool right = true;
  for (int t = 0; t < 96; ++t) right &= y[t] == static_cast<float>(95 - t);
  return right;
}

void barriers() {
  for (const int threads : {1, 32, 50, 64, 1024}) {
    expect(wrong_orders([&] { return reverses<true, true>(threads); }) == 0, "barriers");
  }
  expect(wrong_orders([] { return reverses<false, true>(64); }) > 0, "a missing barrier before a read goes unseen");
  expect(wrong_orders([] { return reverses<true, false>(64); }) > 0, "a missing barrier before a write goes unseen");
  expect(wrong_orders(rewrites<true>) == 0, "barriers between shuffles");
  expect(wrong_orders(rewrites<false>) > 0, "a missing barrier between shuffles goes unseen");
}

// Indices of threads and blocks in three dimensions.
__global__ void index_kernel(int* visits) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  ++visits[block * blockDim.x * blockDim.y * blockDim.z + thread];  // past store(): load() may not read what is written
}

void indices() {
  const int wrong = wrong_orders([] {
    const dim3 grid(3, 4, 2), block(5, 2, 3);
    std::vector<int> visits(3 * 4 * 2 * 5 * 2 * 3, 0);
    launch(index_kernel, grid, block, 0, nullptr, visits.data());
    return visits == std::vector<int>(visits.size(), 1);
  });
  expect(wrong == 0, "every thread of every block runs once");
}

// What each lane gets from each operation, one after another.
template <class T>
__global__ void warp_kernel(T* y) {
  const int lane = threadIdx.x % 32;
  T* const mine = y + threadIdx.x * 8;
  const T value = static_cast<T>(lane + 100);
  store(mine + 0, __shfl_xor_sync(kAll, value, 5));
  store(mine + 1, __shfl_down_sync(kAll, value, 3));
  store(mine + 2, __shfl_sync(kAll, value, 2, 8));
  store(mine + 3, __shfl_down_sync(kAll, value, 3, 8));
  store(mine + 4, lane < 16 ? __shfl_xor_sync(0x0000ffffu, value, 1) : __shfl_xor_sync(0xffff0000u, value, 2));
  store(mine + 5, static_cast<T>(__ballot_sync(kAll, lane % 3 == 0) >> lane & 1));
  store(mine + 6, static_cast<T>(__any_sync(kAll, lane == 7) + 2 * __any_sync(kAll, lane == 40)));
  store(mine + 7, static_cast<T>(__all_sync(kAll, lane < 32) + 2 * __all_sync(kAll, lane != 31)));
}

template <class T>
bool exchanges() {
  const int threads = 96;
  std::vector<T> y(threads * 8);
  launch(warp_kernel<T>, dim3(1), dim3(threads), 0, nullptr, y.data());
  bool right = true;
  for (int t = 0; t < threads; ++t) {
    const int lane = t % 32;
    const int expected[] = {(lane ^ 5) + 100,
                            (lane + 3 < 32 ? lane + 3 : lane) + 100,
                            lane / 8 * 8 + 2 + 100,
                            (lane % 8 + 3 < 8 ? lane + 3 : lane) + 100,
                            (lane ^ (lane < 16 ? 1 : 2)) + 100,
                            lane % 3 == 0,
                            1,
                            1};
    for (int i = 0; i < 8; ++i) right &= y[t * 8 + i] == static_cast<T>(expected[i]);
  }
  return right;
}

// A warp that lacks lanes: nobody waits for them, and what they would have sent is undefined.
__global__ void partial_warp_kernel(float* y) { store(y + threadIdx.x, __shfl_down_sync(kAll, 1.f, 1)); }

// Lanes write, meet, and read each other's numbers.
template <bool kSync>
__global__ void syncwarp_kernel(float* y) {
  float* const tile = shared_memory<float>();
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kSync) __syncwarp();
  store(y + threadIdx.x, tile[threadIdx.x ^ 9]);
}

template <bool kSync>
bool syncs() {
  float y[32];
  launch(syncwarp_kernel<kSync>, dim3(1), dim3(32), sizeof y, nullptr, y);
  bool right = true;
  for (int t = 0; t < 32; ++t) right &= y[t] == static_cast<float>(t ^ 9);
  return right;
}

void warps() {
  expect(wrong_orders(exchanges<int>) == 0, "shuffles and votes, int");
  expect(wrong_orders(exchanges<float>) == 0, "shuffles and votes, float");
  expect(wrong_orders(exchanges<double>) == 0, "shuffles and votes, double");
  expect(wrong_orders(exchanges<long long>) == 0, "shuffles and votes, long long");
  expect(wrong_orders(syncs<true>) == 0, "__syncwarp");
  expect(wrong_orders(syncs<false>) > 0, "a missing __syncwarp goes unseen");
  const int wrong = wrong_orders([] {
    float y[40];
    launch(partial_warp_kernel, dim3(1), dim3(40), 0, nullptr, y);
    bool right = true;
    for (int t = 0; t < 39; ++t) right &= y[t] == 1.f;
    return right && std::isnan(y[39]);
  });
  expect(wrong == 0, "a warp that lacks lanes");
}

enum class Mistake { kNone, kNoWait, kNoBarrier, kEarlyRefill };

// Sums columns of x, 4 x threads at a time through two buffers: one fills while the other is read.
template <Mistake kMistake>
__global__ void pipeline_kernel(const float* x, float* y, int tiles) {
  float* const buffers = shared_memory<float>();
  const int t = threadIdx.x, floats = 4 * blockDim.x;
  const auto fetch = [&](int tile) {
    copy_async<16>(buffers + tile % 2 * floats + 4 * t, x + static_cast<int64_t>(tile) * floats + 4 * t);
  };
  fetch(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (kMistake != Mistake::kNoWait) copies_done();
    if (kMistake != Mistake::kNoBarrier) __syncthreads();
    if (kMistake == Mistake::kEarlyRefill && tile + 2 < tiles) fetch(tile + 2);
    if (tile + 1 < tiles) fetch(tile + 1);
    const float* const now = buffers + tile % 2 * floats;
    for (int i = 0; i < 4; ++i) sum += now[i * blockDim.x + t];
  }
  store(y + t, sum);
}

template <Mistake kMistake>
bool pipelines() {
  const int threads = 48, tiles = 5, floats = 4 * threads;
  const std::vector<float> x = ramp(tiles * floats);
  std::vector<float> y(threads);
  launch(pipeline_kernel<kMistake>, dim3(1), dim3(threads), 2 * floats * sizeof(float), nullptr, x.data(), y.data(),
         tiles);
  bool right = true;
  for (int t = 0; t < threads; ++t) {
    float sum = 0;
    for (int i = t; i < tiles * floats; i += threads) sum += x[i];
    right &= y[t] == sum;
  }
  return right;
}

void copies() {
  expect(wrong_orders(pipelines<Mistake::kNone>) == 0, "copy_async");
  expect(wrong_orders(pipelines<Mistake::kNoWait>) == 5, "a missing copies_done goes unseen");
  expect(wrong_orders(pipelines<Mistake::kNoBarrier>) > 0, "a missing barrier after copies_done goes unseen");
  expect(wrong_orders(pipelines<Mistake::kEarlyRefill>) > 0, "a copy into a buffer that is read goes unseen");
}

__global__ void vector_kernel(const float* x, float* y) {
  using Four = Vec<float, 4>;
  store(reinterpret_cast<Four*>(y) + threadIdx.x, load(reinterpret_cast<const Four*>(x) + threadIdx.x));
}

__global__ void load_shared_kernel(float* y) { store(y, load(shared_memory<float>())); }
__global__ void copy_kernel(float* shared, const float* x) { copy_async<16>(shared, x); }
__global__ void copy_at_kernel(int offset, const float* x) { copy_async<8>(shared_memory<float>() + offset, x); }
__global__ void throwing_kernel() {
  __syncthreads();
  if (threadIdx.x == 5) throw std::logic_error("of the kernel");
  __syncthreads();
}

void addresses() {
  alignas(16) float x[64] = {}, y[64] = {};
  launch(vector_kernel, dim3(1), dim3(8), 0, nullptr, x, y);
  expect_error([&] { launch(vector_kernel, dim3(1), dim3(8), 0, nullptr, x + 1, y); }, "misaligned load",
               {"misaligned load of 16 bytes at 0x", "vector_kernel", "test_emulator.cpp:", "thread (0, 0, 0)"});
  expect_error([&] { launch(vector_kernel, dim3(2), dim3(8), 0, nullptr, x, y + 2); }, "misaligned store",
               {"misaligned store of 16 bytes", "block (0, 0, 0)"});
  expect_error([&] { launch(load_shared_kernel, dim3(1), dim3(1), 16, nullptr, y); }, "load() of shared memory",
               {"global load of shared memory"});
  expect_error([&] { launch(copy_kernel, dim3(1), dim3(1), 16, nullptr, y, x); }, "copy_async() to global memory",
               {"copy_async() to what is not shared memory"});
  expect_error([&] { launch(copy_at_kernel, dim3(1), dim3(1), 64, nullptr, 1, x); }, "misaligned copy_async()",
               {"misaligned copy_async() of 8 bytes"});
  expect_error([&] { launch(copy_at_kernel, dim3(1), dim3(1), 64, nullptr, 2, x + 1); }, "copy_async() from misaligned",
               {"misaligned load of 8 bytes"});
  bool caught = false;
  try {
    launch(throwing_kernel, dim3(1), dim3(64), 0, nullptr);
  } catch (const std::logic_error& error) {
    caught = error.what() == std::string("of the kernel");
  }
  expect(caught, "an exception of a kernel reaches the host");
  expect(reverses<true, true>(64), "a launch after one that failed");
}

__global__ void returning_kernel() {
  if (threadIdx.x >= 33) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_and_shuffle_kernel(float* y) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    store(y, __shfl_xor_sync(kAll, 1.f, 1));
    __syncthreads();
  }
}

__global__ void missing_lane_kernel(float* y) {
  if (threadIdx.x != 7) store(y, __shfl_xor_sync(kAll, 1.f, 1));
}

__global__ void own_mask_kernel(float* y) { store(y, __shfl_xor_sync(0xffu, 1.f, 1)); }

__global__ void masks_differ_kernel(float* y) {
  store(y, __shfl_xor_sync(threadIdx.x < 16 ? kAll : 0xffff0000u, 1.f, 1));
}

void divergence() {
  for (const char* order : kOrders) {
    emulator::set_order(order);
    float y;
    expect_error([] { launch(returning_kernel, dim3(2), dim3(64), 0, nullptr); }, "a barrier some threads skip",
                 {"33 from thread", "at __syncthreads() in returning_kernel", "31 from thread", "returned"});
    expect_error([] { launch(two_barriers_kernel, dim3(1), dim3(64), 0, nullptr); }, "two barriers",
                 {"divergent threads", "32 from thread (0, 0, 0)", "32 from thread (32, 0, 0)"});
    expect_error([&] { launch(barrier_and_shuffle_kernel, dim3(1), dim3(32), 0, nullptr, &y); },
                 "a barrier while others shuffle", {"1 from thread (3, 0, 0)", "a shuffle of lanes 0xffffffff"});
    expect_error([&] { launch(missing_lane_kernel, dim3(1), dim3(64), 0, nullptr, &y); }, "a shuffle without lane 7",
                 {"a shuffle of lanes 0xffffffff", "33 from thread (7, 0, 0) on: returned"});
    expect_error([&] { launch(own_mask_kernel, dim3(1), dim3(32), 0, nullptr, &y); }, "a lane out of its own mask",
                 {"a lane that is not in its own mask 0xff"});
    expect_error([&] { launch(masks_differ_kernel, dim3(1), dim3(32), 0, nullptr, &y); }, "masks that differ",
                 {"a shuffle of lanes 0xffffffff"});
  }
  emulator::set_order("ascending");
}

__global__ void empty_kernel() {}

void limits() {
  const auto launch_empty = [](dim3 grid, dim3 block, size_t shared) {
    return [=] { launch(empty_kernel, grid, block, shared, nullptr); };
  };
  launch_empty(dim3(2, 65535, 1), dim3(1), 0)();
  launch_empty(dim3(1), dim3(1024), 227 * 1024)();
  expect_error(launch_empty(dim3(1), dim3(1025), 0), "1025 threads", {"1024 threads", "(1025, 1, 1)"});
  expect_error(launch_empty(dim3(1), dim3(32, 33), 0), "1056 threads", {"1024 threads"});
  expect_error(launch_empty(dim3(1), dim3(1 << 16, 1 << 16), 0), "2^32 threads", {"1024 threads"});
  expect_error(launch_empty(dim3(1), dim3(0), 0), "no threads", {"the block is empty"});
  expect_error(launch_empty(dim3(0), dim3(32), 0), "no blocks", {"the grid is empty"});
  expect_error(launch_empty(dim3(1, 65536), dim3(32), 0), "a wide grid", {"65535"});
  expect_error(launch_empty(dim3(1u << 31), dim3(32), 0), "a long grid", {"2^31-1"});
  expect_error(launch_empty(dim3(1), dim3(32), 227 * 1024 + 1), "shared memory", {"232448", "232449"});
  bool refused = false;
  try {
    emulator::set_order("upwards");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "an unknown order");
}

// Whether shared memory is all NaN and ends where it should.
__global__ void fresh_kernel(int bytes, int* fresh) {
  unsigned char* const shared = shared_memory<unsigned char>();
  bool all = true;
  for (int i = 0; i < bytes; ++i) all &= shared[i] == 0xff;
#if defined(__SANITIZE_ADDRESS__)
  all &= __asan_address_is_poisoned(shared + bytes) && __asan_address_is_poisoned(shared - 1);
#endif
  for (int i = 0; i < bytes; ++i) shared[i] = 0;
  store(fresh + blockIdx.x, static_cast<int>(all));
}

void shared() {
  std::vector<int> fresh(3);
  launch(fresh_kernel, dim3(3), dim3(1), 1000, nullptr, 1000, fresh.data());
  expect(fresh == std::vector<int>(3, 1), "shared memory starts as NaN in each block");
}

// Each lane loads a V, the next one the V that lies stride further, in each round.
template <class V>
__global__ void strided_kernel(const V* x, V* y, int stride, int rounds) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int r = 0; r < rounds; ++r) store(y + i, load(x + i * stride));
}

template <class V>
emulator::Launch count_strided(int stride, int blocks, int threads, int rounds, const emulator::CacheModel& model) {
  std::vector<Vec<float, 8>> memory(blocks * threads * stride * 2 + 64);
  V* const x = reinterpret_cast<V*>(memory.data());
  emulator::start_counting(model);
  launch(strided_kernel<V>, dim3(blocks), dim3(threads), 0, nullptr, x, x + blocks * threads * stride, stride, rounds);
  return emulator::stop_counting().at(0);
}

void counters() {
  emulator::Launch l = count_strided<float>(1, 3, 64, 2, {});
  expect(l.grid.x == 3 && l.block.x == 64 && l.shared_bytes == 0, "the launch is described");
  expect(l.loads.bytes() == 3 * 64 * 2 * 4 && l.stores.bytes() == l.loads.bytes(), "bytes");
  expect(l.loads.accesses[2] == 3 * 64 * 2 && l.loads.accesses[3] == 0 && l.loads.accesses[4] == 0, "widths");
  expect(l.loads.warp_accesses == 3 * 2 * 2 && l.stores.warp_accesses == 12, "warp accesses");
  expect(l.loads.sectors == 12 * 4 && l.loads.distinct_sectors == 6 * 4, "sectors of coalesced floats");
  expect(l.stores.sectors == 12 * 4 && l.stores.distinct_sectors == 6 * 4, "sectors of stores");
  expect(l.load_sectors_after_cache == 6 * 4, "the second round hits");

  l = count_strided<float>(8, 3, 64, 1, {});
  expect(l.loads.sectors == 6 * 32 && l.loads.distinct_sectors == 6 * 32,
         "a sector for each float, strided by 32 bytes");
  l = count_strided<float>(0, 3, 64, 1, {});
  expect(l.loads.sectors == 6 && l.loads.distinct_sectors == 1, "one sector, broadcast");
  l = count_strided<Vec<half_t, 8>>(1, 1, 32, 1, {});
  expect(l.loads.accesses[4] == 32 && l.loads.bytes() == 512 && l.loads.sectors == 16, "vectors of 16 bytes");
  l = count_strided<half_t>(1, 1, 32, 1, {});
  expect(l.loads.accesses[1] == 32 && l.loads.sectors == 2, "halves");

  const std::vector<float> x = ramp(5 * 192);
  float y[48];
  emulator::start_counting();
  launch(pipeline_kernel<Mistake::kNone>, dim3(1), dim3(48), 2 * 192 * 4, nullptr, x.data(), y, 5);
  l = emulator::stop_counting().at(0);
  expect(l.loads.accesses[4] == 5 * 48 && l.loads.bytes() == 5 * 192 * 4, "copy_async counts as a load");
  expect(l.loads.warp_accesses == 5 * 2, "warp accesses between barriers");
  expect(emulator::stop_counting().empty(), "nothing counts after stop_counting");
}

// Walks over bytes of x as often as it has rounds, sector by sector, each block over the same.
__global__ void walk_kernel(const float* x, float* y, int sectors, int rounds) {
  float sum = 0;
  for (int r = 0; r < rounds; ++r) {
    for (int i = threadIdx.x; i < sectors; i += blockDim.x) sum += load(x + i * 8);
  }
  store(y + blockIdx.x * blockDim.x + threadIdx.x, sum);
}

// Block b walks over its own x, b after b.
__global__ void private_walk_kernel(const float* x, float* y, int sectors, int rounds) {
  float sum = 0;
  for (int r = 0; r < rounds; ++r) {
    for (int i = 0; i < sectors; ++i) sum += load(x + (blockIdx.x * sectors + i) * 8);
  }
  store(y + blockIdx.x, sum);
}

void cache() {
  alignas(128) static float x[64 * 8 * 2], y[128];
  const auto misses = [](auto kernel, int blocks, int threads, int sectors, int rounds,
                         const emulator::CacheModel& model) {
    emulator::start_counting(model);
    launch(kernel, dim3(blocks), dim3(threads), 0, nullptr, x, y, sectors, rounds);
    return emulator::stop_counting().at(0).load_sectors_after_cache;
  };
  const auto cache_of = [](int sectors) { return emulator::CacheModel{sectors * 32, 1, 1}; };
  expect(misses(walk_kernel, 1, 1, 64, 3, cache_of(64)) == 64, "what fits is fetched once");
  expect(misses(walk_kernel, 1, 1, 64, 3, cache_of(60)) == 3 * 64, "LRU loses all of what does not quite fit");
  expect(misses(walk_kernel, 1, 1, 64, 3, cache_of(0)) == 3 * 64, "no cache");
  expect(misses(walk_kernel, 1, 32, 64, 3, cache_of(64)) == 64, "the lanes of a warp share it");
  expect(misses(walk_kernel, 4, 64, 64, 1, cache_of(64)) == 64, "blocks one after another share it");
  expect(misses(walk_kernel, 4, 64, 64, 1, {64 * 32, 2, 1}) == 2 * 64, "two multiprocessors do not");
  expect(misses(walk_kernel, 4, 64, 64, 1, {64 * 32, 4, 1}) == 4 * 64, "four multiprocessors neither");
  expect(misses(private_walk_kernel, 2, 1, 32, 3, {32 * 32, 1, 1}) == 2 * 32, "one block at a time fits");
  expect(misses(private_walk_kernel, 2, 1, 32, 3, {32 * 32, 1, 2}) == 3 * 2 * 32, "two blocks abreast do not");
}

void host_threads() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 20; ++j) wrong += !reverses<true, true>(96);
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(wrong == 0, "launches from several threads of the host");
}

__global__ void round_kernel(const half_t* x, half_t* y) {
  store(y + threadIdx.x, narrow<half_t>(2 * widen(load(x + threadIdx.x))));
}

void conversions() {
  const half_t x[2] = {{0x3c00}, {0xc200}};  // 1, -3
  half_t y[2];
  launch(round_kernel, dim3(1), dim3(2), 0, nullptr, x, y);
  expect(y[0].bits == 0x4000 && y[1].bits == 0xc600, "widen and narrow");
}

}  // namespace

int main() {
  barriers();
  indices();
  warps();
  copies();
  addresses();
  divergence();
  limits();
  shared();
  counters();
  cache();
  host_threads();
  conversions();
  return report();
}
