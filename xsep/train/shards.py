"""WebDataset's shards: tar files of images with their labels, read from begin to end.

``name.jpg`` and ``name.cls`` follow each other; the second holds the labels: numbers or names, separated by spaces.
Every worker of every process has shards of its own.  Their order, and that of the images, depends on the seed, the
epoch and the numbers of processes and workers: with the same, a training continues at any step, after reading, not
decoding, what of the epoch came before.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from itertools import count
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .data import (
    UNREADABLE,
    Collate,
    DataError,
    Labels,
    Plan,
    complain,
    evaluation_transform,
    mix,
    read_pixels,
    seeded,
    training_transform,
)

SHUFFLED = 1000  # images that a worker keeps, encoded, to choose the next from
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


class Raw(NamedTuple):
    """An image of a shard as it lies there."""

    name: str
    image: bytes
    labels: bytes | None


def read_shard(path: Path) -> Iterator[Raw]:
    """The images of a shard.  Where it is damaged it is named, and the rest of it left out."""
    name, image, labels = "", None, None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                stem, ending = _split(member.name)
                if stem != name:
                    if image is not None:
                        yield Raw(f"{path}: {name}", image, labels)
                    name, image, labels = stem, None, None
                content = archive.extractfile(member)
                assert content is not None
                if ending == ".cls":
                    labels = content.read()
                elif ending in IMAGES:
                    image = content.read()
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError) as error:
        complain(f"the rest of the shard {path}", error)
    if image is not None:
        yield Raw(f"{path}: {name}", image, labels)


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return folder + slash + stem, (dot + ending).lower()


def _check_end(file: Any, offset: int) -> None:
    """``tarfile`` takes a damaged header for the end of the archive, which is a block of zeros."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError(f"truncated: no end of the archive at byte {offset}")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header of a file at byte {offset}")


def count_images(path: Path) -> int:
    """By headers only.  Of a damaged shard those before the damage; ``read_shard`` names it."""
    stems = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, ending = _split(member.name)
                if ending in IMAGES:
                    stems.add(stem)
    except (tarfile.TarError, OSError):
        pass
    return len(stems)


class Shards:
    """The shards of a folder.  ``sizes.json`` in it may say how many images each holds; else they are counted."""

    def __init__(self, folder: Path, classes: list[str], multi_label: bool):
        self.files = sorted(folder.glob("*.tar"))
        self.classes, self.multi_label = classes, multi_label
        sizes = folder / "sizes.json"
        if sizes.exists():
            try:
                known = json.loads(sizes.read_text(encoding="utf-8"))
                self.count = sum(int(known[file.name]) for file in self.files)
            except (ValueError, TypeError, LookupError) as error:
                raise DataError(f"{sizes}: not a number of images for each shard: {error!r}") from error
        else:
            self.count = sum(count_images(file) for file in self.files)
        if self.count == 0:
            raise DataError(f"{folder}: no image ({', '.join(IMAGES)}) in its shards")

    def epoch(self, plan: Plan, epoch: int, start: int) -> DataLoader:
        """Training batches of this process, from number ``start`` of the epoch; there is no end of them."""
        readers = plan.world * max(1, plan.workers)
        if len(self.files) < readers:
            raise DataError(
                f"{self.files[0].parent}: {len(self.files)} shards for {plan.world} processes with {plan.workers} "
                "workers each, of which each needs a shard: use fewer workers, or more and smaller shards"
            )
        stream = _Stream(self, plan, training_transform(plan.size), epoch, start)
        collate = Collate(len(self.classes), self.multi_label)
        return plan.loader(stream, collate, batch_size=plan.batch_size)

    def once(self, plan: Plan) -> DataLoader:
        """Every image once, this process's share."""
        stream = _Stream(self, plan, evaluation_transform(plan.size), None, 0)
        return plan.loader(stream, Collate(len(self.classes), self.multi_label), batch_size=plan.batch_size)

    def labels(self, raw: Raw) -> Labels:
        """Raises ``ValueError`` where there are none, or others than the classes."""
        if raw.labels is None:
            raise ValueError("it has no .cls beside it")
        found = []
        for text in raw.labels.decode().split():
            number = int(text) if text.isdigit() else self.classes.index(text) if text in self.classes else -1
            if not 0 <= number < len(self.classes):
                raise ValueError(f"label {text!r} is none of the {len(self.classes)} classes")
            found.append(number)
        if not self.multi_label and len(found) != 1:
            raise ValueError(f"{len(found)} labels in place of one")
        return found if self.multi_label else found[0]


class _Stream(IterableDataset):
    """The samples of one worker.  In an evaluation, without ``epoch``, each once and in order."""

    def __init__(
        self, shards: Shards, plan: Plan, transform: Callable[[Any], Tensor], epoch: int | None, start: int
    ) -> None:
        self.shards, self.plan, self.transform, self.epoch, self.start = shards, plan, transform, epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Labels] | DataError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self.epoch is None:
            reader = self.plan.rank * workers + worker
            for file in self.shards.files[reader :: self.plan.world * workers]:
                for raw in read_shard(file):
                    sample = self._decode(raw, 0)
                    if sample is not None:
                        yield sample
            return
        # Workers take turns, a batch each: the one whose turn batch number start is comes first now.
        worker = (worker + self.start) % workers
        skipped = len(range(worker, self.start, workers)) * self.plan.batch_size
        yield from self._samples(
            self.epoch, self.plan.rank + self.plan.world * worker, self.plan.world * workers, skipped
        )

    def _samples(
        self, epoch: int, reader: int, readers: int, skipped: int
    ) -> Iterator[tuple[Tensor, Labels] | DataError]:
        waiting = failures = 0  # places of unreadable images, which the next that can be read takes
        for place, (number, raw) in enumerate(self._shuffled(epoch, reader, readers)):
            if place < skipped:
                continue
            sample = None if raw is None else self._decode(raw, mix(self.plan.seed, epoch, number, raw.name))
            if sample is None:
                waiting, failures = waiting + 1, failures + 1
                if failures == UNREADABLE or raw is None:
                    yield DataError(
                        f"{self.shards.files[0].parent}: "
                        + (
                            "no image in the shards of this worker"
                            if raw is None
                            else f"{failures} images in a row cannot be read; the last was {raw.name}"
                        )
                    )
                    return
                continue
            for _ in range(waiting + 1):
                yield sample
            waiting = failures = 0

    def _shuffled(self, epoch: int, reader: int, readers: int) -> Iterator[tuple[int, Raw | None]]:
        """The number of the pass and an image, without end; None after a pass over this reader's shards without any."""
        for number in count():
            generator = random.Random(mix(self.plan.seed, epoch, number))
            files = list(self.shards.files)
            generator.shuffle(files)
            kept: list[Raw] = []
            empty = True
            for file in files[reader::readers]:
                for raw in read_shard(file):
                    empty = False
                    kept.append(raw)
                    if len(kept) == SHUFFLED:
                        yield number, _take(kept, generator)
            while kept:
                yield number, _take(kept, generator)
            if empty:
                yield number, None

    def _decode(self, raw: Raw, seed: int) -> tuple[Tensor, Labels] | None:
        try:
            labels = self.shards.labels(raw)
            image = read_pixels(io.BytesIO(raw.image))
        except Exception as error:  # decoders raise what they like
            complain(raw.name, error)
            return None
        with seeded(seed):
            return self.transform(image), labels


def _take(kept: list[Raw], generator: random.Random) -> Raw:
    index = generator.randrange(len(kept))
    kept[index], kept[-1] = kept[-1], kept[index]
    return kept.pop()
