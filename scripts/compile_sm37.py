"""Compiles the CUDA kernels for sm_37, the Tesla K80: registers, spills and stack of each.

    pip install --target FOLDER nvidia-cuda-nvrtc-cu11==11.8.89 nvidia-cuda-runtime-cu11==11.8.89 \\
        nvidia-cuda-nvcc-cu11==11.8.89
    python scripts/compile_sm37.py FOLDER

CUDA 11.8 is the last that knows sm_37.  PyPI has of it the compiler for run time, NVRTC, the headers and ptxas; no
nvcc, which is not needed.  NVRTC takes device code only: the host's half of the sources is read as if it were the
device's, on top of declarations of what it uses of the standard library, and thrown away, since no kernel calls it.
So this shows that the kernels compile, not that a build with nvcc 11.8 passes.  Exits with 1 if a source fails, or a
kernel needs local memory.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path
from typing import Sequence

from ptxas import CSRC, UNITS, CompileError, Unit, run, usage

# In the folder.
NVRTC = "nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2"
PTXAS = "nvidia/cuda_nvcc/bin/ptxas"
INCLUDE = "nvidia/cuda_runtime/include"

OPTIONS = ("--gpu-architecture=compute_37", "--std=c++17", "--device-as-default-execution-space", "-Dthrow=(void)")

# The standard headers that the sources include, all of which become the text below: what the sources use, as
# declarations, since nothing calls those functions.  The error for what is missing here names it.
STANDARD_HEADERS = (
    *("algorithm", "cmath", "cstddef", "cstdint", "cstring", "limits", "numeric", "stdexcept", "string"),
    *("type_traits", "utility", "vector"),
)
STANDARD = """
#ifndef XSEP_STANDARD
#define XSEP_STANDARD

#include <cuda_runtime.h>

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

#define INT32_MAX 2147483647
#define INT64_MAX 9223372036854775807
#define NAN __int_as_float(0x7fffffff)
#define INFINITY __int_as_float(0x7f800000)

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t cudaGetLastError();

namespace std {

template <class T, T kValue>
struct integral_constant {
  static constexpr T value = kValue;
  constexpr operator T() const { return kValue; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;

template <class, class>
constexpr bool is_same_v = false;
template <class T>
constexpr bool is_same_v<T, T> = true;

template <bool, class T, class>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool kWhich, class T, class F>
using conditional_t = typename conditional<kWhich, T, F>::type;

template <class A, class B>
struct pair {
  A first;
  B second;
};
template <class A, class B>
pair(A, B) -> pair<A, B>;

struct string {
  string();
  string(const char*);
  bool empty() const;
};
string operator+(const string&, const string&);
string to_string(long);

struct invalid_argument {
  invalid_argument(const string&);
};

template <class T>
struct vector;

template <class T>
struct numeric_limits {
  static T infinity();
};

template <class T>
const T& min(const T&, const T&);
template <class T>
constexpr const T& max(const T& a, const T& b) { return a < b ? b : a; }
template <class T>
const T& clamp(const T&, const T&, const T&);
template <class T>
T gcd(T, T);
template <class T>
void swap(T&, T&);
template <class T, class U>
T exchange(T&, U&&);
double ceil(double);
using ::memcpy;

}  // namespace std
#endif
"""


def strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def ptx(folder: Path, unit: Unit) -> str:
    """What NVRTC makes of a unit."""
    nvrtc = ctypes.CDLL(str(folder / NVRTC))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = strings([STANDARD] * len(STANDARD_HEADERS)), strings(STANDARD_HEADERS)
    source = unit.source.read_bytes(), bytes(unit.source)
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), *source, len(STANDARD_HEADERS), *headers) != 0:
        raise CompileError("NVRTC does not start")
    options = [*OPTIONS, f"-DXSEP_T={unit.dtype}", f"-I{CSRC / 'cuda'}", f"-I{folder / INCLUDE}"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), strings(options)) != 0
    get_size, get = (
        (nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if failed
        else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    )
    get_size(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise CompileError(text.value.decode())
    return text.value.decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where pip put the packages")
    folder = parser.parse_args().folder.resolve()
    for part in (NVRTC, PTXAS, INCLUDE):
        if not (folder / part).exists():
            parser.error(f"{folder} has no {part}: install the packages there, see --help")

    print(f"{'type':12s}{'registers':>9s}{'spills':>8s}{'stack':>8s}  kernel")
    kernels, failed = [], False
    with tempfile.TemporaryDirectory() as temporary:
        assembly = Path(temporary, "ptx")
        for unit in UNITS:
            try:
                assembly.write_text(ptx(folder, unit))
                said = run(folder / PTXAS, "-arch=sm_37", "-v", assembly, "-o", Path(temporary, "cubin"))
                found = usage(said)
            except CompileError as error:
                print(f"{unit} does not compile:\n{error}", file=sys.stderr)
                failed = True
                continue
            for k in found:
                print(f"{unit.type_name:12s}{k.registers:9d}{k.spills:8d}{k.stack:8d}  {k.name}", flush=True)
            kernels += found
    local = sum(k.local for k in kernels)
    print(f"{len(kernels)} kernels for sm_37, {local} of them with spills or stack")
    return 1 if failed or local else 0


if __name__ == "__main__":
    sys.exit(main())
