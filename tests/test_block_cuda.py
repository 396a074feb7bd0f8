"""The CUDA kernels of blocks, emulated on the host and (``-m gpu``) on a card.

Beyond ``test_block.py`` and ``test_inference.py``.
"""

import re
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace

import needs
import pytest
import test_inference
import torch
import torch.nn.functional as F
from conv_cases import dense, nbytes

import xsep
from xsep._compat import itemsize
from xsep.ops.backends import BACKENDS
from xsep.ops.problem import BlockProblem, Problem
from xsep.shapes import Shape
from xsep.testing import assert_no_worse_than_torch

EMULATED = BACKENDS["cuda-emulated"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MMA, PLAIN = "separable_fprop_nhwc_mma", "separable_fprop_nhwc"
FAMILIES = [(dtype, family) for dtype in DTYPES for family in (MMA, PLAIN) if (dtype, family) != (torch.float32, MMA)]
IDS = [f"{dtype}-{family}" for dtype, family in FAMILIES]


def square(C, H, W, kernel=3, stride=1, dilation=1, N=2):
    pad = dilation * (kernel // 2)
    return Shape(N, C, H, W, kernel, kernel, 1, (stride, stride), (pad,) * 4, (dilation, dilation))


# The convolution, and K.
CASES = {
    "whole_tiles": (square(32, 8, 8), 128),
    "tails_of_everything": (square(40, 7, 9, N=3), 200),
    "c_gt_lanes": (square(136, 5, 6), 8),
    "c_lt_tile": (square(8, 9, 5), 16),
    "one_row": (square(16, 1, 40), 24),
    "one_column": (square(16, 40, 1), 24),
    "1x1_image": (square(24, 1, 1, N=5), 40),
    "1x1_filter": (square(24, 6, 7, 1), 40),
    "5x5": (square(24, 11, 12, 5), 40),
    "stride2": (square(24, 13, 12, stride=2), 40),
    "dilated": (square(24, 13, 12, dilation=2), 40),
    "stride_of_rows_alone": (Shape(2, 16, 13, 11, 3, 3, 1, (2, 1), (0, 1, 2, 0), (2, 1)), 32),
    "pad_beyond_kernel": (Shape(1, 16, 4, 5, 3, 3, pad=(4, 5, 6, 3)), 16),
    "k_not_in_vectors": (square(16, 7, 9), 12),
    "c_not_in_vectors": (square(19, 7, 9), 37),
    "one_channel": (square(1, 7, 9), 1),
}


def inputs(case, K, dtype, device="cpu", mean=0.0):
    """x, center, scale, shift, w_dw, w_pw."""
    x = (dense(case.x_sizes, torch.float64, 0) + mean).to(device, dtype)
    x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    vectors = [dense((case.C,), torch.float32, seed, device) for seed in (1, 2, 3)]
    w_dw, w_pw = dense(case.w_sizes, dtype, 4, device) / 3, dense((K, case.C, 1, 1), dtype, 5, device)
    return x, *vectors, w_dw, w_pw / case.C**0.5


def problem(case, K, x, on_load=True, activation=None):
    p = Problem(x.device.type, x.dtype, True, case.x_sizes, case.w_sizes, *case.geometry, x.get_device())
    return BlockProblem(p, K, on_load, activation)


def in_torch(case, x, center, scale, shift, w_dw, w_pw, activation, relu=True):
    """y, each step rounded to the dtype of x."""
    u = (x - center.view(-1, 1, 1)) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    top, bottom, left, right = case.pad
    u = F.pad((u.relu() if relu else u).to(x.dtype), (left, right, top, bottom))
    z = needs.conv2d(u, w_dw, None, case.stride, 0, case.dilation, case.C)
    return needs.conv2d(z * (z > 0) if activation else z, w_pw)  # torch 2.0.1 has no ReLU of float16


def check_statistics(y, mean, m2, what):
    """Of y as it is stored."""
    theirs, truth = (list(reversed(torch.var_mean(t, (0, 2, 3), correction=0))) for t in (y.float(), y.double()))
    for name, mine, yours, ref, factor in zip(("mean", "m2"), (mean, m2), theirs, truth, (1, y.numel() // y.shape[1])):
        assert_no_worse_than_torch(mine, yours * factor, ref * factor, f"{name} of {what}")


def check(backend, case, K, dtype, family, activation=None, what=""):
    tensors = inputs(case, K, dtype, backend.device)
    x, *vectors, w_dw, w_pw = tensors
    b, what = problem(case, K, x, activation=activation), f"{what} in {dtype}, {family}"
    y, mean, m2 = backend.only(family).block(b, x, w_dw, w_pw, (*vectors, True), True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    truth = in_torch(case, *(t.double() for t in tensors), activation)
    assert_no_worse_than_torch(y, in_torch(case, *tensors, activation), truth, f"y of {what}")
    check_statistics(y, mean, m2, what)


def residual_of(kind, sizes, dtype, device):
    """Dense, or a slice of a tensor that is NaN elsewhere: aligned to vectors of channels, or not."""
    values = 4 * dense(sizes, dtype, 8, device)
    if kind == "dense":
        return values.contiguous(memory_format=torch.channels_last)
    N, K, P, Q = sizes
    larger = values.new_full((N + 1, K + 16, P + 2, Q + 3), torch.nan).contiguous(memory_format=torch.channels_last)
    first = 8 if kind == "slice" else 3
    return larger[1:, first : first + K, 1 : P + 1, 2 : Q + 2].copy_(values)


def inference_inputs(case, K, dtype, device="cpu", biases=True, residual=None):
    """x, w_dw, w_pw, w_dw_bias, bias, residual: so large that results pass both ends of ReLU6."""
    x, *_, w_dw, w_pw = inputs(case, K, dtype, device, mean=0.5)
    two = (3 * dense((channels,), dtype, seed, device) for channels, seed in ((case.C, 6), (K, 7)))
    two = tuple(two) if biases else (None, None)
    _, _, P, Q = problem(case, K, x).depthwise.y
    return x, w_dw, w_pw, *two, residual and residual_of(residual, (case.N, K, P, Q), dtype, device)


def check_inference(backend, case, K, dtype, family, relu, between, after, biases, residual, what):
    tensors = inference_inputs(case, K, dtype, backend.device, biases, residual)
    b = problem(case, K, tensors[0], relu, between)
    y = backend.only(family).block_inference(b, *tensors, after)
    assert y.is_contiguous(memory_format=torch.channels_last)
    options = SimpleNamespace(case=case, relu=relu, activation=between, out_activation=after)
    truth = test_inference.in_torch(options, *(None if t is None else t.double() for t in tensors))
    options_text = f"{relu}, {between}, {after}, biases {biases}, residual {residual}"
    what = f"{what} in {dtype}, {family}, {options_text}"
    assert_no_worse_than_torch(y, test_inference.in_torch(options, *tensors), truth, what)


def skip_without_tensor_cores(backend, family):
    if backend.name == "cuda" and family == MMA and backend.card(0).arch < 80:
        pytest.skip("the card has no tensor cores for this")


@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_inference_cases(name, dtype, family, cuda):
    skip_without_tensor_cores(cuda, family)
    case, K = CASES[name]
    turn = sorted(CASES).index(name)
    for i, (between, after) in enumerate(product(test_inference.ACTIVATIONS, repeat=2)):
        residual = (None, "dense", "slice", "unaligned")[(turn + i + i // 3) % 4]
        check_inference(
            cuda, case, K, dtype, family, i // 2 % 2 == 0, between, after, (turn + i) % 2 == 0, residual, name
        )


@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_cases(name, dtype, family, cuda):
    skip_without_tensor_cores(cuda, family)
    case, K = CASES[name]
    for activation in (None, "relu"):
        check(cuda, case, K, dtype, family, activation, name)


@contextmanager
def counted():
    """What the kernels launched in the context did."""
    launches = []
    EMULATED.module.start_counting(multiprocessors=132)
    try:
        yield launches
    finally:
        launches.extend(EMULATED.module.stop_counting())


# As many pixels as give each of 132 multiprocessors a block, and too few.
@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
@pytest.mark.parametrize(("pixels", "size"), [(128, 131), (64, 93), (32, 91)])
def test_tiles(pixels, size, dtype, family, cuda):
    if cuda.name == "cuda":
        pytest.skip("it depends on the card")
    if (pixels, family) == (128, PLAIN) and dtype != torch.float32:
        pixels = 64  # there is none of 128
    with counted() as launches:
        check(cuda, square(8, size, size, N=1), 136, dtype, family, None, f"tiles of {pixels}")
        check_inference(
            cuda, square(8, size, size, N=1), 136, dtype, family, True, "relu6", "relu6", True, "slice", "tiles"
        )
    for launch in (launches[0], launches[-1]):
        tile = re.search(r"FpropTile<[\w:]+, (\d+), \w+, true>", launch["kernel"])
        assert int(tile[1]) == pixels and launch["grid"] == -(-size * size // pixels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_that_fill_shared_memory(dtype, cuda):
    """A tile of 16 pixels, and one channel more than fits."""
    if cuda.name == "cuda":
        pytest.skip("it depends on the card")
    size = torch.empty((), dtype=dtype).element_size()
    most = ((227 * 1024 - 3 * 128 * 80 - 3 * 128 * 4) // 16 - 16) // 64 * 64 // size
    with counted() as launches:
        check(cuda, square(most, 3, 3), 8, dtype, PLAIN, None, "shared memory")
    assert ", 16, " in launches[0]["kernel"]
    x = torch.empty(2, most + 1, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    assert "bytes of shared memory, of 232448" in cuda.why_not_block(problem(square(most + 1, 3, 3), 8, x), False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices(dtype, cuda):
    """Aligned to vectors and not: the same numbers as of a dense input."""
    case, K = square(16, 7, 9), 24
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype, cuda.device)
    b, on_load = problem(case, K, x), (*vectors, True)
    expected = cuda.block(b, x, w_dw, w_pw, on_load, True)
    larger = x.new_full((3, 40, 9, 12), torch.nan).contiguous(memory_format=torch.channels_last)
    for first in (8, 3):
        part = larger[1:, first : first + 16, 1:8, 2:11]
        part.copy_(x)
        for ours, same in zip(cuda.block(b, part, w_dw, w_pw, on_load, True), expected):
            torch.testing.assert_close(ours, same, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-3)
        part.fill_(torch.nan)


def assert_same_in_every_order(make):
    found = []
    with xsep.backend("cuda-emulated"):
        for order in ("ascending", "descending", "1", "2"):
            EMULATED.module.set_order(order)
            found.append(make())
        EMULATED.module.set_order("ascending")
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other))


@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
@pytest.mark.parametrize("name", ["tails_of_everything", "c_not_in_vectors", "5x5"])
def test_results_do_not_depend_on_the_order_of_threads(name, dtype, family):
    case, K = CASES[name]
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype)
    b = problem(case, K, x)
    assert_same_in_every_order(lambda: EMULATED.only(family).block(b, x, w_dw, w_pw, (*vectors, True), True))


@pytest.mark.parametrize("size", [20, 131])
@pytest.mark.parametrize("spread", [1, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_where_the_mean_is_large(dtype, spread, size, cuda):
    """y is 1 and something that is small beside it."""
    case = square(8, size, size, 1, N=1)
    x = 1 + spread * dense((1, 8, size, size), torch.float64, 0)
    x = x.to(cuda.device, dtype).contiguous(memory_format=torch.channels_last)
    identity = torch.eye(8, device=cuda.device).to(dtype).view(8, 8, 1, 1)
    ones = torch.ones(8, 1, 1, 1, dtype=dtype, device=cuda.device)
    y, *found = cuda.block(problem(case, 8, x, False), x, ones, identity, None, True)
    assert torch.equal(y, x)
    check_statistics(y, *found, f"{dtype}")


def test_more_tiles_than_one_launch_merges(cuda):
    """300 tiles of 128 pixels and more: merged twice."""
    case = square(8, 200, 200, 1, N=1)
    x, *_, w_dw, w_pw = inputs(case, 8, torch.float32, cuda.device, mean=100.0)
    y, mean, m2 = cuda.block(problem(case, 8, x, False), x, w_dw, w_pw, None, True)
    var, exact = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(m2.double(), var * 40000, rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(dtype):
    """y and its statistics are stored once, no byte of z is; x is read once but for its halo."""
    case, K = square(64, 96, 96, N=2), 128
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype)
    with counted() as launches, xsep.backend("cuda-emulated"):
        y, mean, m2 = EMULATED.block(problem(case, K, x), x, w_dw, w_pw, (*vectors, True), True)
    block, merge = launches
    tiles, moments = block["grid"], 8 * K * block["grid"]
    assert tiles == y.numel() // K // 128
    assert block["stores"]["bytes"] == nbytes(y) + moments
    assert block["stores"]["distinct_sectors"] * 32 == nbytes(y) + moments == block["stores"]["sectors"] * 32
    assert block["stores"]["accesses"][16] * 16 == nbytes(y)
    weights, inputs_ = nbytes(w_dw) + nbytes(w_pw), nbytes(x) + sum(map(nbytes, vectors))
    touched = block["loads"]["distinct_sectors"] * 32
    assert inputs_ + weights <= touched <= 1.01 * (inputs_ + weights)
    assert (
        merge["loads"]["bytes"] == moments + (tiles + 8) * K * y.element_size()
    )  # each of 8 warps reads the reference
    assert merge["stores"]["bytes"] == nbytes(mean) + nbytes(m2)


@pytest.mark.parametrize("kind", ["dense", "slice"])
@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
def test_bytes_of_inference(dtype, family, kind):
    """The residual is read once, as y is stored: 16 bytes at once.  Nothing else is stored."""
    case, K = square(64, 24, 24, N=2), 128

    def loads_of(residual):
        tensors = inference_inputs(case, K, dtype, residual=residual)
        with counted() as launches, xsep.backend("cuda-emulated"):
            b = problem(case, K, tensors[0], True, "relu")
            y = EMULATED.only(family).block_inference(b, *tensors, "relu6")
        (launch,) = launches
        assert launch["stores"]["bytes"] == launch["stores"]["accesses"][16] * 16 == nbytes(y)
        return launch["loads"], nbytes(y)

    (without, _), (loads, size) = loads_of(None), loads_of(kind)
    assert loads["bytes"] - without["bytes"] == (loads["accesses"][16] - without["accesses"][16]) * 16 == size
    # A slice that begins amid a sector touches one more for each pixel.
    amid = kind == "slice" and 8 * itemsize(dtype) % 32 != 0
    assert loads["distinct_sectors"] - without["distinct_sectors"] == size // 32 + amid * (2 * 24 * 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_activations(dtype, cuda):
    """As torch does: NaN stays, infinities become the ends."""
    case, K = square(16, 5, 6, 1, N=1), 16
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype, device=cuda.device)
    x, _, _, _, _, residual = inference_inputs(case, K, dtype, cuda.device, residual="dense")
    identity = torch.eye(K, device=cuda.device).to(dtype).view(K, K, 1, 1)
    ones = torch.ones(16, 1, 1, 1, dtype=dtype, device=cuda.device)
    residual[0, :, 2, :3] = odd
    for between, after in product(("relu", "relu6"), repeat=2):
        y = cuda.block_inference(problem(case, K, x, True, between), x, ones, identity, None, None, residual, after)
        expected = torch.tensor([torch.nan, torch.inf if after == "relu" else 6, 0], dtype=dtype, device=cuda.device)
        torch.testing.assert_close(y[0, :, 2, :3], expected.expand(K, 3), rtol=0, atol=0, equal_nan=True)
    x[0, :, 1, 1] = torch.nan
    y = cuda.block_inference(problem(case, K, x, True, "relu6"), x, ones, identity, None, None, None, "relu6")
    assert y[0, :, 1, 1].isnan().all() and y.isnan().sum() == K


def test_explain_block_says_that_inference_runs_in_one_go(cuda):
    x, _, _, _, w_dw, w_pw = inputs(square(16, 5, 5), 8, torch.float16, cuda.device)
    for activation in (None, "relu", "relu6"):
        lines = xsep.explain_block(x, w_dw, w_pw, padding=1, activation=activation).splitlines()
        assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("  inference")] == ["runs in one go"]


def test_why_not():
    case, K = square(16, 5, 5), 8
    x = inputs(case, K, torch.float32)[0]

    def reason(backward=False, **changes):
        activation = changes.pop("activation", None)
        b = problem(case, K, x, activation=activation)
        return EMULATED.why_not_block(b._replace(depthwise=b.depthwise._replace(**changes)), backward)

    assert reason() is None and reason(activation="relu") is None
    assert EMULATED.why_not_block_inference(problem(case, K, x, activation="relu6")) is None
    assert "the layout is NCHW" in reason(nhwc=False)
    assert "multiplier is not 1" in reason(w=(32, 1, 3, 3))
    assert "do not apply elu" in reason(activation="elu")
    assert "torch.float64" in reason(dtype=torch.float64)
    assert reason(backward=True) is None and "do not apply elu" in reason(backward=True, activation="elu")
    assert "the filter is not 3x3" in reason(backward=True, w=(16, 1, 5, 5), pad=(2, 2, 2, 2))
    assert "not multiples of 4" in reason(backward=True, x=(2, 18, 5, 5), w=(18, 1, 3, 3))
