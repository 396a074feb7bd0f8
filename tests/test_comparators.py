"""What the paper compares separable convolutions with: fewer segments (sections 1.2 and 5), a VGG-style stack (4.6)."""

import math

import pytest
import torch
from torch import nn

import xsep
from xsep import DepthwiseConv2d, SeparableConv2d, checkpoints
from xsep.models import vgg_separable, xception
from xsep.nn import FusedSequential, block


@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
def test_fewer_segments_are_a_grouped_convolution(segments, padding):
    options = dict(padding=padding, dilation=(1, 2), bias=True, padding_mode="reflect")
    torch.manual_seed(0)
    ours = SeparableConv2d(8, 6, (3, 5), **options, depth_multiplier=3, activation="elu", segments=segments)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(8, 24, (3, 5), **options, groups=segments), nn.ELU(), nn.Conv2d(24, 6, 1))
    assert list(ours.state_dict()) == ["depthwise.weight", "depthwise.bias", "pointwise.weight", "pointwise.bias"]
    assert ours.depthwise.weight.shape == (24, 8 // segments, 3, 5)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    x = torch.randn(2, 8, 9, 12)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x[0]), theirs(x[0]))
    before = ours.depthwise.weight.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.depthwise.weight, before)


def test_a_segment_per_channel_is_the_depthwise_layer():
    for in_channels in (1, 8):
        made = []
        for segments in (None, in_channels):
            torch.manual_seed(0)
            made.append(SeparableConv2d(in_channels, 6, 3, 2, "tf_same", segments=segments))
        x = torch.randn(2, in_channels, 9, 8)
        assert [type(layer.depthwise) for layer in made] == [DepthwiseConv2d] * 2
        assert torch.equal(made[0](x), made[1](x))


def depthwise_in_segments(weight, segments):
    """(C, 1, R, S) as the (C, C / segments, R, S) that computes the same: other channels of the segment count 0."""
    C, _, R, S = weight.shape
    each = C // segments
    wide = weight.new_zeros(C, each, R, S)
    wide[torch.arange(C), torch.arange(C) % each] = weight[:, 0]
    return wide


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_the_spectrum_contains_the_depthwise_layer(segments):
    depthwise = SeparableConv2d(8, 6, 3, padding=1).double()
    wider = SeparableConv2d(8, 6, 3, padding=1, segments=segments).double()
    state = depthwise.state_dict()
    state["depthwise.weight"] = depthwise_in_segments(state["depthwise.weight"], segments)
    wider.load_state_dict(state)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(wider(x), depthwise(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *((dict(segments=value), f"segments must.*in_channels=8; got {value}") for value in (3, 0, -2, 16, 2.0, True)),
        (dict(segments=2, padding="tf_same"), "padding='tf_same'.*segments=2"),
        (dict(segments=2, padding=(0, 1, 0, 1)), r"padding=\(0, 1, 0, 1\).*segments=2"),
        (dict(segments=2, padding=-1), "padding.*-1"),
        (dict(segments=2, kernel_size=0), "kernel_size.*0"),
        (dict(segments=2, in_channels=0), "in_channels.*0"),
    ],
)
def test_bad_segments_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        SeparableConv2d(**{**dict(in_channels=8, out_channels=6, kernel_size=3), **bad})


def test_initial_values_in_segments():
    weight = SeparableConv2d(32, 48, 3, init="keras", segments=4).depthwise.weight
    limit = math.sqrt(6 / (9 * 8 + 9 * 32))  # Keras's fans of a Conv2D: inputs of a group, all filters
    assert 0.97 * limit < weight.abs().max() <= limit


def test_convert_and_fused_sequential_leave_segments_alone(monkeypatch):
    fused = []

    def record(*arguments, **options):
        fused.append(arguments)
        return run(*arguments, **options)

    run = block.separable_block
    monkeypatch.setattr(block, "separable_block", record)
    torch.manual_seed(0)
    layers = [
        nn.ReLU(),
        SeparableConv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        SeparableConv2d(16, 8, 3, padding=1, bias=False, segments=2),
        nn.BatchNorm2d(8),
    ]
    x = torch.randn(2, 8, 9, 9)
    expected = nn.Sequential(*layers)(x)
    torch.testing.assert_close(FusedSequential(*layers)(x), expected)
    assert len(fused) == 1
    lines = []
    assert type(xsep.convert(layers[4], report=lines.append).depthwise) is nn.Conv2d
    assert any("groups=2 of 16 channels: depthwise" in line for line in lines)


def test_xception_in_segments():
    with torch.device("meta"):
        models = {segments: xception(segments=segments) for segments in (None, 1, 2, 4, 8)}
    counts = {segments: sum(p.numel() for p in model.parameters()) for segments, model in models.items()}
    depthwise = [m.in_channels for m in models[None].modules() if type(m) is DepthwiseConv2d]
    for segments in (1, 2, 4, 8):
        more = sum(9 * C * (C // segments - 1) for C in depthwise)
        assert counts[segments] == 22_855_952 + more
        assert list(models[segments].state_dict()) == list(models[None].state_dict())
        groups = [m.groups for m in models[segments].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert groups == [1, 1, *[segments] * 34]
    for bad in (3, 16, 0, "all"):
        with pytest.raises(ValueError, match=f"segments must be one of None, 1, 2, 4, 8; got {bad!r}"):
            xception(segments=bad)


def test_xception_in_segments_computes_the_depthwise_one_and_is_saved(tmp_path):
    torch.manual_seed(0)
    depthwise = xception(num_classes=0, drop_rate=0.0).eval()
    state = {
        key: depthwise_in_segments(value, 8) if value.dim() == 4 and value.shape[1] == 1 else value
        for key, value in depthwise.state_dict().items()
    }
    x = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        expected = depthwise(x)
        for fused in (False, True):
            model = xception(num_classes=0, segments=8, fused=fused).eval()
            model.load_state_dict(state)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

    file = tmp_path / "segments.safetensors"
    checkpoints.save(model, file)
    built, loaded = checkpoints.build(file)
    assert built.segments == 8 and not loaded.left_out
    assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())
    with pytest.raises(ValueError, match="of another shape"):
        checkpoints.load(depthwise, file)
    with pytest.raises(ValueError, match="not in segments"):
        checkpoints.save(model, tmp_path / "segments.weights.h5")


def test_vgg_separable():
    with torch.device("meta"):
        model = vgg_separable()
    assert sum(p.numel() for p in model.parameters()) == 23_485_227
    kinds = [type(layer) for layer in model.features]
    assert kinds.count(SeparableConv2d) == kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 13
    assert kinds.count(nn.MaxPool2d) == 5 and not any(type(m) is nn.Conv2d and m.groups > 1 for m in model.modules())
    layers = [layer for layer in model.features if isinstance(layer, SeparableConv2d)]
    assert all(m.depthwise.out_channels == m.depthwise.in_channels and m.depthwise.bias is None for m in layers)
    assert model(torch.empty(2, 3, 64, 40, device="meta")).shape == (2, 1000)

    torch.manual_seed(0)
    small = vgg_separable(7, in_chans=1, channels=(4, 8, 8, 16, 16), drop_rate=0.5, segments=2)
    small(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())
    assert [m.depthwise.groups for m in small.features if isinstance(m, SeparableConv2d)] == [1, *[2] * 12]
    with pytest.raises(ValueError, match="channels must be 5 numbers.*4, 8"):
        vgg_separable(channels=(4, 8))
