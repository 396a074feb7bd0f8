"""``FusedSequential`` against ``nn.Sequential``: results, gradients, running statistics, and what is not fused."""

import copy
import pickle

import needs
import pytest
import torch
from gradients import assert_all_no_worse_than_torch, assert_mostly_no_worse_than_torch, results
from torch import nn

from xsep import DepthwiseConv2d, SeparableConv2d
from xsep.nn import FusedSequential, MaxPoolSame, block
from xsep.ops import cpu, residual
from xsep.ops.problem import is_nhwc


def separable(in_channels, out_channels, kernel_size=3, bias=False, **options):
    return SeparableConv2d(in_channels, out_channels, kernel_size, bias=bias, **{"padding": 1, **options})


def layers(**norm):
    """Convolutions with everything that is fused between them, and with what is not."""
    return [
        nn.ReLU(),
        separable(3, 8, depth_multiplier=2, activation="elu"),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(inplace=True),
        separable(8, 6, stride=2, padding=(0, 1, 2, 1)),
        nn.BatchNorm2d(6, **norm),
        nn.Sequential(
            DepthwiseConv2d(6, 6, 3, padding=2, dilation=2, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False)
        ),
        nn.ReLU(inplace=True),
        separable(5, 4, bias=True),
        nn.ReLU(),
        separable(4, 7),
        separable(7, 4),
        nn.BatchNorm2d(4, **norm),
        nn.ReLU(inplace=True),
    ]


def pair(made, dtype=torch.float32, seed=0):
    """The same layers in ``nn.Sequential`` and ``FusedSequential``, with random norms."""
    torch.manual_seed(seed)
    plain = nn.Sequential(*made)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    plain = plain.to(dtype)
    return plain, FusedSequential(*copy.deepcopy(list(plain)))


@pytest.fixture
def blocks(monkeypatch):
    """The calls of ``separable_block``: whether with a center, with ReLU, with statistics."""
    calls = []

    def record(*arguments, **options):
        calls.append((arguments[1] is not None, arguments[4], options["statistics"]))
        return run(*arguments, **options)

    run = block.separable_block
    monkeypatch.setattr(block, "separable_block", record)
    return calls


def input(dtype=torch.float32, N=4, mean=0.0, layout=torch.channels_last):
    torch.manual_seed(1)
    return (torch.randn(N, 3, 12, 11) + mean).to(dtype).contiguous(memory_format=layout)


def applies_norms(backend, x):
    """Whether there are kernels for norms that nothing applies on load."""
    return backend.name == "cpu" and is_nhwc(x)


@pytest.mark.parametrize("mean", [0, 1e4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_training_agrees(layout, mean, backend, blocks):
    plain, fused = (m.to(backend.device) for m in pair(layers()))
    exact, x = copy.deepcopy(plain).double(), input(mean=mean, layout=layout).to(backend.device)
    found = [results(model, t) for model, t in ((fused, x), (plain, x), (exact, x.double()))]
    assert blocks == [
        (False, True, True),
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, applies_norms(backend, x)),
    ]
    assert_all_no_worse_than_torch(*found, "output and gradients")
    statistics = [[b for b in model.buffers() if b.is_floating_point()] for model in (fused, plain, exact)]
    assert_all_no_worse_than_torch(*statistics, "running statistics")
    assert all(m.num_batches_tracked == 1 for m in fused if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_agrees(autocast, backend):
    dtype = torch.bfloat16
    kept = torch.float32 if autocast else dtype
    draws = []
    for seed in range(5):
        plain, fused = (m.to(backend.device) for m in pair(layers(), kept, seed))
        x = input(kept).to(backend.device)
        with torch.autocast(backend.device, dtype, enabled=autocast):
            mine, yours = results(fused, x), results(plain, x)
        assert mine[0].dtype == yours[0].dtype == dtype
        draws.append([mine, yours, results(copy.deepcopy(plain).double(), x.double())])
    assert_mostly_no_worse_than_torch(draws, "output and gradients")


@pytest.mark.parametrize(
    "norm",
    [dict(), dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(eps=0.1, momentum=0.7)],
)
def test_every_kind_of_norm(norm):
    plain, fused = pair(layers(**norm), torch.float64)
    assert list(plain.state_dict()) == list(fused.state_dict())
    for step in range(3):
        x = input(torch.float64) * (step + 1) + step
        torch.testing.assert_close(results(fused, x), results(plain, x))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    for model in (plain, fused):
        model.eval()
    before = copy.deepcopy(fused.state_dict())
    torch.testing.assert_close(results(fused, x), results(plain, x))
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)


def test_frozen_norms_make_no_statistics(blocks):
    """Those in eval mode inside a model that trains."""
    plain, fused = pair(layers(), torch.float64)
    for model in (plain, fused):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2)
                module.eval()
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(results(fused, input(torch.float64)), results(plain, input(torch.float64)))
    assert blocks and not any(statistics for _, _, statistics in blocks)


def pooled(**norm):
    """Pools after norms of either sign."""
    plain, fused = pair(
        [
            separable(3, 8),
            nn.BatchNorm2d(8, **norm),
            nn.MaxPool2d(3, 2, 1),
            nn.ReLU(),
            separable(8, 6, activation="relu"),
            nn.BatchNorm2d(6, **norm),
            MaxPoolSame(),
        ]
    )
    for model in (plain, fused):
        torch.manual_seed(3)
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                if module.affine:
                    nn.init.normal_(module.weight)
                    assert module.weight.min() < 0 < module.weight.max()
    return plain, fused


@pytest.mark.parametrize("norm", [dict(), dict(affine=False), dict(momentum=None)])
@pytest.mark.parametrize("train", [True, False])
def test_pools_come_before_norms(train, norm, blocks, monkeypatch):
    plain, fused = (model.double().train(train) for model in pooled(**norm))
    read, apply = [], residual.apply_vectors
    monkeypatch.setattr(residual, "apply_vectors", lambda y, *vectors: read.append(y.shape[2:]) or apply(y, *vectors))
    x = input(torch.float64, layout=torch.contiguous_format)  # for which sums are composed
    torch.testing.assert_close(results(fused, x), results(plain, x))
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    assert read == [(6, 6), (3, 3)] and blocks == [(False, False, train), (False, True, train)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pools_before_norms_agree(dtype, backend):
    plain, fused = (model.to(backend.device, dtype) for model in pooled())
    exact, x = copy.deepcopy(plain).double(), input(dtype, mean=3).to(backend.device)
    found = [results(model, t) for model, t in ((fused, x), (plain, x), (exact, x.double()))]
    assert_all_no_worse_than_torch(*found, "output and gradients")
    statistics = [[b for b in model.buffers() if b.is_floating_point()] for model in (fused, plain, exact)]
    assert_all_no_worse_than_torch(*statistics, "running statistics")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[2].register_forward_hook(lambda module, args, y: 2 * y),
        lambda model: model.__setitem__(1, Doubled(8, dtype=torch.float64)),
        lambda model: model.__setitem__(2, nn.AvgPool2d(3, 2, 1)),
        lambda model: model.__setitem__(2, nn.Identity()),
    ],
)
def test_pools_that_stay_after_norms(change):
    plain, fused = (model.double() for model in pooled())
    for model in (plain, fused):
        torch.manual_seed(2)
        change(model)
    torch.testing.assert_close(results(fused, input(torch.float64)), results(plain, input(torch.float64)))


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("change", "fused_calls"),
    [
        (lambda model: model[1].depthwise.register_forward_hook(lambda module, args, y: 2 * y), 1),
        (lambda model: model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],)), 1),
        (lambda model: model[2].register_forward_hook(lambda module, args, y: 2 * y), 2),
        (lambda model: model[0].register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)), 2),
        (lambda model: setattr(model[4], "forward", lambda x, m=model[4]: 2 * type(m).forward(m, x)), 1),
        (lambda model: model.__setitem__(2, Doubled(8, dtype=torch.float64)), 2),
        (lambda model: model.__setitem__(4, separable(8, 6, bias=(True, False)).double()), 1),
        (lambda model: model.__setitem__(4, separable(8, 6, bias=(False, True)).double()), 1),
        (lambda model: model.__setitem__(4, separable(8, 6, padding_mode="reflect").double()), 1),
        (lambda model: model.__setitem__(4, separable(8, 6, activation=nn.ELU(2.0)).double()), 1),
        (lambda model: model.__setitem__(4, separable(8, 6, activation=nn.Sigmoid()).double()), 1),
        (lambda model: model.__setitem__(3, nn.ReLU6()), 2),
        (lambda model: nn.utils.parametrizations.orthogonal(model[4].pointwise), 1),
    ],
)
def test_what_is_not_known_runs_as_itself(change, fused_calls, blocks):
    models = pair(layers()[:5], torch.float64)
    for model in models:
        torch.manual_seed(2)
        change(model)
    plain, fused = models
    torch.testing.assert_close(results(fused, input(torch.float64)), results(plain, input(torch.float64)))
    assert len(blocks) == fused_calls


def test_sync_batch_norm_is_called():
    _, fused = pair(layers())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    called = []
    for module in converted:
        if isinstance(module, nn.SyncBatchNorm):
            module.forward = lambda x: called.append(x.shape) or x
    converted(input())
    assert len(called) == 3


def test_a_norm_of_one_value_is_refused():
    model = FusedSequential(separable(3, 8), nn.BatchNorm2d(8), separable(8, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel.*1, 8, 1, 1"):
        model(torch.randn(1, 3, 1, 1))
    assert model.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 2, 1, 1)


def test_an_empty_batch_leaves_the_statistics():
    plain, fused = pair(layers())
    x = input(N=0)
    assert fused(x).shape == plain(x).shape
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


def test_copies_and_parts():
    _, fused = pair(layers())
    x = input()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x))
    assert type(fused[:2]) is FusedSequential
    torch.testing.assert_close(fused[2:](fused[:2](x)), fused(x))


def projection(in_channels, out_channels, stride=1, **norm):
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels, **norm)


# The layers of the branches, and those before both; how many blocks there are, and how many moments.
MODULES = {
    "identity": (lambda: ([nn.ReLU(), separable(3, 3), nn.BatchNorm2d(3)], [], []), 1, 0),
    "relu at the end": (
        lambda: ([separable(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True)], projection(3, 6), []),
        2,
        0,
    ),
    "no norm at the end": (lambda: ([separable(3, 3)], [], []), 1, 0),
    "projection": (lambda: ([separable(3, 6), nn.BatchNorm2d(6)], projection(3, 6), []), 2, 0),
    "projection, no norm at the end": (lambda: ([separable(3, 6)], projection(3, 6), []), 2, 0),
    "pool": (
        lambda: (
            [separable(3, 6), nn.BatchNorm2d(6), MaxPoolSame()],
            projection(3, 6, 2),
            [nn.BatchNorm2d(3), nn.ReLU()],
        ),
        2,
        1,
    ),
    "torch's pool, affine=False": (
        lambda: (
            [
                nn.ReLU(),
                separable(3, 6),
                nn.BatchNorm2d(6, affine=False),
                nn.MaxPool2d((2, 3), 2, (0, 1), ceil_mode=True),
            ],
            projection(3, 6, (2, 2), affine=False),
            [nn.BatchNorm2d(3, affine=False), nn.ReLU(inplace=True)],
        ),
        2,
        1,
    ),
    "dilated pool": (
        lambda: ([separable(3, 6), nn.BatchNorm2d(6), nn.MaxPool2d(3, 1, 1, dilation=2)], [nn.Conv2d(3, 6, 3)], []),
        1,
        0,
    ),
    "another shortcut": (
        lambda: ([separable(3, 6), nn.BatchNorm2d(6)], [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()], []),
        1,
        0,
    ),
    "other layers before": (lambda: ([separable(3, 6)], projection(3, 6), [nn.BatchNorm2d(3), nn.ELU()]), 2, 0),
    "layers before, for one branch": (lambda: ([separable(3, 3)], [], [nn.BatchNorm2d(3), nn.ReLU()]), 1, 0),
    "other layers first": (
        lambda: ([nn.ELU(), separable(3, 3)], projection(3, 3), [nn.BatchNorm2d(3), nn.ReLU()]),
        2,
        0,
    ),
    "nothing to fuse": (lambda: ([nn.Conv2d(3, 3, 1)], projection(3, 3), []), 1, 0),
    "convolution before": (
        lambda: (
            [separable(5, 6), nn.BatchNorm2d(6)],
            projection(5, 6),
            [nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()],
        ),
        2,
        0,
    ),
    "no layers": (lambda: ([], projection(3, 3), [nn.BatchNorm2d(3), nn.ReLU()]), 1, 0),
    "strided identity": (lambda: ([separable(3, 3)], [nn.Sequential()], [nn.ReLU()]), 1, 0),
}


class Residual(nn.Module):
    def __init__(self, kind, main, shortcut, before):
        super().__init__()
        self.main, self.shortcut, self.before = kind(*main), nn.ModuleList(shortcut), nn.ModuleList(before)

    def forward(self, x):
        if isinstance(self.main, FusedSequential):
            return self.main.plus(x, self.shortcut, self.before)
        x = block._called(self.before, x)
        return self.main(x) + block._called(self.shortcut, x)


def residuals(name, seed=0):
    """A residual module of ``nn.Sequential``, and the same with ``plus``, with norms of either sign."""
    torch.manual_seed(seed)
    made = MODULES[name][0]()
    models = [Residual(kind, *copy.deepcopy(made)).double() for kind in (nn.Sequential, FusedSequential)]
    for module in models[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.fixture
def moments(monkeypatch):
    calls = []
    run = block.with_moments
    monkeypatch.setattr(block, "with_moments", lambda y: calls.append(y.shape) or run(y))
    return calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", MODULES)
def test_residual_modules(name, layout, blocks, moments):
    plain, fused = residuals(name)
    for step in range(2):
        x = input(torch.float64, layout=layout) * (step + 1) + step
        torch.testing.assert_close(results(fused, x), results(plain, x))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    if layout is torch.channels_last:
        assert (len(blocks), len(moments)) == (2 * MODULES[name][1], 2 * MODULES[name][2])
    for model in (plain, fused):
        model.eval()
    torch.testing.assert_close(results(fused, x), results(plain, x))
    assert not any(statistics for _, _, statistics in blocks[2 * MODULES[name][1] :])
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.main.register_forward_hook(lambda module, args, y: 2 * y),
        lambda model: model.main[1].register_forward_hook(lambda module, args, y: 2 * y),
        lambda model: model.shortcut[0].register_forward_hook(lambda module, args, y: 2 * y),
        lambda model: model.shortcut[1].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda model: model.before[0].register_forward_hook(lambda module, args, y: 2 * y),
        lambda model: model.before[1].register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)),
        lambda model: model.shortcut.__setitem__(1, Doubled(6, dtype=torch.float64)),
    ],
)
def test_hooks_of_residual_modules_are_called(change):
    models = residuals("pool")
    for model in models:
        torch.manual_seed(2)
        change(model)
    plain, fused = models
    torch.testing.assert_close(results(fused, input(torch.float64)), results(plain, input(torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["identity", "pool"])
def test_residual_modules_agree(name, dtype):
    plain, fused = (model.to(dtype) for model in residuals(name))
    exact, x = copy.deepcopy(plain).double(), input(dtype, mean=3)
    found = [results(model, t) for model, t in ((fused, x), (plain, x), (exact, x.double()))]
    assert_all_no_worse_than_torch(*found, "output and gradients")
    statistics = [[b for b in model.buffers() if b.is_floating_point()] for model in (fused, plain, exact)]
    assert_all_no_worse_than_torch(*statistics, "running statistics")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("train", [True, False])
def test_norm_and_relu(train, layout, moments):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)).double().train(train)
    nn.init.normal_(plain[0].weight)
    fused = copy.deepcopy(plain)
    x = input(torch.float64, layout=layout, mean=1)
    found = [
        [t.detach() if i == 0 else t for i, t in enumerate(made)]
        for made in (results(Run(fused), x), results(plain, x))
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    assert len(moments) == (train and layout is torch.channels_last)


class Run(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return block.run_norm_and_relu(list(self.layers), x * 1)


def test_layers_may_be_iterators():
    plain, fused = residuals("pool")
    x = input(torch.float64)
    torch.testing.assert_close(fused.main.plus(x, iter(fused.shortcut), iter(fused.before)), plain(x))


def test_a_result_may_be_changed_in_place():
    """Torch refuses to change what is a view of recycled memory."""
    fused = nn.Sequential(FusedSequential(separable(3, 32), nn.BatchNorm2d(32)), nn.ReLU(inplace=True))
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert fused(x).numel() * 4 > cpu._RECYCLED_BYTES
    fused(x).sum().backward()


@needs.compiling
@pytest.mark.parametrize("name", ["identity", "pool"])
def test_residual_modules_compile(name):
    plain, fused = residuals(name)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = input(torch.float64)
    torch.testing.assert_close(results(compiled, x), results(plain, x))
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


@needs.compiling
def test_compile():
    plain, fused = pair(layers())
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = input()
    torch.testing.assert_close(results(compiled, x), results(plain, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())
