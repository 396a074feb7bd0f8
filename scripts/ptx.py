"""Counts the PTX instructions of a thread per output of the 3x3 stride 1 kernels, where nothing is at a border.

    python scripts/ptx.py                # for sm_80

An output is an element of y (fprop), or of dy (wgrad; "both": dgrad+wgrad): 9 multiply-adds, or 18.  "row loop" is the
innermost loop with most of them: the instructions of all its basic blocks, loads and stores among them, over the
outputs that its multiply-adds make.  Blocks that exclude each other would both count, so it is an upper bound.

In NCHW other loops move the elements between global and shared memory, in vectors of 16 bytes; "copies" are the
instructions of those loops over the elements that they move, added up: x and y of fprop, dy and x (and dx) backward.
Loops that apply a function on load are left out, and so is what is done once a thread, a strip or a row of a tile, and
the halos that are copied twice.  Exits with 1 if a count is above its target; that of "both" is the sum of the others.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, NamedTuple

from ptxas import UNITS, CompileError, Unit, kernel, ptx

TARGETS = {"fprop": 40, "wgrad": 60, "both": 100}
COPIES = {"fprop": 2, "wgrad": 2, "both": 3}  # in NCHW: of x and y; of dy and x; of dy, x and dx
# The constants of the kernels, of which the first are the filter's size and the stride.
KERNELS = {
    ("depthwise_fprop_nhwc_kernel", (3, 1, 0)): "fprop",
    ("depthwise_backward_nhwc_kernel", (3, 1, 0, 1, 0)): "wgrad",
    ("depthwise_backward_nhwc_kernel", (3, 1, 1, 1, 0)): "both",
    ("depthwise_fprop_nchw_kernel", (3, 1)): "fprop",
    ("depthwise_backward_nchw_kernel", (3, 1, 0, 1)): "wgrad",
    ("depthwise_backward_nchw_kernel", (3, 1, 1, 1)): "both",
}
COUNTED = [unit for unit in UNITS if unit.group in ("nhwc", "nchw")]

ENTRY = re.compile(r"\.entry (\w+)\((?:.|\n)*?\n\{\n((?:.|\n)*?)\n\}\n")
BRANCH = re.compile(r"(@!?%p\d+ )?bra(?:\.uni)?\s+(\$\w+)")
VECTOR = re.compile(r"cp\.async\S* .*, 16$|(ld|st)\.global\S*\.v4\.[fub]32 ")  # of 16 bytes, to or from global memory
IN_VECTOR = {"float": 4, "half_t": 8, "bfloat16_t": 8}  # elements in 16 bytes


class Count(NamedTuple):
    unit: Unit
    pass_: str
    instructions: int  # of the row loop
    outputs: int  # that it makes
    copies: float  # instructions per output

    @property
    def row_loop(self) -> float:
        return self.instructions / self.outputs

    @property
    def total(self) -> float:
        return self.row_loop + self.copies

    @property
    def target(self) -> int:
        return TARGETS[self.pass_]


def counts(nvcc: str, unit: Unit, architecture: str) -> list[Count]:
    """Of each kernel of ``KERNELS`` in a unit."""
    found = []
    for symbol, body in ENTRY.findall(ptx(nvcc, unit, architecture)):
        pass_ = KERNELS.get(kernel(symbol))
        if pass_ is None:
            continue
        loops = innermost_loops(body)
        row_loop = max(loops, key=_multiply_adds)
        copies = [loop for loop in loops if _copies(loop)]
        if len(copies) != (COPIES[pass_] if unit.group == "nchw" else 0):
            raise CompileError(f"{unit}, {pass_}: {len(copies)} loops copy vectors")
        per_vector = sum(len(loop) / _vectors(loop) for loop in copies)
        outputs = _multiply_adds(row_loop) // (18 if pass_ == "both" else 9)
        found.append(Count(unit, pass_, len(row_loop), outputs, per_vector / IN_VECTOR[unit.type_name]))
    if len(found) != 3:
        raise CompileError(f"{unit}: {len(found)} of its 3 kernels are in the PTX")
    return found


def _copies(loop: list[str]) -> bool:
    """It moves vectors between global and shared memory, without a function on load."""
    return _vectors(loop) > 0 and any(".shared" in instruction for instruction in loop) and not _multiply_adds(loop)


def _multiply_adds(loop: list[str]) -> int:
    return sum("fma.rn.f32" in instruction for instruction in loop)


def _vectors(loop: list[str]) -> int:
    return sum(VECTOR.search(instruction) is not None for instruction in loop)


def innermost_loops(body: str) -> list[list[str]]:
    """The instructions of each loop of a kernel that has no loop in it."""
    blocks, successors = _blocks(body)
    predecessors = [{a for a, after in enumerate(successors) if b in after} for b in range(len(blocks))]

    def innermost(nodes: frozenset[int]) -> Iterator[frozenset[int]]:
        reached = {node: _reached(node, nodes, successors) for node in nodes}
        for loop in {frozenset(b for b in reached[a] if a in reached[b]) for a in nodes if a in reached[a]}:
            heads = {node for node in loop if predecessors[node] - loop}
            yield from list(innermost(loop - heads)) or [loop]

    loops = sorted(innermost(frozenset(range(len(blocks)))), key=min)
    return [[instruction for b in sorted(loop) for instruction in blocks[b]] for loop in loops]


def _blocks(body: str) -> tuple[list[list[str]], list[set[int]]]:
    """The basic blocks of a kernel, and the blocks that may follow each."""
    blocks: list[list[str]] = [[]]
    labels = {}
    for line in (line.split("//")[0].strip() for line in body.splitlines()):
        label = re.fullmatch(r"(\$\w+):", line)
        if label:
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
            continue
        for instruction in (part.strip() for part in line.strip("{}").split(";")):  # inline assembly may have several
            if instruction and not instruction.startswith("."):
                blocks[-1].append(instruction)
                if BRANCH.fullmatch(instruction):
                    blocks.append([])
    successors = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else ""
        branch = BRANCH.fullmatch(last)
        after = {labels[branch[2]]} if branch else set()
        if i + 1 < len(blocks) and last != "ret" and not (branch and branch[1] is None):
            after.add(i + 1)
        successors.append(after)
    return blocks, successors


def _reached(start: int, nodes: frozenset[int], successors: list[set[int]]) -> set[int]:
    found: set[int] = set()
    waiting = [start]
    while waiting:
        new = (successors[waiting.pop()] & nodes) - found
        found |= new
        waiting += new
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", default="sm_80", help="default: %(default)s")
    parser.add_argument(
        "--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", help="default: %(default)s"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time, default %(default)s")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda unit: counts(args.nvcc, unit, args.architecture), COUNTED))
    row = "{:7s}{:11s}{:7s}{:>7s}{:>9s}{:>10s}{:>8s}   {}".format
    print(row("layout", "dtype", "pass", "target", "counted", "row loop", "copies", "instructions / outputs"))
    for c in (c for of_unit in found for c in of_unit):
        numbers = (str(c.target), f"{c.total:.1f}", f"{c.row_loop:.1f}", f"{c.copies:.1f}")
        print(row(c.unit.group.upper(), c.unit.type_name, c.pass_, *numbers, f"{c.instructions} / {c.outputs}"))
    return 0 if all(c.total <= c.target for of_unit in found for c in of_unit) else 1


if __name__ == "__main__":
    sys.exit(main())
