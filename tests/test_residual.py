"""``residual_sum`` and ``moments``: kernels against torch in the same dtype and in float64, as torch treats them."""

from types import SimpleNamespace

import needs
import pytest
import torch
import torch.nn.functional as F
from conv_cases import DTYPES, LAYOUTS, clones, dense, sliced
from hypothesis import given, settings
from hypothesis import strategies as st

import xsep
from xsep.ops import cpu, moments, residual
from xsep.ops.moments import with_moments
from xsep.ops.problem import vector_dtype
from xsep.ops.residual import NO_POOL, Branch, Pool, residual_sum
from xsep.testing import assert_no_worse_than_torch

ops = torch.ops.xsep
NHWC = torch.channels_last
SAME = Pool((3, 3), (2, 2), (1, 1), True)


@pytest.fixture(params=cpu._C.isas())
def isa(request):
    before = cpu._C.current_isa()
    cpu._C.set_isa(request.param)
    with xsep.backend("cpu"):
        yield request.param
    cpu._C.set_isa(before)


@pytest.fixture
def kernels_only(monkeypatch):
    """Nothing may be composed."""

    def composed(*arguments):
        raise AssertionError("composed of torch's operators")

    monkeypatch.setattr(residual, "compose", composed)
    for name in ("compose_statistics", "statistics_of"):
        monkeypatch.setattr(moments, name, composed)


@st.composite
def sums(draw):
    window = draw(st.sampled_from([1, 2, 3, 3, 5])), draw(st.sampled_from([1, 2, 3, 3, 5]))
    pool = Pool(
        window,
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        tuple(draw(st.integers(0, size // 2)) for size in window),
        draw(st.booleans()),
    )
    return SimpleNamespace(
        N=draw(st.integers(0, 3)),
        C=draw(st.sampled_from([2, 3, 8, 16, 17, 33, 64, 100])),
        H=draw(st.integers(max(2, window[0]), 14)),
        W=draw(st.integers(max(2, window[1]), 14)),
        pool=draw(st.sampled_from([NO_POOL, pool, pool])),
        shift=draw(st.booleans()),
        skip=draw(st.sampled_from([None, "plain", "vectors"])),
        skip_layout=draw(st.sampled_from(LAYOUTS)),
        ties=draw(st.booleans()),
        relu=draw(st.booleans()),
        threads=draw(st.sampled_from([1, 2, 3])),
    )


def drawn_inputs(drawn, dtype):
    """The tensors of a sum, and a gradient of its result."""
    y = sliced((drawn.N, drawn.C, drawn.H, drawn.W), dtype, NHWC, 0)
    if drawn.ties:
        y.copy_(y.double().round())
    sizes = drawn.N, drawn.C, drawn.pool.extent(0, drawn.H), drawn.pool.extent(1, drawn.W)
    vectors = [dense((drawn.C,), vector_dtype(y), seed) for seed in range(1, 7)]
    tensors = [y, *vectors[:2], vectors[2] if drawn.shift else None, None, None, None, None]
    if drawn.skip is not None:
        tensors[4] = sliced(sizes, dtype, drawn.skip_layout, 8)
    if drawn.skip == "vectors":
        tensors[5:] = *vectors[3:5], vectors[5] if drawn.shift else None
    return tensors, sliced(sizes, dtype, NHWC, 9)


def as_modules(pool, relu, y, center, scale, shift, skip, skip_center, skip_scale, skip_shift):
    """A max-pool, a BatchNorm of each branch, which rounds, and a sum or a ReLU."""

    def normalized(t, center, scale, shift):
        center, scale, shift = (None if v is None else v.view(-1, 1, 1) for v in (center, scale, shift))
        wide = (t.to(scale.dtype) - center) * scale
        return (wide if shift is None else wide + shift).to(t.dtype)

    dtype = y.dtype
    if pool != NO_POOL:  # in double, which is as exact: torch 2.0.1 has none of float16, nor sums and ReLUs
        y = F.max_pool2d(y.double(), *pool[:3], ceil_mode=pool.ceil_mode).to(dtype)
    out = normalized(y, center, scale, shift)
    if skip is None:
        return F.relu(out.double()).to(dtype) if relu else out
    other = skip if skip_scale is None else normalized(skip, skip_center, skip_scale, skip_shift)
    return (out.double() + other.double()).to(dtype)


def with_gradients(function, tensors, dout):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], dout)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_agree_with_torch(dtype, isa, threads, kernels_only):
    @settings(max_examples=60)
    @given(sums())
    def check(drawn):
        threads(drawn.threads)
        tensors, dout = drawn_inputs(drawn, dtype)

        def ours(*t):
            relu = drawn.relu and t[4] is None
            return residual_sum(Branch(*t[:4]), None if t[4] is None else Branch(*t[4:]), drawn.pool, relu)

        def theirs(*t):
            return as_modules(drawn.pool, drawn.relu, *t)

        exact = with_gradients(theirs, [t if t is None else t.double() for t in tensors], dout.double())
        found = [with_gradients(ours, tensors, dout), with_gradients(theirs, tensors, dout)]
        assert found[0][0].dtype == dtype and residual.is_nhwc(found[0][0]) == residual.is_nhwc(tensors[0])
        for i, (mine, yours, truth) in enumerate(zip(*found, exact)):
            if dtype == torch.float64:
                torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
            else:
                assert_no_worse_than_torch(mine, yours, truth, f"result {i}")

    check()


def example(dtype=torch.float64, C=5, plain=False, ties=False):
    drawn = SimpleNamespace(
        N=2, C=C, H=7, W=6, pool=SAME, shift=True, skip="plain" if plain else "vectors", skip_layout=NHWC, ties=ties
    )
    tensors, dout = drawn_inputs(drawn, dtype)
    return [None if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors], dout


@pytest.mark.parametrize("skip", [None, "plain", "vectors"])
def test_derivatives(skip):
    tensors, _ = example(C=2, plain=skip == "plain")
    leaves = [t.requires_grad_() for t in tensors[: 4 if skip is None else 8] if t is not None]

    def run(*t):
        t = [*t, *(None,) * (8 - len(t))]
        return residual_sum(Branch(*t[:4]), None if skip is None else Branch(*t[4:]), SAME, skip is None)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@needs.opcheck
def test_opcheck():
    tensors, dout = example(torch.float32, C=8)
    leaves = [t.requires_grad_() for t in tensors]
    *main, skip, skip_center, skip_scale, _ = (t.detach() for t in tensors)
    y = main[0]
    calls = [
        (ops.residual_sum, (*leaves, *SAME, False)),
        (ops.residual_sum, (*leaves[:4], None, None, None, None, *SAME, True)),
        (ops.residual_sum_backward, (dout, *main, skip, skip_center, skip_scale, *SAME, False)),
        (ops.residual_sum_backward, (dout, *main, None, None, None, *SAME, True)),
        (ops.moments, (leaves[0],)),
        (ops.moments, (y.contiguous(),)),
    ]
    for op, arguments in calls:
        found = torch.library.opcheck(op.default, arguments)
        assert set(found.values()) == {"SUCCESS"}, (op, found)


def test_transforms_are_composed():
    tensors, _ = example(C=3)

    def run(y):
        z, mean, m2 = with_moments(y)
        return (
            residual_sum(Branch(z, *tensors[1:4]), Branch(*tensors[4:]), SAME).sin().sum() + (mean * m2).sum()
        ).exp()

    leaf = tensors[0].clone().requires_grad_()
    expected = torch.autograd.grad(run(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(run)(tensors[0]), expected)


def test_nan_is_the_largest(isa):
    y = torch.zeros(1, 33, 6, 6).contiguous(memory_format=NHWC)
    y[0, 3, 2, 2] = y[0, 32, 5, 5] = torch.nan
    out = residual_sum(Branch(y, torch.zeros(33), torch.ones(33)), None, Pool((3, 3), (1, 1), (1, 1)))
    assert torch.equal(out.isnan(), F.max_pool2d(y, 3, 1, 1).isnan()) and out.isnan().sum() == 13


def test_the_first_of_equals_gets_the_gradient(isa):
    y = torch.ones(1, 20, 8, 9).contiguous(memory_format=NHWC).requires_grad_()
    theirs = torch.autograd.grad(F.max_pool2d(y, 3, 2, 1).sum(), y)[0]
    sum = residual_sum(Branch(y, torch.zeros(20), torch.full((20,), 2.0)), None, Pool((3, 3), (2, 2), (1, 1)))
    torch.testing.assert_close(torch.autograd.grad(sum.sum(), y)[0], 2 * theirs, rtol=0, atol=0)


def test_slices_are_read_in_place():
    tensors, dout = drawn_inputs(
        SimpleNamespace(
            N=2, C=16, H=9, W=9, pool=SAME, shift=True, skip="vectors", skip_layout=NHWC, ties=False, threads=1
        ),
        torch.float32,
    )
    *main, skip, skip_center, skip_scale, _ = tensors
    y = main[0]
    assert not y.is_contiguous(memory_format=NHWC)
    assert clones(lambda: ops.residual_sum(*tensors, *SAME, False)) == 0
    dense_dout = dout.contiguous(memory_format=NHWC)
    backward = dense_dout, *main, skip, skip_center, skip_scale
    assert clones(lambda: ops.residual_sum_backward(*backward, *SAME, False)) == 0
    assert clones(lambda: ops.moments(y)) == 0


@pytest.mark.parametrize("plain", [False, True])
def test_what_backward_keeps(plain):
    """y and the vectors, and the other branch only if it has vectors."""
    tensors, _ = example(torch.float32, plain=plain)
    y, skip = tensors[0].requires_grad_(), tensors[4].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = residual_sum(Branch(*tensors[:4]), Branch(*tensors[4:]), SAME)
    assert y.data_ptr() in kept and out.data_ptr() not in kept and (skip.data_ptr() in kept) != plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elsewhere_it_is_composed(layout, monkeypatch):
    tensors, dout = example(torch.float32)
    calls, compose = [], residual.compose
    monkeypatch.setattr(residual, "compose", lambda *arguments: calls.append(1) or compose(*arguments))
    y = tensors[0].contiguous(memory_format=layout)
    out = residual_sum(Branch(y, *tensors[1:4]), Branch(*tensors[4:]), SAME)
    torch.testing.assert_close(out, as_modules(SAME, False, *tensors))
    assert len(calls) == (layout is torch.contiguous_format)
    if calls:
        with pytest.raises(RuntimeError, match="no kernel.*channels_last"):
            ops.residual_sum(y, *tensors[1:], *SAME, False)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(y=torch.zeros(4, 5, 6)), ValueError, r"y must be \(N, C, H, W\); got shape \(4, 5, 6\)"),
        (dict(center=torch.zeros(4)), ValueError, r"center must have shape \(5,\); got \(4,\)"),
        (dict(skip=torch.zeros(2, 5, 4, 3)), ValueError, r"skip must have shape \(2, 5, 4, 4\); got \(2, 5, 4, 3\)"),
        (dict(skip_scale=torch.zeros(6)), ValueError, r"skip_scale must have shape \(5,\); got \(6,\)"),
        (dict(skip_center=None), ValueError, "skip_center and skip_scale go together"),
        (dict(relu=True), ValueError, "relu must be False with skip"),
        (dict(skip=None), ValueError, "only with skip"),
        (dict(pool=Pool((3, 3), (2, 2), (2, 1))), ValueError, r"padding.*half.*\(3, 3\); got \(2, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    tensors, _ = example(torch.float32)
    names = "y", "center", "scale", "shift", "skip", "skip_center", "skip_scale", "skip_shift"
    named = {**dict(zip(names, tensors)), "pool": SAME, "relu": False, **change}
    pool, relu = named.pop("pool"), named.pop("relu")
    with pytest.raises(error, match=message):
        residual_sum(Branch(*list(named.values())[:4]), Branch(*list(named.values())[4:]), pool, relu)


def in_torch(x):
    var, mean = torch.var_mean(x.to(vector_dtype(x)), (0, 2, 3), unbiased=False)
    return mean, var * x[:, 0].numel()


def hold(found, theirs, exact, names):
    for name, mine, yours, truth in zip(names, found, theirs, exact):
        assert mine.dtype == yours.dtype
        if mine.dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)
        else:
            assert_no_worse_than_torch(mine, yours, truth, name)


@pytest.mark.parametrize("mean", [0, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_agree_with_torch(dtype, layout, mean, isa, threads, kernels_only):
    for sizes, count in (((3, 17, 9, 150), 3), ((1, 130, 40, 8), 2), ((2, 3, 5, 7), 1)):
        threads(count)
        x = sliced(sizes, dtype, layout, 0, mean)
        hold(ops.moments(x), in_torch(x), in_torch(x.double()), ("mean", "m2"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_moments(dtype, layout):
    """With that of the tensor itself, in one pass over channels_last tensors; one of them, and none."""
    x = sliced((2, 17, 9, 15), dtype, layout, 0, 3)
    dmean, dm2 = (dense((17,), vector_dtype(x), seed) for seed in (1, 2))
    dy = sliced(x.shape, dtype, layout, 3)

    def run(moments, x, dy, *vectors):
        x = x.detach().requires_grad_()
        outputs = zip(moments(x), (dy, *vectors))
        outputs, gradients = zip(*((output, gradient) for output, gradient in outputs if gradient is not None))
        return torch.autograd.grad(outputs, x, gradients)

    for gradients in ((dy, dmean, dm2), (None, dmean, None), (dy, None, dm2), (dy, None, None)):
        wide = [None if t is None else t.double() for t in gradients]
        results = [run(f, x, *gradients) for f in (with_moments, lambda x: (x * 1, *in_torch(x)))]
        hold(*results, run(lambda x: (x * 1, *in_torch(x)), x.double(), *wide), ["gradient"])


def test_moments_of_nothing():
    y = torch.zeros(0, 4, 3, 3).contiguous(memory_format=NHWC).requires_grad_()
    same, mean, m2 = with_moments(y)
    assert mean.tolist() == m2.tolist() == [0] * 4
    (same.sum() + mean.sum() + m2.sum()).backward()
    assert y.grad.shape == y.shape
    with pytest.raises(ValueError, match=r"y must be \(N, C, H, W\).*shape \(2, 3\)"):
        ops.moments(torch.zeros(2, 3))


def test_derivatives_of_moments():
    y = example(C=2)[0][0].requires_grad_()
    assert torch.autograd.gradcheck(with_moments, y)
    assert torch.autograd.gradgradcheck(with_moments, y, fast_mode=True)
    assert torch.autograd.gradcheck(ops.moments, y)
