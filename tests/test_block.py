"""``separable_block`` against long double, by the tolerance rule, and what torch does to operators around it."""

from types import SimpleNamespace

import needs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import dtypes, interpreted
from conv_cases import DTYPES, LAYOUTS, cases, clones, dense, nbytes, rounded, sliced, true_results, wide
from gradients import assert_all_no_worse_than_torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xsep
from xsep.ops import block
from xsep.ops.problem import memory_format
from xsep.testing import assert_no_worse_than_torch

ops = torch.ops.xsep
INPUTS = ("x", "center", "scale", "shift", "depthwise_weight", "pointwise_weight")
# Of so few numbers, rounded several times on their way, luck decides which are closer: they are compared all at once.
FEW = 500
NAMES = ("y", "mean", "m2", *(f"gradient of {name}" for name in INPUTS))


@st.composite
def blocks(draw, largest=26):
    """A depthwise convolution and what goes round it; its vectors are those named."""
    return SimpleNamespace(
        case=draw(cases(largest)),
        K=draw(st.sampled_from([1, 2, 7, 16, 33])),
        vectors=draw(st.sets(st.sampled_from(INPUTS[1:4]))),
        relu=draw(st.booleans()),
        activation=draw(st.sampled_from([None, None, "relu", "elu"])),
    )


def drawn_inputs(drawn, dtype, layout, device="cpu"):
    """What ``separable_block`` takes, in its order, and gradients of what it returns.

    Mostly of one sign, so that the sums over an image do not cancel: whose rounding is luckier would decide there.
    """
    case = drawn.case
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    x = sliced(case.x_sizes, dtype, layout, 0, 2.0, device)
    vectors = [
        dense((case.C,), vector, seed, device) if name in drawn.vectors else None
        for seed, name in enumerate(INPUTS[1:4], 11)
    ]
    # As large as keeps float16 from overflowing.
    w_dw = dense(case.w_sizes, dtype, 1, device).abs() / (case.R * case.S)
    w_pw = dense((drawn.K, case.w_sizes[0], 1, 1), dtype, 2, device).abs() / case.w_sizes[0]
    _, _, P, Q = ops.fprop(x.to("meta"), w_dw.to("meta"), None, *case.geometry).shape
    dy = sliced((case.N, drawn.K, P, Q), dtype, layout, 3, 2.0, device)
    count = max(1, case.N * P * Q)
    dmean, dm2 = dense((drawn.K,), vector, 4, device), dense((drawn.K,), vector, 5, device) / count
    return (x, *vectors, drawn.relu, w_dw, w_pw, *case.geometry, drawn.activation), (dy, dmean, dm2)


def results(function, inputs, gradients):
    """Outputs, and the gradients of what is in ``INPUTS``: None where there is no such input."""
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    outputs = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, torch.Tensor)]
    found = iter(torch.autograd.grad(outputs, wanted, gradients))
    places = (0, 1, 2, 3, 5, 6)
    return [*(t.detach() for t in outputs), *(next(found) if inputs[i] is not None else None for i in places)]


def in_torch(x, center, scale, shift, relu, w_dw, w_pw, stride, pad, dilation, activation):
    """As one writes it with torch: each step rounded to the dtype of x, the statistics of float32."""
    u = x
    if center is not None:
        u = u - center.view(-1, 1, 1)
    if scale is not None:
        u = u * scale.view(-1, 1, 1)
    if shift is not None:
        u = u + shift.view(-1, 1, 1)
    u = (u.relu() if relu else u).to(x.dtype)
    top, bottom, left, right = pad
    z = F.conv2d(F.pad(u, (left, right, top, bottom)), w_dw, None, stride, 0, dilation, x.shape[1])
    y = F.conv2d(getattr(F, activation)(z) if activation else z, w_pw)
    wide_y = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide_y, (0, 2, 3), correction=0)
    return y, mean, var * (y.numel() // y.shape[1])


def torch_results(inputs, gradients):
    """In the dtype of the inputs; where torch does not convolve in that, float32's, rounded once."""
    dtype = inputs[0].dtype
    if needs.convolves(dtype, inputs[0].device.type):
        return results(in_torch, inputs, gradients)
    widened = [t.float() if isinstance(t, torch.Tensor) else t for t in (*inputs, *gradients)]
    found = results(in_torch, widened[: len(inputs)], widened[len(inputs) :])
    return [t if t is None or t.dim() == 1 else t.to(dtype) for t in found]


def in_long_double(case, inputs, gradients):
    x, center, scale, shift, relu, w_dw, w_pw, _, _, _, activation = inputs
    dy, dmean, dm2 = (wide(t) for t in gradients)
    center, scale, shift = (
        np.full((case.C, 1, 1), value, np.longdouble) if v is None else wide(v)[:, None, None]
        for v, value in ((center, 0), (scale, 1), (shift, 0))
    )
    centered, w_pw = wide(x) - center, wide(w_pw)[:, :, 0, 0]
    u = scale * centered + shift
    passes = u > 0 if relu else np.ones_like(u, dtype=bool)
    (N, _, P, Q), hidden = dy.shape, w_pw.shape[1]
    no_bias = torch.zeros(hidden)
    v = true_results(case, u * passes, w_dw, no_bias, np.zeros((N, hidden, P, Q), np.longdouble))[0]
    z = {None: v, "relu": np.maximum(v, 0), "elu": np.where(v > 0, v, np.expm1(v))}[activation]
    slope = {None: np.ones_like(v), "relu": v > 0, "elu": np.where(v > 0, 1, z + 1)}[activation]
    y = np.einsum("kc,ncpq->nkpq", w_pw, z)
    mean = y.sum((0, 2, 3)) / max(1, N * P * Q)
    deviations = y - mean[:, None, None]
    dy = dy + dmean[:, None, None] / max(1, N * P * Q) + 2 * deviations * dm2[:, None, None]
    dv = np.einsum("kc,nkpq->ncpq", w_pw, dy) * slope
    _, du, dw_dw = true_results(case, u * passes, w_dw, no_bias, dv)
    du = du * passes
    dscale, dshift = (du * centered).sum((0, 2, 3)), du.sum((0, 2, 3))
    dw_pw = np.einsum("nkpq,ncpq->kc", dy, z)[:, :, None, None]
    outputs = [y, mean, (deviations**2).sum((0, 2, 3))]
    return rounded([*outputs, du * scale, -scale[:, 0, 0] * dshift, dscale, dshift, dw_dw, dw_pw], x.device)


def check_drawn(drawn, dtype, layout, device):
    if dtype in (torch.float16, torch.bfloat16) and drawn.activation == "relu":
        drawn.activation = "elu"  # a z that is rounded across zero gives another gradient, torch's or ours
    inputs, gradients = drawn_inputs(drawn, dtype, layout, device)
    ours = results(xsep.separable_block, inputs, gradients)
    layout_of_x = memory_format(inputs[0])
    assert ours[0].is_contiguous(memory_format=layout_of_x) and ours[3].is_contiguous(memory_format=layout_of_x)
    if ours[0].numel() == 0:
        assert all(t is None or t.abs().sum() == 0 for t in ours)
        return
    truth, theirs = in_long_double(drawn.case, inputs, gradients), torch_results(inputs, gradients)
    compared = [four for four in zip(NAMES, ours, theirs, truth) if four[1] is not None]
    what = f"{drawn} in {dtype}, {layout}"
    for name, mine, yours, ref in compared:
        assert mine.dtype == yours.dtype
        if mine.numel() > FEW:
            assert_no_worse_than_torch(mine, yours, ref, f"{name} of {what}")
    if ours[0].numel() > FEW:
        _, *lists = zip(*compared)
        assert_all_no_worse_than_torch(*lists, what)


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


@pytest.mark.parametrize("spread", [0, 1, 1e2])
@pytest.mark.parametrize("mean", [1, 1e2, 1e4])  # about zero, where the sum cancels, luck decides
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [1, 3])
def test_statistics_where_the_mean_is_large(images, dtype, layout, mean, spread, monkeypatch):
    """Deviations of about 1 from the means of 7 images, which lie ``spread`` apart; some images at a time."""
    if not needs.convolves(dtype, "cpu"):
        pytest.skip(f"torch {torch.__version__} does not convolve {dtype} on the CPU")
    monkeypatch.setattr(block, "_PART_ELEMENTS", images * 16 * 20 * 21)
    y = dense((7, 16, 20, 21), torch.float64, 0) + mean + spread * torch.randn(7, 16, 1, 1, dtype=torch.float64)
    y = y.to(dtype).contiguous(memory_format=layout)
    ones, identity = torch.ones(16, 1, 1, 1, dtype=dtype), torch.eye(16).to(dtype).view(16, 16, 1, 1)
    same, *found = xsep.separable_block(y, None, None, None, False, ones, identity)
    assert torch.equal(same, y)
    wide_y = y if dtype == torch.float64 else y.float()
    theirs, truth = (list(reversed(torch.var_mean(t, (0, 2, 3), correction=0))) for t in (wide_y, y.double()))
    if dtype == torch.float64:
        values = wide(y)
        exact = values.mean((0, 2, 3))
        truth = rounded([exact, ((values - exact[:, None, None]) ** 2).mean((0, 2, 3))])
    for name, mine, yours, ref, factor in zip(("mean", "m2"), found, theirs, truth, (1, 7 * 20 * 21)):
        assert mine.dtype == wide_y.dtype
        assert_no_worse_than_torch(mine, yours * factor, ref * factor, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("relu", "activation"), [(False, None), (True, "relu"), (True, "elu")])
def test_gradients_of_the_first_and_second_order(relu, activation, layout, backend):
    x, *vectors, w_dw, w_pw = leaves(torch.float64, layout, backend.device, C=2, sizes=(3, 4))

    def plain(x, w_dw, w_pw):
        return xsep.separable_block(x, None, None, None, relu, w_dw, w_pw, padding=1, activation=activation)

    def full(*tensors):
        options = dict(stride=(1, 2), padding=(0, 1, 2, 1), activation=activation)
        return xsep.separable_block(*tensors[:4], relu, *tensors[4:], **options)

    for function, inputs in ((plain, (x, w_dw, w_pw)), (full, (x, *vectors, w_dw, w_pw))):
        check_both_orders(function, inputs)


def check_both_orders(function, inputs):
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)  # of what create_graph=True gives,
    outputs = function(*inputs)
    gradients = [torch.ones_like(t) for t in outputs] if isinstance(outputs, tuple) else None
    found = [torch.autograd.grad(outputs, inputs, gradients, True, create) for create in (True, False)]
    torch.testing.assert_close(*found)  # which has to be the same


def leaves(dtype, layout=torch.contiguous_format, device="cpu", C=4, M=2, K=3, sizes=(5, 4)):
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    x = sliced((2, C, *sizes), dtype, layout, 0, device=device)
    vectors = [dense((C,), vector, seed, device) for seed in (1, 2, 3)]
    weights = dense((C * M, 1, 3, 3), dtype, 4, device), dense((K, C * M, 1, 1), dtype, 5, device)
    return [t.detach().requires_grad_() for t in (x, *vectors, *weights)]


def test_derivatives_where_the_vectors_depend_on_the_input():
    """As BatchNorm's do: the operator's gradient of the input is that through the input alone."""
    x, center, scale, shift, w_dw, w_pw = leaves(torch.float64)

    def function(x, scale, w_dw):
        y, mean, m2 = xsep.separable_block(x, x.mean((0, 2, 3)), scale, shift, True, w_dw, w_pw, padding=1)
        return (y * mean.view(-1, 1, 1)).pow(2).sum() + m2.sum()

    check_both_orders(function, (x, scale, w_dw))


@pytest.mark.parametrize("used", ["y", "mean", "m2"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_gradients_of_one_output(used, layout, backend):
    tensors = leaves(torch.float64, layout, backend.device)
    outputs = xsep.separable_block(*tensors[:4], True, *tensors[4:])
    expected = in_torch(*tensors[:4], True, *tensors[4:], (1, 1), (0, 0, 0, 0), (1, 1), None)
    i = ("y", "mean", "m2").index(used)
    g = torch.randn_like(outputs[i])
    found = torch.autograd.grad(outputs[i], tensors, g, allow_unused=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected[i], tensors, g))


def test_gradients_only_of_what_needs_them():
    tensors = [t.detach() for t in leaves(torch.float64)]
    full = [t.clone().requires_grad_() for t in tensors]  # dense, as below: torch sums a slice in another order
    expected = torch.autograd.grad(xsep.separable_block(*full[:4], True, *full[4:])[0].pow(2).sum(), full)
    for i in range(len(tensors)):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        y, mean, m2 = xsep.separable_block(*one[:4], True, *one[4:], statistics=False)
        assert mean is None and m2 is None
        y.pow(2).sum().backward()
        assert torch.equal(one[i].grad, expected[i])
        assert all(t.grad is None for j, t in enumerate(one) if i != j)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_expanded_gradients_and_gradients_in_the_other_layout(layout, backend):
    tensors = leaves(torch.float64, layout, backend.device)
    y, _, _ = xsep.separable_block(*tensors[:4], True, *tensors[4:], padding=1)
    expected = in_torch(*tensors[:4], True, *tensors[4:], (1, 1), (1, 1, 1, 1), (1, 1), None)[0]
    other = LAYOUTS[layout == LAYOUTS[0]]
    for g in (torch.ones((), dtype=y.dtype, device=y.device).expand_as(y), y.detach().contiguous(memory_format=other)):
        found = torch.autograd.grad(y, tensors, g, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, g, retain_graph=True))


def test_pointwise_weights_of_either_layout_leave_the_input_its_own():
    """Without a copy: results that torch makes in the layout of the weights would have to be copied."""
    for layout in LAYOUTS:
        for other in LAYOUTS:
            x, _, _, _, w_dw, w_pw = leaves(torch.float32, layout)
            # contiguous(memory_format=other) would leave the strides of 1x1 weights as they are.
            w_pw = w_pw.detach().to(memory_format=other).requires_grad_()
            outputs, dy = [], torch.ones(2, 3, 3, 2).contiguous(memory_format=layout)

            def run(x=x, w_dw=w_dw, w_pw=w_pw, outputs=outputs, dy=dy):
                y, _, _ = xsep.separable_block(x, None, None, None, True, w_dw, w_pw, statistics=False)
                outputs.extend((y, *torch.autograd.grad(y, (x, w_pw), dy)))

            assert clones(run) == 0
            y, dx, dw_pw = outputs
            assert y.is_contiguous(memory_format=layout) and dx.is_contiguous(memory_format=layout)
            assert dw_pw.is_contiguous()


@needs.opcheck
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(statistics, layout, backend):
    x, *full, w_dw, w_pw = leaves(torch.float32, layout, backend.device)
    for vectors, relu, activation in ((full, True, None), ([None] * 3, False, "elu"), ([None] * 3, True, "relu")):
        arguments = (x, w_dw, w_pw, *vectors, relu, activation, (2, 1), (0, 1, 0, 1), (1, 1))
        found = torch.library.opcheck(ops.block.default, (*arguments, statistics))
        assert set(found.values()) == {"SUCCESS"}, found
        y, mean, m2 = (t.detach() for t in ops.block(*arguments, True))
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        for gradients in ((y, mean, m2), (None, None, m2), (y, None, None)):
            found = torch.library.opcheck(ops.block_backward.default, (*gradients, y, mean, *detached))
            assert set(found.values()) == {"SUCCESS"}, found


def test_backward_itself_has_no_derivative():
    x, *vectors, w_dw, w_pw = leaves(torch.float32)
    arguments = (x, w_dw, w_pw, *vectors, True, None, (1, 1), (0, 0, 0, 0), (1, 1))
    y, mean, m2 = ops.block(*arguments, True)
    dx, *_ = ops.block_backward(y, mean, m2, y, mean, *arguments)
    with pytest.raises(NotImplementedError, match="block_backward has no derivative"):
        dx.sum().backward()


@needs.compiling
@pytest.mark.parametrize("translator", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_compile(layout, translator, backend):
    tensors = leaves(torch.float32, layout, backend.device)

    def function(x, center, scale, shift, w_dw, w_pw):
        y, mean, m2 = xsep.separable_block(x.sin(), center, scale, shift, True, w_dw, w_pw, padding="tf_same")
        y, _, _ = xsep.separable_block(y, mean, m2.rsqrt(), None, True, w_dw[:3], w_pw[:, :3], statistics=False)
        return y.pow(2)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=translator, fullgraph=True)
    found, expected = (f(*tensors) for f in (compiled, function))
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.sum(), tensors) for y in (found, expected))
    torch.testing.assert_close(*gradients)


@needs.compiling
def test_export_with_dynamic_extents():
    class Model(torch.nn.Module):
        def forward(self, x, shift, w_dw, w_pw):
            return xsep.separable_block(x, None, None, shift, True, w_dw, w_pw, 2, "tf_same")

    _, _, _, shift, w_dw, w_pw = (t.detach() for t in leaves(torch.float32))
    x = torch.randn(2, 4, 9, 8)
    dims = {0: torch.export.Dim("N"), 2: torch.export.Dim("H", min=5), 3: torch.export.Dim("W", min=5)}
    exported = torch.export.export(Model(), (x, shift, w_dw, w_pw), dynamic_shapes=(dims, None, None, None)).module()
    for sizes in ((2, 4, 9, 8), (5, 4, 12, 31)):
        x = torch.randn(sizes)
        torch.testing.assert_close(exported(x, shift, w_dw, w_pw), Model()(x, shift, w_dw, w_pw))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_active_dtype(dtype, backend):
    if not needs.convolves(dtype, backend.device):
        pytest.skip(f"torch {torch.__version__} does not convolve {dtype} on the {backend.device}")
    tensors = leaves(torch.float32, device=backend.device)
    with torch.autocast(backend.device, dtype):
        y, mean, m2 = xsep.separable_block(*tensors[:4], True, *tensors[4:])
        assert (y.dtype, mean.dtype, m2.dtype) == (dtype, torch.float32, torch.float32)
        found = torch.autograd.grad(y.sum() + m2.sum(), tensors)
        assert all(t.dtype == torch.float32 for t in found)
        wide_ones = [t.double() for t in tensors]
        assert xsep.separable_block(*wide_ones[:4], True, *wide_ones[4:])[0].dtype == torch.float64
    narrow = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]
    outputs = xsep.separable_block(narrow[0], *tensors[1:4], True, *narrow[4:])
    assert all(torch.equal(*pair) for pair in zip(outputs, (y, mean, m2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_float32_with_halves(dtype, backend):
    """They are rounded; backward keeps them as they are."""
    if not needs.convolves(dtype, backend.device):
        pytest.skip(f"torch {torch.__version__} does not convolve {dtype} on the {backend.device}")
    x, *vectors, w_dw, w_pw = leaves(torch.float32, device=backend.device)
    x = x.detach().to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y, _, m2 = xsep.separable_block(x, *vectors, True, w_dw, w_pw)
    assert {w_dw.data_ptr(), w_pw.data_ptr()} < set(kept)
    found = torch.autograd.grad(y.sum() + m2.sum(), (x, w_dw, w_pw))
    narrow = [w.detach().to(dtype).requires_grad_() for w in (w_dw, w_pw)]
    expected_y, _, expected_m2 = xsep.separable_block(x, *vectors, True, *narrow)
    expected = torch.autograd.grad(expected_y.sum() + expected_m2.sum(), (x, *narrow))
    assert torch.equal(y, expected_y) and [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
    assert all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in zip(found, expected))
    with pytest.raises(TypeError, match="input and pointwise_weight must have the same dtype"):
        xsep.separable_block(x.float(), *vectors, True, w_dw, narrow[1])


def test_backward_under_autocast_is_in_the_dtype_of_forward():
    for name in ("cpu", "aten"):
        with xsep.backend(name):
            tensors = leaves(torch.float32)
            y, _, _ = xsep.separable_block(*tensors[:4], True, *tensors[4:])
            expected = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
            with torch.autocast("cpu", torch.bfloat16):
                found = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
                differentiable = torch.autograd.grad(y.sum(), tensors, create_graph=True)
            assert all(torch.equal(*pair) for pair in zip(found, expected))
            torch.testing.assert_close(differentiable, expected)


def test_vectors_of_any_dtype():
    """Those of a model in half precision: they are widened."""
    tensors = leaves(torch.bfloat16)
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors[1:4]]
    same = [t.detach().float().requires_grad_() for t in narrow]
    found, expected = (xsep.separable_block(tensors[0], *v, True, *tensors[4:])[0] for v in (narrow, same))
    assert torch.equal(found, expected)
    for mine, wider in zip(torch.autograd.grad(found.sum(), narrow), torch.autograd.grad(expected.sum(), same)):
        assert torch.equal(mine, wider.bfloat16())


def test_transforms_and_forward_mode():
    x, center, scale, shift, w_dw, w_pw = (t.detach() for t in leaves(torch.float64))

    def of(block):
        def function(x, scale):
            y, mean, m2 = block(x, center, scale, shift, True, w_dw, w_pw, (1, 1), (1, 1, 1, 1), (1, 1), "elu")
            return y.pow(2).sum() + mean.sum() + m2.sum()

        return function

    ours, theirs = of(xsep.separable_block), of(in_torch)
    tangents = torch.randn_like(x), torch.randn_like(scale)
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, scale),
        lambda f: torch.func.jvp(f, (x, scale), tangents),
        lambda f: torch.func.vmap(torch.func.grad(f, 1), (None, 0))(x, torch.stack((scale, shift))),
        lambda f: torch.func.hessian(f, 1)(x, scale),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
        derivative = torch.autograd.forward_ad.unpack_dual(ours(dual, scale)).tangent
    expected = torch.func.jvp(theirs, (x, scale), (tangents[0], torch.zeros_like(scale)))[1]
    torch.testing.assert_close(derivative, expected)


@needs.flop_counter
def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    tensors = leaves(torch.float32)
    depthwise, pointwise = 2 * 2 * 8 * 3 * 2 * 9, 2 * 2 * 3 * 3 * 2 * 8
    with FlopCounterMode(display=False) as counter:
        y, _, _ = xsep.separable_block(*tensors[:4], True, *tensors[4:])
        assert counter.get_total_flops() == depthwise + pointwise
        y.sum().backward()
        assert counter.get_total_flops() == 4 * depthwise + 3 * pointwise  # z is made twice


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("activation", [None, "elu"])
def test_backward_keeps_input_and_output_only(activation, statistics, layout):
    tensors = leaves(torch.bfloat16, layout, C=16, K=24, sizes=(20, 21))
    tensors[0] = tensors[0].detach().contiguous(memory_format=layout).requires_grad_()
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        options = dict(padding=1, activation=activation, statistics=statistics)
        y, mean, _ = xsep.separable_block(*tensors[:4], True, *tensors[4:], **options)
    vectors = 3 * 16 * 4 + (24 * 4 if statistics else 0)
    weights = (16 * 2 * 9 + 16 * 2 * 24) * 2
    assert sum(map(nbytes, kept)) == nbytes(tensors[0]) + (nbytes(y) if statistics else 0) + vectors + weights
    assert {t.data_ptr() for t in kept} >= {tensors[0].data_ptr(), *([y.data_ptr()] if statistics else [])}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_empty_batch(layout, backend):
    x, *others = leaves(torch.float32, layout, backend.device)
    x = x.detach()[:0].requires_grad_()
    y, mean, m2 = xsep.separable_block(x, *others[:3], True, *others[3:])
    assert y.shape == (0, 3, 3, 2) and mean.tolist() == m2.tolist() == [0, 0, 0]
    found = torch.autograd.grad((y, mean, m2), (x, *others), [torch.ones_like(t) for t in (y, mean, m2)])
    assert all(t.shape == leaf.shape and t.abs().sum() == 0 for t, leaf in zip(found, (x, *others)))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (dict(input=torch.randn(4, 5, 5)), ValueError, r"input must be \(N, C, H, W\).*\(4, 5, 5\)"),
        (dict(input=torch.ones(2, 4, 5, 5, dtype=torch.int64)), TypeError, "input.*floating-point.*int64"),
        (dict(input=torch.randn(2, 3, 5, 5)), ValueError, "depthwise_weight's 8 filters.*3 channels"),
        (dict(input=torch.randn(2, 4, 2, 5)), ValueError, "filter height 3.*input height 2"),
        (dict(center=torch.zeros(5)), ValueError, r"center must have shape \(4,\); got \(5,\)"),
        (dict(scale=torch.zeros(4, 1)), ValueError, r"scale must have shape \(4,\); got \(4, 1\)"),
        (dict(shift=torch.zeros(4, device="meta")), ValueError, "input and shift.*same device.*cpu and meta"),
        (dict(relu="relu"), TypeError, "relu must be a bool; got 'relu'"),
        (dict(relu=None), TypeError, "relu must be a bool; got None"),
        (dict(depthwise_weight=torch.randn(8, 3, 3)), ValueError, r"depthwise_weight.*\(8, 3, 3\)"),
        (dict(depthwise_weight=torch.randn(8, 2, 3, 3)), ValueError, r"depthwise_weight.*\(8, 2, 3, 3\)"),
        (dict(depthwise_weight=torch.randn(8, 1, 3, 3).double()), TypeError, "depthwise_weight.*float32.*float64"),
        (dict(pointwise_weight=torch.randn(3, 4, 1, 1)), ValueError, r"pointwise_weight.*8, 1, 1.*\(3, 4, 1, 1\)"),
        (dict(pointwise_weight=torch.randn(3, 8, 1, 3)), ValueError, r"pointwise_weight.*\(3, 8, 1, 3\)"),
        (dict(pointwise_weight=torch.randn(3, 8)), ValueError, r"pointwise_weight.*\(3, 8\)"),
        (dict(pointwise_weight=torch.randn(0, 8, 1, 1)), ValueError, r"pointwise_weight.*\(0, 8, 1, 1\)"),
        (dict(pointwise_weight=torch.randn(3, 8, 1, 1).half()), TypeError, "pointwise_weight.*float32.*float16"),
        (dict(stride=0), ValueError, "stride.*0"),
        (dict(padding="SAME"), ValueError, "padding.*SAME"),
        (dict(dilation=(1, 2, 3)), ValueError, r"dilation.*\(1, 2, 3\)"),
        (dict(activation="gelu"), ValueError, "activation.*'gelu'"),
    ],
)
def test_bad_arguments_are_named(bad, error, message):
    good = dict(
        input=torch.randn(2, 4, 5, 5),
        center=None,
        scale=None,
        shift=None,
        relu=True,
        depthwise_weight=torch.randn(8, 1, 3, 3),
        pointwise_weight=torch.randn(3, 8, 1, 1),
    )
    xsep.separable_block(**good)
    with pytest.raises(error, match=message):
        xsep.separable_block(**{**good, **bad})
