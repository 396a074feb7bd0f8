// The CUDA kernels in the Python module: a call chooses its kernel, asks for a workspace, and starts it on a stream.

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "call.h"
#include "cuda_calls.h"

namespace py = pybind11;

namespace xsep {

namespace {

class CudaCall : PreparedCall {
 public:
  CudaCall(int pass, const ConvShape& shape, int dtype, bool nhwc, bool on_load, bool relu, int card,
           std::string family)
      : PreparedCall(pass, shape, dtype, nhwc, on_load, relu), card_(card), family_(std::move(family)) {
    if (card < 0 || card >= static_cast<int>(cuda::cards().size())) {
      throw std::invalid_argument("there is no CUDA device " + std::to_string(card));
    }
  }

  // `allocate` takes a number of bytes and returns the address of so many, which stay until the call returns.
  void operator()(const py::tuple& tensors, uintptr_t stream, const py::function& allocate) const {
    DepthwiseArgs call = with(tensors);
    const cuda::Kernel& kernel = cuda::select(call, card_, family_);
    const int64_t bytes = cuda::workspace_bytes(kernel, call, card_);
    if (bytes > 0) call.workspace = reinterpret_cast<void*>(allocate(bytes).cast<uintptr_t>());
    if (reinterpret_cast<uintptr_t>(call.workspace) % 64 != 0) {
      throw std::invalid_argument("workspace must be aligned to 64 bytes");
    }
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
}

}  // namespace xsep
