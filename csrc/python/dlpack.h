// The part of DLPack's ABI (version 0) that hands a block of memory to torch, which calls `deleter` when it is done.
#pragma once

#include <cstdint>

namespace xsep::dlpack {

struct Device {
  int32_t type = 1;  // CPU
  int32_t id = 0;
};

constexpr uint8_t kFloat = 2, kBfloat = 4;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

constexpr const char* kCapsule = "dltensor";  // torch renames it when it takes it over

}  // namespace xsep::dlpack
