#!/usr/bin/env python3
"""Compiles the Triton kernels ahead of time, without a GPU, and prints what each needs of the hardware.

    python scripts/triton_aot.py                                       # every target; half an hour on 2 cores
    python scripts/triton_aot.py --targets sm_90 gfx942 --problems 3x3 --dtypes float16

Every configuration of every pass is compiled for every target, layout and dtype, as the JIT would for 728 channels of
37 x 37, as Xception has them, in aligned tensors.  A row: registers and bytes spilled a
thread, bytes of shared memory a program, the widest loads and stores, the instruction of matrix products.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("error: TRITON_INTERPRET=1 is set: the interpreter compiles nothing")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from xsep.ops.compiled import DGRAD, DGRAD_WGRAD, FPROP, PASSES, WGRAD
from xsep.ops.problem import BlockProblem, Problem
from xsep.triton import configs, launch

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
}
PROBLEMS = {
    "3x3": dict(kernel=3),
    "5x5": dict(kernel=5),
    "7x7": dict(kernel=7),
    "13x13": dict(kernel=13),
    "3x3_stride2": dict(kernel=3, stride=2),
    "3x3_multiplier": dict(kernel=3, multiplier=2),
    "3x3_on_load": dict(kernel=3, on_load=True),
    **{f"3x3_block_{K}": dict(kernel=3, on_load=True, block=K) for K in (16, 32, 64, 128, 256)},
    "5x5_block_256": dict(kernel=5, block=256),
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_PTX_ARCH = re.compile(r"\.target (sm_\w+)")
_BLOCK, _BLOCK_BACKWARD, _BLOCK_INFERENCE = range(len(PASSES), len(PASSES) + 3)  # as passes: those of blocks
_NAMES = (*PASSES, "block", "block_backward", "inference")
_MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")


class Job(NamedTuple):
    target: str
    problem: str
    dtype: str
    nhwc: bool
    pass_: int
    config: configs.Config | configs.BlockConfig | configs.GradientsConfig


class Row(NamedTuple):
    job: Job
    kernel: str
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    load: int  # bytes of the widest load from global memory, of a thread
    store: int
    matrix: str  # its instruction of matrix products, or "-"


def problem(name: str, dtype: torch.dtype, nhwc: bool) -> Problem:
    options = PROBLEMS[name]
    R, s, C = options["kernel"], options.get("stride", 1), 728
    sizes = (2, C, 37, 37), (C * options.get("multiplier", 1), 1, R, R)
    return Problem("cuda", dtype, nhwc, *sizes, (s, s), (R // 2,) * 4, (1, 1), 0)


def block(name: str, dtype: torch.dtype) -> BlockProblem:
    options = PROBLEMS[name]
    return BlockProblem(problem(name, dtype, True), options["block"], options.get("on_load", False), None)


def jobs(targets, problems, dtypes, most: int) -> list[Job]:
    found = []
    for name in problems:
        for dtype in dtypes:
            if "block" in PROBLEMS[name]:
                b = block(name, DTYPES[dtype])
                for pass_, reason, config in (
                    (_BLOCK, configs.why_not_fused(b), configs.block_config(b)),
                    (_BLOCK_BACKWARD, configs.why_not_gradients_fused(b), configs.gradients_config(b)),
                    (_BLOCK_INFERENCE, configs.why_not_fused(b, inference=True), configs.block_config(b)),
                ):
                    if reason is None:
                        found += [Job(each, name, dtype, True, pass_, config) for each in targets if each != "sm_75"]
                continue
            for nhwc in (True, False):
                p = problem(name, DTYPES[dtype], nhwc)
                for pass_ in range(len(PASSES)):
                    if pass_ == DGRAD and PROBLEMS[name].get("on_load"):
                        continue  # it is part of dgrad_wgrad then
                    if pass_ == DGRAD_WGRAD and not launch.one_pass(p):
                        continue
                    found += [
                        Job(target, name, dtype, nhwc, pass_, config)
                        for config in configs.ordered(p, pass_, 132)[:most]
                        for target in targets
                    ]
    return found


def _started(job: Job) -> list[tuple]:
    """(kernel, arguments, constants) of each kernel that the launcher starts for a job, on tensors without memory."""
    started: list[tuple] = []

    def record(kernel, programs, arguments, constants):
        started.append((kernel, arguments, constants))

    p = problem(job.problem, DTYPES[job.dtype], job.nhwc)
    x, y = (torch.empty(sizes, dtype=p.dtype, device="meta", memory_format=p.memory_format) for sizes in (p.x, p.y))
    w, wide = torch.empty(p.w, dtype=p.dtype, device="meta"), torch.float64 if job.dtype == "float64" else torch.float32
    on_load = None
    if PROBLEMS[job.problem].get("on_load"):
        on_load = (*(torch.empty(p.x[1], dtype=wide, device="meta") for _ in range(3)), True)
    if job.pass_ >= _BLOCK:
        b = block(job.problem, p.dtype)
        w_pw = torch.empty((b.K, p.w[0], 1, 1), dtype=p.dtype, device="meta")
        y = torch.empty((p.y[0], b.K, *p.y[2:]), dtype=p.dtype, device="meta", memory_format=p.memory_format)
        w_dw_bias, bias, mean = (
            w[:, 0, 0, 0].contiguous(),
            w_pw[:, 0, 0, 0].contiguous(),
            torch.empty(b.K, device="meta"),
        )
    if job.pass_ == _BLOCK:
        launch.block(b, x, w, w_pw, on_load, True, job.config, record)
    elif job.pass_ == _BLOCK_BACKWARD:
        launch.block_backward(b, y, mean, mean, y, mean, x, w, w_pw, on_load, job.config, 132, record)
    elif job.pass_ == _BLOCK_INFERENCE:
        launch.block_inference(b, x, w, w_pw, w_dw_bias, bias, y, "relu6", job.config, record)
    elif job.pass_ == FPROP:
        launch.fprop(p, x, w, None, on_load, job.config, 132, record)
    else:
        x_or_none = None if job.pass_ == DGRAD else x
        w_or_none = None if job.pass_ == WGRAD else w
        launch.backward(p, job.pass_, y, x_or_none, w_or_none, on_load, job.config, 132, record)
    return started


def _source(kernel, arguments: tuple, constants: dict) -> tuple[ASTSource, dict]:
    """What the JIT would compile: integers equal to 1 are constants, those divisible by 16 known to be."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature: dict[str, str] = {}
    known: dict[str, object] = {}
    attributes: dict[tuple, list] = {}
    parameters = {each.name: each for each in kernel.params}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments)):
        specialised = not parameters[name].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif value is None or (value == 1 and specialised):
            signature[name], known[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        signature[name], known[name] = "constexpr", value
    return ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes), options


def compile_job(job: Job) -> list[Row]:
    rows = []
    for kernel, arguments, constants in _started(job):
        source, options = _source(kernel, arguments, constants)
        compiled = triton.compile(source, target=TARGETS[job.target], options=options)
        measure = _nvidia if job.target.startswith("sm_") else _amd
        rows.append(Row(job, kernel.fn.__name__, *measure(compiled)))
    return rows


def _nvidia(compiled) -> tuple[int, int, int, int, int, str]:
    ptx = compiled.asm["ptx"]
    registers, spilled = _ptxas(ptx)
    loads, stores = (_widest(ptx, name) for name in ("ld.global", "st.global"))
    return registers, spilled, compiled.metadata.shared, loads, stores, _matrix(ptx)


def _matrix(text: str) -> str:
    found = _MATRIX.search(text)
    return found.group(0) if found else "-"


def _widest(ptx: str, instruction: str) -> int:
    """Bytes of the widest global access in PTX."""
    found = [0]
    for vector, bits in re.findall(instruction + r"[\w.:]*?(?:\.v(\d))?\.b(\d+) ", ptx):
        found.append(int(vector or 1) * int(bits) // 8)
    return max(found)


def _ptxas(ptx: str) -> tuple[int, int]:
    """Registers and bytes spilled, of the ptxas that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = _PTX_ARCH.search(ptx).group(1)  # type: ignore[union-attr]
    number = int(re.sub(r"\D", "", arch))
    tool = get_ptxas(number) if inspect.signature(get_ptxas).parameters else get_ptxas()  # as Triton's version has it
    tool = tool[0] if isinstance(tool, tuple) else tool
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [getattr(tool, "path", tool), "-v", f"--gpu-name={arch}", str(source), "-o", str(source) + ".o"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", report)
    return int(re.search(r"Used (\d+) registers", report).group(1)), int(spilled.group(1)) if spilled else 0  # type: ignore[union-attr]


def _amd(compiled) -> tuple[int, int, int, int, int, str]:
    text = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
    spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
    loads, stores = (_widest_amd(text, name) for name in ("load", "store"))
    return registers, spilled, compiled.metadata.shared, loads, stores, _matrix(text)


def _widest_amd(text: str, name: str) -> int:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
    found = re.findall(rf"(?:global|buffer|flat)_{name}_(dwordx\d|dword|ushort|short)", text)
    return max((sizes[each] for each in found), default=0)


def _printed(rows: list[Row]) -> list[Row]:
    """The kernels of a job but those that only pass over numbers, which are the same for all."""
    return [row for row in rows if row.kernel not in ("reduce_partials_kernel", "through_statistics_kernel")]


def _pass(row: Row) -> str:
    return row.kernel.removesuffix("_kernel") if row.job.pass_ == _BLOCK_BACKWARD else _NAMES[row.job.pass_]


def _tile(row: Row) -> str:
    config = row.job.config
    if isinstance(config, configs.GradientsConfig):
        config = config.wgrad if row.kernel == "block_wgrad_kernel" else config.dgrad
    return "x".join(map(str, config[:3])) + f" w{config.warps}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--most", type=int, default=99, help="configurations a problem, by the model's order (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    todo = jobs(options.targets, options.problems, options.dtypes, options.most)
    print(f"Triton {triton.__version__}, {len(todo)} compilations")
    print(
        "target   problem         dtype    layout pass        tile           registers spilled shared load store matrix"
    )
    spilling = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for rows in pool.map(compile_job, todo, chunksize=4):
            for row in _printed(rows):
                job = row.job
                print(
                    f"{job.target:8s} {job.problem:15s} {job.dtype:8s} {'NHWC' if job.nhwc else 'NCHW':6s} "
                    f"{_pass(row):11s} {_tile(row):14s} {row.registers:9d} {row.spilled:7d} {row.shared:6d} "
                    f"{row.load:4d} {row.store:5d} {row.matrix}",
                    flush=True,
                )
            spilling += any(each.spilled for each in rows)
    print(f"{spilling} of {len(todo)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
