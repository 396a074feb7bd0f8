"""The operators against float64, by the tolerance rule: every dtype, layout, instruction set and kind of shape."""

import needs
import numpy as np
import pytest
import torch
from conftest import dtypes, interpreted
from conv_cases import DTYPES, LAYOUTS, cases, dense, rounded, sliced, torch_results, true_results, wide
from hypothesis import given, settings
from hypothesis import strategies as st

import xsep
from xsep.ops import cpu
from xsep.ops.problem import Problem
from xsep.shapes import NAMED, Shape
from xsep.testing import assert_no_worse_than_torch

ops = torch.ops.xsep


def tensors(case, dtype, layout, seed=0, mean=0.0, device="cpu"):
    x = sliced(case.x_sizes, dtype, layout, seed, mean, device)
    w, bias = dense(case.w_sizes, dtype, seed + 1, device), dense(case.w_sizes[:1], dtype, seed + 2, device)
    y_sizes = ops.fprop(x.to("meta"), w.to("meta"), None, *case.geometry).shape
    return x, w, bias, sliced(y_sizes, dtype, layout, seed + 3, mean, device)


def check_all_maps(case, dtype, layout, device):
    x, w, bias, dy = tensors(case, dtype, layout, device=device)
    truth = rounded(true_results(case, x, w, bias, dy), device)
    theirs = torch_results(case, x, w, bias, dy)
    fused = ops.dgrad_wgrad(dy, x, w, *case.geometry)
    results = {
        "fprop": (ops.fprop(x, w, bias, *case.geometry), 0),
        "dgrad": (ops.dgrad(dy, w, x.shape, *case.geometry), 1),
        "wgrad": (ops.wgrad(dy, x, w.shape, *case.geometry), 2),
        "dgrad_wgrad dx": (fused[0], 1),
        "dgrad_wgrad dw": (fused[1], 2),
    }
    for name, (ours, i) in results.items():
        assert ours.dtype == dtype
        assert_no_worse_than_torch(ours, theirs[i], truth[i], f"{name} of {case} in {dtype}, {layout}")
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_shapes(name, dtype, layout, kernels):
    if interpreted(kernels):
        if dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter truncates to bfloat16")
        if name in ("13x13", "p_gt_tile", "plane_gt_tile", "stride2_7x7"):
            pytest.skip("as much as a minute in Triton's interpreter; test_triton.py has smaller ones")
    check_all_maps(NAMED[name], dtype, layout, kernels.device)


# Beyond the caches, where the CPU kernels store past them, walk memory another way and ask for it in advance: pixels of
# whole and of ragged cache lines, a wide filter, and one that only the general loops take.
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("C, R, S", [(96, 3, 3), (90, 3, 3), (90, 5, 5), (90, 1, 4)])
def test_large_tensors(C, R, S, layout):
    case = Shape(3, C, 150, 161, R, S, 1, (1, 1), (R // 2, R // 2, S // 2, S // 2))
    w, bias = dense(case.w_sizes, torch.float32, 1), dense((C,), torch.float32, 2)
    x = dense(case.x_sizes, torch.float32, 0).contiguous(memory_format=layout)
    y_sizes = ops.fprop(x.to("meta"), w.to("meta"), None, *case.geometry).shape
    # Of one sign, so that long sums grow and what is added to them is rounded.
    dy = (torch.arange(y_sizes.numel()) % 3 + 0.5).view(y_sizes).contiguous(memory_format=layout)
    truth = torch_results(case, *(t.double() for t in (x, w, bias, dy)))
    theirs = torch_results(case, x, w, bias, dy)
    ours = ops.fprop(x, w, bias, *case.geometry), *ops.dgrad_wgrad(dy, x, w, *case.geometry)
    alone = ops.dgrad(dy, w, x.shape, *case.geometry), ops.wgrad(dy, x, w.shape, *case.geometry)
    for name, mine, i in zip(("y", "dx", "dw", "dx alone", "dw alone"), (*ours, *alone), (0, 1, 2, 1, 2)):
        assert_no_worse_than_torch(mine, theirs[i], truth[i], f"{name} of {case} in {layout}")


def test_drawn_shapes(kernels):
    slow = interpreted(kernels)

    @settings(max_examples=10 if slow else 50)
    @given(cases(largest=12) if slow else cases(), st.sampled_from(dtypes(kernels)), st.sampled_from(LAYOUTS))
    def check(case, dtype, layout):
        check_all_maps(case, dtype, layout, kernels.device)

    check()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_every_order(stride, layout, backend):
    # Double differences of every element call the operators thousands of times.
    N, C = (2, 4) if backend.name == "cpu" else (1, 2)
    case = Shape(N, C, 6, 7, 3, 3, 2, (stride, stride), (0, 1, 2, 1), (1, 1))
    x, w, bias, dy = tensors(case, torch.float64, layout, device=backend.device)
    x, w, bias, dy = (t.detach().requires_grad_() for t in (x, w, bias, dy))
    maps = {
        "fprop": (lambda x, w, b: ops.fprop(x, w, b, *case.geometry), (x, w, bias)),
        "dgrad": (lambda dy, w: ops.dgrad(dy, w, case.x_sizes, *case.geometry), (dy, w)),
        "wgrad": (lambda dy, x: ops.wgrad(dy, x, case.w_sizes, *case.geometry), (dy, x)),
        "dgrad_wgrad": (lambda dy, x, w: ops.dgrad_wgrad(dy, x, w, *case.geometry), (dy, x, w)),
    }
    for name, (f, inputs) in maps.items():
        assert torch.autograd.gradcheck(f, inputs), name
        assert torch.autograd.gradgradcheck(f, inputs), name

    def third(x, w):
        y = ops.fprop(x, w, None, *case.geometry)
        return torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(third, (x, w))


@needs.opcheck
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_opcheck(layout, multiplier, any_backend):
    case = Shape(2, 4, 6, 8, 3, 3, multiplier, (2, 2), (0, 1, 0, 1), (1, 1))
    x, w, bias, dy = tensors(case, torch.float32, layout, device=any_backend.device)
    x, w, bias, dy = (t.detach().requires_grad_() for t in (x, w, bias, dy))
    for op, args in (
        (ops.fprop.default, (x, w, bias)),
        (ops.fprop.default, (x, w, None)),
        (ops.dgrad.default, (dy, w, case.x_sizes)),
        (ops.wgrad.default, (dy, x, case.w_sizes)),
        (ops.dgrad_wgrad.default, (dy, x, w)),
    ):
        results = torch.library.opcheck(op, (*args, *case.geometry))
        assert set(results.values()) == {"SUCCESS"}, (op, results)


def test_function_on_load(kernels):
    """relu(scale * (x - center) + shift) on load; padding stays zeros of the result; gradients through all of it."""

    slow = interpreted(kernels)

    @settings(max_examples=10 if slow else 30)
    @given(
        cases(largest=12) if slow else cases(),
        st.sampled_from(dtypes(kernels)),
        st.sampled_from(LAYOUTS),
        st.booleans(),
    )
    def check(case, dtype, layout, relu):
        check_on_load(case, dtype, layout, relu, kernels)

    check()


def check_on_load(case, dtype, layout, relu, kernels):
    # Mostly of one sign, so that the sums over an image do not cancel: whose rounding is luckier would decide there.
    x, w, _, dy = tensors(case, dtype, layout, mean=2.0, device=kernels.device)
    w = w.abs()
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    center, scale, shift = (dense((case.C,), vector, seed, kernels.device) for seed in (11, 12, 13))

    def in_torch():
        leaves = [t.detach().to(vector).clone().requires_grad_() for t in (x, w, center, scale, shift)]
        c, s, b = (t.view(1, -1, 1, 1) for t in leaves[2:])
        u = s * (leaves[0] - c) + b
        u = (u.relu() if relu else u).contiguous(memory_format=layout)
        top, bottom, left, right = case.pad
        u = torch.nn.functional.pad(u, (left, right, top, bottom))
        y = torch.nn.functional.conv2d(u, leaves[1], None, case.stride, 0, case.dilation, case.C)
        if case.N == 0:
            return [y.detach()] + [torch.zeros_like(t) for t in leaves]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(vector))]

    def in_long_double():
        c, s, b = (wide(t)[:, None, None] for t in (center, scale, shift))
        centered = wide(x) - c
        u = s * centered + b
        passes = u > 0 if relu else np.ones_like(u, dtype=bool)
        y, du, dw = true_results(case, u * passes, w, torch.zeros(case.w_sizes[0]), dy)
        du = du * passes
        dscale, dshift = (du * centered).sum((0, 2, 3)), du.sum((0, 2, 3))
        return rounded([y, du * s, dw, -wide(scale) * dshift, dscale, dshift], kernels.device)

    nhwc = layout == torch.channels_last and case.C > 0 and x.stride(3) != 1
    p = Problem(x.device.type, dtype, nhwc, case.x_sizes, case.w_sizes, *case.geometry, x.get_device())
    on_load = (center, scale, shift, relu)
    y = kernels.fprop(p, x, w, None, on_load)
    dw = kernels.wgrad(p, dy, x, on_load)
    dx, fused_dw, dscale, dshift = kernels.dgrad_wgrad_on_load(p, dy, x, w, on_load)
    ours = [y, dx, fused_dw, -scale * dshift, dscale, dshift]
    truth = in_long_double()
    theirs = [t.to(o.dtype) for t, o in zip(in_torch(), ours)]  # torch in float32, rounded once as our outputs are
    names = ("y", "dx", "dw", "dcenter", "dscale", "dshift")
    for name, o, t, r in zip(names, ours, theirs, truth):
        assert_no_worse_than_torch(o, t, r, f"{name} of {case} in {dtype}, {layout}")
    assert_no_worse_than_torch(dw, theirs[2], truth[2], f"wgrad alone of {case}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_layout_follows_the_input(layout, any_backend):
    x = torch.randn(2, 8, 9, 9, device=any_backend.device).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(8, 1, 3, 3, device=any_backend.device, requires_grad=True)
    y = xsep.depthwise_conv2d(x, w, padding=1)
    assert y.is_contiguous(memory_format=layout)
    for grad in (torch.randn_like(y), torch.randn_like(y).contiguous(memory_format=torch.channels_last)):
        dx, dw = torch.autograd.grad(y, (x, w), grad, retain_graph=True)
        assert dx.is_contiguous(memory_format=layout) and dw.is_contiguous()
        expected = torch.autograd.grad(torch.nn.functional.conv2d(x, w, padding=1, groups=8), (x, w), grad)
        torch.testing.assert_close((dx, dw), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_expanded_and_permuted_gradients(layout, any_backend):
    x = torch.randn(2, 8, 6, 5, device=any_backend.device).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(8, 1, 3, 3, device=any_backend.device, requires_grad=True)
    for reduce in (lambda y: y.sum(), lambda y: y.mean((2, 3)).sum(), lambda y: (y.permute(3, 2, 1, 0) ** 2).sum()):
        ours = torch.autograd.grad(reduce(xsep.depthwise_conv2d(x, w, padding=1)), (x, w))
        theirs = torch.autograd.grad(reduce(torch.nn.functional.conv2d(x, w, padding=1, groups=8)), (x, w))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    y = xsep.depthwise_conv2d(x.detach().transpose(2, 3), w, padding=1)  # neither layout: made dense
    torch.testing.assert_close(
        y, torch.nn.functional.conv2d(x.detach().transpose(2, 3), w, padding=1, groups=8), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_deterministic_for_any_number_of_threads(layout, count, threads):
    threads(count)
    case = Shape(5, 24, 30, 31, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1))
    x, w, _, dy = tensors(case, torch.float32, layout)
    first = ops.dgrad_wgrad(dy, x, w, *case.geometry)
    for _ in range(5):
        again = ops.dgrad_wgrad(dy, x, w, *case.geometry)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    check_all_maps(case, torch.float32, layout, "cpu")


@pytest.mark.parametrize("kernels", [f"cpu {isa}" for isa in cpu._C.isas()], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_outputs_beyond_the_caches(layout, kernels):
    """Above 24 MB, whole cache lines of float32 are written past the caches, and wgrad walks memory another way."""
    torch.use_deterministic_algorithms(False)  # the outputs are of recycled memory, then, which begins at a line
    case = Shape(1, 32, 455, 450, 3, 3, pad=(1, 1, 1, 1))
    x, dy = (dense(case.x_sizes, torch.float32, seed).contiguous(memory_format=layout) for seed in (0, 1))
    w, bias = dense(case.w_sizes, torch.float32, 2), dense((case.C,), torch.float32, 3)
    truth = torch_results(case, *(t.double() for t in (x, w, bias, dy)))
    theirs = torch_results(case, x, w, bias, dy)
    fused = ops.dgrad_wgrad(dy, x, w, *case.geometry)
    dx = ops.dgrad(dy, w, x.shape, *case.geometry)
    ours = [ops.fprop(x, w, bias, *case.geometry), dx, ops.wgrad(dy, x, w.shape, *case.geometry)]
    for i, name in enumerate(("fprop", "dgrad", "wgrad")):
        assert_no_worse_than_torch(ours[i], theirs[i], truth[i], name)
    assert_no_worse_than_torch(fused[0], theirs[1], truth[1], "dgrad_wgrad dx")
    assert_no_worse_than_torch(fused[1], theirs[2], truth[2], "dgrad_wgrad dw")


def test_more_than_2_to_the_31_elements():
    if _free_memory() < 12e9:
        pytest.skip(f"needs 12 GB of free memory, there are {_free_memory() / 1e9:.1f}")
    extent = 46342  # its square is above 2^31
    torch.use_deterministic_algorithms(False)  # filling the output with NaN first would only take time
    x = torch.zeros(1, 1, extent, extent, dtype=torch.bfloat16)
    x[0, 0, -1, -1], x[0, 0, -3, 5], x[0, 0, 0, 0] = 2, 3, 5
    w = torch.arange(1.0, 10.0).view(1, 1, 3, 3).bfloat16()
    y = xsep.depthwise_conv2d(x, w, padding=1)
    assert y.shape == x.shape
    assert y[0, 0, -2:, -2:].tolist() == [[18, 16], [12, 10]]
    assert y[0, 0, -4:-1, 4:7].flatten().tolist() == [27, 24, 21, 18, 15, 12, 9, 6, 3]
    assert y[0, 0, :2, :2].tolist() == [[25, 20], [10, 5]]
    assert y[0, 0, extent // 2 - 1000 : extent // 2].abs().sum() == 0


def _free_memory() -> float:
    for line in open("/proc/meminfo"):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024.0
    return 0.0
