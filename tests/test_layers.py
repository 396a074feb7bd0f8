"""The layers against ``nn.Conv2d``: values, gradients, parameters, and everything else that people do with a module."""

import copy
import io
import math
import pickle

import needs
import pytest
import torch
import torch.nn.functional as F
from gradients import results
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from xsep import DepthwiseConv2d, SeparableConv2d
from xsep.testing import assert_no_worse_than_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def arguments(draw):
    """``DepthwiseConv2d``'s arguments and an input's shape that they fit."""
    C = draw(st.sampled_from([1, 3, 8, 17]))
    size = st.integers(1, 4)
    kernel = draw(size | st.tuples(size, size))
    (kh, kw) = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dilation = draw(st.sampled_from([1, 2, (1, 2)]))
    padding = draw(
        st.integers(0, 2)
        | st.tuples(st.integers(0, 2), st.integers(0, 2))
        | st.tuples(*[st.integers(0, 2)] * 4)
        | st.sampled_from(["same", "valid", "tf_same"])
    )
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 1), 3]))
    # At least as large as the dilated kernel, and as reflect and circular padding need.
    N, H, W = draw(st.integers(0, 2)), draw(st.integers(7, 12)), draw(st.integers(7, 12))
    options = dict(
        in_channels=C,
        out_channels=C * draw(st.integers(1, 3)),
        kernel_size=(kh, kw),
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    return options, (C, H, W) if draw(st.booleans()) else (N, C, H, W)


class Padded(nn.Module):
    """torch's layer for padding that ``nn.Conv2d`` has no word for: padded by ``F.pad`` as the definition says."""

    def __init__(self, in_channels, padding, padding_mode, **options):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, groups=in_channels, **options)
        self.padding, self.mode = padding, "constant" if padding_mode == "zeros" else padding_mode

    def forward(self, x):
        if self.padding == "tf_same":
            ends = []
            for axis in (-2, -1):
                k, s, d = (value[axis] for value in (self.conv.kernel_size, self.conv.stride, self.conv.dilation))
                total = max((math.ceil(x.shape[axis] / s) - 1) * s + (k - 1) * d + 1 - x.shape[axis], 0)
                ends += [total // 2, total - total // 2]
        else:
            ends = self.padding
        return self.conv(F.pad(x, [ends[2], ends[3], ends[0], ends[1]], mode=self.mode))


def torch_layer(options):
    """The layer of torch or timm that computes the same."""
    if options["padding"] == "tf_same" and options["padding_mode"] == "zeros":
        kept = {name: value for name, value in options.items() if name not in ("padding", "padding_mode")}
        return Conv2dSame(groups=options["in_channels"], **kept)
    if options["padding"] == "tf_same" or (isinstance(options["padding"], tuple) and len(options["padding"]) == 4):
        return Padded(**options)
    return nn.Conv2d(groups=options["in_channels"], **options)


def check(ours, theirs, x, what):
    """``theirs`` has the parameters of ``ours`` already, in the same dtype."""
    truth = results(copy.deepcopy(theirs).double(), x.double())
    if needs.convolves(x.dtype, x.device.type):
        torch_results = results(theirs, x)
    else:  # float32's, rounded once
        torch_results = [t.to(x.dtype) for t in results(copy.deepcopy(theirs).float(), x.float())]
    for mine, yours, ref in zip(results(ours, x), torch_results, truth):
        assert mine.dtype == yours.dtype == x.dtype
        assert_no_worse_than_torch(mine, yours, ref, what)


def test_depthwise_agrees_with_torch(backend):
    @settings(max_examples=150 if backend.name == "cpu" else 75)
    @given(arguments(), st.sampled_from(DTYPES), st.booleans())
    def check_drawn(drawn, dtype, channels_last):
        options, shape = drawn
        assume(needs.pads_unbatched_circularly or len(shape) == 4 or options["padding_mode"] != "circular")
        if options["padding_mode"] != "zeros":
            # The gradient of F.pad adds rounded numbers in half precision: luck decides.
            dtype = torch.float32
        torch.manual_seed(0)
        ours = DepthwiseConv2d(**options).to(backend.device, dtype)
        torch.manual_seed(0)
        theirs = torch_layer(options).to(backend.device, dtype)
        x = torch.rand(shape).to(backend.device, dtype)
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(mine, yours) for mine, yours in zip(ours.parameters(), theirs.parameters()))
        check(ours, theirs, x, f"{options} on {shape} in {dtype}")

    check_drawn()


@pytest.mark.parametrize("padding", [0, (1, 2), "same"])
def test_a_drop_in_for_conv2d(padding):
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, 12, (3, 5), padding=padding, dilation=2)
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 12, (3, 5), padding=padding, dilation=2, groups=6)
    assert isinstance(ours, nn.Conv2d)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert repr(ours) == repr(theirs).replace("Conv2d", "DepthwiseConv2d", 1)


def test_repr_tells_the_padding():
    assert "padding=tf_same" in repr(DepthwiseConv2d(4, 4, 3, 2, "tf_same"))
    assert "padding=(0, 1, 2, 3)" in repr(DepthwiseConv2d(4, 4, 3, padding=(0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (dict(in_channels=0), ValueError, "in_channels.*0"),
        (dict(in_channels=2.0), ValueError, "in_channels.*2.0"),
        (dict(out_channels=6), ValueError, "out_channels.*6"),
        (dict(out_channels=0), ValueError, "out_channels.*0"),
        (dict(kernel_size=0), ValueError, "kernel_size.*0"),
        (dict(kernel_size=(3, 3, 3)), ValueError, "kernel_size.*(3, 3, 3)"),
        (dict(kernel_size=3.0), TypeError, "kernel_size.*3.0"),
        (dict(kernel_size="3"), ValueError, "kernel_size.*3"),
        (dict(stride=0), ValueError, "stride.*0"),
        (dict(stride=True), ValueError, "stride.*True"),
        (dict(stride=None), TypeError, "stride.*None"),
        (dict(dilation=(1, 0)), ValueError, "dilation.*(1, 0)"),
        (dict(padding=-1), ValueError, "padding.*-1"),
        (dict(padding=(0, 0, 0, -1)), ValueError, "padding.*-1"),
        (dict(padding=(1, 2, 3)), ValueError, "padding.*(1, 2, 3)"),
        (dict(padding="SAME"), ValueError, "padding.*SAME"),
        (dict(padding=0.5), TypeError, "padding.*0.5"),
        (dict(padding="same", stride=2), ValueError, "same.*stride"),
        (dict(padding_mode="mirror"), ValueError, "padding_mode.*mirror"),
    ],
)
def test_bad_arguments_are_named(bad, error, message):
    with pytest.raises(error, match=message):
        DepthwiseConv2d(**{**dict(in_channels=4, out_channels=4, kernel_size=3), **bad})


@pytest.mark.parametrize("shape", [(2, 4, 9, 9), (2, 16, 9, 9), (4, 9, 9), (9, 9), (1, 2, 8, 9, 9)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_an_input_of_other_channels_is_refused(shape, padding_mode):
    layer = DepthwiseConv2d(8, 16, 3, padding=1, padding_mode=padding_mode)
    with pytest.raises(ValueError, match="input must be"):
        layer(torch.randn(shape))


@pytest.mark.parametrize("padding", [1, (0, 1, 1, 0), "tf_same"])
def test_copies(padding, backend):
    layer = SeparableConv2d(4, 6, 3, stride=2, padding=padding, activation="elu").to(backend.device)
    x = torch.randn(2, 4, 7, 8, device=backend.device)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert other.depthwise.weight is not layer.depthwise.weight


def test_meta_device():
    layer = SeparableConv2d(4, 6, 3, stride=2, padding="tf_same", device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 4, 7, 8, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.device.type, y.dtype) == ((2, 6, 4, 4), "meta", torch.bfloat16)
    assert all(p.device.type == "meta" for p in layer.parameters())


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_kept(channels_last, backend):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 8, 9, 7, device=backend.device).contiguous(memory_format=memory_format).requires_grad_()
    layer = SeparableConv2d(8, 16, 3, padding=1, activation="relu").to(backend.device, memory_format=memory_format)
    y = layer(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("padding", [1, "tf_same"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    "translated",
    [
        lambda model, x: torch.fx.symbolic_trace(model),
        pytest.param(lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True), marks=needs.compiling),
        pytest.param(lambda model, x: torch.export.export(model, (x,)).module(), marks=needs.compiling),
    ],
    ids=["fx", "compile", "export"],
)
def test_tracing_and_compiling(translated, padding, padding_mode, backend):
    model = nn.Sequential(SeparableConv2d(4, 6, 3, 2, padding, padding_mode=padding_mode), nn.ReLU())
    model, x = model.to(backend.device), torch.randn(2, 4, 9, 8, device=backend.device)
    assert torch.equal(translated(model, x)(x), model(x))


def test_autocast(backend):
    layer = SeparableConv2d(4, 6, 3, padding=1).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        assert layer(torch.randn(2, 4, 9, 8, device=backend.device)).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False, (True, False), (False, True)])
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("activation", [None, "relu", "elu", torch.tanh, nn.PReLU()])
def test_separable_agrees_with_torch(bias, multiplier, activation, backend):
    class Tanh(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    acts = {None: nn.Identity(), "relu": nn.ReLU(), "elu": nn.ELU(), torch.tanh: Tanh()}
    depthwise_bias, pointwise_bias = bias if isinstance(bias, tuple) else (bias, bias)
    options = dict(stride=(2, 1), padding=1, dilation=2, padding_mode="replicate")
    torch.manual_seed(0)
    ours = SeparableConv2d(5, 7, 3, **options, bias=bias, depth_multiplier=multiplier, activation=activation)
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Conv2d(5, 5 * multiplier, 3, **options, groups=5, bias=depthwise_bias),
        acts.get(activation, activation),
        nn.Conv2d(5 * multiplier, 7, 1, bias=pointwise_bias),
    )
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    ours, theirs, x = ours.to(backend.device), theirs.to(backend.device), torch.rand(2, 5, 9, 8, device=backend.device)
    check(ours, theirs, x, f"{bias}, {multiplier}, {activation}")
    assert ours(x[0]).dim() == 3


def test_parameter_names_of_separable():
    layer = SeparableConv2d(4, 6, 3, bias=(False, True), activation=nn.PReLU())
    assert list(layer.state_dict()) == ["depthwise.weight", "activation.weight", "pointwise.weight", "pointwise.bias"]
    assert type(layer.depthwise) is DepthwiseConv2d and type(layer.pointwise) is nn.Conv2d


def test_keras_initial_values():
    """Glorot uniform; a depthwise kernel (kh, kw, C, M) has kh*kw*C inputs and kh*kw*M outputs for Keras."""
    C, M, O, kh, kw = 32, 4, 48, 3, 5
    layer = SeparableConv2d(C, O, (kh, kw), depth_multiplier=M, init="keras")
    limits = {"depthwise": math.sqrt(6 / (kh * kw * (C + M))), "pointwise": math.sqrt(6 / (C * M + O))}
    for name, limit in limits.items():
        conv = getattr(layer, name)
        assert 0.97 * limit < conv.weight.abs().max() <= limit, name
        assert abs(conv.weight.std() * math.sqrt(3) / limit - 1) < 0.1, name
        assert conv.bias.abs().max() == 0, name


@pytest.mark.parametrize("init", ["torch", "keras"])
def test_reset_parameters(init):
    torch.manual_seed(0)
    layer = SeparableConv2d(4, 6, 3, init=init)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not torch.equal(layer.depthwise.weight, before["depthwise.weight"])
    if init == "torch":
        torch.manual_seed(0)
        layer.reset_parameters()
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(activation="gelu"), "activation.*gelu"),
        (dict(init="glorot"), "init.*glorot"),
        (dict(bias=(True, False, True)), "bias.*True, False, True"),
        (dict(depth_multiplier=0), "depth_multiplier.*0"),
        (dict(out_channels=0), "out_channels.*0"),
        (dict(in_channels=0), "in_channels.*0"),
    ],
)
def test_bad_separable_arguments_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        SeparableConv2d(**{**dict(in_channels=4, out_channels=6, kernel_size=3), **bad})
