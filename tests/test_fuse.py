"""``fuse`` on models that people have and on small ones: results stay; what is taken up; what is left and said."""

import contextlib
import copy
import pickle

import needs
import pytest
import timm
import torch
import torchvision
from conv_cases import DTYPES, LAYOUTS
from gradients import assert_all_no_worse_than_torch
from torch import nn

import xsep
from xsep import DepthwiseConv2d, SeparableConv2d
from xsep.models.xception import Block
from xsep.nn import FusedSequential
from xsep.nn.fuse import FusedResidual, InferenceBlock
from xsep.testing import assert_no_worse_than_torch

NHWC = torch.channels_last
# In half precision the outputs of a channel share the error of its rounded weights and bias: a small model is but a few
# numbers, and it is luck how much closer to the truth either comes.
DRAWN = 20
# How to make a model, and how many separable convolutions, residual sums and BatchNorms there are in it.
MODELS = {
    "xception": (lambda: xsep.models.xception(num_classes=20), 34, 8, 40),
    "plain xception": (lambda: xsep.models.xception("timm", num_classes=20, fused=False), 34, 8, 40),
    "fused xception": (lambda: xsep.models.xception("timm", num_classes=20, fused=True), 34, 8, 40),
    "timm legacy_xception": (lambda: timm.create_model("legacy_xception", num_classes=20), 34, 8, 40),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=20), 17, 10, 52),
}


@pytest.fixture(autouse=True)
def seeded():
    """A test's numbers are the same whatever ran before it."""
    torch.manual_seed(0)


def trained(model, seed=0):
    """In eval mode, with BatchNorms as training leaves them."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if module.track_running_stats:
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def fused(model):
    """A fused copy, and the lines of the report."""
    lines = []
    return xsep.fuse(copy.deepcopy(model), report=lines.append), lines


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, InferenceBlock)]


def outputs(ours, theirs, x, context=contextlib.nullcontext):
    """Those of a fused model, of the model before, both in ``context``, and the true ones."""
    with torch.no_grad():
        with context():
            found, yours = ours(x), theirs(x)
        truth = copy.deepcopy(theirs).double()(x.double())
    assert found.dtype == yours.dtype
    return found, yours, truth


def assert_agrees(ours, theirs, x, what=""):
    found, yours, truth = outputs(ours, theirs, x)
    assert_no_worse_than_torch(found, yours, truth, what)
    return found


def depthwise(C, **options):
    return nn.Conv2d(C, C, 3, groups=C, bias=False, **{"padding": 1, **options})


def layers(**norm):
    """A MobileNet's, an Xception's and plain layers, and whatever fits between them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(inplace=True),
        nn.Sequential(depthwise(8), nn.BatchNorm2d(8, **norm), nn.ReLU6()),
        nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12, **norm), nn.ReLU6(inplace=True)),
        nn.Conv2d(12, 24, 3, groups=12, stride=2, padding=(1, 0), bias=True),
        nn.BatchNorm2d(24, **norm),
        nn.Identity(),
        nn.Conv2d(24, 6, 1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        SeparableConv2d(6, 10, 3, padding="tf_same", bias=(False, True), activation="relu"),
        nn.BatchNorm2d(10, **norm),
        nn.ReLU(),
        SeparableConv2d(10, 4, 3, padding=(0, 1, 2, 1), depth_multiplier=2, bias=False),
        nn.BatchNorm2d(4, **norm),
    )


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_results(name):
    make, separable, residual, norms = MODELS[name]
    theirs = trained(make())
    ours, lines = fused(theirs)
    assert lines[0].startswith(f"xsep: fused {separable} separable convolutions: ")
    assert lines[-1].startswith(f"xsep: folded {norms} BatchNorms: ") and len(lines) == (3 if residual else 2)
    assert len(blocks_of(ours)) == separable
    assert sum(isinstance(module, FusedResidual) for module in ours.modules()) == residual
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    x = torch.randn(1, 3, 64, 70).contiguous(memory_format=NHWC if "xception" in name else LAYOUTS[0])
    assert_agrees(ours, theirs, x, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_every_dtype_and_layout(dtype, layout, backend):
    if not needs.convolves(dtype, backend.device):
        pytest.skip(f"torch {torch.__version__} does not convolve {dtype} on the {backend.device}")
    drawn = []
    for seed in range(DRAWN):
        torch.manual_seed(seed)
        theirs = trained(layers(), seed).to(backend.device, dtype, memory_format=layout)
        ours, _ = fused(theirs)
        options = [
            tuple(block.options[name] for name in ("relu", "activation", "out_activation")) for block in blocks_of(ours)
        ]
        assert options == [
            (True, "relu6", "relu6"),
            (False, None, None),
            (True, "relu", "relu"),
            (False, None, None),
        ]
        x = torch.randn(2, 3, 38, 37).to(backend.device, dtype).contiguous(memory_format=layout)
        if dtype == torch.float64:
            torch.testing.assert_close(ours(x), theirs(x))
        drawn.append(outputs(ours, theirs, x))
        assert drawn[-1][0].is_contiguous(memory_format=layout)
    if dtype != torch.float64:
        assert_all_no_worse_than_torch(*zip(*drawn), "outputs")


@pytest.mark.parametrize("norm", [dict(affine=False), dict(eps=0.1)])
def test_other_norms(norm):
    theirs = trained(layers(**norm))
    ours, _ = fused(theirs)
    assert_agrees(ours, theirs, torch.randn(2, 3, 38, 37))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype):
    model = trained(nn.Sequential(nn.Conv2d(8, 40, 3), nn.BatchNorm2d(40))).to(dtype)
    conv, norm = copy.deepcopy(model).double()
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    (folded, identity), _ = fused(model)
    assert type(folded) is nn.Conv2d and type(identity) is nn.Identity
    assert torch.equal(folded.weight, (conv.weight * factor.view(-1, 1, 1, 1)).to(dtype))
    assert torch.equal(folded.bias, ((conv.bias - norm.running_mean) * factor + norm.bias).to(dtype))


@pytest.mark.parametrize("sequential", [nn.Sequential, FusedSequential])
def test_names_stay(sequential):
    theirs = trained(sequential(*layers()))
    ours, _ = fused(theirs)
    names = dict(theirs.named_modules())
    assert all(name in names for name, _ in ours.named_modules()) and type(ours) is sequential
    assert type(ours[3][0]) is InferenceBlock and type(ours[11].depthwise) is InferenceBlock
    assert all(type(module) is nn.Identity for module in (ours[1], ours[2], ours[3][1], ours[4][0], ours[11].pointwise))
    assert_agrees(ours, theirs, torch.randn(2, 3, 38, 37))


def test_converted_models_are_fused():
    theirs = trained(layers())
    ours, _ = fused(xsep.convert(copy.deepcopy(theirs), report=None))
    assert len(blocks_of(ours)) == 4
    assert_agrees(ours, theirs, torch.randn(2, 3, 38, 37))


class Held(nn.Module):
    """Uses its input after its layers, as a residual block does."""

    def __init__(self, *made):
        super().__init__()
        self.layers = nn.Sequential(*made)

    def forward(self, x):
        return self.layers(x) + x


@pytest.mark.parametrize("before", [[], [nn.Identity()], [nn.Dropout()]])
def test_a_relu_that_overwrites_the_input_stays(before):
    """What comes before it here passes on the tensor it is given."""
    theirs = trained(Held(*before, nn.ReLU(inplace=True), depthwise(4), nn.Conv2d(4, 4, 1)))
    ours, _ = fused(theirs)
    x = torch.randn(2, 4, 6, 5)
    assert [block.options["relu"] for block in blocks_of(ours)] == [False]
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_on_what_a_layer_made_is_applied_on_load(inplace):
    first = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace)
    for made in (first, first[::2]):
        theirs = trained(Held(*made, depthwise(4), nn.Conv2d(4, 4, 1)))
        ours, _ = fused(theirs)
        assert [block.options["relu"] for block in blocks_of(ours)] == [True]
        assert_agrees(ours, theirs, torch.randn(2, 4, 6, 5))


def test_a_relu_before_one_that_was_taken_up_stays():
    """Of two in a row the first goes into the block before; the second goes into the next."""
    theirs = trained(
        nn.Sequential(depthwise(4), nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.ReLU(), depthwise(4), nn.Conv2d(4, 4, 1))
    )
    ours, _ = fused(theirs)
    assert [(b.options["relu"], b.options["out_activation"]) for b in blocks_of(ours)] == [
        (False, "relu6"),
        (True, None),
    ]
    assert_agrees(ours, theirs, 9 * torch.randn(2, 4, 6, 5))


def test_shared_modules():
    """A sequence in two places, in one of them between others; a BatchNorm and a convolution used twice."""
    inner = nn.Sequential(depthwise(4), nn.BatchNorm2d(4))
    norm, pointwise = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    theirs = trained(
        nn.Sequential(inner, pointwise, norm, nn.Sequential(inner, nn.ReLU()), depthwise(4), pointwise, norm)
    )
    ours, lines = fused(theirs)
    assert ours[0] is ours[3][0] and len(blocks_of(ours)) == 1
    assert "xsep: left 1 depthwise convolution, nothing known to follow: 0.0" in lines
    assert_agrees(ours, theirs, torch.randn(2, 4, 6, 5))


class Own(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)
    return module


def replaced(module):
    module.forward = lambda x: 2 * type(module).forward(module, x)
    return module


@pytest.mark.parametrize(
    ("made", "fused_blocks", "reasons"),
    [
        ([depthwise(4), nn.ELU(), nn.Conv2d(4, 4, 1)], 0, ["1 depthwise convolution, followed by ELU: 0"]),
        ([depthwise(4), nn.Conv2d(4, 4, 3)], 0, ["1 depthwise convolution, followed by Conv2d: 0"]),
        ([depthwise(4), nn.Conv2d(4, 4, 1, stride=2)], 0, ["1 depthwise convolution, followed by Conv2d: 0"]),
        ([depthwise(4), nn.Conv2d(4, 4, 1, padding=1)], 0, ["1 depthwise convolution, followed by Conv2d: 0"]),
        ([depthwise(4), nn.Conv2d(4, 4, 1, groups=2)], 0, ["1 depthwise convolution, followed by Conv2d: 0"]),
        ([depthwise(4), nn.BatchNorm2d(4), nn.ReLU()], 0, ["1 depthwise convolution, nothing known to follow: 0"]),
        ([depthwise(4), Own(nn.Conv2d(4, 4, 1))], 0, ["1 depthwise convolution, followed by Own: 0"]),
        ([depthwise(4, padding_mode="reflect"), nn.Conv2d(4, 4, 1)], 0, ["padding_mode='reflect': 0"]),
        ([with_hook(depthwise(4)), nn.Conv2d(4, 4, 1)], 0, ["1 depthwise convolution, with hooks"]),
        ([replaced(depthwise(4)), nn.Conv2d(4, 4, 1)], 0, ["1 depthwise convolution, with hooks"]),
        ([depthwise(4), with_hook(nn.Conv2d(4, 4, 1))], 0, ["1 depthwise convolution, followed by Conv2d: 0"]),
        ([depthwise(4), with_hook(nn.ReLU()), nn.Conv2d(4, 4, 1)], 0, ["followed by ReLU: 0"]),
        ([with_hook(nn.Sequential(depthwise(4))), nn.Conv2d(4, 4, 1)], 0, ["a place that is not known: 0.0"]),
        ([depthwise(4), nn.Conv2d(4, 4, 1), with_hook(nn.BatchNorm2d(4))], 1, ["1 BatchNorm, with hooks"]),
        ([nn.Conv2d(4, 4, 3), replaced(nn.BatchNorm2d(4))], 0, ["1 BatchNorm, with hooks"]),
        ([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)], 0, ["without running statistics: 1"]),
        ([nn.MaxPool2d(2), nn.BatchNorm2d(4)], 0, ["1 BatchNorm, no convolution known to come before: 1"]),
        (
            [Held(nn.Sequential(nn.BatchNorm2d(4)))],
            0,
            ["1 BatchNorm, no convolution known to come before: 0.layers.0.0"],
        ),
    ],
)
def test_left_alone_with_a_reason(made, fused_blocks, reasons):
    theirs = trained(nn.Sequential(*made)).double()
    ours, lines = copy.deepcopy(theirs), []
    xsep.fuse(ours, report=lines.append)
    assert len(blocks_of(ours)) == fused_blocks
    left = [line for line in lines if line.startswith("xsep: left ")]
    assert len(left) == len(reasons) and all(reason in line for reason, line in zip(reasons, left)), lines
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("change", "adds"),
    [
        (lambda block: None, True),
        (lambda block: with_hook(block), True),
        (lambda block: with_hook(block.rep), False),
        (lambda block: with_hook(block.rep[-1]), False),
        (lambda block: block.rep.append(nn.ReLU()), False),
        (lambda block: block.rep.append(nn.MaxPool2d(3, 1, 1)), False),
        (lambda block: setattr(block, "residual", False), False),
        (lambda block: setattr(block, "forward", block.rep.forward), False),
    ],
)
def test_only_a_block_that_ends_in_one_adds_the_residual(change, adds):
    theirs = trained(Block((4,) * 4, nn.BatchNorm2d, None, True, True, None, None, False)).double()
    ours, lines = copy.deepcopy(theirs), []
    for block in (theirs, ours):
        change(block)
        block.eval()
    xsep.fuse(ours, report=lines.append)
    assert (type(ours) is FusedResidual) == adds == ("xsep: fused 1 residual sum: the model itself" in lines)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["3.1", ""])
def test_training_mode_is_refused(name):
    model = trained(layers())
    model.get_submodule(name).training = True
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"eval mode; {name or 'the model itself'} is in training mode"):
        xsep.fuse(model)
    assert str(model) == str(before)


@pytest.mark.parametrize("not_a_model", [None, "resnet", lambda x: x])
def test_not_a_model(not_a_model):
    with pytest.raises(TypeError, match="nn.Module"):
        xsep.fuse(not_a_model)


def test_report_is_printed_unless_told_otherwise(capsys):
    model = trained(layers())
    assert xsep.fuse(model) is model
    assert capsys.readouterr().out.splitlines() == [
        "xsep: fused 4 separable convolutions: 3.0, 5, 11.depthwise, 1 more",
        "xsep: folded 6 BatchNorms: 1, 3.1, 4.1, 3 more",
    ]
    xsep.fuse(model, report=None)
    assert capsys.readouterr().out == ""
    xsep.fuse(nn.Linear(2, 2).eval())
    assert capsys.readouterr().out.splitlines() == ["xsep: fused no separable convolution", "xsep: folded no BatchNorm"]


def test_fused_models_are_for_inference():
    model, _ = fused(trained(layers()))
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    x = torch.randn(1, 3, 38, 37)
    assert not model(x).requires_grad
    with pytest.raises(RuntimeError, match="no gradients, and input requires them"):
        model(x.requires_grad_())
    with pytest.raises(ValueError, match=r"input must be \(N, 8, H, W\); got shape \(1, 4, 9, 9\)"):
        model[3][0](torch.randn(1, 4, 9, 9))


@needs.compiling
def test_fused_models_are_copied_saved_traced_and_compiled():
    model, _ = fused(trained(torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25)))
    x = torch.randn(1, 3, 40, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
        assert torch.equal(other(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_autocast():
    drawn = []
    for seed in range(DRAWN):
        torch.manual_seed(seed)
        theirs = trained(layers(), seed)
        x = torch.randn(2, 3, 38, 37)
        drawn.append(outputs(fused(theirs)[0], theirs, x, lambda: torch.autocast("cpu", torch.bfloat16)))
        assert drawn[-1][0].dtype == torch.bfloat16
    assert_all_no_worse_than_torch(*zip(*drawn), "autocast")


def test_depthwise_layers_of_ours():
    theirs = trained(nn.Sequential(DepthwiseConv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1, padding="same")))
    ours, _ = fused(theirs)
    assert len(blocks_of(ours)) == 1
    assert_agrees(ours, theirs, torch.randn(2, 1, 6, 5))
