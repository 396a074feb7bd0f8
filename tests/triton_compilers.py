"""What torch's compilers make of the Triton kernels for a GPU that is not there; run by test_triton.py.

``trace`` traces all maps with fixed and with symbolic sizes, and looks for the kernels in the graph.  ``aotinductor``
exports all maps with dynamic extents and has AOTInductor write its C++ for an H100, up to where it would run kernels:
what the C++ launches and allocates are the kernels and their outputs alone.
"""

import re
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor
import triton
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.backends.compiler import GPUTarget

import xsep  # noqa: F401
from xsep.ops import triton as backend

SIZES, CHANNELS = (5, 23, 29), 728
LAYOUTS = torch.contiguous_format, torch.channels_last
# Four maps, two of which sum partial results.
LAUNCHES = ["fprop", "backward", "reduce_partials", "backward", "reduce_partials", "backward"]


class Driver:
    """Of Triton, for the GPU."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


class EveryMap(torch.nn.Module):
    def forward(self, x, w):
        ops, geometry = torch.ops.xsep, ((1, 1), (1, 1, 1, 1), (1, 1))
        y = ops.fprop(x, w, None, *geometry)
        gradients = ops.dgrad(y, w, x.shape, *geometry), ops.wgrad(y, x, w.shape, *geometry)
        return (y, *gradients, *ops.dgrad_wgrad(y, x, w, *geometry))


def tensors(layout, sizes=SIZES):
    N, H, W = sizes
    x = torch.empty((N, CHANNELS, H, W), device="cuda", dtype=torch.float16, memory_format=layout)
    return x, torch.empty(CHANNELS, 1, 3, 3, device="cuda", dtype=torch.float16)


def trace() -> None:
    environment = ShapeEnv()

    def symbol(value):
        source = ConstantSource(f"size_{value}")
        made = environment.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        return environment.create_symintnode(made, hint=value, source=source)

    for dynamic in (False, True):
        for layout in LAYOUTS:
            with FakeTensorMode(shape_env=environment):
                inputs = tensors(layout, tuple(map(symbol, SIZES)) if dynamic else SIZES)
                graph = aot_export_joint_simple(EveryMap(), inputs, trace_joint=False).graph
            called = [node for node in graph.nodes if node.op == "call_function"]
            kernels = [node for node in called if str(node.target) == "triton_kernel_wrapper_functional"]
            assert not any("xsep" in str(node.target) for node in called), graph
            assert len(kernels) == len(LAUNCHES), graph
            written = [sorted(node.kwargs["tensors_to_clone"]) for node in kernels]
            assert written == [["y"], ["dx"], ["partials"], ["out"], ["dx", "partials"], ["out"]], written
            arguments = kernels[0].kwargs["kwargs"]
            assert arguments["ALIGN"] == (8 if layout == torch.channels_last else 1), arguments
            assert dynamic == (not isinstance(arguments["H"], int)), arguments


class Written(Exception):
    """The code is there; to go on, kernels would have to run."""


def aotinductor() -> None:
    from torch._inductor.graph import GraphLowering

    properties = SimpleNamespace(
        name="H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
    )
    gpu = {
        "_get_device_properties": properties,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.empty(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    kernels = [f"{name}_kernel" if name == "reduce_partials" else f"depthwise_{name}_kernel" for name in LAUNCHES]
    with ExitStack() as stack:
        for name, value in gpu.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *args, value=value: value, create=True))
        run = stack.enter_context(
            mock.patch.object(GraphLowering, "_run_jit_variant_for_autotune", side_effect=Written)
        )
        # Patterns that it looks for are traced on the GPU.
        stack.enter_context(mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init"))
        stack.enter_context(
            torch._inductor.config.patch({"triton.autotune_at_compile_time": False, "compile_threads": 1})
        )
        for layout in LAYOUTS:
            with FakeTensorMode(), torch.no_grad():
                auto = torch.export.Dim.AUTO
                shapes = {0: auto, 2: auto, 3: auto}, None
                program = torch.export.export(EveryMap(), tensors(layout), dynamic_shapes=shapes, strict=False)
            held = [str(node.target) for node in program.graph.nodes if "xsep" in str(node.target)]
            assert held == [f"xsep.{name}.default" for name in ("fprop", "dgrad", "wgrad", "dgrad_wgrad")], held
            run.reset_mock()
            try:
                torch._inductor.aoti_compile_and_package(program)
            except RuntimeError as error:
                if not run.called:
                    raise error
            code = run.call_args.args[0].value
            body = code[code.index("void inductor_entry_impl(") :]
            launches = re.findall(r"^ *call_(\w+?)_\d+\(", body, re.MULTILINE)
            assert sorted(launches) == sorted(kernels), launches
            assert body.count("aoti_torch_empty_strided(") == 7, body  # five outputs and two of partial sums
            assert "xsep" not in body, body


triton.runtime.driver.set_active(Driver())
backend.TritonBackend.why_not_card = lambda self, index: None
backend._card = lambda index: backend.Card("none", "sm_90", 132)
for name in sys.argv[1:]:
    {"trace": trace, "aotinductor": aotinductor}[name]()
    print(f"{name}: done")
