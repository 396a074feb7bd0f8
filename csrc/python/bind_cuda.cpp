// The CUDA kernels in the Python module: a call chooses its kernel, asks for a workspace, and starts it on a stream.

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <array>

#include "bind.h"
#include "call.h"
#include "cuda_calls.h"

namespace py = pybind11;

namespace xsep {

namespace {

void check_card(int card) {
  if (card < 0 || card >= static_cast<int>(cuda::cards().size())) {
    throw std::invalid_argument("there is no CUDA device " + std::to_string(card));
  }
}

// `allocate` takes a number of bytes and returns the address of so many, which stay until the call returns.
void* workspace(int64_t bytes, const py::function& allocate) {
  if (bytes == 0) return nullptr;
  const uintptr_t address = allocate(bytes).cast<uintptr_t>();
  if (address % 64 != 0) throw std::invalid_argument("workspace must be aligned to 64 bytes");
  return reinterpret_cast<void*>(address);
}

class CudaCall : PreparedCall {
 public:
  CudaCall(int pass, const ConvShape& shape, int dtype, bool nhwc, bool on_load, bool relu, int card,
           std::string family)
      : PreparedCall(pass, shape, dtype, nhwc, on_load, relu), card_(card), family_(std::move(family)) {
    check_card(card);
  }

  void operator()(const py::tuple& tensors, uintptr_t stream, const py::function& allocate) const {
    DepthwiseArgs call = with(tensors);
    const cuda::Kernel& kernel = cuda::select(call, card_, family_);
    call.workspace = workspace(cuda::workspace_bytes(kernel, call, card_), allocate);
    py::gil_scoped_release unlocked;
    cuda::run(kernel, call, card_, stream);
  }

  std::string family(const py::tuple& tensors) const { return cuda::name(cuda::select(with(tensors), card_, family_)); }

  std::vector<std::pair<std::string, std::string>> why_not(const py::tuple& tensors) const {
    return cuda::why_not(with(tensors), card_);
  }

  int64_t workspace_bytes(const py::tuple& tensors) const {
    const DepthwiseArgs call = with(tensors);
    return cuda::workspace_bytes(cuda::select(call, card_, family_), call, card_);
  }

 private:
  int card_;
  std::string family_;
};

// A training block's forward or backward pass, or its inference form, prepared once.
class CudaSeparableCall {
 public:
  CudaSeparableCall(bool backward, const ConvShape& shape, int K, int dtype, bool nhwc, int activation,
                    int out_activation, bool relu, int card, std::string family)
      : card_(card), family_(std::move(family)) {
    check(shape);
    if (K < 1) throw std::invalid_argument("K must be at least 1; got " + std::to_string(K));
    for (const int each : {activation, out_activation}) {
      if (each < 0 || each > 2) {
        throw std::invalid_argument("activation must be 0 (none), 1 (ReLU) or 2 (ReLU6); got " + std::to_string(each));
      }
    }
    check_card(card);
    args_.backward = backward, args_.shape = shape, args_.K = K, args_.nhwc = nhwc;
    args_.dtype = static_cast<Dtype>(dtype);
    with_dtype(args_.dtype, [](auto) {});
    args_.activation = static_cast<cuda::Activation>(activation);
    args_.out_activation = static_cast<cuda::Activation>(out_activation);
    args_.on_load.relu = relu;
  }

  void operator()(const py::tuple& tensors, uintptr_t stream, const py::function& allocate) const {
    cuda::SeparableArgs call = with(tensors);
    const cuda::SeparableKernel& kernel = cuda::select(call, card_, family_);
    call.workspace = workspace(cuda::workspace_bytes(kernel, call, card_), allocate);
    py::gil_scoped_release unlocked;
    cuda::run(kernel, call, card_, stream);
  }

  std::vector<std::pair<std::string, std::string>> why_not(const py::tuple& tensors) const {
    return cuda::why_not(with(tensors), card_);
  }

 private:
  // With (x, its strides, w_dw, w_pw, center, scale, shift), and then
  // (y, mean, m2, w_dw_bias, bias, residual, its strides) or
  // (dy, y, mean, dmean, dm2, dx, dw_dw, dw_pw, dscale, dshift), for which w_pw is transposed.
  cuda::SeparableArgs with(const py::tuple& tensors) const {
    const size_t entries = args_.backward ? 17 : 14;
    if (tensors.size() != entries) throw std::invalid_argument("a call takes " + std::to_string(entries) + " entries");
    const auto pointer = [&](int i) { return reinterpret_cast<void*>(tensors[i].cast<uintptr_t>()); };
    const auto located = [&](int i) -> TensorRef {
      const auto strides = tensors[i + 1].cast<std::array<int64_t, 4>>();
      return {pointer(i), strides[0], strides[1], strides[2], strides[3]};
    };
    cuda::SeparableArgs call = args_;
    const auto vector = [&](int i) { return static_cast<float*>(pointer(i)); };
    call.x = located(0), call.w_dw = pointer(2), (call.backward ? call.w_pw_t : call.w_pw) = pointer(3);
    call.on_load.center = pointer(4), call.on_load.scale = pointer(5), call.on_load.shift = pointer(6);
    if (call.backward) {
      call.dy = pointer(7), call.y_made = pointer(8);
      call.mean_made = vector(9), call.dmean = vector(10), call.dm2 = vector(11);
      call.dx = pointer(12), call.dw_dw = pointer(13), call.dw_pw = pointer(14);
      call.dscale = vector(15), call.dshift = vector(16);
    } else {
      call.y = pointer(7), call.mean = vector(8), call.m2 = vector(9);
      call.w_dw_bias = pointer(10), call.bias = pointer(11), call.residual = located(12);
    }
    if (!call.on_load.center != !call.on_load.scale || !call.on_load.center != !call.on_load.shift) {
      throw std::invalid_argument("center, scale and shift go together");
    }
    if (!call.mean != !call.m2) throw std::invalid_argument("mean and m2 go together");
    if (!call.mean_made != !call.dmean || !call.mean_made != !call.dm2) {
      throw std::invalid_argument("mean, dmean and dm2 go together");
    }
    return call;
  }

  cuda::SeparableArgs args_{};
  int card_;
  std::string family_;
};

}  // namespace

void bind_cuda(py::module_& m) {
  py::class_<cuda::Card>(m, "Card", py::module_local())
      .def_readonly("name", &cuda::Card::name)
      .def_readonly("arch", &cuda::Card::arch)
      .def_property_readonly("arch_name", [](const cuda::Card& card) { return "sm_" + std::to_string(card.arch); })
      .def_readonly("multiprocessors", &cuda::Card::multiprocessors)
      .def_readonly("shared_bytes", &cuda::Card::shared_bytes);
  m.def("cuda_cards", &cuda::cards);
  m.def("cuda_driver_version", &cuda::driver_version);
  m.def("cuda_why_no_code", &cuda::why_no_code, py::arg("card"));
  m.def(
      "cuda_families", [](int dtype) { return cuda::families(static_cast<Dtype>(dtype)); }, py::arg("dtype"),
      "Names of the kernel families of an element type, in order of preference.");
  m.def(
      "cuda_families_off_at_first", [](int dtype) { return cuda::families_off_at_first(static_cast<Dtype>(dtype)); },
      py::arg("dtype"), "Those that are switched off until the self-test has passed.");
  m.def(
      "cuda_set_enabled",
      [](int dtype, const std::string& family, bool enabled) {
        cuda::set_enabled(static_cast<Dtype>(dtype), family, enabled);
      },
      py::arg("dtype"), py::arg("family"), py::arg("enabled"));

  py::class_<CudaCall>(m, "CudaCall", py::module_local())
      .def(py::init<int, const ConvShape&, int, bool, bool, bool, int, std::string>(), py::arg("pass_"),
           py::arg("shape"), py::arg("dtype"), py::arg("nhwc"), py::arg("on_load"), py::arg("relu"), py::arg("card"),
           py::arg("family"))
      .def("__call__", &CudaCall::operator(), py::arg("tensors"), py::arg("stream"), py::arg("allocate"))
      .def("family", &CudaCall::family, py::arg("tensors"), "The name of the family that would run.")
      .def("why_not", &CudaCall::why_not, py::arg("tensors"), "Each family, and why it would not run.")
      .def("workspace_bytes", &CudaCall::workspace_bytes, py::arg("tensors"));

  m.def(
      "cuda_separable_families", [](int dtype) { return cuda::separable_families(static_cast<Dtype>(dtype)); },
      py::arg("dtype"), "Names of the kernel families of training blocks, in order of preference.");
  m.def(
      "cuda_set_separable_enabled",
      [](int dtype, const std::string& family, bool enabled) {
        cuda::set_separable_enabled(static_cast<Dtype>(dtype), family, enabled);
      },
      py::arg("dtype"), py::arg("family"), py::arg("enabled"));
  py::class_<CudaSeparableCall>(m, "CudaSeparableCall", py::module_local())
      .def(py::init<bool, const ConvShape&, int, int, bool, int, int, bool, int, std::string>(), py::arg("backward"),
           py::arg("shape"), py::arg("K"), py::arg("dtype"), py::arg("nhwc"), py::arg("activation"),
           py::arg("out_activation"), py::arg("relu"), py::arg("card"), py::arg("family"))
      .def("__call__", &CudaSeparableCall::operator(), py::arg("tensors"), py::arg("stream"), py::arg("allocate"))
      .def("why_not", &CudaSeparableCall::why_not, py::arg("tensors"), "Each family, and why it would not run.");
}

}  // namespace xsep
