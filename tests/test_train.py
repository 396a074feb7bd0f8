"""``xsep.train``: what a training computes, and that neither a signal nor bad data nor a full disk loses anything."""

import copy
import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from safetensors.torch import load_file
from torch import nn
from training import CLASSES, Net, train, write_folders, write_shards

from xsep.testing import assert_no_worse_than_torch
from xsep.train import RECIPES, mean_average_precision
from xsep.train.__main__ import _parser as parser
from xsep.train.__main__ import main, make_recipe
from xsep.train.averaging import Average
from xsep.train.data import DataError, EpochOrder, Plan
from xsep.train.evaluate import main as evaluate
from xsep.train.loop import Diverged
from xsep.train.metrics import average_precision, correct_in_top
from xsep.train.recipes import learning_rate, make_loss, make_optimizer
from xsep.train.splits import open_split, read_weights
from xsep.train.state import found

ROOT = Path(__file__).parents[1]
PROGRAM = str(Path(training.__file__))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A training that nothing stopped: 12 steps."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole")
    assert train(folders, output) == 0
    return output


def program(*launcher, **options):
    command = [sys.executable, *launcher, PROGRAM, json.dumps({k: options[k] for k in options}, default=str)]
    # TP: over the loopback interface, whatever the machine's name resolves to.
    environment = {
        **os.environ,
        "TP_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def same(a, b):
    """Whether two values of a state are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(output, other):
    """Weights, average, and all that the next step would depend on, random numbers included."""
    ours, theirs = found(Path(output))[0], found(Path(other))[0]
    assert ours.name == theirs.name
    for name in ("model.safetensors", "average.safetensors"):
        assert same(load_file(ours / name), load_file(theirs / name)), name
    ours, theirs = (torch.load(path / "state.pt", weights_only=True) for path in (ours, theirs))
    for key in ours:
        assert same(ours[key], theirs[key]), key


def test_the_numbers_of_the_paper():
    imagenet, jft = RECIPES["imagenet"], RECIPES["jft"]
    assert (imagenet.optimizer, imagenet.momentum, imagenet.lr, imagenet.drop_rate) == ("sgd", 0.9, 0.045, 0.5)
    assert (imagenet.lr_decay, imagenet.decay_epochs, imagenet.weight_decay) == (0.94, 2, 1e-5)
    assert (jft.optimizer, jft.momentum, jft.lr, jft.drop_rate) == ("rmsprop", 0.9, 0.001, 0)
    assert (jft.lr_decay, jft.decay_epochs, jft.decay_samples, jft.weight_decay) == (0.9, 0, 3_000_000, 1e-5)


def test_every_number_is_a_flag():
    given = vars(parser().parse_args(["--data", "x", "--output", "y", "--recipe", "jft"]))
    assert make_recipe(given) == RECIPES["jft"]
    flags = ["--lr", "0.5", "--weight-decay", "4e-5", "--decay-samples", "7", "--drop-rate", "0.25", "--epochs", "3"]
    changed = make_recipe(vars(parser().parse_args(["--data", "x", "--output", "y", *flags])))
    assert (changed.lr, changed.weight_decay, changed.decay_samples) == (0.5, 4e-5, 7)
    assert (changed.drop_rate, changed.epochs, changed.momentum) == (0.25, 3, 0.9)


def test_learning_rates():
    imagenet, jft = RECIPES["imagenet"], RECIPES["jft"]
    rates = [learning_rate(imagenet, epochs, 0, 32) for epochs in (0, 1.99, 2, 3.5, 4, 20)]
    assert rates == pytest.approx([0.045, 0.045, 0.045 * 0.94, 0.045 * 0.94, 0.045 * 0.94**2, 0.045 * 0.94**10])
    rates = [learning_rate(jft, 99, samples, 32) for samples in (0, 2_999_999, 3_000_000, 9_000_001)]
    assert rates == pytest.approx([0.001, 0.001, 0.0009, 0.001 * 0.9**3])
    scaled = make_recipe(vars(parser().parse_args(["--data", "x", "--output", "y", "--lr-batch", "32"])))
    assert learning_rate(scaled, 0, 0, 256) == pytest.approx(0.045 * 8)


def test_optimizers():
    net = Net()
    for name, kind in (("imagenet", "SGD"), ("jft", "RMSpropTF")):
        optimizer = make_optimizer(RECIPES[name], net)
        assert type(optimizer).__name__ == kind
        for group in optimizer.param_groups:
            assert group["momentum"] == 0.9
            assert all(group["weight_decay"] == (1e-5 if p.dim() > 1 else 0) for p in group["params"])
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))


def test_losses():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([1, 0, 4, 4])
    hot = nn.functional.one_hot(classes, 5).float()
    softmax, sigmoid = make_loss(RECIPES["imagenet"]), make_loss(RECIPES["jft"])
    expected = -logits.log_softmax(1)[range(4), classes].mean()
    assert softmax(logits, classes).item() == pytest.approx(expected.item(), rel=1e-5)
    assert softmax(logits, 3 * hot).item() == pytest.approx(expected.item(), rel=1e-5)
    p = logits.sigmoid()
    expected = -(hot * p.log() + (1 - hot) * (1 - p).log()).sum() / 4
    assert sigmoid(logits, hot).item() == pytest.approx(expected.item(), rel=1e-5)
    assert sigmoid(logits, classes).item() == pytest.approx(expected.item(), rel=1e-5)


def test_averaging():
    net = Net()
    average = Average(net, 0.6)
    expected = {name: t.clone().double() for name, t in net.state_dict().items()}
    for update in range(8):
        net.train()(torch.randn(4, 3, 8, 8))  # changes BatchNorm's statistics
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        average.update_parameters(net)
        decay = min(0.6, (1 + update) / (10 + update))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def naive_average_precision(scores, labels, k, weights):
    ranked = sorted(range(len(scores)), key=lambda c: -scores[c])[:k]
    total = hits = 0.0
    for rank, c in enumerate(ranked, 1):
        if labels[c]:
            hits += 1
            total += weights[c] * hits / rank
    best = sum(sorted((w for w, label in zip(weights, labels) if label), reverse=True)[:k])
    return total / best if best else float("nan")


@pytest.mark.parametrize("k", [1, 5, 100])
def test_map_against_naive_loops(k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(20, 130, generator=generator)
    labels = (torch.rand(20, 130, generator=generator) < torch.linspace(0, 1, 20)[:, None]).float()  # none to all
    weights = torch.rand(130, generator=generator).double()
    weights[::3] = 0
    for given in (weights, None):
        used = torch.ones(130) if given is None else given
        expected = [naive_average_precision(*pair, k, used.tolist()) for pair in zip(scores.tolist(), labels.tolist())]
        np.testing.assert_allclose(average_precision(scores, labels, k, given).numpy(), expected, rtol=1e-12)
        assert mean_average_precision(scores, labels, k, given) == pytest.approx(np.nanmean(expected))
    assert np.isnan(expected[0]) and expected[-1] == pytest.approx(1)


def test_top_accuracy():
    logits = torch.tensor([[0.1, 3.0, 2.0], [5.0, 1.0, 4.0]])
    assert [correct_in_top(logits, torch.tensor([2, 0]), k) for k in (1, 2, 5)] == [1, 2, 2]


def test_processes_share_the_steps_of_one():
    one = list(EpochOrder(50, Plan(12, seed=3), 1, 0))
    shares = [list(EpochOrder(50, Plan(3, accumulate=2, rank=rank, world=2, seed=3), 1, 0)) for rank in range(2)]
    assert len(one) == 4 and len(shares[0]) == len(shares[1]) == 8
    for step, batch in enumerate(one):
        parts = [share[2 * step + part] for part in range(2) for share in shares]
        assert [item for part in parts for item in part] == batch
    assert len({index for batch in one for index, _ in batch}) == 48
    assert list(EpochOrder(50, Plan(12, seed=3), 1, 3)) == one[3:]
    assert list(EpochOrder(50, Plan(12, seed=3), 2, 0)) != one


def test_a_training(folders, whole):
    """What it writes, and that it learns."""
    lines = rows(whole / "training.csv")
    assert [int(line["step"]) for line in lines] == list(range(1, 13))
    assert {float(line["lr"]) for line in lines} == {0.045}
    scores = rows(whole / "evaluation.csv")
    assert [(line["epoch"], line["weights"], line["images"]) for line in scores] == [
        (epoch, weights, "9.0") for epoch in ("1", "2") for weights in ("model", "average")
    ]
    assert [path.name for path in found(whole)] == ["checkpoint-000000012", "checkpoint-000000006"]
    assert not [path for path in whole.iterdir() if path.name.startswith(".")]


def test_it_learns(folders, tmp_path):
    assert (
        train(folders, tmp_path, Net(norm=False, dropout=False), numbers={"epochs": 15, "lr": 0.1, "average": 0.9}) == 0
    )
    scores = rows(tmp_path / "evaluation.csv")[-2:]
    assert [float(line["top1"]) for line in scores] == [1, 1]


def test_resumes_after_a_kill(folders, tmp_path):
    """SIGKILL in the forward pass of step 9; the last checkpoint is of step 8.  Each in a new process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert program(data=folders, output=whole).returncode == 0
    killed = program(data=folders, output=parts, save_steps=2, die=9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert found(parts)[0].name == "checkpoint-000000008"
    assert program(data=folders, output=parts, resume=True, save_steps=2).returncode == 0
    assert_same_end(parts, whole)
    assert [int(line["step"]) for line in rows(parts / "training.csv")] == list(range(1, 13))
    assert len(rows(parts / "evaluation.csv")) == 4


def test_sigterm_saves(folders, whole, tmp_path, capfd):
    torch.manual_seed(0)
    net = Net()
    net.acts = {5: signal.SIGTERM}
    assert train(folders, tmp_path, net, workers=1) == 128 + signal.SIGTERM
    assert "stopped after step 5; --resume continues" in capfd.readouterr().err
    assert found(tmp_path)[0].name == "checkpoint-000000005"
    assert train(folders, tmp_path, resume=True) == 0
    assert_same_end(tmp_path, whole)


def test_shards_resume(shards, tmp_path):
    """With two workers, and a shuffled order; the same images are seen as without a stop."""
    options = dict(workers=2, batch_size=3)
    assert train(shards, tmp_path / "whole", **options) == 0
    assert train(shards, tmp_path / "parts", max_steps=3, **options) == 0
    assert train(shards, tmp_path / "parts", max_steps=13, resume=True, **options) == 0
    assert found(tmp_path / "parts")[0].name == "checkpoint-000000013"
    assert train(shards, tmp_path / "parts", resume=True, **options) == 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def weights_after(output):
    return load_file(found(Path(output))[0] / "model.safetensors")


def alone(folders, output, dtype, net, **options):
    """The weights after a training in this process."""
    torch.manual_seed(0)
    assert train(folders, output, Net(**net).to(dtype), **options) == 0
    return weights_after(output)


def test_two_processes_are_one_with_the_double_batch(folders, tmp_path):
    """With statistics of both batches, in BatchNorms that are applied on load and others."""
    net = {"dropout": False}
    double = program(*TWO, data=folders, output=tmp_path / "two", net=net, batch_size=4, sync_bn=True)
    assert double.returncode == 0, double.stderr
    assert double.stderr.count("step 6, epoch 2.00") == 1, double.stderr  # of one process only
    ours = weights_after(tmp_path / "two")
    torch_same = alone(folders, tmp_path / "one", torch.float32, net, batch_size=8)
    ref64 = alone(folders, tmp_path / "exact", torch.float64, net, batch_size=8)
    assert ours.keys() == ref64.keys()
    for name, reference in ref64.items():
        assert_no_worse_than_torch(ours[name], torch_same[name], reference, name)
    torch.manual_seed(0)
    start = Net(**net).state_dict()
    assert all((ref64[name] - start[name]).abs().max() > 1e-4 for name in start)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_asynchronous_updates(folders, tmp_path):
    """Each process makes an update of every batch of its own; after a stop of one all stop, and go on."""
    options = dict(data=folders, output=tmp_path, asynchronous=True, net={"dropout": False}, numbers={"epochs": 6})
    stopped = program(*TWO, **options, stop=4)
    assert stopped.returncode != 0 and "--resume continues" in stopped.stderr, stopped.stderr
    step = int(found(tmp_path)[0].name.split("-")[1])
    state = torch.load(found(tmp_path)[0] / "state.pt", weights_only=True)
    assert 4 <= step <= 6 and state["averaged"] == step + 4  # within the second epoch
    done = program(*TWO, **options, resume=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 18, epoch 6.00") == 1, done.stderr
    after = torch.load(found(tmp_path)[0] / "state.pt", weights_only=True)
    assert after["averaged"] == state["averaged"] + 2 * (18 - step) and not after["random"]
    # Which gradients are late, and so what is learned, is left to chance; a guess is right for a third of the images.
    assert float(rows(tmp_path / "evaluation.csv")[-2]["top1"]) > 2 / 3
    assert load_file(found(tmp_path)[0] / "model.safetensors")["1.num_batches_tracked"] == after["averaged"]


def test_a_server_of_weights():
    """It updates weights that have changed since the gradients were computed, and adds to the statistics."""
    from xsep.train.asynchronous import Server, tensors

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copies = [copy.deepcopy(model) for _ in range(2)]
    server = Server(model, torch.optim.SGD(model.parameters(), lr=9), Average(model, 0.5))
    start = [t.clone() for t in tensors(model)]
    expected = [t.clone().double() for t in start]
    for worker, rate in zip(copies, (0.5, 0.25)):
        worker(torch.randn(5, 3)).square().sum().backward()
        gradients = [p.grad for p in worker.parameters()]
        changes = [after - before for after, before in zip(worker.buffers(), start[4:])]
        for t, change in zip(expected, [*(-rate * g for g in gradients), *changes]):
            t += change.double()
        values, signal = server.update(gradients, changes, rate, 3 if worker is copies[0] else 0)
        assert signal == 3
        for value, mine, reference in zip(values, tensors(model), expected):
            assert torch.equal(value, mine) and value.data_ptr() != mine.data_ptr()
            torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 2 and server.average.n_averaged == 2
    assert all(p.grad is None for p in model.parameters())


def test_accumulated_batches_are_one(folders, tmp_path):
    """Without BatchNorm, whose statistics are those of a batch."""
    net = {"norm": False, "dropout": False}
    ours = alone(folders, tmp_path / "accumulated", torch.float32, net, batch_size=2, accumulate=4)
    torch_same = alone(folders, tmp_path / "one", torch.float32, net, batch_size=8)
    ref64 = alone(folders, tmp_path / "exact", torch.float64, net, batch_size=8)
    for name, reference in ref64.items():
        assert_no_worse_than_torch(ours[name], torch_same[name], reference, name)
    torch.manual_seed(0)
    start = Net(**net).state_dict()
    assert all((ref64[name] - start[name]).abs().max() > 1e-4 for name in start)


def test_unreadable_images(folders, tmp_path, capfd):
    """They are named, others take their place, and evaluations leave them out."""
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    for file in (data / "train" / "dark" / "3.jpg", data / "val" / "grey" / "0.jpg"):
        file.write_bytes(file.read_bytes()[:-100])
    (data / "train" / "grey" / "2.jpg").write_bytes(b"no picture")
    assert train(data, tmp_path / "run") == 0
    messages = capfd.readouterr().err
    assert f"cannot read {data / 'train' / 'dark' / '3.jpg'}: image file is truncated" in messages
    assert f"cannot read {data / 'train' / 'grey' / '2.jpg'}: cannot identify image file" in messages
    assert f"cannot read {data / 'val' / 'grey' / '0.jpg'}: " in messages
    assert len(rows(tmp_path / "run" / "training.csv")) == 12
    assert {line["images"] for line in rows(tmp_path / "run" / "evaluation.csv")} == {"8.0"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_vanishes(folders, tmp_path, workers):
    """As when a disk is unmounted: the training ends with a message, and what was saved stays."""
    data = tmp_path / "data"
    shutil.copytree(folders / "train", data / "train")
    assert train(data, tmp_path / "run", max_steps=2) == 0
    split = open_split(data, "train", False)
    shutil.rmtree(data / "train")
    with pytest.raises(DataError, match=r"20 images in a row cannot be read; the last was .*\.jpg$"):
        training.fit(
            Net(),
            split,
            None,
            RECIPES["imagenet"],
            training.Options(tmp_path / "run", batch_size=4, size=16, resume=True, workers=workers),
        )
    assert [path.name for path in found(tmp_path / "run")] == ["checkpoint-000000002"]


def test_empty_class_folder(folders, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    for file in (data / "train" / "dark").iterdir():
        file.unlink()
    assert main(["--data", str(data), "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"{data / 'train'}: no image in the folders of these classes: dark; put images there" in message
    assert not (tmp_path / "run").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def damage_a_header(path):
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = b"x" * 512
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [(cut, "unexpected end of data", 2), (damage_a_header, "no header of a file at byte", 2), (empty, "empty", 0)]


@pytest.mark.parametrize("damage, reason, left", DAMAGES, ids=["cut", "header", "empty"])
def test_corrupt_shard(shards, tmp_path, capfd, damage, reason, left):
    """It is named, and what lies before the damage is used."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    broken = data / "train" / "0002.tar"
    damage(broken)
    assert train(data, tmp_path / "run", batch_size=2) == 0
    assert f"cannot read the rest of the shard {broken}: {reason}" in capfd.readouterr().err
    assert int(found(tmp_path / "run")[0].name[-9:]) == 2 * (18 + left) // 2


def test_shards_with_wrong_labels(shards, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    (data / "classes.txt").write_text("bright\ndark\n")
    assert train(data, tmp_path / "run", Net(classes=2)) == 0
    assert "0000.tar: 000002: label '2' is none of the 2 classes" in capfd.readouterr().err


def test_shards_that_are_too_few(shards, tmp_path):
    with pytest.raises(DataError, match="4 shards for 1 processes with 5 workers"):
        train(shards, tmp_path, workers=5)


def test_full_disk(folders, whole, tmp_path, monkeypatch, capfd):
    """The checkpoint before stays, the training goes on, and it is as if nothing had happened when there is room."""
    fsync, room = os.fsync, [False]

    def full(descriptor):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    room[0] = True
    monkeypatch.setattr(os, "fsync", full)
    assert train(folders, tmp_path, max_steps=4) == 0
    room[0] = False
    assert train(folders, tmp_path, resume=True, max_steps=8) == 1
    message = capfd.readouterr().err
    assert "cannot save a checkpoint at step 8: [Errno 28] No space left on device; the last one is" in message
    assert "checkpoint-000000004" in message
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-000000004"]
    room[0] = True
    assert train(folders, tmp_path, resume=True) == 0
    assert_same_end(tmp_path, whole)


def test_damaged_checkpoint(folders, whole, tmp_path, capfd):
    """The one before is used; where there is none, nothing is thrown away."""
    shutil.copytree(whole, tmp_path / "run")
    newest = found(tmp_path / "run")[0]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:1000])
    assert train(folders, tmp_path / "run", resume=True, max_steps=7) == 0
    message = capfd.readouterr().err
    assert f"{newest}: cannot be read: " in message and "trying the one before" in message
    assert "continuing" in message and "checkpoint-000000006 at step 6" in message


def test_refusals(folders, whole, tmp_path):
    with pytest.raises(FileExistsError, match="--resume continues it"):
        train(folders, whole)
    with pytest.raises(ValueError, match="of another model, or for another number of classes"):
        train(folders, whole, Net(classes=5), resume=True)
    with pytest.raises(DataError, match="24 images to train on are fewer than the global batch, 25"):
        train(folders, tmp_path, batch_size=25)
    with pytest.raises(ValueError, match="drop_rate must be less than 1"):
        train(folders, tmp_path, numbers={"drop_rate": 1.0})
    for bad, text in (({"sync_bn": True}, "sync_bn True"), ({"amp": "fp16"}, "amp fp16")):
        with pytest.raises(ValueError, match=f"asynchronous.*do not wait for each other, as {text} would need"):
            train(folders, tmp_path, asynchronous=True, **bad)
    assert len(found(whole)) == 2


def test_changes_at_a_resume_are_named(folders, tmp_path, capfd):
    assert train(folders, tmp_path, max_steps=2) == 0
    assert train(folders, tmp_path, max_steps=3, resume=True, batch_size=2, numbers={"lr": 0.01}) == 0
    assert "not exactly as it would have gone on: batch_size 4 → 2, lr 0.045 → 0.01" in capfd.readouterr().err
    assert float(rows(tmp_path / "training.csv")[-1]["lr"]) == 0.01


def test_divergence_is_not_saved(folders, tmp_path):
    assert train(folders, tmp_path, max_steps=2) == 0
    with pytest.raises(Diverged, match="the weights are not finite at step"):
        train(folders, tmp_path, resume=True, save_steps=1, numbers={"lr": 1e38})
    for path in found(tmp_path):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values()), path


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"channels_last": False, "accumulate": 2}], ids=str)
def test_precision_and_layout(folders, tmp_path, options):
    assert train(folders, tmp_path, max_steps=2, **options) == 0
    assert all(float(line["loss"]) < 10 for line in rows(tmp_path / "training.csv"))


def write_list(folder):
    """A list of some images, one of them with two labels, one with none, and weights of the classes."""
    lines = [f"train/{name}/{i}.jpg {name}" for name in CLASSES for i in range(3)]
    (folder / "train.txt").write_text("\n".join([*lines, "train/dark/3.jpg\tdark\tgrey", "train/dark/4.jpg"]))
    (folder / "val.txt").write_text("val/dark/0.jpg dark grey\nval/grey/1.jpg grey\n")
    (folder / "weights.txt").write_text("dark 2\ngrey 0.5\n")


def test_several_labels(folders, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    write_list(data)
    assert train(data, tmp_path / "run", multi_label=True, recipe="jft", numbers={"epochs": 1}) == 0
    scores = rows(tmp_path / "run" / "evaluation.csv")
    assert [line["images"] for line in scores] == ["2.0", "2.0"]
    assert all(0 < float(line["map100"]) <= 1 for line in scores)
    assert read_weights(data / "weights.txt", CLASSES).tolist() == [0, 2, 0.5]
    (data / "val.txt").write_text("val/dark/0.jpg night\n")
    with pytest.raises(DataError, match=r"val\.txt: labels that are none of the 3 classes: night"):
        train(data, tmp_path / "other", multi_label=True, recipe="jft")


def test_commands(folders, tmp_path, capsys):
    """Xception itself: a step, and an evaluation of its average."""
    flags = ["--data", str(folders), "--size", "71", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    assert main([*flags, "--output", str(tmp_path / "run"), "--max-steps", "1"]) == 0
    capsys.readouterr()
    weights = found(tmp_path / "run")[0] / "average.safetensors"
    assert evaluate([*flags, "--weights", str(weights)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 9 and 0 <= scores["top1"] <= scores["top5"] == 1


def test_bad_arguments(folders, tmp_path, capsys):
    def error(*flags):
        assert main(["--output", str(tmp_path / "run"), *flags]) == 2
        return capsys.readouterr().err

    assert "absent: no such folder" in error("--data", str(tmp_path / "absent"))
    assert "neither train.txt nor a folder train in it" in error("--data", str(tmp_path))
    assert "lr must not be negative" in error("--data", str(folders), "--lr", "-1")
    with pytest.raises(SystemExit):
        main(["--data", str(folders), "--output", str(tmp_path), "--batch-size", "0"])
    assert "must be at least 1; got 0" in capsys.readouterr().err
