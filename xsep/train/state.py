"""Checkpoints of a training: a folder each, which is there whole or not at all.

``model.safetensors`` and ``average.safetensors`` hold weights, ``state.pt`` all else that a training needs to go on
as if it had not stopped.  A checkpoint is written under another name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoints
from .._files import write_bytes
from ..models import Xception

PREFIX = "checkpoint-"
MODEL, AVERAGE, STATE = "model.safetensors", "average.safetensors", "state.pt"


def save(folder: Path, step: int, model: nn.Module, average: nn.Module, state: dict[str, Any], keep: int) -> Path:
    """Writes ``checkpoint-STEP`` in ``folder``, then removes all but the last ``keep``.

    Raises ``OSError`` where it cannot be written; the others are then as they were.
    """
    path = folder / f"{PREFIX}{step:09d}"
    if path.exists():
        return path
    temporary = folder / f".{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    try:
        temporary.mkdir(parents=True)
        _save_weights(model, temporary / MODEL)
        _save_weights(average, temporary / AVERAGE)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(temporary / STATE, buffer.getvalue())
        _sync(temporary)
        os.rename(temporary, path)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in found(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()), reverse=True)


def load(path: Path, model: nn.Module, average: nn.Module) -> dict[str, Any]:
    """Reads the weights into both modules and returns the state.

    Raises ``ValueError`` that names the checkpoint where it is damaged or another model's; nothing is changed then.
    """
    from safetensors.torch import load_file

    try:
        weights = [load_file(str(path / name)) for name in (MODEL, AVERAGE)]
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise nearly anything here
        raise ValueError(f"{path}: cannot be read: {error}") from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for loaded in weights:
        if {name: tensor.shape for name, tensor in loaded.items()} != expected:
            raise ValueError(f"{path}: of another model, or for another number of classes")
    for module, loaded in zip((model, average), weights):
        module.load_state_dict(loaded)
    return state


def random_state() -> dict[str, Any]:
    """Of Python's, NumPy's and torch's generators, in types that ``torch.load(weights_only=True)`` takes."""
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    state = {"python": random.getstate(), "numpy": [str(name), keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _save_weights(module: nn.Module, path: Path) -> None:
    if isinstance(module, Xception):
        checkpoints.save(module, path)  # with the preset, so that others can load it
        return
    import safetensors.torch

    state: dict[str, Tensor] = {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}
    write_bytes(path, safetensors.torch.save(state))


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
