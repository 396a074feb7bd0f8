"""``convert`` on models that people have: what it replaces, what it leaves and says, and that results stay."""

import copy
import io

import needs
import pytest
import timm
import torch
import torchvision
from gradients import assert_all_no_worse_than_torch, results
from torch import nn

import xsep
from xsep import DepthwiseConv2d
from xsep.testing import assert_no_worse_than_torch

TF_SAME = "timm.layers.conv2d_same.Conv2dSame"
# Name: (how to make it, input extents, number of depthwise convolutions).
MODELS = {
    "timm mobilenetv3_large_100": (lambda: timm.create_model("mobilenetv3_large_100"), (96, 96), 15),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), (97, 96), 16),
    "timm tf_efficientnet_b0": (lambda: timm.create_model("tf_efficientnet_b0"), (96, 111), 16),
    "timm convnext_tiny": (lambda: timm.create_model("convnext_tiny"), (96, 96), 18),
    "timm legacy_xception": (lambda: timm.create_model("legacy_xception"), (96, 96), 34),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), (97, 97), 17),
}


def is_depthwise(module):
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_results(name, backend):
    make, extents, count = MODELS[name]
    torch.manual_seed(0)
    theirs = make().eval().to(backend.device)
    ours = copy.deepcopy(theirs)
    parameters, state, lines = list(ours.parameters()), list(ours.state_dict()), []
    assert xsep.convert(ours, report=lines.append) is ours
    assert f"replaced {count} convolutions" in lines[0] and len(lines) == 2 and "groups=1" in lines[1]
    depthwise = [module for module in ours.modules() if is_depthwise(module)]
    assert len(depthwise) == count and all(type(module) is DepthwiseConv2d for module in depthwise)
    assert all(p is q for p, q in zip(ours.parameters(), parameters)) and list(ours.state_dict()) == state

    x = torch.randn(2, 3, *extents, device=backend.device)
    truth = results(copy.deepcopy(theirs).double(), x.double())
    (y, *grads), (torch_y, *torch_grads), (true_y, *true_grads) = results(ours, x), results(theirs, x), truth
    assert_no_worse_than_torch(y, torch_y, true_y, name)
    assert_all_no_worse_than_torch(grads, torch_grads, true_grads, f"gradients of {name}")


def test_tf_same_becomes_a_word():
    model = timm.create_model("tf_efficientnet_b0")
    same = [name for name, m in model.named_modules() if f"{type(m).__module__}.{type(m).__name__}" == TF_SAME]
    xsep.convert(model, report=None)
    converted = [name for name in same if type(model.get_submodule(name)) is DepthwiseConv2d]
    assert converted and all(model.get_submodule(name).padding == "tf_same" for name in converted)
    assert [name for name in same if name not in converted] == ["conv_stem"]


@pytest.mark.parametrize(
    "options",
    [dict(padding="same"), dict(padding="valid", stride=2), dict(padding=(1, 2), padding_mode="circular", dilation=2)],
)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_model_that_is_a_convolution(options, multiplier):
    conv = nn.Conv2d(4, 4 * multiplier, 3, groups=4, dtype=torch.float64, **options)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = conv(x)
    lines = []
    converted = xsep.convert(conv, report=lines.append)
    assert converted is conv and type(conv) is DepthwiseConv2d
    assert lines == ["xsep: replaced 1 convolution, depthwise: the model itself"]
    torch.testing.assert_close(conv(x), expected)


def test_state_of_the_module_is_kept():
    conv = nn.Conv2d(4, 4, 3, groups=4, dtype=torch.float64).eval()
    conv.bias.requires_grad_(False)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append("forward"))
    conv.register_forward_pre_hook(lambda *_: calls.append("before"))
    conv.note = "mine"
    weight, optimizer = conv.weight, torch.optim.SGD(conv.parameters(), lr=1)
    xsep.convert(conv, report=None)
    assert conv.weight is weight and conv.note == "mine" and not conv.training
    assert conv.weight.requires_grad and not conv.bias.requires_grad and conv.weight.dtype == torch.float64
    conv(torch.randn(1, 4, 5, 5, dtype=torch.float64)).sum().backward()
    assert calls == ["before", "forward"]
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(conv.weight, before)


def test_shared_modules_stay_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.ReLU())})
    lines = []
    xsep.convert(model, report=lines.append)
    assert model["a"] is model["b"][0] and type(model["a"]) is DepthwiseConv2d
    assert lines == ["xsep: replaced 1 convolution, depthwise: a"]


def test_weight_norm_of_the_old_kind_still_works():
    conv = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    x = torch.randn(2, 4, 9, 8)
    expected = conv(x)
    xsep.convert(conv, report=None)
    conv.weight_g.data *= 2
    conv.bias.data *= 2
    torch.testing.assert_close(conv(x), 2 * expected)


class Scaled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def monkeypatched():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    conv.forward = lambda input: input
    return conv


def quantized():
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(4, 4, 3, groups=4)).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    torch.ao.quantization.prepare(model, inplace=True)
    model(torch.randn(1, 4, 5, 5))
    return torch.ao.quantization.convert(model)[1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(4, 4, 3), "groups=1"),
        (lambda: nn.Conv2d(1, 4, 3), "groups=1"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups=2 of 4 channels"),
        (lambda: nn.LazyConv2d(4, 3, groups=4), "LazyConv2d may compute"),
        (lambda: nn.Conv1d(4, 4, 3, groups=4), "torch.nn.modules.conv.Conv1d may compute"),
        (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), "ConvTranspose2d may compute"),
        (lambda: Scaled(4, 4, 3, groups=4), "Scaled may compute"),
        pytest.param(
            lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4)),
            "Parametrized",
            marks=needs.weight_norm,
        ),
        (quantized, "quantized"),
        (monkeypatched, "forward was replaced"),
        (lambda: DepthwiseConv2d(4, 4, 3), "already"),
    ],
)
def test_left_alone_with_a_reason(make, reason):
    conv = make()
    kind, lines = type(conv), []
    xsep.convert(nn.Sequential(nn.ReLU(), conv), report=lines.append)
    assert type(conv) is kind
    assert lines[0] == "xsep: replaced no convolution"
    assert lines[1].startswith("xsep: left 1 convolution, ") and reason in lines[1] and lines[1].endswith(": 1")


def test_report_is_printed_unless_told_otherwise(capsys):
    def model():
        return nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=groups) for groups in (1, 8, 8, 8, 8, 8, 4)))

    xsep.convert(model())
    assert capsys.readouterr().out.splitlines() == [
        "xsep: replaced 5 convolutions, depthwise: 1, 2, 3, 2 more",
        "xsep: left 1 convolution, groups=1: 0",
        "xsep: left 1 convolution, groups=4 of 8 channels: 6",
    ]
    xsep.convert(model(), report=None)
    assert capsys.readouterr().out == ""


def test_a_model_without_convolutions():
    lines = []
    xsep.convert(nn.Linear(2, 2), report=lines.append)
    assert lines == ["xsep: replaced no convolution"]


@pytest.mark.parametrize("not_a_model", [None, "resnet", lambda x: x])
def test_not_a_model(not_a_model):
    with pytest.raises(TypeError, match="nn.Module"):
        xsep.convert(not_a_model)


def test_converted_models_are_copied_saved_and_traced():
    model = xsep.convert(timm.create_model("mobilenetv3_small_050"), report=None).eval()
    x = torch.randn(1, 3, 64, 64)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), torch.fx.symbolic_trace(model)):
        assert torch.equal(other(x), model(x))
