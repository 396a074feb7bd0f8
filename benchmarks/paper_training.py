"""What paper.py trains: data, networks of any width, and a training of one by a recipe of ``xsep.train``."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from xsep.models import vgg_separable, xception
from xsep.train.averaging import Average
from xsep.train.metrics import correct_in_top
from xsep.train.recipes import Recipe, learning_rate, make_loss, make_optimizer


class Data(NamedTuple):
    name: str
    train: Dataset  # pairs of an image (3, size, size) in [-1, 1] and the number of its class
    validation: Dataset
    classes: int


def digits(size: int) -> Data:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged; a fifth validates."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    whole = TensorDataset(images, torch.tensor(found.target))
    train, validation = train_test_split(range(len(whole)), test_size=0.2, random_state=0, stratify=found.target)
    return Data(
        "scikit-learn's handwritten digits, enlarged from 8 px",
        Subset(whole, train),
        Subset(whole, validation),
        classes=10,
    )


def folders(path: Path, size: int) -> Data:
    """A folder per class: below ``train`` and ``val``, or below ``path``, where every fifth image of a class validates.

    Training sees random crops and mirror images, validation one crop of the centre.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        common.fail(f"--data: {path} is not a folder")
    scaled = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    random = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *scaled])
    center = transforms.Compose([transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size), *scaled])
    apart = (path / "train").is_dir() and (path / "val").is_dir()
    try:
        train = ImageFolder(str(path / "train" if apart else path), random, loader=_image)
        validation = ImageFolder(str(path / "val" if apart else path), center, loader=_image)
    except FileNotFoundError as error:  # no folder in it, or one without images
        common.fail(f"--data: {error}")
    if train.classes != validation.classes:
        common.fail(f"--data: the classes of {path}/train and {path}/val differ")
    if len(train.classes) < 2:
        common.fail(f"--data: {path} has one class only, {train.classes[0]}; a folder per class is needed")
    if apart:
        return Data(str(path), train, validation, len(train.classes))
    held_out, seen = set(), [0] * len(train.classes)
    for i, label in enumerate(train.targets):
        seen[label] += 1
        if seen[label] % 5 == 0:
            held_out.add(i)
    if not held_out:
        common.fail(f"--data: no class of {path} has five images, of which one could validate")
    kept = [i for i in range(len(train)) if i not in held_out]
    return Data(str(path), Subset(train, kept), Subset(validation, sorted(held_out)), len(train.classes))


def _image(file: str):
    from PIL import Image

    try:
        return Image.open(file).convert("RGB")
    except OSError as error:
        raise OSError(f"--data: cannot read {file}: {error}") from error


WEIGHT_DECAY = {"xception": 1e-5, "vgg_separable": 1e-5, "inception_v3": 4e-5}


def inception_v3(num_classes: int, drop_rate: float, fc_layers: int = 0) -> nn.Module:
    """torchvision's, without the auxiliary tower; ``fc_layers`` of 4096 units as ``xception``'s."""
    from torchvision.models import inception_v3 as torchvision_inception_v3

    model = torchvision_inception_v3(
        weights=None, aux_logits=False, init_weights=False, num_classes=num_classes, dropout=drop_rate
    )
    layers: list[nn.Module] = []
    width = model.fc.in_features
    for _ in range(fc_layers):
        layers += [nn.Linear(width, 4096), nn.ReLU(inplace=True)]
        width = 4096
    model.fc = nn.Sequential(*layers, nn.Linear(width, num_classes))
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "xception": xception,
    "inception_v3": inception_v3,
    "vgg_separable": vgg_separable,
}


def network(name: str, classes: int, divisor: int, recipe: Recipe, options: dict[str, Any]) -> nn.Module:
    """A new network with every layer ``divisor`` times as narrow; initial values and BatchNorm's constants are alike.

    The image's channels, the classes and the number of segments stay.
    """
    with torch.device("meta"):  # its values are drawn below, at its width
        model = NETWORKS[name](num_classes=classes, drop_rate=recipe.drop_rate, **options)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

    def narrow(channels: int) -> int:
        return channels if channels == 3 else channels // divisor

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            each = 1 if module.groups == module.in_channels else narrow(module.in_channels) // module.groups
            module.in_channels, module.out_channels = narrow(module.in_channels), narrow(module.out_channels)
            module.groups = module.in_channels // each
            module.weight = nn.Parameter(torch.empty(module.out_channels, each, *module.kernel_size))
        elif isinstance(module, nn.Linear):
            out_features = module.out_features if module is classifier else narrow(module.out_features)
            module.__init__(narrow(module.in_features), out_features)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            # Large training runs average for longer, Keras with 0.01; hundreds of steps are too few for that.
            module.__init__(narrow(module.num_features), eps=1e-3, momentum=0.1)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
    return model


class Point(NamedTuple):
    """A point of a training profile; the accuracies are those of the averaged weights on the validation set."""

    step: int
    epoch: float
    lr: float
    loss: float  # of training, mean since the last point
    top1: float
    top5: float


class Settings(NamedTuple):
    """What all runs share."""

    steps: int
    evaluations: int
    batch_size: int
    divisor: int
    device: str
    amp: bool
    workers: int


def train(
    name: str,
    options: dict[str, Any],
    recipe: Recipe,
    data: Data,
    settings: Settings,
    seed: int,
    progress: Callable[[], object],
) -> list[Point]:
    """Trains a new network from ``seed``; ``progress`` is called after each step."""
    torch.manual_seed(seed)
    model = network(name, data.classes, settings.divisor, recipe, options)
    model = model.to(settings.device, memory_format=torch.channels_last)
    average = Average(model, recipe.average)
    average.eval()
    optimizer = make_optimizer(dataclasses.replace(recipe, weight_decay=WEIGHT_DECAY[name]), model)
    loss_of = make_loss(recipe)
    amp = torch.autocast(settings.device, torch.bfloat16) if settings.amp else contextlib.nullcontext()
    wanted = {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
    points: list[Point] = []
    losses: list[Tensor] = []
    for step, (x, labels) in enumerate(_batches(data.train, settings, seed)):
        samples = step * settings.batch_size
        lr = learning_rate(recipe, samples / len(data.train), samples, settings.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with amp:
            loss = loss_of(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.detach())
        progress()
        if step + 1 in wanted:
            epoch = (step + 1) * settings.batch_size / len(data.train)
            with amp:
                accuracies = accuracy(average.module, data, settings)
            points.append(Point(step + 1, epoch, lr, torch.stack(losses).mean().item(), *accuracies))
            losses = []
    return points


def _batches(dataset: Dataset, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``settings.steps`` batches, every epoch in another order."""
    loader = DataLoader(
        dataset,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
        generator=torch.Generator().manual_seed(seed),
    )
    done = 0
    while True:
        for x, labels in loader:
            if done == settings.steps:
                return
            done += 1
            yield _moved(x, labels, settings.device)


def _moved(x: Tensor, labels: Tensor, device: str) -> tuple[Tensor, Tensor]:
    return x.to(device, memory_format=torch.channels_last), labels.to(device)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, settings: Settings) -> tuple[float, float]:
    """Of the validation set, the fractions whose class is the most probable one and among the five most probable."""
    first = fifth = 0
    loader = DataLoader(data.validation, 64, num_workers=settings.workers)
    for x, labels in loader:
        x, labels = _moved(x, labels, settings.device)
        logits = model(x)
        first += correct_in_top(logits, labels, 1)
        fifth += correct_in_top(logits, labels, 5)
    count = len(data.validation)
    return first / count, fifth / count
