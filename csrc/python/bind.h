// The parts of the Python module that the build may leave out.
#pragma once

#include <pybind11/pybind11.h>

namespace xsep {

void bind_cuda(pybind11::module_& m);      // the CUDA kernels, or the same sources emulated
void bind_emulator(pybind11::module_& m);  // what the emulator counts, and the order of its threads

}  // namespace xsep
