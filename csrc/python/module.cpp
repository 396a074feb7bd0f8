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
#include "moments_call.h"
#include "residual_sum_call.h"
#include "separable_call.h"

namespace py = pybind11;
using namespace xsep;

namespace {

class DepthwiseCall : PreparedCall {
 public:
  DepthwiseCall(int pass, const ConvShape& shape, int dtype, bool nhwc, bool on_load, bool relu, int threads)
      : PreparedCall(pass, shape, dtype, nhwc, on_load, relu) {
    args_.threads = checked_threads(threads);
    DepthwiseArgs planned = args_;
    static const char any = 0;  // the plan asks only whether there are vectors
    if (on_load) planned.on_load.center = &any;
    workspace_bytes = cpu::workspace_bytes(planned);
  }

  void operator()(const py::tuple& tensors, uintptr_t workspace) const {
    DepthwiseArgs call = with(tensors);
    call.workspace = checked_workspace(workspace);
    py::gil_scoped_release unlocked;
    cpu::depthwise(call);
  }

  int64_t workspace_bytes;
};

struct Output {
  Output(Dtype dtype, const std::array<int64_t, 4>& sizes, bool nhwc) : shape(sizes) {
    const auto [N, C, H, W] = sizes;
    strides = nhwc ? std::array<int64_t, 4>{H * W * C, 1, W * C, C} : std::array<int64_t, 4>{C * H * W, H * W, W, 1};
    const auto bytes = with_dtype(dtype, [](auto tag) { return int64_t{sizeof(typename decltype(tag)::type)}; });
    const auto bits = static_cast<uint8_t>(8 * bytes);
    const dlpack::DataType type{dtype == Dtype::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat, bits, 1};
    memory = cpu::allocate(bytes * N * C * H * W);
    if (!memory) throw std::bad_alloc();
    managed.tensor = {memory, {}, 4, type, shape.data(), strides.data(), 0};
    managed.context = this;
    managed.deleter = [](dlpack::ManagedTensor* self) { delete static_cast<Output*>(self->context); };
  }
  ~Output() { cpu::release(memory); }
  Output(const Output&) = delete;

  void* memory;
  std::array<int64_t, 4> shape, strides;
  dlpack::ManagedTensor managed;
};

// A capsule with a dense tensor (N, C, H, W) in recycled memory, for torch.from_dlpack.
py::object recycled(int dtype, const std::array<int64_t, 4>& sizes, bool nhwc) {
  for (int64_t size : sizes) {
    if (size < 1) throw std::invalid_argument("sizes must be at least 1; got " + std::to_string(size));
  }
  auto* output = new Output(static_cast<Dtype>(dtype), sizes, nhwc);
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

  py::class_<ResidualSumCall>(m, "ResidualSumCall", py::module_local())
      .def(py::init<bool, const ConvShape&, int, bool, bool, int>(), py::arg("backward"), py::arg("shape"),
           py::arg("dtype"), py::arg("skip_vectors"), py::arg("relu"), py::arg("threads"))
      .def_readonly("workspace_bytes", &ResidualSumCall::workspace_bytes)
      .def("__call__", &ResidualSumCall::operator(), py::arg("tensors"), py::arg("workspace"));

  py::class_<MomentsCall>(m, "MomentsCall", py::module_local())
      .def(py::init<const std::array<int32_t, 4>&, int, bool, int>(), py::arg("sizes"), py::arg("dtype"),
           py::arg("nhwc"), py::arg("threads"))
      .def_readonly("workspace_bytes", &MomentsCall::workspace_bytes)
      .def("__call__", &MomentsCall::operator(), py::arg("tensors"), py::arg("workspace"));

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
  m.def("recycled", recycled, py::arg("dtype"), py::arg("sizes"), py::arg("nhwc"));
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
