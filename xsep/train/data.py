"""Images and their labels: folders of classes, and lists of files with any number of labels each.

Batches are uint8, which a GPU turns into numbers from -1 to 1 faster than workers could send them.  The order of an
epoch depends on the seed and the epoch alone, and how an image is cropped on these and the image: so a training can
continue at any step, with any number of workers.
"""

from __future__ import annotations

import multiprocessing
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Sequence, Union

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..classify import CROP
from .stopping import blocked

UNREADABLE = 20  # images in a row: then it is not the images, but the disk or the folder

Labels = Union[int, Sequence[int]]


class DataError(Exception):
    """What is wrong with the data, by name of the file."""


@dataclass(frozen=True)
class Plan:
    """How images are brought to this process: ``batch_size`` at a time to each of ``world``, with ``workers`` each."""

    batch_size: int
    accumulate: int = 1
    size: int = 299
    workers: int = 0
    seed: int = 0
    rank: int = 0
    world: int = 1
    pin_memory: bool = False

    @property
    def global_batch(self) -> int:
        """Images a step, of all processes."""
        return self.batch_size * self.accumulate * self.world

    def steps(self, count: int) -> int:
        """Of an epoch: what is left over for less than a step is seen in other epochs."""
        steps = count // self.global_batch
        if steps == 0:
            raise DataError(f"{count} images to train on are fewer than the global batch, {self.global_batch}")
        return steps

    def loader(self, dataset: Dataset, collate: Collate, **options: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # torch's own goes on where the last step left it
            **options,
        )


@dataclass(frozen=True)
class Collate:
    """A batch of samples: images (N, 3, H, W) and classes (N,), or which of ``classes`` labels they have (N, C)."""

    classes: int
    multi_label: bool

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor] | DataError:
        for sample in samples:
            if isinstance(sample, DataError):
                return sample  # raised in the process that trains, without a worker's traceback
        samples = [sample for sample in samples if sample is not None]
        images = torch.stack([image for image, _ in samples]) if samples else torch.empty(0, 3, 1, 1)
        if not self.multi_label:
            return images, torch.tensor([labels for _, labels in samples], dtype=torch.long)
        targets = torch.zeros(len(samples), self.classes)
        for row, (_, labels) in zip(targets, samples):
            row[torch.as_tensor(labels, dtype=torch.long)] = 1
        return images, targets


def batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """What a loader yields; raises a ``DataError`` that a worker sent."""
    others = multiprocessing.active_children()
    with blocked():  # a worker that a signal ends would end the training before it can save
        iterator = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    try:
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del iterator  # asks the workers to end, which those within a long read do not hear
        for worker in workers:
            worker.kill()


class Images(Dataset):
    """Files and their labels.  One that cannot be read is named, and the next takes its place while training."""

    def __init__(self, samples: list[tuple[Path, Labels]], classes: list[str], multi_label: bool):
        self.samples, self.classes, self.multi_label = samples, classes, multi_label
        self.transform: Callable[[Any], Tensor] | None = None
        self.training = True

    @property
    def count(self) -> int:
        return len(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Labels] | DataError | None:
        assert self.transform is not None
        index, seed = item
        for offset in range(UNREADABLE if self.training else 1):
            path, labels = self.samples[(index + offset) % len(self.samples)]
            try:
                image = read_pixels(path)
            except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
                complain(str(path), error)
            else:
                with seeded(seed):
                    return self.transform(image), labels
        return DataError(f"{UNREADABLE} images in a row cannot be read; the last was {path}") if self.training else None

    def epoch(self, plan: Plan, epoch: int, start: int) -> DataLoader:
        """Training batches of this process, from number ``start`` of the epoch."""
        self.training, self.transform = True, training_transform(plan.size)
        order = EpochOrder(len(self), plan, epoch, start)
        return plan.loader(self, Collate(len(self.classes), self.multi_label), batch_sampler=order)

    def once(self, plan: Plan) -> DataLoader:
        """Every image once, this process's share."""
        self.training, self.transform = False, evaluation_transform(plan.size)
        share = [(i, 0) for i in range(plan.rank, len(self), plan.world)]
        collate = Collate(len(self.classes), self.multi_label)
        return plan.loader(self, collate, sampler=share, batch_size=plan.batch_size)


@dataclass(frozen=True)
class EpochOrder:
    """Batches of (index, seed).  A step's images are the same for any number of processes with its global batch."""

    count: int
    plan: Plan
    epoch: int
    start: int

    def __len__(self) -> int:
        return self.plan.steps(self.count) * self.plan.accumulate - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self.plan
        generator = torch.Generator().manual_seed(mix(plan.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        for number in range(self.start, self.start + len(self)):
            first = (number * plan.world + plan.rank) * plan.batch_size
            indices = order[first : first + plan.batch_size].tolist()
            yield [(i, mix(plan.seed, self.epoch, i)) for i in indices]


def mix(*parts: Any) -> int:
    """A seed of 32 bits, which is what torch's generator for CPUs takes."""
    return zlib.crc32(repr(parts).encode())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch on the CPU; those outside go on as if nothing were."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def complain(name: str, error: Exception) -> None:
    """From whichever process or worker meets it; a line is written at once so that lines do not mix."""
    sys.stderr.write(f"cannot read {name}: {' '.join(str(error).split()) or type(error).__name__}\n")
    sys.stderr.flush()


def read_pixels(file: Path | BinaryIO) -> Any:
    """A PIL image, turned upright."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        if max(opened.size) > 100 * min(opened.size):
            raise ValueError(f"{opened.size[0]} x {opened.size[1]} pixels are a line, which resized would be too long")
        return ImageOps.exif_transpose(opened).convert("RGB")


def _transforms() -> Any:
    import torchvision

    quiet = getattr(torchvision, "disable_beta_transforms_warning", None)
    if quiet is not None:
        quiet()  # torchvision 0.15 says on every import that they may change
    from torchvision.transforms import v2

    return v2


def training_transform(size: int) -> Callable[[Any], Tensor]:
    """A random crop, scaled, and a flip: (3, size, size) uint8."""
    v2 = _transforms()
    crop = v2.RandomResizedCrop(size, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def evaluation_transform(size: int) -> Callable[[Any], Tensor]:
    """The crop in the middle that ``python -m xsep.classify`` takes: (3, size, size) uint8."""
    v2 = _transforms()
    resize = v2.Resize(int(size / CROP), v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


def open_folder(folder: Path, classes: list[str] | None, multi_label: bool) -> Images:
    """A folder of one folder per class; the classes' numbers follow the order of their names."""
    from torchvision.datasets import ImageFolder

    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise DataError(f"{folder}: neither folders of classes nor shards (*.tar) in it")
    unknown = sorted(set(names) - set(names if classes is None else classes))
    if unknown:
        raise DataError(f"{folder}: folders that are none of the classes: {listed(unknown)}")
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError:
        full = {path.parent.relative_to(folder).parts[0] for path in folder.rglob("*.*") if path.parent != folder}
        empty = sorted(set(names) - full) or names
        raise DataError(
            f"{folder}: no image in the folders of these classes: {listed(empty)}; put images there, or remove the "
            "folders, which changes the numbers of the classes"
        ) from None
    classes = names if classes is None else classes
    numbers = {name: number for number, name in enumerate(classes)}
    samples: list[tuple[Path, Labels]] = [(Path(path), numbers[found.classes[label]]) for path, label in found.samples]
    if multi_label:
        samples = [(path, (label,)) for path, label in samples]  # type: ignore[misc]
    return Images(samples, classes, multi_label)


def open_list(file: Path, classes: list[str] | None) -> Images:
    """Lines of a path, relative to the list's folder, and labels, separated by tabs, or if it has none by spaces."""
    rows: list[tuple[Path, list[str]]] = []
    for line in read_lines(file):
        path, *labels = (part for part in (line.split("\t") if "\t" in line else line.split()) if part)
        rows.append((file.parent / path, labels))
    if not rows:
        raise DataError(f"{file}: an empty list")
    count = Counter(label for _, labels in rows for label in labels)
    classes = sorted(count) if classes is None else classes
    unknown = sorted(set(count) - set(classes))
    if unknown:
        raise DataError(f"{file}: labels that are none of the {len(classes)} classes: {listed(unknown)}")
    numbers = {name: number for number, name in enumerate(classes)}
    return Images([(path, [numbers[label] for label in labels]) for path, labels in rows], classes, True)


def read_lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a text in UTF-8") from error


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
