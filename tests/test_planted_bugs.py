"""A test of the tests: bugs planted in the CUDA kernels, one at a time, turn the emulated C++ tests red.

A copy of the sources is built once with every bug in it; a variable of the environment names the one that is awake.
"""

import os
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
from test_cpp import ROOT, build

KERNELS = ROOT / "csrc" / "cuda"
SWITCH = "XSEP_PLANTED_BUG"
BARRIER = "__syncthreads();"
# A file, and shapes of tests/cpp/cases.h on which a barrier that it lacks shows.
BARRIERS = {
    "correlate.cuh": ("multiplier",),
    "depthwise_backward_nchw.cuh": ("plain_3x3",),
    "depthwise_backward_nhwc.cuh": ("stride2_even",),
    "depthwise_fprop_nchw.cuh": ("plain_3x3",),
    "depthwise_fprop_nhwc.cuh": ("stride2_even",),
    "depthwise_fprop_nhwc_tma.cuh": ("whole_blocks",),
    "depthwise_generic_conv.cuh": ("multiplier", "filter_beyond_shared_memory"),
    "depthwise_generic_wgrad_staged.cuh": ("signal",),
    "moments.cuh": ("plain_3x3",),
    "reduce.cuh": ("many_small_images",),
    "separable_backward_nhwc.cuh": ("many_small_images", "stride2_even", "whole_blocks"),
    "separable_fprop_nhwc.cuh": ("whole_blocks",),
}


class Bug(NamedTuple):
    """An expression of a kernel that becomes another one, or a barrier that is not waited for."""

    file: str
    text: str
    planted: str
    shapes: tuple  # on which it shows
    occurrence: int = 0  # of the text

    def __str__(self):
        return f"{self.file}: {self.planted or f'without barrier {self.occurrence + 1}'}"

    @property
    def of_blocks(self):
        return self.file.startswith(("moments", "separable", "through"))

    def code(self, number):
        if self.text == BARRIER:
            return f"if (xsep::planted_bug != {number}) {BARRIER}"
        return f"(xsep::planted_bug == {number} ? ({self.planted}) : ({self.text}))"


def missing_barriers():
    """Each one of each kernel."""
    for file in sorted(KERNELS.glob("*.cuh")):
        for occurrence in range(file.read_text().count(BARRIER)):
            yield Bug(file.name, BARRIER, "", BARRIERS[file.name], occurrence)


OFF_BY_ONE = [
    Bug(
        "nhwc.cuh",
        "residue + (axis.longest - 1) * axis.step < axis.extent",
        "residue + (axis.longest - 1) * axis.step < axis.extent - 1",
        ("stride2_even",),
    ),
    Bug("depthwise_fprop_nhwc.cuh", "last < p.H ? last + 1 : p.H", "last < p.H ? last : p.H", ("stride2_even",)),
    Bug(
        "depthwise_fprop_nhwc.cuh",
        "columns_inside<kPixels>(w0, p.dilation_w, p.W)",
        "columns_inside<kPixels>(w0, p.dilation_w, p.W + 1)",
        ("stride2_even",),
    ),
    Bug(
        "depthwise_fprop_nhwc_tma.cuh", "(rows - 1) * kStride + kR", "(rows - 1) * kStride + kR - 1", ("stride2_even",)
    ),
    Bug("depthwise_fprop_nhwc_tma.cuh", "row / kBoxes % 2", "(row + 1) / kBoxes % 2", ("whole_blocks",)),
    Bug("depthwise_fprop_nhwc_tma.cuh", "first_col * kStride - p.pad_left", "first_col * kStride", ("whole_blocks",)),
    Bug(
        "depthwise_backward_nhwc.cuh",
        "(p.P - 1 - p0) / p.dilation_h + 1",
        "(p.P - 1 - p0) / p.dilation_h",
        ("stride2_even",),
    ),
    Bug(
        "depthwise_backward_nhwc.cuh",
        "columns_inside<kCols>(w0, p.dilation_w, p.W)",
        "columns_inside<kCols>(w0, p.dilation_w, p.W - 1)",
        ("stride2_even",),
    ),
    Bug(
        "nchw_band.cuh",
        "static_cast<unsigned>(col) < static_cast<unsigned>(width)",
        "static_cast<unsigned>(col) <= static_cast<unsigned>(width)",
        ("plain_3x3",),
    ),
    Bug(
        "nchw_band.cuh",
        "clamp(height - row, 0, count - above)",
        "clamp(height - row - 1, 0, count - above)",
        ("plain_3x3",),
    ),
    Bug(
        "depthwise_fprop_nchw.cuh",
        "(call.P - 1 - block.residue) / call.dilation_h + 1 - block.step",
        "(call.P - 1 - block.residue) / call.dilation_h - block.step",
        ("plain_3x3",),
    ),
    Bug(
        "depthwise_backward_nchw.cuh",
        "smaller(kStride * right - call.pad_left, call.W)",
        "smaller(kStride * right - call.pad_left, call.W - 1)",
        ("plain_3x3",),
    ),
    Bug("correlate.cuh", "i + kCount <= existing.hi", "i + kCount <= existing.hi + 1", ("multiplier",)),
    Bug("depthwise_generic_wgrad_staged.cuh", "at.n < p.N && col < cols", "at.n < p.N && col < cols - 1", ("signal",)),
    Bug("reduce.cuh", "part < r.parts", "part < r.parts - 1", ("plain_3x3",)),
    Bug(
        "separable_fprop_nhwc.cuh",
        "ahead[r].load_if(rows[r] && below(col, p.W), from + r * next_row)",
        "ahead[r].load_if(rows[r] && below(col, p.W - 1), from + r * next_row)",
        ("whole_blocks",),
    ),
    Bug("separable_fprop_nhwc.cuh", "below(h[i] + down, p.H)", "below(h[i] + down, p.H - 1)", ("stride2_even",)),
    Bug(
        "separable_fprop_nhwc.cuh",
        "at < p.K ? widen(load(p.bias + at)) : 0.f",
        "at < p.K - 1 ? widen(load(p.bias + at)) : 0.f",
        ("whole_blocks",),
    ),
    Bug("separable_backward_nhwc.cuh", "smaller(q_to - q, kRun)", "smaller(q_to - q - 1, kRun)", ("whole_blocks",)),
    Bug("separable_backward_nhwc.cuh", "widen(of_z.at[v]) <= 0", "widen(of_z.at[v]) < -1", ("whole_blocks",)),
    Bug(
        "separable_backward_nhwc.cuh",
        "below(in_box, at.box_rows())",
        "below(in_box, at.box_rows() - 1)",
        ("stride2_even",),
    ),
    Bug("through_statistics.cuh", "smaller(first + kThroughPixels, p.pixels)", "first", ("whole_blocks",)),
]
SWAPPED_STRIDES = [
    Bug(
        "depthwise_fprop_nhwc.cuh",
        "offset(p.in, at.image, h_load, w0)",
        "offset(p.in, at.image, w0, h_load)",
        ("stride2_even",),
    ),
    Bug(
        "depthwise_fprop_nchw.cuh",
        "block.image * call.x_n + block.channel * call.x_c",
        "block.image * call.x_c + block.channel * call.x_n",
        ("plain_3x3",),
    ),
    Bug(
        "nchw_band.cuh",
        "plane * slab.plane + row * row_stride",
        "plane * row_stride + row * slab.plane",
        ("plain_3x3",),
    ),
    Bug("depthwise_backward_nchw.cuh", "dy_residue * call.dy_h", "dy_residue * call.dy_row", ("dilated",)),
    Bug(
        "depthwise_generic_conv.cuh",
        "tap * p.w_slide + cross_tap * p.w_cross",
        "tap * p.w_cross + cross_tap * p.w_slide",
        ("multiplier",),
    ),
    Bug("reduce.cuh", "channel * r.taps + which", "which * r.channels + channel", ("plain_3x3",)),
    Bug("separable_fprop_nhwc.cuh", "from.p * p.residual_row", "from.p * p.residual_col", ("whole_blocks",)),
    Bug("separable_backward_nhwc.cuh", "h * p.z.row", "h * p.z.col", ("whole_blocks",)),
]
BUGS = [*missing_barriers(), *OFF_BY_ONE, *SWAPPED_STRIDES]


def plant(text, bugs):
    """The text of a file with each of ``{number: bug}`` in it."""
    places = []
    for number, bug in bugs.items():
        begins = [match.start() for match in re.finditer(re.escape(bug.text), text)]
        assert len(begins) == 1 or bug.text == BARRIER, f"{bug}: '{bug.text}' occurs {len(begins)} times"
        places.append((begins[bug.occurrence], number, bug))
    for begin, number, bug in sorted(places, reverse=True):
        text = text[:begin] + bug.code(number) + text[begin + len(bug.text) :]
    return text


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    for name in ("csrc", "cmake", "tests/cpp"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    for file in sorted({bug.file for bug in BUGS}):
        path = folder / "csrc" / "cuda" / file
        path.write_text(plant(path.read_text(), {n: bug for n, bug in enumerate(BUGS) if bug.file == file}))
    with open(folder / "csrc" / "dtype.h", "a") as header:
        header.write(
            "#include <cstdlib>\n"
            f'namespace xsep {{ inline const int planted_bug = std::atoi(std::getenv("{SWITCH}")); }}\n'
        )
    build(folder, folder / "build", "-DXSEP_EMULATE_CUDA=ON", target="test_cuda_emulated")
    build(folder, folder / "build", "-DXSEP_EMULATE_CUDA=ON", target="test_separable_cuda_emulated")
    return folder / "build"


def run(folder, of_blocks, number, shapes):
    program = folder / ("test_separable_cuda_emulated" if of_blocks else "test_cuda_emulated")
    return subprocess.run([program, *shapes], env={**os.environ, SWITCH: str(number)}, capture_output=True, text=True)


@pytest.mark.parametrize("of_blocks", [False, True], ids=["maps", "blocks"])
def test_without_a_bug(of_blocks, programs):
    shapes = sorted({shape for bug in BUGS if bug.of_blocks == of_blocks for shape in bug.shapes})
    done = run(programs, of_blocks, -1, shapes)
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout


@pytest.mark.parametrize("number", range(len(BUGS)), ids=[str(bug) for bug in BUGS])
def test_a_bug_is_found(number, programs):
    done = run(programs, BUGS[number].of_blocks, number, BUGS[number].shapes)
    assert done.returncode != 0 and "FAILED" in done.stdout, done.stdout  # or it crashes after the first failures
