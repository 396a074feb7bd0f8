"""Finds what a folder has to train and to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Union

import torch
from torch import Tensor

from .data import DataError, Images, listed, open_folder, open_list, read_lines
from .shards import Shards

Split = Union[Images, Shards]


def open_split(folder: Path, name: str, multi_label: bool, classes: list[str] | None = None) -> Split:
    """``name.txt`` (a list), ``name/*.tar`` (shards) or ``name/`` (folders of classes), the first that there is.

    The classes are those of ``classes.txt``, one a line, if ``classes`` is left out; without that file those that are
    found, in the order of their names.

    Raises:
        DataError: it names the file or folder, and what is wrong with it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if classes is None and (folder / "classes.txt").exists():
        classes = read_lines(folder / "classes.txt")
        if not classes or len(set(classes)) != len(classes):
            raise DataError(f"{folder / 'classes.txt'}: not a different name on every line")
    split = folder / name
    if split.with_name(f"{name}.txt").exists():
        if not multi_label:
            raise DataError(f"{split}.txt: lists are of images with several labels: use --recipe jft, or --multi-label")
        return open_list(split.with_name(f"{name}.txt"), classes)
    if not split.is_dir():
        raise DataError(f"{folder}: neither {name}.txt nor a folder {name} in it")
    if any(split.glob("*.tar")):
        if classes is None:
            raise DataError(f"{folder}: shards need a classes.txt here, with the name of a class on every line")
        return Shards(split, classes, multi_label)
    return open_folder(split, classes, multi_label)


def read_weights(file: Path, classes: list[str]) -> Tensor:
    """Lines of a class and its weight, for (C,) weights: what is not listed weighs nothing."""
    weights = torch.zeros(len(classes), dtype=torch.float64)
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = []
    for line in read_lines(file):
        name, _, text = line.replace("\t", " ").rpartition(" ")
        try:
            weight = float(text)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise DataError(f"{file}: not a class and its weight: {line!r}")
        if name.strip() in numbers:
            weights[numbers[name.strip()]] = weight
        else:
            unknown.append(name.strip())
    if unknown:
        raise DataError(f"{file}: names that are none of the {len(classes)} classes: {listed(unknown)}")
    return weights
