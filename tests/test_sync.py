"""BatchNorm over the batches of two processes against one process with the batches of both.  torch has no yardstick of
its own on the CPU: ``nn.SyncBatchNorm`` refuses to synchronise there."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from gradients import assert_all_no_worse_than_torch
from torch import nn

from xsep import SeparableConv2d
from xsep.models.xception import Block
from xsep.nn import FusedSequential, SyncBatchNorm2d
from xsep.train import processes

WORLD = 2
# The largest error is that of a sum that cancels: of a single model's it is luck which is the smaller.
DRAWN = 10


def separable(in_channels, out_channels, **options):
    return SeparableConv2d(in_channels, out_channels, 3, padding=1, bias=False, **options)


def layers(**norm):
    """BatchNorms that are applied on load, and two that are not."""
    return FusedSequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6, **norm),
        nn.ReLU(inplace=True),
        separable(6, 8, depth_multiplier=2),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(inplace=True),
        separable(8, 5, activation="elu"),
        nn.BatchNorm2d(5, **norm),
        separable(5, 7),
        nn.BatchNorm2d(7, **norm),
    )


def inside():
    """BatchNorms that are all applied on load: ``nn.SyncBatchNorm`` itself does for them."""
    made = separable(3, 8), nn.BatchNorm2d(8), separable(8, 6), nn.BatchNorm2d(6), nn.ReLU(), separable(6, 4)
    return FusedSequential(*made)


def residual():
    return Block((3, 4, 3), nn.BatchNorm2d, None, True, True, None, None, True)


# A model, the class of its BatchNorms, the images of the first process, and the dtype.
CASES = {
    "uneven": (layers, SyncBatchNorm2d, 3, torch.float32),
    "all images in one process": (layers, SyncBatchNorm2d, 0, torch.float32),
    "bfloat16": (layers, SyncBatchNorm2d, 4, torch.bfloat16),
    "float64": (layers, SyncBatchNorm2d, 3, torch.float64),
    "without parameters, cumulative": (lambda: layers(affine=False, momentum=None), SyncBatchNorm2d, 3, torch.float32),
    "without running statistics": (lambda: layers(track_running_stats=False), SyncBatchNorm2d, 3, torch.float32),
    "torch's class": (inside, nn.SyncBatchNorm, 3, torch.float32),
    "residual": (residual, SyncBatchNorm2d, 3, torch.float32),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 63)), SyncBatchNorm2d, 3, torch.float32),
}


def made(name, seed, kind=None, group=None):
    """A model of a case, the same in every process, and its batches: of two steps, with means far from zero."""
    make, _, _, dtype = CASES[name]
    torch.manual_seed(seed)
    model = make().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.1, 0.9)
    if kind is not None:
        model = kind.convert_sync_batchnorm(model, group)
    x = torch.randn(2, 8, 3, 9, 7, dtype=torch.float64) + 3
    return model, x.to(dtype).contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def results(model, x, first=0, last=None):
    """Outputs and gradients of two steps on images ``first`` to ``last``, and running statistics after them."""
    outputs, losses = [], 0
    for batch in x:
        y = model(batch[first:last])
        sizes = len(batch), *y.shape[1:]
        # 11 divides no size: where each image has the same weights, BatchNorm's gradients are 0.
        weights = (torch.arange(math.prod(sizes)) % 11 - 3).to(y.dtype).view(sizes)
        losses = losses + (y * weights[first:last]).sum()
        outputs.append(y.detach())
    found = torch.autograd.grad(losses, [x, *model.parameters()])
    buffers = [b.clone() for b in model.buffers()]
    return outputs, [found[0][:, first:last], *found[1:]], buffers


def evaluated(model, x):
    with torch.no_grad():
        return model.eval()(x[0])


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    own_group = [dist.new_group([i]) for i in range(WORLD)][rank]
    found = {}
    for name, (_, kind, split, _) in CASES.items():
        for seed in range(DRAWN):
            model, x = made(name, seed, kind)
            found[name, seed] = (*results(model, x, *((0, split), (split, 8))[rank]), evaluated(model, x))
    model, x = made("float64", 0, SyncBatchNorm2d, own_group)
    found["own group"] = results(model, x, *((0, 3), (3, 8))[rank])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    processes.finish()


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by name."""
    folder = tmp_path_factory.mktemp("sync")
    torch.multiprocessing.spawn(rank_main, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_agree_with_one(name, found):
    drawn = [compared(name, seed, *(each[name, seed] for each in found)) for seed in range(DRAWN)]
    for what, of_kind in zip(("outputs", "gradients", "buffers", "outputs in eval mode"), zip(*drawn)):
        ours, theirs, truth = (sum(lists, []) for lists in zip(*of_kind))
        assert_agree(ours, theirs, truth, f"{what} of {name}")


def compared(name, seed, first, second):
    """Of each kind of result those of two processes, those of one, and the true ones."""
    (outputs, grads, buffers, y), (outputs_1, grads_1, buffers_1, y_1) = first, second
    assert all(map(torch.equal, buffers, buffers_1))
    plain, x = made(name, seed)
    if isinstance(plain, FusedSequential):
        plain = nn.Sequential(*plain)
    elif isinstance(plain, Block):
        plain.rep = nn.Sequential(*plain.rep)
    exact, wide = copy.deepcopy(plain).double(), x.detach().double().requires_grad_()
    ours = (
        [torch.cat(pair) for pair in zip(outputs, outputs_1)],
        [torch.cat((grads[0], grads_1[0]), 1), *(a + b for a, b in zip(grads[1:], grads_1[1:]))],
        buffers,
        [y, y_1],
    )
    theirs, truth = ((*results(m, x), [evaluated(m, x)] * 2) for m, x in ((plain, x), (exact, wide)))
    return zip(ours, theirs, truth)


def assert_agree(ours, theirs, truth, what):
    """The tolerance rule; in float64 torch's result is the truth."""
    if any(t.dtype == torch.float64 for t in ours):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
    elif ours:
        assert_all_no_worse_than_torch(ours, theirs, truth, what)


def test_a_process_group_of_one_has_its_own_statistics(found):
    for each, images in zip(found, ((0, 3), (3, 8))):
        model, x = made("float64", 0)
        for mine, yours in zip(each["own group"], results(model, x, *images)):
            torch.testing.assert_close(mine, yours)


def test_without_processes_it_is_batch_norm():
    model, x = made("float64", 0, SyncBatchNorm2d)
    assert sum(type(module) is SyncBatchNorm2d for module in model.modules()) == 4
    plain, _ = made("float64", 0)
    for mine, yours in zip(results(model, x), results(plain, x)):
        torch.testing.assert_close(mine, yours)
