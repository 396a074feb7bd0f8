"""Batches of real photographs: those that scikit-image and scikit-learn ship, a folder of one's own, or noise."""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def shipped() -> list[np.ndarray]:
    """(H, W, 3) uint8 arrays."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [getattr(skimage.data, name)() for name in names] + list(load_sample_images().images)


def folder(path: Path) -> list[np.ndarray]:
    """The images of a folder and its subfolders, at most 256; ends the program if there is none that it can read."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_dir():
        common.fail(f"--data: {path} is not a folder")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)[:256]
    if not files:
        common.fail(f"--data: no image ({', '.join(SUFFIXES)}) in {path}")
    images = []
    for file in files:
        try:
            images.append(np.asarray(Image.open(file).convert("RGB")))
        except (UnidentifiedImageError, OSError) as error:
            common.fail(f"--data: cannot read {file}: {error}")
    return images


def batch(images: list[np.ndarray], count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size) float32 in [-1, 1]: random square crops of at least half the shorter side, scaled."""
    random = np.random.default_rng(seed)
    crops = []
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.shape[:2]) * random.uniform(0.5, 1))
        top, left = (int(random.integers(0, extent - side + 1)) for extent in image.shape[:2])
        crop = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
        crops.append(torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops) / 127.5 - 1


def noise(count: int, size: int, seed: int) -> Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(seed))
