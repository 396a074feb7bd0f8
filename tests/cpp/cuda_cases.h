// What the tests of CUDA kernels share: the devices, a GPU or the host emulator's, and their memory.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/device.h"
#include "cuda/depthwise.h"

namespace xsep::cases {

#if defined(XSEP_EMULATE_CUDA)
// The choice of a kernel and of its grid depends on the device: a large and a small one.
inline std::vector<cuda::Device> devices() { return {{90, 132, 227 * 1024}, {70, 1, 96 * 1024}}; }
constexpr const char* kOrders[] = {"ascending", "descending", "1"};
inline void set_order(const char* order) { cuda::emulator::set_order(order); }
#else
inline std::vector<cuda::Device> devices() {
  int device, major, minor, multiprocessors, shared_bytes;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {{10 * major + minor, multiprocessors, shared_bytes}};
}
constexpr const char* kOrders[] = {"once", "twice"};  // the same
inline void set_order(const char*) {}
#endif

// Bytes that kernels can reach: of the device, or exactly so many of the host.
class Memory {
 public:
  explicit Memory(const std::vector<char>& bytes) : size_(bytes.size()) {
    allocate();
    if (size_ > 0) write(bytes);
  }
  // All ones: NaN in every type.
  explicit Memory(int64_t size) : Memory(std::vector<char>(size, static_cast<char>(0xff))) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(); }

  void* get() const { return data_; }
  void spoil() const {
    if (size_ > 0) write(std::vector<char>(size_, static_cast<char>(0xff)));
  }
  std::vector<char> bytes() const {
    std::vector<char> result(size_);
    if (size_ > 0) read(result);
    return result;
  }

 private:
#if defined(XSEP_EMULATE_CUDA)
  void allocate() {
    if (posix_memalign(&data_, 64, size_) != 0) std::abort();
  }
  void free() { std::free(data_); }
  void write(const std::vector<char>& bytes) const { std::memcpy(data_, bytes.data(), size_); }
  void read(std::vector<char>& bytes) const { std::memcpy(bytes.data(), data_, size_); }
#else
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::printf("FAILED: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
  void allocate() { check(cudaMalloc(&data_, size_ > 0 ? size_ : 1)); }
  void free() { cudaFree(data_); }
  void write(const std::vector<char>& bytes) const {
    check(cudaMemcpy(data_, bytes.data(), size_, cudaMemcpyHostToDevice));
  }
  void read(std::vector<char>& bytes) const { check(cudaMemcpy(bytes.data(), data_, size_, cudaMemcpyDeviceToHost)); }
#endif

  size_t size_;
  void* data_ = nullptr;
};

}  // namespace xsep::cases
