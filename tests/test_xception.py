"""Xception against timm's, against Keras's differences written out, and against the paper's numbers."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from gradients import assert_all_no_worse_than_torch, assert_mostly_no_worse_than_torch, results
from torch import nn

import xsep
from xsep.models import Xception, xception
from xsep.nn import MaxPoolSame
from xsep.testing import assert_no_worse_than_torch


class PaddedPool(nn.Module):
    """Keras's max-pool, with the padding written out."""

    def forward(self, x):
        ends = []
        for extent in (x.shape[3], x.shape[2]):
            total = max((-(-extent // 2) - 1) * 2 + 3 - extent, 0)
            ends += [total // 2, total - total // 2]
        return F.max_pool2d(F.pad(x, ends, value=-torch.inf), 3, 2)


def reference(preset, **options):
    """timm's network with random BatchNorm statistics; for ``'keras'`` with Keras's eps and pools."""
    torch.manual_seed(0)
    model = timm.create_model("legacy_xception", **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            # Small, so that Keras's larger eps shows.
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            module.eps = {"keras": 1e-3, "timm": 1e-5}[preset]
            module.momentum = {"keras": 0.01, "timm": 0.1}[preset]
    if preset == "keras":
        for i in (1, 2, 3, 12):
            model.get_submodule(f"block{i}.rep")[-1] = PaddedPool()
    return model


@pytest.mark.parametrize("preset", ["keras", "timm"])
@pytest.mark.parametrize(("extents", "fused"), [((96, 96), False), ((107, 118), False), ((107, 118), True)])
def test_agrees_with_timm(preset, extents, fused, backend):
    if fused and backend.name == "cuda-emulated":
        pytest.skip("many minutes on the emulator, where test_block.py runs single blocks")
    theirs = reference(preset, num_classes=50).eval().to(backend.device)
    ours = xception(preset, num_classes=50, fused=fused).eval().to(backend.device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *extents, device=backend.device)
    with torch.no_grad():
        assert_no_worse_than_torch(ours(x), theirs(x), theirs.double()(x.double()), preset)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_and_statistics_of_training_agree_with_timm(fused, backend):
    if fused and backend.name == "cuda-emulated":
        pytest.skip("many minutes on the emulator, where test_block.py runs single blocks")
    theirs = reference("timm", num_classes=50).to(backend.device)
    ours = xception("timm", num_classes=50, fused=fused).to(backend.device)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    draws = []
    for _ in range(5 if fused else 1):
        x = torch.randn(4, 3, 97, 97, device=backend.device).contiguous(memory_format=torch.channels_last)
        draws.append([results(ours, x), results(theirs, x), results(exact, x.double())])
    assert_mostly_no_worse_than_torch(draws, "gradients")
    stats = [[b for name, b in m.named_buffers() if "running" in name] for m in (ours, theirs, exact)]
    assert_all_no_worse_than_torch(*stats, "running statistics")


def test_what_training_keeps():
    """Fused: the stem's three tensors, and one of each block, shortcut and module."""
    kept = {}
    for fused in (False, True):
        model = xception(num_classes=10, fused=fused)
        of_model = {t.data_ptr() for t in model.parameters()}
        found = {}

        def keep(t, of_model=of_model, found=found):
            if t.data_ptr() not in of_model:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(2, 3, 203, 203).contiguous(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            held = model(x)
        kept[fused] = sum(found.values())
        assert held.requires_grad
    assert kept[True] < 0.45 * kept[False]


@pytest.mark.parametrize("options", [dict(), dict(residual=False, activation="elu"), dict(preset="timm")])
def test_fused_training_follows_the_unfused(options):
    """In float64, where what differs by rounding stays small: five steps, then inference."""
    torch.manual_seed(0)
    plain, fused = (xception(num_classes=3, fused=fused, **options).double() for fused in (False, True))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, 3, 71, 75, dtype=torch.float64)
    y = torch.arange(4) % 3
    losses = []
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for batch in x:
            loss = F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-8) and losses[0] != losses[4]
    for (name, mine), yours in zip(fused.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x[0]), plain.eval()(x[0]), rtol=1e-6, atol=1e-8)


def test_fused_is_the_same_model():
    plain, fused = (xception(fused=fused) for fused in (False, True))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    kept = {}
    for name, model in (("plain", plain), ("fused", fused)):
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.randn(1, 3, 75, 75).contiguous(memory_format=torch.channels_last))
        kept[name] = sum(storages.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert kept["fused"] < 0.6 * kept["plain"], kept


def test_fused_where_supported():
    """By default: in float32 on a CPU, but not with an activation that its kernels do not have, or for a compiler."""
    from xsep.nn import block

    calls = []

    def record(*arguments, **options):
        calls.append(arguments[0].dtype)
        return run(*arguments, **options)

    run = block.separable_block
    x = torch.randn(1, 3, 75, 75)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "separable_block", record)
        for options, expected in ((dict(), 34), (dict(fused=False), 0), (dict(activation="elu"), 0)):
            model = xception("timm", num_classes=3, **options).eval()
            calls.clear()
            model(x)
            assert len(calls) == expected, options
        calls.clear()
        with xsep.backend("aten"):
            xception(num_classes=3)(torch.randn(2, 3, 75, 75))
        assert not calls
        patch.setattr(block, "is_compiling", lambda: True)
        xception(num_classes=3)(torch.randn(2, 3, 75, 75))
        assert not calls


def test_presets_differ():
    theirs = reference("timm", num_classes=0).eval()
    x = torch.randn(1, 3, 107, 118)
    outputs = {}
    for preset in ("keras", "timm"):
        model = xception(preset, num_classes=0).eval()
        model.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            outputs[preset] = model(x)
    assert (outputs["keras"] - outputs["timm"]).norm() > 0.01 * outputs["timm"].norm()
    with pytest.raises(ValueError, match="preset.*tensorflow"):
        xception("tensorflow")


@pytest.mark.parametrize("H", range(1, 10))
@pytest.mark.parametrize("W", [1, 2, 7, 8])
def test_pool_is_tensorflows_same(H, W):
    x = -torch.rand(2, 3, H, W)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = MaxPoolSame()(ours), PaddedPool()(theirs)
    assert torch.equal(y, expected) and y.shape[2:] == (-(-H // 2), -(-W // 2))
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_the_papers_numbers():
    with torch.device("meta"):
        model = xception()
    assert sum(p.numel() for p in model.parameters()) == 22_855_952
    assert sum(b.numel() for name, b in model.named_buffers() if "running" in name) == 54_528
    extents = []
    for name in ("act1", "act2", "block1", "block2", "block3", "block11", "block12", "act4"):
        model.get_submodule(name).register_forward_hook(lambda module, args, y: extents.append(y.shape[2]))
    assert model(torch.empty(1, 3, 299, 299, device="meta")).shape == (1, 1000)
    assert extents == [149, 147, 74, 37, 19, 19, 10, 10]
    depthwise = [m for m in model.modules() if type(m) is xsep.DepthwiseConv2d]
    assert len(depthwise) == 34 and all(m.bias is None and m.kernel_size == (3, 3) for m in depthwise)


@pytest.mark.parametrize("preset", ["keras", "timm"])
def test_state_dict_is_timms(preset):
    ours, theirs = xception(preset).state_dict(), timm.create_model("legacy_xception").state_dict()
    assert list(ours) == list(theirs) and len(ours) == 276
    assert all(ours[key].shape == theirs[key].shape for key in theirs)


def test_without_residuals():
    """Figure 9: neither parameters of the skips nor sums."""
    x = torch.randn(1, 3, 75, 75)
    full, plain = xception(num_classes=10).eval(), xception(num_classes=10, residual=False).eval()
    missing, unexpected = plain.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    assert {key.split(".")[0] for key in unexpected} == {"block1", "block2", "block3", "block12"}
    assert all("skip" in key for key in unexpected)
    with torch.no_grad():
        for block in (full.block1, full.block5):
            y = torch.randn(1, 64 if block is full.block1 else 728, 9, 9)
            rest = y if block.skip is None else block.skipbn(block.skip(y))
            other = plain.block1 if block is full.block1 else plain.block5
            torch.testing.assert_close(block(y), other(y) + rest)
        assert torch.isfinite(plain(x)).all()


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("elu", F.elu)])
def test_activation_between_depthwise_and_pointwise(activation, function):
    """Figure 10: the checkpoint's names stay."""
    model = xception("timm", activation=activation)
    assert list(model.state_dict()) == list(xception("timm").state_dict())
    separable, x = model.conv3, torch.randn(1, 1024, 5, 5)
    torch.testing.assert_close(separable(x), separable.pointwise(function(separable.conv1(x))))
    with pytest.raises(ValueError, match="activation.*gelu"):
        xception(activation="gelu")


def test_fully_connected_layers():
    model = xception(fc_layers=2)
    extra = 2048 * 4096 + 4096 + 4096 * 4096 + 4096 + (4096 - 2048) * 1000
    assert sum(p.numel() for p in model.parameters()) == 22_855_952 + extra
    features = torch.randn(2, 2048, 3, 3)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, 4096) and hidden.min() == 0
    torch.testing.assert_close(model.forward_head(features), model.fc(hidden))
    with pytest.raises(ValueError, match="fc_layers.*-1"):
        xception(fc_layers=-1)


def test_dropout_comes_before_the_classifier_in_training_only():
    model = xception(num_classes=0, drop_rate=0.5)
    features = torch.rand(2, 2048, 3, 3) + 1
    dropped = (model.forward_head(features) == 0).double().mean()
    assert 0.4 < dropped < 0.6
    torch.testing.assert_close(model.eval().forward_head(features), features.mean((2, 3)))


def test_features_agree_with_timm():
    theirs = timm.create_model("legacy_xception", features_only=True).eval()
    ours = xception("timm", features_only=True).eval()
    ours.load_state_dict(theirs.body.state_dict())
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [64, 128, 256, 728, 2048]
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [info["module"] for info in ours.feature_info] == theirs.feature_info.module_name()
    assert dict(ours.named_modules()).keys() >= {info["module"] for info in ours.feature_info}
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        mine, yours, truth = ours(x), theirs(x), theirs.double()(x.double())
    assert len(mine) == len(yours)
    for i, maps in enumerate(zip(mine, yours, truth)):
        assert_no_worse_than_torch(*maps, f"feature map {i}")


def test_heads():
    model = xception("timm", num_classes=7).eval()
    x = torch.randn(2, 3, 75, 75)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape == (2, 2048, 3, 3) and pooled.shape == (2, model.num_features)
        assert torch.equal(model(x), model.get_classifier()(pooled)) and model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.double().reset_classifier(5, global_pool="avg")
        assert model(x.double()).shape == (2, 5) and model.num_classes == 5
    with pytest.raises(ValueError, match="num_classes.*-1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool.*max"):
        model.reset_classifier(5, "max")


def test_input_is_not_written_to_and_channels_last_flows_through():
    model = Xception(num_classes=3, in_chans=4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 75, 75).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    formats = set()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, MaxPoolSame)):
            module.register_forward_hook(
                lambda module, args, y: formats.add(y.is_contiguous(memory_format=torch.channels_last))
            )
    model(x)
    assert formats == {True} and torch.equal(x, before)


def test_initial_values_and_copies():
    keras, he = (xception(preset, num_classes=9) for preset in ("keras", "timm"))
    depthwise = keras.block4.rep[1].conv1.weight
    limit = (6 / (9 * 728 + 9)) ** 0.5
    assert 0.97 * limit < depthwise.abs().max() <= limit and keras.fc.bias.abs().max() == 0
    assert he.block4.rep[1].pointwise.weight.std().item() == pytest.approx((2 / 728) ** 0.5, rel=0.05)
    assert all(m.eps == 1e-3 and m.momentum == 0.01 for m in keras.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(m.eps == 1e-5 and m.momentum == 0.1 for m in he.modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(1, 3, 75, 75)
    keras.eval()
    for other in (copy.deepcopy(keras), pickle.loads(pickle.dumps(keras))):
        assert torch.equal(other(x), keras(x))
