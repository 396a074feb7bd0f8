"""Loads a file into an Xception, makes the Xception for a file, and saves one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..models import Xception, xception
from ..models.xception import PRESETS
from . import files
from .matching import fit, plain_keys


class Loaded(NamedTuple):
    """What was loaded."""

    format: str
    preset: str
    left_out: list[str]  # names in the file: the head that a model without classifier has no place for


def load(model: Xception, file: str | os.PathLike, preset: str | None = None) -> Loaded:
    """Loads a file of torch, safetensors or Keras; nothing in it is executed.

    Args:
        model: its weights are replaced when all of the file's fit, else it stays as it is.
        file: timm's or Cadene's ``.pth``, ``.safetensors``, Keras's legacy ``.h5``, ``.weights.h5`` or ``.keras``.
        preset: the one that the weights were trained with.  Left out: ``'keras'`` for Keras's files, what ``save``
            recorded for its own, and ``'timm'`` for others.

    A model without classifier (``num_classes=0``) takes the base of a file with any head, which ``left_out`` names.
    Counts of batches that a file lacks become 0.  Values are converted to the model's dtype.

    Raises:
        ValueError: the file is damaged or of another kind; it does not fit the model, with a list of what is missing,
            unexpected or of another shape; or the model has another preset than the weights were trained with, or
            another activation than the file records.
        OSError: the file cannot be opened.
        ImportError: the file needs h5py or safetensors.
    """
    _check(model)
    file = Path(file)
    return _load(model, file, _read(file, preset))


def build(file: str | os.PathLike, preset: str | None = None, **options: Any) -> tuple[Xception, Loaded]:
    """The Xception that a file holds, with its preset, classes, channels and hidden layers; or with other ``options``.

    Arguments and exceptions are those of ``load``.  Under a head that is not Xception's own the base is built, with
    ``num_classes=0``.
    """
    file = Path(file)
    contents = _read(file, preset)
    tensors, traits = contents.tensors, contents.traits
    found: dict[str, Any] = {
        "preset": traits["preset"],
        "activation": None if traits["activation"] == "none" else traits["activation"],
        "num_classes": _size(tensors.get("fc.weight"), 0, default=0),
        "in_chans": _size(tensors.get("conv1.weight"), 1, default=3),
        "residual": "block1.skip.weight" in tensors,
        "segments": _segments(tensors.get("block1.rep.0.conv1.weight")),
        "fc_layers": sum(key.startswith("hidden.") and key.endswith(".weight") for key in tensors),
    }
    model = xception(**{**found, **options})
    return model, _load(model, file, contents)


def save(model: Xception, file: str | os.PathLike) -> None:
    """Saves weights: timm's keys as ``.safetensors``, ``.pth`` or ``.pt``, or a ``.weights.h5`` for Keras's Xception.

    Files with timm's keys record the preset.  Whoever reads ``file`` meanwhile, or after a failure, finds the old one.

    Raises:
        ValueError: another ending; or Keras's Xception is not this model: another preset, hidden layers, an activation
            within the separable convolutions, segments, no residuals.
        OSError: the file cannot be written.
        ImportError: the file needs h5py or safetensors.
    """
    _check(model)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    files.write(Path(file), state, _traits(model))


def _check(model: Xception) -> None:
    if not isinstance(model, Xception):
        raise TypeError(f"model must be an xsep.models.Xception; got {type(model).__name__}")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model has no memory for its weights: it is on the meta device")


def _traits(model: Xception) -> dict[str, str]:
    return {"preset": model.preset, "activation": model.activation or "none"}


def _size(tensor: Tensor | None, dimension: int, default: int) -> int:
    return default if tensor is None or tensor.dim() <= dimension else tensor.shape[dimension]


def _segments(spatial: Tensor | None) -> int | None:
    """``xception``'s option, from spatial weights (C, C / segments, 3, 3), in old files of depthwise ones (C, 3, 3)."""
    if spatial is None or spatial.dim() != 4 or spatial.shape[1] <= 1:
        return None
    return spatial.shape[0] // spatial.shape[1]


def _read(file: Path, preset: str | None) -> files.Contents:
    """The contents by plain keys, and with the preset that the caller knows to be right."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    contents = files.read(file)
    with files.naming(file):
        contents = plain_keys(contents)
    return contents if preset is None else contents._replace(traits={**contents.traits, "preset": preset})


def _load(model: Xception, file: Path, contents: files.Contents) -> Loaded:
    theirs, ours = contents.traits, _traits(model)
    with files.naming(file):
        if theirs["preset"] != ours["preset"]:
            raise ValueError(
                f"its weights are for xception(preset={theirs['preset']!r}), and give other features in this model, "
                f"whose preset is {ours['preset']!r}; preset={ours['preset']!r} as an argument loads them all the same"
            )
        if theirs["activation"] != ours["activation"]:
            raise ValueError(
                f"its model has activation {theirs['activation']!r} between depthwise and pointwise, this one has "
                f"{ours['activation']!r}"
            )
        fitted = fit(contents, model.state_dict())
    model.load_state_dict(fitted.state)
    return Loaded(contents.format, theirs["preset"], fitted.left_out)
