"""A small network and small images to train on, and a training of them as a program of its own.

``python tests/training.py JSON`` runs ``fit`` on the folder ``data`` with the options in the JSON; ``net`` are
those of the network, ``die`` is the number of the forward pass at which it kills itself, ``stop`` that at which the
last process gets a SIGTERM.
"""

import dataclasses
import io
import json
import os
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from xsep import SeparableConv2d
from xsep.nn import FusedSequential
from xsep.train import RECIPES, Options, fit, processes
from xsep.train.splits import open_split

SIZE = 16
CLASSES = ["bright", "dark", "grey"]


class Net(FusedSequential):
    """Two separable convolutions, perhaps without BatchNorm or dropout."""

    def __init__(self, norm=True, dropout=True, classes=3):
        layers = [SeparableConv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [SeparableConv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, classes)]
        kept = {nn.BatchNorm2d: norm, nn.Dropout: dropout}
        super().__init__(*(layer for layer in layers if kept.get(type(layer), True)))
        self.calls, self.acts = 0, {}

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls in self.acts:
            os.kill(os.getpid(), self.acts[self.calls])
        return super().forward(x.to(self[-1].weight.dtype))


def jpeg(number, brightness):
    noise = np.random.default_rng(number).integers(0, 60, (20 + number % 7, 24, 3))
    data = io.BytesIO()
    Image.fromarray((noise + brightness).astype("uint8")).save(data, "JPEG")
    return data.getvalue()


def write_folders(folder):
    for start, (split, count) in enumerate({"train": 8, "val": 3}.items()):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = jpeg(1000 * start + 100 * label + i, 90 * label)
                (folder / split / name / f"{i}.jpg").write_bytes(image)
    return folder


def write_shards(folder, shards=4, count=6):
    (folder / "train").mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    for shard in range(shards):
        with tarfile.open(folder / "train" / f"{shard:04d}.tar", "w") as archive:
            for i in range(count):
                number = shard * count + i
                label = number % len(CLASSES)
                for ending, data in ((".jpg", jpeg(number, 90 * label)), (".cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:06d}{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def train(data, output, net=None, multi_label=False, joined=None, recipe="imagenet", numbers=None, **options):
    """The exit status of ``fit``.  ``numbers`` are the recipe's."""
    train_split = open_split(Path(data), "train", multi_label)
    validation = open_split(Path(data), "val", multi_label, train_split.classes) if (data / "val").exists() else None
    recipe = dataclasses.replace(RECIPES[recipe], **{"epochs": 2, **(numbers or {})})
    options = Options(Path(output), **{"batch_size": 4, "size": SIZE, "log_steps": 1, **options})
    if net is None:
        torch.manual_seed(options.seed)
        net = Net()
    return fit(net, train_split, validation, recipe, options, joined)


def main(given):
    torch.set_num_threads(1)
    joined = processes.start("cpu")
    torch.manual_seed(0)
    net = Net(**given.pop("net", {}))
    net.acts = {given.pop("die", 0): signal.SIGKILL}
    stop = given.pop("stop", 0)
    if joined.rank == joined.world - 1:
        net.acts[stop] = signal.SIGTERM
    status = train(Path(given.pop("data")), given.pop("output"), net, joined=joined, **given)
    processes.finish()
    return status


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
