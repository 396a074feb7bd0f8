"""The compile gate: every CUDA kernel compiles without spills or local memory, within its budget of registers.

For sm_80, sm_90a, sm_100 and sm_120, or with ``XSEP_ALL_ARCHITECTURES=1`` for every architecture that this nvcc knows.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
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
