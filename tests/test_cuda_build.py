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


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_registers_spills_and_stack(tmp_path):
    work = [(unit, architecture) for unit in UNITS for architecture in architectures()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = list(pool.map(lambda item: compile_unit(NVCC, *item, tmp_path), work))
    wrong, seen = [], set()
    for (unit, architecture), (kernels, _) in zip(work, compiled):
        for kernel in kernels:
            seen.add(kernel.family)
            limit = budget(kernel, architecture)
            if kernel.registers > limit or kernel.local:
                wrong.append(f"{unit}, {architecture}: {kernel}, of {limit} registers")
    assert not wrong, "\n".join(wrong)
    assert seen == set(BUDGET)


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
