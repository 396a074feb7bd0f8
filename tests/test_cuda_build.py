"""The compile gate: every CUDA kernel compiles without spills or local memory, within its budget of registers.
And, of PTX, the 3x3 kernels within their budget of instructions.

For sm_80, sm_90a, sm_100 and sm_120, or with ``XSEP_ALL_ARCHITECTURES=1`` for every architecture that this nvcc knows.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from ptx import COUNTED, counts, innermost_loops
from ptxas import UNITS, compile_unit
from sass import SPECIALISED, accesses, find_cuobjdump

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
EVERYTHING = os.environ.get("XSEP_ALL_ARCHITECTURES") == "1"

# Registers per thread: with 3x3, 5x5 and 7x7 filters where the filter is a parameter of the kernel, or with any.
BUDGET = {
    "depthwise_fprop_nhwc_kernel": {3: 168, 5: 168, 7: 255},
    "depthwise_fprop_nhwc_tma_kernel": {3: 128, 5: 128, 7: 255},
    "depthwise_backward_nhwc_kernel": {3: 168, 5: 168, 7: 255},
    "depthwise_fprop_nchw_kernel": {3: 64, 5: 96, 7: 128},
    "depthwise_backward_nchw_kernel": {3: 128, 5: 128, 7: 255},
    "depthwise_generic_conv_kernel": 128,
    "depthwise_generic_wgrad_kernel": 128,
    "depthwise_generic_wgrad_staged_kernel": 128,
    "reduce_partials_kernel": 64,
    "separable_fprop_nhwc_kernel": 128,
    "separable_backward_nhwc_kernel": 168,
    "through_statistics_kernel": 96,
    "merge_moments_kernel": 64,
}
# In 64 registers the compiler for Blackwell spills.
ON_BLACKWELL = {**BUDGET, "depthwise_fprop_nchw_kernel": {3: 96, 5: 96, 7: 128}}


def architectures():
    if not EVERYTHING:
        return ["sm_80", "sm_90a", "sm_100", "sm_120"]
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [*known, "sm_90a"]


def budget(kernel, architecture):
    """The size of the filter is the first of a kernel's numbers."""
    limit = (ON_BLACKWELL if int(re.findall(r"\d+", architecture)[0]) >= 100 else BUDGET)[kernel.family]
    return limit[kernel.constants[0]] if isinstance(limit, dict) else limit


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What nvcc made of each unit for each architecture."""
    if NVCC is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("cubins")
    work = [(unit, architecture) for unit in UNITS for architecture in architectures()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(work, pool.map(lambda item: compile_unit(NVCC, *item, folder), work)))


def test_registers_spills_and_stack(compiled):
    wrong, seen = [], set()
    for (unit, architecture), (kernels, *_) in compiled.items():
        for kernel in kernels:
            seen.add(kernel.family)
            limit = budget(kernel, architecture)
            if kernel.registers > limit or kernel.local:
                wrong.append(f"{unit}, {architecture}: {kernel}, of {limit} registers")
    assert not wrong, "\n".join(wrong)
    assert seen == set(BUDGET)


# Bytes of the widest load and store of a thread in 3x3 kernels: those of a pixel's vector of channels in NHWC.
WIDEST = {
    ("depthwise_fprop_nhwc_kernel", "float"): 16,
    ("depthwise_fprop_nhwc_kernel", "half_t"): 8,
    ("depthwise_fprop_nhwc_kernel", "bfloat16_t"): 8,
    ("depthwise_backward_nhwc_kernel", "float"): 8,
    ("depthwise_backward_nhwc_kernel", "half_t"): 4,
    ("depthwise_backward_nhwc_kernel", "bfloat16_t"): 4,
    **{
        (f"depthwise_{pass_}_nchw_kernel", dtype): 16
        for pass_ in ("fprop", "backward")
        for dtype in ("float", "half_t", "bfloat16_t")
    },
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_vectors_in_machine_code(architecture, compiled):
    cuobjdump = find_cuobjdump(NVCC)
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump: on PATH, beside nvcc, or in the triton package")
    seen = set()
    for unit in SPECIALISED:
        for kernel in accesses(cuobjdump, compiled[unit, architecture].cubin):
            if kernel.constants[:1] != (3,):
                continue
            if kernel.family == "depthwise_fprop_nhwc_tma_kernel":  # empty on sm_80; elsewhere no thread loads x
                plain = WIDEST["depthwise_fprop_nhwc_kernel", unit.type_name]
                assert architecture == "sm_80" or kernel.widest("STG") == plain, (unit, kernel)
                continue
            key = kernel.family, unit.type_name
            seen.add(key)
            assert kernel.widest("LDG", "LDGSTS") == WIDEST[key], (unit, kernel)
            makes_dw_alone = "backward" in kernel.family and kernel.constants[2:4] == (0, 1)
            assert makes_dw_alone or kernel.widest("STG") == WIDEST[key], (unit, kernel)
            if kernel.family.endswith("nchw_kernel") and unit.dtype == "float":
                assert kernel.count["LDGSTS", 16] > 0, (unit, kernel)
    assert seen == set(WIDEST)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_instructions_per_output():
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [count for of_unit in pool.map(lambda unit: counts(NVCC, unit, "sm_80"), COUNTED) for count in of_unit]
    assert len(found) == 18 and {count.pass_ for count in found} == {"fprop", "wgrad", "both"}
    wrong = [f"{c.unit}, {c.pass_}: {c.total:.1f} of {c.target}" for c in found if c.total > c.target]
    assert not wrong, "\n".join(wrong)


def test_innermost_loops():
    text = """
        mov.u32 %r1, 0;
    $L__BB0_1:
        add.s32 %r1, %r1, 1;
    $L__BB0_2:
        fma.rn.f32 %f1, %f1, %f1, %f1;
        @%p1 bra $L__BB0_3;
        { .reg .b16 b; mov.b16 b, 0; cvt.f32.f16 %f2, b;}
    $L__BB0_3:
        @%p2 bra $L__BB0_2;
        @%p3 bra $L__BB0_1;
    $L__BB0_4:
        sub.s32 %r1, %r1, 1;
        @!%p4 bra $L__BB0_4;
        ret;
    """
    inner, last = innermost_loops(text)
    assert [line.split()[0] for line in inner] == ["fma.rn.f32", "@%p1", "mov.b16", "cvt.f32.f16", "@%p2"]
    assert [line.split()[0] for line in last] == ["sub.s32", "@!%p4"]
