"""``separable_block_inference`` against long double, by the tolerance rule, and as torch treats its operator."""

from types import SimpleNamespace

import needs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import dtypes, interpreted
from conv_cases import DTYPES, LAYOUTS, cases, clones, dense, rounded, sliced, true_results, wide
from hypothesis import given, settings
from hypothesis import strategies as st

import xsep
from xsep.ops.backends import BACKENDS
from xsep.ops.problem import memory_format
from xsep.testing import assert_no_worse_than_torch

ops = torch.ops.xsep
OPTIONAL = ("depthwise_bias", "bias", "residual")
ACTIVATIONS = (None, "relu", "relu6")


@st.composite
def blocks(draw, largest=26):
    """A depthwise convolution and what goes round it; of what is optional there is what is named."""
    return SimpleNamespace(
        case=draw(cases(largest)),
        K=draw(st.sampled_from([1, 2, 7, 16, 33])),
        given=draw(st.sets(st.sampled_from(OPTIONAL))),
        relu=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        out_activation=draw(st.sampled_from(ACTIVATIONS)),
        residual_layout=draw(st.sampled_from(LAYOUTS)),
    )


def drawn_inputs(drawn, dtype, layout, device="cpu"):
    """The tensors of a block, scaled so that results pass both ends of ReLU6."""
    case, hidden = drawn.case, drawn.case.w_sizes[0]
    x = sliced(case.x_sizes, dtype, layout, 0, 0.5, device)
    w_dw = dense(case.w_sizes, dtype, 1, device)
    w_pw = dense((drawn.K, hidden, 1, 1), dtype, 2, device) / hidden**0.5
    _, _, P, Q = ops.fprop(x.to("meta"), w_dw.to("meta"), None, *case.geometry).shape
    made = {
        "depthwise_bias": dense((hidden,), dtype, 3, device),
        "bias": dense((drawn.K,), dtype, 4, device),
        "residual": sliced((case.N, drawn.K, P, Q), dtype, drawn.residual_layout, 5, 0, device),
    }
    return (x, w_dw, w_pw, *(made[name] if name in drawn.given else None for name in OPTIONAL))


def in_torch(drawn, x, w_dw, w_pw, w_dw_bias, bias, residual):
    """As one writes it with torch."""

    def activated(v, name):  # in double, which is as exact: torch 2.0.1 has none of float16
        return v if name is None else getattr(F, name)(v.double()).to(v.dtype)

    stride, (top, bottom, left, right), dilation = drawn.case.geometry
    u = F.pad(activated(x, "relu" if drawn.relu else None), (left, right, top, bottom))
    z = activated(needs.conv2d(u, w_dw, w_dw_bias, stride, 0, dilation, x.shape[1]), drawn.activation)
    y = needs.conv2d(z, w_pw, bias)
    return activated(y if residual is None else y + residual, drawn.out_activation)


def in_long_double(drawn, x, w_dw, w_pw, w_dw_bias, bias, residual, sizes):
    def activated(v, name):
        return v if name is None else np.clip(v, 0, 6 if name == "relu6" else np.inf)

    hidden = w_dw.shape[0]
    no_bias = torch.zeros(hidden) if w_dw_bias is None else w_dw_bias
    u = np.maximum(wide(x), 0) if drawn.relu else wide(x)
    z = true_results(drawn.case, u, w_dw, no_bias, np.zeros((sizes[0], hidden, *sizes[2:]), np.longdouble))[0]
    y = np.einsum("kc,ncpq->nkpq", wide(w_pw)[:, :, 0, 0], activated(z, drawn.activation))
    y = y + (0 if bias is None else wide(bias)[:, None, None]) + (0 if residual is None else wide(residual))
    return rounded([activated(y, drawn.out_activation)], x.device)[0]


def check_drawn(drawn, dtype, layout, device):
    tensors = drawn_inputs(drawn, dtype, layout, device)
    before = [None if t is None else t.clone() for t in tensors]
    y = xsep.separable_block_inference(
        *tensors, *drawn.case.geometry, drawn.relu, drawn.activation, drawn.out_activation
    )
    assert y.is_contiguous(memory_format=memory_format(tensors[0]))
    assert all(t is None or torch.equal(t, old) for t, old in zip(tensors, before))
    truth = in_long_double(drawn, *tensors, y.shape)
    assert_no_worse_than_torch(y, in_torch(drawn, *tensors), truth, f"{drawn} in {dtype}, {layout}")


def test_drawn_blocks(kernels):
    slow = interpreted(kernels)
    # The pointwise part is torch's.
    found = [dtype for dtype in dtypes(kernels) if needs.convolves(dtype, kernels.device)]

    @settings(max_examples=60 if kernels.name == "cpu" else 10 if slow else 15)
    @given(blocks(10) if slow else blocks(), st.sampled_from(found), st.sampled_from(LAYOUTS))
    def check(drawn, dtype, layout):
        check_drawn(drawn, dtype, layout, kernels.device)

    check()


def test_drawn_blocks_of_the_aten_backend():
    @settings(max_examples=60)
    @given(blocks(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
    def check(drawn, dtype, layout):
        if needs.convolves(dtype, "cpu"):
            with xsep.backend("aten"):
                check_drawn(drawn, dtype, layout, "cpu")

    check()


def tensors(dtype=torch.float32, layout=torch.contiguous_format, device="cpu", C=4, M=2, K=3, sizes=(5, 4)):
    """All six, for a depthwise convolution of 3x3 without padding."""
    P, Q = sizes[0] - 2, sizes[1] - 2
    return (
        sliced((2, C, *sizes), dtype, layout, 0, device=device),
        dense((C * M, 1, 3, 3), dtype, 1, device),
        dense((K, C * M, 1, 1), dtype, 2, device),
        dense((C * M,), dtype, 3, device),
        dense((K,), dtype, 4, device),
        sliced((2, K, P, Q), dtype, layout, 5, device=device),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("weights_layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_layout_is_that_of_the_input(weights_layout, layout):
    x, w_dw, w_pw, *others = tensors(layout=layout)
    expected = xsep.separable_block_inference(x, w_dw, w_pw, *others)
    w_pw = w_pw.to(memory_format=weights_layout)
    outputs = []
    assert clones(lambda: outputs.append(xsep.separable_block_inference(x, w_dw, w_pw, *others))) == 0
    (y,) = outputs
    assert y.is_contiguous(memory_format=layout) and torch.equal(y, expected)


@needs.opcheck
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_opcheck(layout, backend):
    six = tensors(layout=layout, device=backend.device)
    bare = (*six[:3], None, None, None)
    for given_tensors, relu, activation, out in ((six, True, "relu6", "relu"), (bare, False, None, None)):
        arguments = (*given_tensors, relu, activation, out, (1, 1), (0, 0, 0, 0), (1, 1))
        found = torch.library.opcheck(ops.block_inference.default, arguments)
        assert set(found.values()) == {"SUCCESS"}, found


@needs.compiling
@pytest.mark.parametrize("translator", ["aot_eager", "inductor"])
def test_compile(translator, backend):
    six = tensors(layout=torch.channels_last, device=backend.device)

    def function(x, *others):
        return (
            xsep.separable_block_inference(x.sin(), *others, relu=True, activation="relu", out_activation="relu6") * 2
        )

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(function, backend=translator, fullgraph=True)(*six)
    torch.testing.assert_close(found, function(*six))


@needs.compiling
def test_export_with_dynamic_extents():
    class Model(torch.nn.Module):
        def forward(self, x, w_dw, w_pw, bias):
            return xsep.separable_block_inference(x, w_dw, w_pw, bias=bias, stride=2, padding="tf_same", relu=True)

    _, w_dw, w_pw, _, bias, _ = tensors()
    dims = {0: torch.export.Dim("N"), 2: torch.export.Dim("H", min=5), 3: torch.export.Dim("W", min=5)}
    weights = w_dw, w_pw, bias
    exported = torch.export.export(
        Model(), (torch.randn(2, 4, 9, 8), *weights), dynamic_shapes=(dims, None, None, None)
    )
    for sizes in ((2, 4, 9, 8), (5, 4, 12, 31)):
        x = torch.randn(sizes)
        torch.testing.assert_close(exported.module()(x, *weights), Model()(x, *weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_active_dtype(dtype, backend):
    if not needs.convolves(dtype, backend.device):
        pytest.skip(f"torch {torch.__version__} does not convolve {dtype} on the {backend.device}")
    six = tensors(device=backend.device)
    with torch.autocast(backend.device, dtype):
        y = xsep.separable_block_inference(*six, relu=True)
        assert xsep.separable_block_inference(*(t.double() for t in six)).dtype == torch.float64
    assert torch.equal(y, xsep.separable_block_inference(*(t.to(dtype) for t in six), relu=True)) and y.dtype == dtype


def test_transforms_and_forward_mode():
    x, *others = tensors(torch.float64)

    def function(x):
        return xsep.separable_block_inference(x, *others, relu=True, activation="relu6")

    tangent = torch.randn_like(x)
    _, derivative = torch.func.jvp(function, (x,), (tangent,))
    step = 1e-6
    torch.testing.assert_close(derivative, (function(x + step * tangent) - function(x - step * tangent)) / (2 * step))
    batches = torch.stack((x, x + 1))
    torch.testing.assert_close(torch.func.vmap(function)(batches), torch.stack([function(x) for x in batches]))


def test_gradients_are_refused():
    six = tensors()
    names = ("input", "depthwise_weight", "pointwise_weight", *OPTIONAL)
    for i, name in enumerate(names):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate(six)]
        with pytest.raises(RuntimeError, match=f"no gradients, and {name} requires them.*no_grad"):
            xsep.separable_block_inference(*one)
        with torch.no_grad():
            assert torch.equal(xsep.separable_block_inference(*one), xsep.separable_block_inference(*six))
    y = ops.block_inference(*one, False, None, None, (1, 1), (0, 0, 0, 0), (1, 1))
    with pytest.raises(NotImplementedError, match="block_inference has no derivative"):
        y.sum().backward()


@needs.flop_counter
def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        xsep.separable_block_inference(*tensors())
    assert counter.get_total_flops() == 2 * 2 * 8 * 3 * 2 * 9 + 2 * 2 * 3 * 3 * 2 * 8


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_empty_batch(layout, backend):
    x, *weights, residual = tensors(layout=layout, device=backend.device)
    assert xsep.separable_block_inference(x[:0], *weights, residual[:0]).shape == (0, 3, 3, 2)


@pytest.mark.parametrize("fits", [True, False])
def test_a_backend_may_have_kernels_for_it(fits, monkeypatch):
    six, seen = tensors(), []

    def why_not(b):
        seen.append(b)
        return None if fits else "not this one"

    def kernel(b, *arguments):
        seen.extend(arguments)
        return torch.full((2, 3, 3, 2), 7.0)

    cpu = BACKENDS["cpu"]
    monkeypatch.setattr(cpu, "why_not_block_inference", why_not, raising=False)
    monkeypatch.setattr(cpu, "block_inference", kernel, raising=False)
    y = xsep.separable_block_inference(*six, relu=True, activation="relu", out_activation="relu6")
    b, *arguments = seen
    assert (b.depthwise.x, b.depthwise.w, b.K, b.on_load, b.activation) == ((2, 4, 5, 4), (8, 1, 3, 3), 3, True, "relu")
    assert bool((y == 7).all()) == fits and len(arguments) == (7 if fits else 0)
    assert not fits or (all(map(torch.equal, arguments[:6], six)) and arguments[6:] == ["relu6"])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (dict(input=torch.randn(4, 5, 5)), ValueError, r"input must be \(N, C, H, W\).*\(4, 5, 5\)"),
        (dict(input=torch.ones(2, 4, 5, 5, dtype=torch.int64)), TypeError, "input.*floating-point.*int64"),
        (dict(depthwise_weight=torch.randn(8, 2, 3, 3)), ValueError, r"depthwise_weight.*\(8, 2, 3, 3\)"),
        (dict(pointwise_weight=torch.randn(3, 4, 1, 1)), ValueError, r"pointwise_weight.*8, 1, 1.*\(3, 4, 1, 1\)"),
        (dict(depthwise_bias=torch.randn(4)), ValueError, r"depthwise_bias must have shape \(8,\); got \(4,\)"),
        (dict(bias=torch.randn(1)), ValueError, r"bias must have shape \(3,\); got \(1,\)"),
        (dict(bias=torch.randn(3).double()), TypeError, "input and bias.*float32.*float64"),
        (dict(bias=torch.randn(3, device="meta")), ValueError, "input and bias.*cpu and meta"),
        (dict(residual=torch.randn(2, 3, 5, 5)), ValueError, r"residual.*\(2, 3, 3, 3\); got \(2, 3, 5, 5\)"),
        (dict(residual=torch.randn(1, 3, 3, 3)), ValueError, r"residual.*\(2, 3, 3, 3\); got \(1, 3, 3, 3\)"),
        (dict(residual=torch.randn(2, 3, 3, 3).half()), TypeError, "input and residual.*float32.*float16"),
        (dict(stride=0), ValueError, "stride.*0"),
        (dict(padding="SAME"), ValueError, "padding.*SAME"),
        (dict(relu="relu"), TypeError, "relu must be a bool; got 'relu'"),
        (dict(activation="elu"), ValueError, "activation must be None, 'relu' or 'relu6'; got 'elu'"),
        (dict(out_activation="gelu"), ValueError, "out_activation must be.*'gelu'"),
    ],
)
def test_bad_arguments_are_named(bad, error, message):
    good = dict(
        input=torch.randn(2, 4, 5, 5),
        depthwise_weight=torch.randn(8, 1, 3, 3),
        pointwise_weight=torch.randn(3, 8, 1, 1),
    )
    xsep.separable_block_inference(**good)
    with pytest.raises(error, match=message):
        xsep.separable_block_inference(**{**good, **bad})
