"""A test of the tests: a bug planted in a CUDA kernel turns the C++ tests on the emulator red.

The sources are compiled as they are, and once for each bug the unit that has it.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O0", "-DXSEP_EMULATE_CUDA", "-Wno-unknown-pragmas"]
TYPES = {"float": "float", "half": "xsep::half_t", "bfloat16": "xsep::bfloat16_t", "double": "double"}


class Bug(NamedTuple):
    group: str  # of the kernels
    source: str  # in csrc/cuda
    text: str  # that stands there once
    planted: str  # in its place
    shape: str  # that shows it
    where: str  # in each line that says what failed


BUGS = {
    "nchw_missing_barrier": Bug(
        "nchw",
        "depthwise_fprop_nchw.cuh",
        "copies_done();\n    __syncthreads();",
        "copies_done();",
        "whole_blocks",
        "depthwise_fprop_nchw",
    ),
    "nchw_missing_barrier_before_the_store": Bug(
        "nchw",
        "depthwise_fprop_nchw.cuh",
        "__syncthreads();\n    store_slab(y, y_tile, layout.y);",
        "store_slab(y, y_tile, layout.y);",
        "whole_blocks",
        "depthwise_fprop_nchw",
    ),
    "nchw_missing_wait_for_copies": Bug(
        "nchw", "depthwise_fprop_nchw.cuh", "copies_done();", "", "whole_blocks", "depthwise_fprop_nchw"
    ),
    "nchw_off_by_one": Bug(
        "nchw",
        "nchw_band.cuh",
        "const bool inside = static_cast<unsigned>(col) < static_cast<unsigned>(width);",
        "const bool inside = static_cast<unsigned>(col) <= static_cast<unsigned>(width);",
        "whole_blocks",
        "_nchw",
    ),
    "nchw_swapped_stride": Bug(
        "nchw",
        "depthwise_fprop_nchw.cuh",
        "call->x_c = x.c, call->x_h = x.h;",
        "call->x_c = x.h, call->x_h = x.c;",
        "whole_blocks",
        "depthwise_fprop_nchw",
    ),
    "nhwc_missing_barrier": Bug(
        "nhwc", "depthwise_fprop_nhwc.cuh", "__syncthreads();", "", "whole_blocks", "depthwise_fprop_nhwc"
    ),
    "nhwc_missing_barrier_in_the_reduction": Bug(
        "nhwc", "reduce.cuh", "__syncthreads();", "", "many_small_images", "grad"
    ),
    "nhwc_off_by_one": Bug(
        "nhwc",
        "depthwise_fprop_nhwc.cuh",
        "const int steps = (rows - 1) * kStride + kR;",
        "const int steps = (rows - 1) * kStride + kR - 1;",
        "stride2_even",
        "depthwise_fprop_nhwc",
    ),
    "nhwc_swapped_stride": Bug(
        "nhwc",
        "depthwise_fprop_nhwc.cuh",
        "p.in = Pixels::of<T>(in.n, in.h, in.w, s.dilation_h, s.dilation_w);",
        "p.in = Pixels::of<T>(in.n, in.w, in.h, s.dilation_h, s.dilation_w);",
        "whole_blocks",
        "depthwise_fprop_nhwc",
    ),
}


def compiled(source, out, *flags, csrc=ROOT / "csrc"):
    command = [COMPILER, *FLAGS, *flags, f"-I{csrc}", f"-I{ROOT / 'tests' / 'cpp'}"]
    run = subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(out)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def linked(objects, out):
    run = subprocess.run([COMPILER, *map(str, objects), "-o", str(out)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def failures(program, *shapes):
    """The lines that say what failed; the program has to run to its end."""
    run = subprocess.run([str(program), *shapes], capture_output=True, text=True)
    found = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    assert re.search(r"\d+ checks, \d+ failed", run.stdout), run.stdout + run.stderr
    assert run.returncode == (1 if found else 0)
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The test program in parts, by name."""
    folder, cuda = tmp_path_factory.mktemp("objects"), ROOT / "csrc" / "cuda"
    work = {name: (cuda / f"{name}.cpp", ()) for name in ("depthwise", "emulator")}
    work["test"] = (ROOT / "tests" / "cpp" / "test_cuda.cpp", ())
    for group in ("nhwc", "nchw", "generic"):
        for name, element in TYPES.items():
            if group == "generic" or name != "double":
                work[f"{group}_{name}"] = (cuda / f"{group}.cu", (f"-DXSEP_T={element}",))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {
            name: pool.submit(compiled, source, folder / f"{name}.o", *flags) for name, (source, flags) in work.items()
        }
        return {name: job.result() for name, job in jobs.items()}


def test_without_bugs(objects, tmp_path):
    shapes = {bug.shape for bug in BUGS.values()}
    assert failures(linked(objects.values(), tmp_path / "test"), *shapes) == []


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_turns_the_tests_red(name, objects, tmp_path):
    bug = BUGS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "cuda" / bug.source
    text = path.read_text()
    assert text.count(bug.text) == 1, "the text to replace has changed"
    path.write_text(text.replace(bug.text, bug.planted))
    unit = f"{bug.group}_float"
    planted = compiled(csrc / "cuda" / f"{bug.group}.cu", tmp_path / "unit.o", "-DXSEP_T=float", csrc=csrc)
    found = failures(linked({**objects, unit: planted}.values(), tmp_path / "test"), bug.shape)
    assert found, "the bug was not noticed"
    assert all(bug.where in line for line in found), found
