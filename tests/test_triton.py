"""The Triton kernels without a GPU: every configuration in the interpreter, code for GPUs, tracing, tuning.

The operators' own tests run them too, in the interpreter, or on a GPU where there is one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import layers
import needs
import pytest
import test_inference
import torch
from conftest import interpreted
from conv_cases import LAYOUTS
from test_block import check_drawn, drawn_inputs, in_torch
from test_ops import check_all_maps, tensors

import xsep
from xsep import info, selftest
from xsep.ops import triton as triton_backend
from xsep.ops.backends import BACKENDS
from xsep.ops.problem import BlockProblem, Problem
from xsep.shapes import Shape
from xsep.testing import assert_no_worse_than_torch
from xsep.triton import configs, tuning

ROOT = Path(__file__).parents[1]
TRITON = BACKENDS["triton"]
XCEPTION = ((8, 728, 19, 19), (728, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
LARGE_FILTERS = {
    "8x8": Shape(1, 5, 9, 9, 8, 8, pad=(4, 3, 4, 3)),
    "8x8_multiplier_stride2": Shape(2, 3, 10, 9, 8, 8, 2, (2, 2), (3, 3, 4, 4)),
    "7x7_stride2": Shape(1, 4, 9, 17, 7, 7, 1, (2, 2), (3, 3, 3, 3)),
    "2x33": Shape(1, 4, 3, 12, 2, 33, pad=(0, 1, 16, 16)),
}
BLOCKS = {
    "tails": dict(
        case=Shape(3, 20, 7, 9, 3, 3, pad=(1, 1, 1, 1)), K=40, vectors={"center", "scale", "shift"}, relu=True
    ),
    "stride_dilation": dict(case=Shape(2, 18, 11, 12, 3, 2, 1, (2, 1), (0, 1, 2, 1), (1, 2)), K=16, relu=True),
    "tall": dict(case=Shape(2, 17, 26, 9, 3, 3, 1, (1, 1), (1, 1, 1, 0)), K=18, vectors={"scale"}, activation="relu"),
    "wide_stride2": dict(
        case=Shape(1, 19, 13, 31, 3, 3, 1, (2, 2), (0, 1, 0, 1)), K=24, vectors={"center", "shift"}, relu=True
    ),
    "few_channels_of_many_taps": dict(case=Shape(2, 3, 11, 9, 5, 4, 1, (1, 2), (2, 2, 2, 1)), K=33, activation="relu"),
}


@pytest.fixture
def triton():
    if TRITON.why_absent() is not None:
        pytest.skip(TRITON.why_absent())
    if not interpreted(TRITON):
        pytest.skip("the interpreter is for machines without a GPU")
    with xsep.backend("triton"):
        yield TRITON


def problem(nhwc, dtype=torch.float32, sizes=XCEPTION, device="cuda"):
    return Problem(device, dtype, nhwc, *sizes, 0 if device == "cuda" else -1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", LARGE_FILTERS)
def test_large_filters(name, layout, triton):
    check_all_maps(LARGE_FILTERS[name], torch.float32, layout, "cpu")


@pytest.mark.parametrize(
    ("layout", "dtype", "C"),
    [(torch.contiguous_format, torch.float32, 3), (torch.channels_last, torch.float16, 34)],
    ids=["NCHW", "NHWC"],
)
def test_every_configuration(layout, dtype, C, triton, monkeypatch):
    """The tiles that GPUs use, on images that they do not divide; partial results of several programs."""
    case = Shape(3, C, 3, 9, 3, 3, 1, (1, 1), (1, 1, 1, 1))
    p = problem(layout == torch.channels_last, dtype, (case.x_sizes, case.w_sizes, *case.geometry), "cpu")
    tried = {config for pass_ in range(4) for config in configs.candidates(p, pass_)}
    assert len(tried) >= 6
    summed = []

    def splits(units, blocks, multiprocessors):
        summed.append(min(units, 3))
        return summed[-1]

    monkeypatch.setattr(configs, "splits", splits)
    for config in sorted(tried):
        monkeypatch.setattr(configs, "INTERPRETED", config)
        check_all_maps(case, dtype, layout, "cpu")
    assert max(summed) == 3


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of pixels, of x's channels and of y's, none of them whole; several programs that sum."""
    monkeypatch.setattr(configs, "INTERPRETED_BLOCK", configs.BlockConfig(64, 16, 32, 1))
    wgrad, dgrad = configs.BlockConfig(64, 16, 32, 1), configs.BlockConfig(16, 16, 16, 1)
    monkeypatch.setattr(configs, "INTERPRETED_GRADIENTS", configs.GradientsConfig(wgrad, dgrad, 32))
    for name, value in (("_BLOCK_PROGRAMS", 3), ("wgrad_splits", lambda *a: 2)):
        monkeypatch.setattr(configs, name, value)


@pytest.fixture
def made(triton, monkeypatch):
    """The names of the passes of blocks that Triton makes."""
    names, launch = [], triton_backend._launch()[0]

    def noted(name, original):
        return lambda *a: names.append(name) or original(*a)

    for name in ("block", "block_backward", "block_inference"):
        monkeypatch.setattr(launch, name, noted(name, getattr(launch, name)))
    return names


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_blocks(name, dtype, made, small_tiles):
    drawn = SimpleNamespace(**{**dict(vectors=set(), relu=False, activation=None), **BLOCKS[name]})
    check_drawn(drawn, dtype, torch.channels_last, "cpu")
    if drawn.activation == "elu":  # in place of ReLU in half types
        assert made == []
    elif drawn.case.R * drawn.case.S > configs.HELD:
        assert made == ["block"]
    else:
        assert made == ["block", "block_backward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("given", "relu", "activations", "residual_layout"),
    [
        ({"depthwise_bias", "bias", "residual"}, True, ("relu6", "relu"), torch.channels_last),
        ({"residual"}, False, ("relu", None), torch.contiguous_format),
        (set(), False, (None, "relu6"), torch.channels_last),
    ],
    ids=["everything", "residual", "nothing"],
)
def test_fused_blocks_of_inference(given, relu, activations, residual_layout, name, dtype, made, small_tiles):
    case, K = BLOCKS[name]["case"], BLOCKS[name]["K"]
    activation, out_activation = activations
    drawn = SimpleNamespace(
        case=case,
        K=K,
        given=given,
        relu=relu,
        activation=activation,
        out_activation=out_activation,
        residual_layout=residual_layout,
    )
    test_inference.check_drawn(drawn, dtype, torch.channels_last, "cpu")
    assert made == ["block_inference"]


@pytest.mark.parametrize("used", [("y",), ("mean",), ("m2",), ("y", "m2")], ids="+".join)
def test_gradients_of_some_outputs(used, made, small_tiles):
    """What is None is zero; sums are the same at every call; dense and not."""
    inputs, gradients = drawn_inputs(SimpleNamespace(**BLOCKS["tails"], activation=None), torch.float32, LAYOUTS[1])
    wanted = [gradient for name, gradient in zip(("y", "mean", "m2"), gradients) if name in used]
    found = []
    for function in (xsep.separable_block, xsep.separable_block, in_torch):
        leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
        outputs = [out for name, out in zip(("y", "mean", "m2"), function(*leaves)) if name in used]
        found.append(torch.autograd.grad(outputs, [t for t in leaves if isinstance(t, torch.Tensor)], wanted))
    assert made == ["block", "block_backward"] * 2 and all(map(torch.equal, *found[:2]))
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [0, 1, 1e2])
@pytest.mark.parametrize(("N", "mean"), [(7, 1), (7, 1e4), (1, 1e4)])
def test_statistics_of_tiles(N, mean, spread, triton, monkeypatch):
    """Deviations of about 1 from the means of images, which lie ``spread`` apart; a last tile that is not whole."""
    monkeypatch.setattr(configs, "INTERPRETED_BLOCK", configs.BlockConfig(64, 16, 16, 1))
    y = torch.randn(N, 16, 20, 21, dtype=torch.float64) + mean + spread * torch.randn(N, 16, 1, 1, dtype=torch.float64)
    y = y.float().contiguous(memory_format=torch.channels_last)
    ones, identity = torch.ones(16, 1, 1, 1), torch.eye(16).view(16, 16, 1, 1)
    same, *found = xsep.separable_block(y, None, None, None, False, ones, identity)
    assert torch.equal(same, y)
    theirs, truth = (list(reversed(torch.var_mean(t, (0, 2, 3), correction=0))) for t in (y, y.double()))
    for name, mine, yours, ref, factor in zip(("mean", "m2"), found, theirs, truth, (1, N * 20 * 21)):
        assert_no_worse_than_torch(mine, yours * factor, ref * factor, name)


def test_blocks_without_statistics_and_of_nothing(triton):
    x, w = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.ones(3, 1, 1, 1)
    w_pw = torch.ones(2, 3, 1, 1)
    y, mean, m2 = xsep.separable_block(x, None, None, None, False, w, w_pw, statistics=False)
    assert mean is m2 is None and y.eq(3).all() and y.is_contiguous(memory_format=torch.channels_last)
    b = BlockProblem(problem(True, sizes=((0, 3, 4, 5), (3, 1, 1, 1), *XCEPTION[2:]), device="cpu"), 2, False, None)
    nothing = x[:0]
    y, mean, m2 = triton.block(b, nothing, w, w_pw, None, True)
    assert y.numel() == 0 and mean.tolist() == m2.tolist() == [0, 0]
    assert triton.block_inference(b, nothing, w, w_pw, None, None, y, "relu").shape == y.shape
    on_load = (*(torch.ones(3) for _ in range(3)), True)
    for given, sums in ((None, []), (on_load, [(3,), (3,)])):
        dx, *others = triton.block_backward(b, y, mean, None, y, mean, nothing, w, w_pw, given)
        found = [t for t in others if t is not None]
        assert dx.shape == nothing.shape and [t.shape for t in found] == [w.shape, w_pw.shape, *sums]
        assert not any(t.any() for t in found)


def test_why_not_block():
    half = BlockProblem(problem(True, torch.float16), 256, True, None)
    single, double = (half._replace(depthwise=half.depthwise._replace(dtype=d)) for d in (torch.float32, torch.float64))
    for fused in (half, half._replace(activation="relu"), half._replace(K=512, on_load=False), single._replace(K=64)):
        assert configs.why_not_fused(fused) is None
    wide = half.depthwise._replace(w=(1456, 1, 3, 3))
    for other, reason in (
        (half._replace(K=257), "by the model.* 257 channels of torch.float16"),
        (half._replace(K=769, on_load=False), "by the model"),
        (single._replace(K=65), "by the model.* torch.float32"),
        (double, "float64"),
        (half._replace(activation="elu"), "no blocks with elu"),
        (half._replace(depthwise=problem(False, torch.float16)), "channels_last tensors only"),
        (half._replace(depthwise=wide), "no blocks with a channel multiplier"),
        (half._replace(depthwise=half.depthwise._replace(x=(2**30, 728, 19, 19))), r"2\^31 programs"),
    ):
        assert re.search(reason, configs.why_not_fused(other))


def test_why_not_gradients_of_blocks():
    half = BlockProblem(problem(True, torch.float16), 256, True, None)
    single = half._replace(depthwise=half.depthwise._replace(dtype=torch.float32))
    for fused in (half, half._replace(activation="relu"), half._replace(K=257, on_load=False), single._replace(K=32)):
        assert configs.why_not_gradients_fused(fused) is None

    def resized(x, w=(728, 1, 3, 3)):
        return half._replace(depthwise=half.depthwise._replace(x=x, w=w))

    for other, reason in (
        (half._replace(K=320), "by the model.* 320 channels of torch.float16"),
        (single._replace(K=64), "by the model.* torch.float32"),
        (half._replace(activation="elu"), "no blocks with elu"),
        (resized((8, 728, 19, 19), (728, 1, 5, 5)), "filters of up to 9 taps only"),
        (resized((8, 728, 19, 600)), "512 KB of dz for each program"),
        (resized((1, 728, 2**16, 2**15)), r"2\^31 pixels"),
    ):
        assert re.search(reason, configs.why_not_gradients_fused(other))


def test_programs_share_the_gradients_of_blocks():
    """Every row is of one strip, no program waits long for another, and little of dz is made twice."""
    half = BlockProblem(problem(True, torch.float16), 256, True, None)
    for N, H in ((1, 1), (1, 19), (8, 19), (32, 37), (33, 74), (500, 147), (0, 5)):
        b = half._replace(depthwise=half.depthwise._replace(x=(N, 128, H, 30), w=(128, 1, 3, 3)))
        grid = configs.gradients_grid(b, configs.gradients_config(b).dgrad, 132)
        assert (grid.strips - 1) * grid.rows < H <= grid.strips * grid.rows and grid.c_blocks == 2
        assert grid.splits == min(66, N * grid.strips)
        if N * H > 66:
            longest = configs.ceil_div(N * grid.strips, grid.splits) * (grid.rows + 2)
            assert longest < 1.5 * (N * H / grid.splits + 2)


def test_why_not_blocks_of_inference():
    """A ReLU on load takes less than a function with vectors; ReLU6 is one of its activations."""
    half = BlockProblem(problem(True, torch.float16), 512, True, "relu6")
    assert configs.why_not_fused(half, inference=True) is None and configs.why_not_fused(half) is not None
    assert "by the model" in configs.why_not_fused(half._replace(K=728), inference=True)


def test_no_blocks_where_triton_has_no_tensor_cores(triton, monkeypatch):
    half = BlockProblem(problem(True, torch.float16), 256, True, None)
    assert triton.why_not_block(half, backward=False) is None
    monkeypatch.setattr(triton_backend, "_card", lambda index: triton_backend.Card("T4", "sm_75", 40))
    for reason in (*(triton.why_not_block(half, each) for each in (False, True)), triton.why_not_block_inference(half)):
        assert "tensor cores of sm_75" in reason


def test_gradients(triton):
    x, w, _, _ = tensors(Shape(1, 2, 3, 4, 3, 3, pad=(1, 1, 1, 1)), torch.float64, torch.channels_last)
    x, w = (t.detach().requires_grad_() for t in (x, w))
    assert torch.autograd.gradcheck(lambda x, w: xsep.depthwise_conv2d(x, w, padding=1), (x, w))


def test_nan_passes_through_relu_on_load(triton):
    x = torch.tensor([[-1.0, float("nan"), 2.0]]).view(1, 1, 1, 3)
    one, zero = torch.ones(1), torch.zeros(1)
    p = problem(False, torch.float32, ((1, 1, 1, 3), (1, 1, 1, 1), (1, 1), (0,) * 4, (1, 1)), "cpu")
    y = triton.fprop(p, x, torch.ones(1, 1, 1, 1), None, (zero, one, zero, True))
    assert y[0, 0, 0, 0] == 0 and y[0, 0, 0, 1].isnan() and y[0, 0, 0, 2] == 2


def test_why_not(triton, monkeypatch):
    p = problem(True, device="cpu")
    assert triton.why_not(p) is None
    assert triton.why_not(p._replace(dtype=torch.bfloat16)) == "Triton's interpreter truncates to bfloat16"
    assert triton.why_not(p._replace(dtype=torch.complex64)) == "it has no kernels for torch.complex64"
    assert "live on the CPU, under TRITON_INTERPRET=1, not on cuda" in triton.why_not(problem(True))
    assert "2^31 programs" in triton.why_not(p._replace(x=(2**31, 1, 3, 3), w=(1, 1, 3, 3)))
    assert "beyond 32 bits" in triton.why_not(p._replace(x=(1, 1, 2**31, 3), w=(1, 1, 3, 3)))
    with pytest.raises(RuntimeError, match="'triton' is forced but cannot run.*bfloat16"):
        xsep.depthwise_conv2d(torch.ones(1, 1, 3, 3).bfloat16(), torch.ones(1, 1, 3, 3).bfloat16())
    import triton as package

    monkeypatch.setattr(package, "__version__", "3.1.0")
    assert triton_backend._launch.__wrapped__() == (None, "it needs Triton 3.3 or newer, not 3.1.0")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in triton_backend._launch.__wrapped__()[1]


def test_info_and_explain_name_it(triton):
    assert f"by Triton {sys.modules['triton'].__version__}" in info.built()["Triton kernels"]
    assert "runs (forced): depthwise_triton" in xsep.explain(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))


def test_selftest(triton, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selftest, "SHAPES", {name: selftest.SHAPES[name] for name in ("3x3_stride1", "stride3")})
    command = ["--backend", "triton", "--dtypes", "float16", "bfloat16"]
    assert selftest.main(command) == 0
    printed = capsys.readouterr().out
    maps, blocks = (line for line in printed.splitlines() if line.startswith("float16"))
    assert maps.split()[1] == "depthwise_triton" and maps.count("(") == 4 and "FAILED" not in maps
    assert blocks.split()[1] == "block_triton" and blocks.count("(") == 3 and "FAILED" not in blocks
    assert "bfloat16   depthwise_triton                          -" in printed
    families = triton.family, triton.block_family
    triton_backend._why_failed.cache_clear()
    assert all(triton_backend._why_failed(triton, family, torch.float16, 0) is None for family in families)

    outputs = selftest._outputs
    monkeypatch.setattr(selftest, "_outputs", lambda *case: tuple(t + 1 for t in outputs(*case)))
    assert selftest.main(command) == 1
    printed = capsys.readouterr().out
    assert "FAILED depthwise_triton, torch.float16, fprop" in printed
    assert "FAILED block_triton, torch.float16, block" in printed
    triton_backend._why_failed.cache_clear()
    try:
        for family in families:
            reason = triton_backend._why_failed(triton, family, torch.float16, 0)
            assert "failed in 'python -m xsep.selftest --backend triton'" in reason
    finally:
        triton_backend._why_failed.cache_clear()


def test_a_column_of_the_benchmark(triton, monkeypatch, capsys):
    """As on a GPU with CUDA kernels, whose times and Triton's stand side by side."""
    monkeypatch.setattr(layers, "backends_on", lambda device: ["cpu", "triton"])
    monkeypatch.setattr(layers, "NETWORKS", {"tiny": [Shape(1, 4, 5, 5, 3, 3, 1, (1, 1), (1, 1, 1, 1))]})
    with xsep.backend("cpu"):
        rows = layers.measure_all(["tiny"], [1], ["nhwc"], samples=1, max_seconds=0.0)
    assert [row["pass"] for row in rows] == list(layers.PASSES)
    assert all(row["triton_ms"] > row["ms"] > 0 for row in rows)  # the interpreter takes milliseconds
    assert " triton ms " in capsys.readouterr().out


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_model_of_configurations(nhwc):
    """Tiles that images fill come first, and a batch that varies changes nothing that is compiled."""
    p = problem(nhwc, torch.float16)
    for pass_ in range(4):
        best, *_, worst = configs.ordered(p, pass_, 132)
        assert configs.cost(p, pass_, best, 132) < configs.cost(p, pass_, worst, 132)
        assert configs.cost(p, pass_, best, 132) < 2 * 2 * (2 if pass_ < 3 else 3) * 8 * 728 * 361
    narrow = p._replace(x=(8, 64, 7, 7), w=(64, 1, 3, 3))
    first = configs.ordered(narrow, configs.FPROP, 132)[0]
    assert first.block_p * first.block_q <= 128
    for N in (1, 8, 512):
        grid = configs.grid(p._replace(x=(N, *p.x[1:])), configs.FPROP, first, 132)
        assert grid.rows % first.block_p == 0 and grid.rows * grid.strips >= 19


def test_choices_are_timed_once_and_kept(tmp_path):
    path, timed = tmp_path / "xsep" / "triton.json", []

    def clock(calls):
        timed.append(len(calls))
        for call in calls:
            call()
        return [3.0, 1.0, 2.0][: len(calls)]

    def choose(choices, p, card="card"):
        run = []
        config = choices.choose(p, configs.FPROP, False, card, 132, run.append)
        return config, run

    p = problem(True, torch.float16)
    choices = tuning.Choices(path, clock)
    config, run = choose(choices, p)
    assert config == configs.ordered(p, configs.FPROP, 132)[1] == run[1] and timed == [3]
    larger_batch = p._replace(x=(32, *p.x[1:]))
    assert choose(choices, larger_batch) == (config, []) and timed == [3]
    assert choose(tuning.Choices(path, clock), larger_batch) == (config, []) and timed == [3]  # another process
    for other in (p._replace(dtype=torch.float32), p._replace(nhwc=False), p._replace(stride=(2, 2))):
        choose(choices, other)
    assert timed == [3] * 4
    choose(choices, p, "another card")
    assert timed == [3] * 5 and choose(tuning.Choices(path, clock), p)[1] == []

    path.write_text(path.read_text().replace('"configs"', '"others"'))
    assert choose(tuning.Choices(path, clock), p)[1] and timed == [3] * 6
    path.write_text("{ no json")
    assert choose(tuning.Choices(path, clock), p)[1] and timed == [3] * 7
    unwritable = tuning.Choices(tmp_path / "xsep" / "triton.json" / "below_a_file.json", clock)
    assert choose(unwritable, p)[1] and choose(unwritable, p)[1] == []


def test_nothing_is_timed_during_capture_or_where_results_have_to_repeat(monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert not tuning.may_time()  # every test runs with deterministic algorithms
    torch.use_deterministic_algorithms(False)
    assert tuning.may_time()
    capturing = True
    assert not tuning.may_time()


def elsewhere(*command, **options):
    """A process that compiles where this one interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **options)


def compiled(*options):
    """The rows of scripts/triton_aot.py: (target, problem, layout, pass, registers, spilled, shared, load, matrix)."""
    run = elsewhere(str(ROOT / "scripts" / "triton_aot.py"), *options)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = [line.split() for line in run.stdout.splitlines()[2:-1]]
    return [(*row[:2], *row[3:5], *map(int, row[7:11]), row[12]) for row in rows]


# Registers of a thread; AMD's have 512 of them, and LLVM unrolls further there.
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (("--targets", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "--problems", "3x3", "--most", "1"), 168),
        (("--targets", "gfx90a", "gfx942", "--problems", "3x3", "--most", "1"), 256),
        (("--targets", "sm_90", "--problems", "3x3"), 168),
        (("--targets", "sm_75", "sm_100", "--problems", "3x3_multiplier", "--most", "2"), 256),
        (("--targets", "sm_80", "gfx90a", "--problems", "5x5", "3x3_stride2", "3x3_on_load", "--most", "1"), 512),
    ],
    ids=["every NVIDIA target", "every AMD target", "every configuration", "multiplier", "every kind"],
)
def test_compiles_ahead_of_time(options, budget, triton):
    rows = compiled(*options, "--dtypes", "float16")
    assert len(rows) >= 16
    for target, problem, layout, pass_, registers, spilled, shared, load, _ in rows:
        assert spilled == 0 and registers <= budget and shared <= 4096, (target, layout, pass_)
        if layout == "NHWC" and problem != "3x3_multiplier":  # 728 channels of two bytes are whole vectors
            widest = 16 if pass_ == "fprop" else 8 if problem.startswith("3x3") or pass_ == "dgrad" else 4
            assert load >= (widest if target.startswith("sm_") else widest // 2), (target, pass_)


MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def test_blocks_compile_to_tensor_cores(triton):
    problems = ("3x3_block_16", "3x3_block_128", "3x3_block_256")
    rows = compiled("--targets", *MATRIX, "--problems", *problems, "--dtypes", "float16")
    assert len(rows) == 4 * 12 and {row[3] for row in rows} == {"block", "block_wgrad", "block_dgrad", "inference"}
    for target, problem, _, pass_, registers, spilled, shared, load, matrix in rows:
        # Without as many channels as a warp group takes, sm_90 and sm_100 use what sm_80 has.
        expected = (MATRIX[target], MATRIX["sm_80"]) if problem == "3x3_block_16" else (MATRIX[target],)
        assert spilled == 0 and load == 16 and matrix in expected, (target, problem, pass_)
        assert registers <= 240 and shared <= 65536, (target, problem, pass_)


@needs.compiling
@pytest.mark.parametrize("name", ["trace", "aotinductor"])
def test_compilers_see_the_kernels(name, triton):
    if not hasattr(torch.library, "triton_op"):
        pytest.skip("torch.library.triton_op is missing")
    if name == "aotinductor":
        lowering = pytest.importorskip("torch._inductor.graph").GraphLowering
        if not hasattr(lowering, "_run_jit_variant_for_autotune"):
            pytest.skip("this torch's AOTInductor runs kernels before it has written its code")
    run = elsewhere(str(ROOT / "tests" / "triton_compilers.py"), name)
    assert run.returncode == 0 and run.stdout.strip() == f"{name}: done", run.stdout[-3000:] + run.stderr[-3000:]
