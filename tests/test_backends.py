"""The choice of a backend: forcing, explaining, falling back; and what torch does to operators around it."""

import os
import subprocess
import sys

import needs
import pytest
import torch
import torch.nn.functional as F

import xsep
from xsep.ops.backends import BACKENDS

ops = torch.ops.xsep
GEOMETRY = ((1, 1), (1, 1, 1, 1), (1, 1))


def inputs(dtype=torch.float32, channels_last=False, device="cpu"):
    x = torch.randn(2, 8, 9, 7).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randn(8, 1, 3, 3).to(device, dtype), torch.randn(8).to(device, dtype)


def test_explain_names_every_backend():
    x, w, _ = inputs()
    lines = xsep.explain(x, w, padding=1).splitlines()
    assert "float32 NCHW x 2x8x9x7" in lines[0] and len(lines) == 6
    assert lines[1].split() == ["cpu", "runs"]
    assert "no CUDA kernels" in lines[2] or "its tensors live on CUDA devices, not on cpu" in lines[2]
    assert "could run if forced" in lines[3] or "XSEP_EMULATE_CUDA=1" in lines[3]
    assert "its tensors live on" in lines[4] or "could run if forced" in lines[4] or "riton" in lines[4]
    assert lines[5].split(maxsplit=1) == ["aten", "could run; comes after cpu"]
    with xsep.backend("aten"):
        assert "runs (forced)" in xsep.explain(x, w, padding=1).splitlines()[5]
    with xsep.backend("cuda"):
        assert "raises" in xsep.explain(x, w, padding=1).splitlines()[1]


def block_lines(*given, **options):
    """The rows of ``explain_block`` on the block, by the name of the pass."""
    text = xsep.explain_block(*given, **options)
    title, *rows = text[text.index("its block: ") :].splitlines()
    return title, {name: reason for name, reason in (row.split(maxsplit=1) for row in rows)}


def test_explain_block_says_what_is_composed_and_why(monkeypatch):
    x, w, _ = inputs()
    w_pw = torch.randn(5, 8, 1, 1)
    assert xsep.explain_block(x, w, w_pw, padding=1).startswith(xsep.explain(x, w, padding=1) + "\nits block: ")
    title, found = block_lines(x, w, w_pw, padding=1)
    assert title == "its block: 5 channels, nothing between the convolutions, on cpu"
    assert found == dict.fromkeys(("forward", "backward", "inference"), "runs in one go")
    title, found = block_lines(x, w, w_pw, activation="elu")
    assert "elu between the convolutions" in title and list(found) == ["forward", "backward"]
    assert all("is composed: its kernels for blocks have no activation 'elu'" in reason for reason in found.values())
    assert list(block_lines(x, w, w_pw, activation="relu6")[1]) == ["inference"]
    _, found = block_lines(x, torch.randn(16, 1, 3, 3), torch.randn(5, 16, 1, 1))
    assert found["backward"] == "is composed: its kernels for blocks have no channel multiplier; got 2"
    with xsep.backend("aten"):
        title, found = block_lines(x, w, w_pw)
        assert title.endswith("on aten") and found["forward"] == "is composed: it has no kernels for blocks"
        assert found["inference"] == "is composed: it has no kernels for blocks in inference"
    with xsep.backend("cuda"):
        assert xsep.explain_block(x, w, w_pw) == xsep.explain(x, w)  # which says why it raises
    asked = []
    monkeypatch.setattr(BACKENDS["cpu"], "why_not_block", lambda b, backward: asked.append((b, backward)))
    monkeypatch.setattr(BACKENDS["cpu"], "why_not_block_inference", lambda b: None)
    xsep.explain_block(x, w, w_pw, 2, (1, 0), activation="relu", on_load=False)
    assert [backward for _, backward in asked] == [False, True]
    for b, _ in asked:
        assert (b.K, b.on_load, b.activation, b.depthwise.stride, b.depthwise.pad) == (
            5,
            False,
            "relu",
            (2, 2),
            (1, 1, 0, 0),
        )
    for bad, message in (
        ((x[0], w, w_pw), "input must be"),
        ((x, w, w), "pointwise_weight must be"),
        ((x, w, w_pw, 0), "stride"),
    ):
        with pytest.raises(ValueError, match=message):
            xsep.explain_block(*bad)
    with pytest.raises(ValueError, match="activation must be.*'gelu'"):
        xsep.explain_block(x, w, w_pw, activation="gelu")


def test_a_forced_backend_that_cannot_run_raises_its_reason():
    x, w, _ = inputs()
    with xsep.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced.*(no CUDA kernels|not on cpu)"):
        xsep.depthwise_conv2d(x, w)
    with pytest.raises(ValueError, match="backend must be one of cpu, cuda.*mkl"), xsep.backend("mkl"):
        pass
    xsep.depthwise_conv2d(x, w)  # the context is over


def test_the_environment_variable(tmp_path):
    code = "import torch, xsep; xsep.depthwise_conv2d(torch.randn(1, 2, 3, 3), torch.randn(2, 1, 3, 3))"
    for name, message in (("cuda", "'cuda' is forced"), ("fast", "XSEP_BACKEND must be one of")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "XSEP_BACKEND": name},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode != 0 and message in run.stderr


def test_another_dtype_falls_back_with_one_warning():
    x, w = torch.randn(1, 2, 5, 5).to(torch.complex64), torch.randn(2, 1, 3, 3).to(torch.complex64)
    with pytest.warns(UserWarning, match="torch's own kernels for torch.complex64 on cpu: it has no kernels"):
        y = xsep.depthwise_conv2d(x, w)
    torch.testing.assert_close(y, F.conv2d(x, w, groups=2))


@pytest.mark.parametrize("channels_last", [False, True])
def test_backends_agree(channels_last, any_backend):
    x, w, bias = inputs(torch.float64, channels_last, any_backend.device)
    results = []
    for name in (any_backend.name, "aten"):
        with xsep.backend(name):
            dx_dw = ops.dgrad_wgrad(x, x, w, *GEOMETRY)
            results.append([ops.fprop(x, w, bias, *GEOMETRY), *dx_dw])
    torch.testing.assert_close(*results)
    assert [t.stride() for t in results[0]] == [t.stride() for t in results[1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w: (x[0, 0], w), ValueError, "input must be"),
        (lambda x, w: (x, w[:, 0]), ValueError, "weight must be"),
        (lambda x, w: (x[:, :5], w), ValueError, "8 filters must be a positive multiple of input's 5"),
        (lambda x, w: (x.double(), w), TypeError, "float64 and torch.float32"),
        (lambda x, w: (x[:, :, :2], w), ValueError, "filter height 3.*larger than the padded input height 2"),
        (lambda x, w: (x, w[:, :, :0]), ValueError, "weight must not be empty"),
    ],
)
def test_bad_tensors_are_named(change, error, message):
    x, w, _ = inputs()
    with pytest.raises(error, match=message):
        xsep.depthwise_conv2d(*change(x, w))
    with pytest.raises(error, match=message), torch.inference_mode():
        xsep.depthwise_conv2d(*change(x, w))


@needs.compiling
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", [1, "tf_same"])
def test_compile_and_export_with_dynamic_extents(channels_last, padding, backend):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = xsep.DepthwiseConv2d(8, 16, 3, 2, padding)

        def forward(self, x):
            return self.conv(x).relu()

    torch._dynamo.reset()  # or it would count the compilations of all these models as one function's
    model = Model().to(backend.device)
    x, _, _ = inputs(channels_last=channels_last, device=backend.device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    dims = {0: torch.export.Dim("N"), 2: torch.export.Dim("H", min=5), 3: torch.export.Dim("W", min=5)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dims,)).module()
    for sizes in ((2, 8, 9, 7), (3, 8, 12, 10), (1, 8, 5, 31)):
        other = torch.randn(sizes, device=backend.device)
        if channels_last:
            other = other.contiguous(memory_format=torch.channels_last)
        ours, theirs = other.clone().requires_grad_(), other.clone().requires_grad_()
        compiled(ours).sum().backward()
        model(theirs).sum().backward()
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(exported(other), model(other))


@needs.compiling
def test_inductor(backend):
    x, w, bias = inputs(device=backend.device)
    compiled = torch.compile(lambda x: xsep.depthwise_conv2d(x.relu(), w, bias, padding=1) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), F.conv2d(x.relu(), w, bias, padding=1, groups=8) * 2)


def test_transforms_and_forward_mode():
    x, w, _ = inputs(torch.float64)

    def ours(x, w):
        return xsep.depthwise_conv2d(x, w, padding=1).pow(2).sum()

    def theirs(x, w):
        return F.conv2d(x, w, padding=1, groups=8).pow(2).sum()

    tangents = tuple(torch.randn_like(t) for t in (x, w))
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, w),
        lambda f: torch.func.jvp(f, (x, w), tangents),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(x, w),
        lambda f: torch.func.hessian(f, 1)(x[:1, :, :3, :3], w),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
        derivative = torch.autograd.forward_ad.unpack_dual(ours(dual, w)).tangent
    torch.testing.assert_close(derivative, torch.func.jvp(theirs, (x, w), (tangents[0], torch.zeros_like(w)))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_active_dtype(dtype, backend):
    if not needs.convolves(dtype, backend.device):
        pytest.skip(f"torch {torch.__version__} does not convolve {dtype} on the {backend.device}")
    x, w, bias = inputs(device=backend.device)
    for grad in (True, False):
        with torch.autocast(backend.device, dtype):
            y = xsep.depthwise_conv2d(x, w.requires_grad_(grad), bias, padding=1)
            assert y.dtype == F.conv2d(x, w, bias, padding=1, groups=8).dtype == dtype
            assert xsep.depthwise_conv2d(x.double(), w.double(), bias.double()).dtype == torch.float64


@needs.flop_counter
def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    x, w, _ = inputs()
    forward = 2 * 2 * 8 * 9 * 7 * 9
    with FlopCounterMode(display=False) as counter:
        y = xsep.depthwise_conv2d(x.requires_grad_(), w.requires_grad_(), padding=1)
        assert counter.get_total_flops() == forward
        y.sum().backward()
        assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, padding=1, groups=8)  # torch counts its forward alike
        assert counter.get_total_flops() == forward


def test_what_watches_sees_the_operator(backend):
    """The shortcut round the dispatcher hides nothing from tracers, profilers and modes."""
    x, w, _ = inputs(device=backend.device)
    with torch.profiler.profile() as profile:
        xsep.depthwise_conv2d(x, w)
    assert any(event.key == "xsep::fprop" for event in profile.key_averages())
    traced = torch.jit.trace(lambda x: xsep.depthwise_conv2d(x, w), x, check_trace=False)
    assert "xsep::fprop" in str(traced.graph)
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        assert xsep.depthwise_conv2d(fake.from_tensor(x), fake.from_tensor(w)).shape == (2, 8, 7, 5)
