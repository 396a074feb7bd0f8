// The Python module xsep._C, and xsep._C_emulated with the CUDA sources on the host emulator: pointers as integers,
// shapes as ConvShape.  Checks what it can, releases the GIL.  Its types are its own, since both modules may be loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "../cpu/memory.h"
#include "../depthwise.h"
#include "bind.h"
#include "call.h"
#include "dlpack.h"
#include "separable_call.h"

namespace py = pybind11;
using namespace xsep;

namespace {

class DepthwiseCall : PreparedCall {
 public:
  DepthwiseCall(int pass, const ConvShape& shape, int dtype, bool nhwc, bool on_load, bool relu, int threads)
      : PreparedCall(pass, shape, dtype, nhwc, on_load, relu) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1; got " + std::to_string(threads));
    args_.threads = threads;
    DepthwiseArgs planned = args_;
    static const char any = 0;  // the plan asks only whether there are vectors
    if (on_load) planned.on_load.center = &any;
    workspace_bytes = cpu::workspace_bytes(planned);
  }

  void operator()(const py::tuple& tensors, uintptr_t workspace) const {
    DepthwiseArgs call = with(tensors);
    call.workspace = reinterpret_cast<void*>(workspace);
    if (workspace % 64 != 0) throw std::invalid_argument("workspace must be aligned to 64 bytes");
    py::gil_scoped_release unlocked;
    cpu::depthwise(call);
  }

  int64_t workspace_bytes;
};

struct Output {
  explicit Output(int64_t bytes) : memory(cpu::allocate(bytes)), shape(bytes) {
    if (!memory) throw std::bad_alloc();
    managed.tensor = {memory, {}, 1, {1 /* unsigned integer */, 8, 1}, &shape, nullptr, 0};
    managed.context = this;
    managed.deleter = [](dlpack::ManagedTensor* self) { delete static_cast<Output*>(self->context); };
  }
  ~Output() { cpu::release(memory); }
  Output(const Output&) = delete;

  void* memory;
  int64_t shape;
  dlpack::ManagedTensor managed;
};

// A capsule with so many bytes of recycled memory, for torch.from_dlpack.
py::object recycled(int64_t bytes) {
  if (bytes < 1) throw std::invalid_argument("bytes must be at least 1; got " + std::to_string(bytes));
  auto* output = new Output(bytes);
  return py::reinterpret_steal<py::object>(PyCapsule_New(&output->managed, dlpack::kCapsule, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, dlpack::kCapsule)) return;  // taken over
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    managed->deleter(managed);
  }));
}

}  // namespace

PYBIND11_MODULE(XSEP_MODULE, m) {
  m.doc() = "Kernels of xsep on raw pointers; use the torch operators of xsep.ops instead.";

  py::class_<ConvShape>(m, "ConvShape", py::module_local())
      .def(py::init([](int N, int C, int H, int W, int R, int S, int M, std::array<int, 2> stride,
                       std::array<int, 4> pad, std::array<int, 2> dilation) {
             const ConvShape s{N,         C,      H,      W,      R,      S,           M,          stride[0],
                               stride[1], pad[0], pad[1], pad[2], pad[3], dilation[0], dilation[1]};
             check(s);
             return s;
           }),
           py::arg("N"), py::arg("C"), py::arg("H"), py::arg("W"), py::arg("R"), py::arg("S"), py::arg("M"),
           py::arg("stride"), py::arg("pad"), py::arg("dilation"))
      .def_property_readonly("P", &ConvShape::P)
      .def_property_readonly("Q", &ConvShape::Q);

  py::class_<DepthwiseCall>(m, "DepthwiseCall", py::module_local())
      .def(py::init<int, const ConvShape&, int, bool, bool, bool, int>(), py::arg("pass_"), py::arg("shape"),
           py::arg("dtype"), py::arg("nhwc"), py::arg("on_load"), py::arg("relu"), py::arg("threads"))
      .def_readonly("workspace_bytes", &DepthwiseCall::workspace_bytes)
      .def("__call__", &DepthwiseCall::operator(), py::arg("tensors"), py::arg("workspace"));

  py::class_<SeparableCall>(m, "SeparableCall", py::module_local())
      .def(py::init<bool, const ConvShape&, int, int, bool, bool, bool, std::array<double, 2>, std::array<double, 2>,
                    bool, int>(),
           py::arg("backward"), py::arg("shape"), py::arg("K"), py::arg("dtype"), py::arg("nhwc"), py::arg("on_load"),
           py::arg("relu"), py::arg("between"), py::arg("after"), py::arg("statistics"), py::arg("threads"))
      .def_readonly("workspace_bytes", &SeparableCall::workspace_bytes)
      .def("__call__", &SeparableCall::operator(), py::arg("tensors"), py::arg("workspace"));

  m.def(
      "isas",
      [] {
        py::list names;
        for (int i = 0; i < cpu::isa_count(); ++i) names.append(cpu::isa_name(i));
        return names;
      },
      "Names of the instruction sets that can run here, best first.");
  m.def("current_isa", [] { return cpu::isa_name(cpu::current_isa()); });
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (int i = 0; i < cpu::isa_count(); ++i) {
          if (name == cpu::isa_name(i)) return cpu::set_isa(i);
        }
        throw std::invalid_argument("instruction set '" + name + "' cannot run here");
      },
      py::arg("name"));
  m.def("recycles", cpu::recycles);
  m.def("recycled", recycled, py::arg("bytes"));
  m.def("set_limit", cpu::set_limit, py::arg("bytes"));
  m.def("waiting_bytes", cpu::waiting_bytes);
  m.def("release_waiting", cpu::release_waiting);
  m.attr("cuda") = XSEP_CUDA_SUMMARY;
#if defined(XSEP_HAS_CUDA)
  bind_cuda(m);
#endif
#if defined(XSEP_EMULATE_CUDA)
  bind_emulator(m);
#endif
  m.attr("compiler") = XSEP_COMPILER;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
