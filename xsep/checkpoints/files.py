"""What a file holds, by timm's keys, whichever program wrote it; and the bytes of files that timm reads."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import torch
from torch import Tensor

from .._files import write_bytes
from ..models.xception import PRESETS
from . import keras

_CONTAINERS = ("state_dict", "model", "model_state_dict", "net")


class Contents(NamedTuple):
    """The tensors of a file.

    ``tensors`` is keyed as in the file, or for Keras's files by timm's keys; ``sources`` has the file's own name where
    a key is another.  ``traits`` are the ``preset`` and the ``activation`` of the model that the weights are for.
    """

    format: str
    tensors: dict[str, Tensor]
    sources: dict[str, str]
    traits: dict[str, str]


def read(file: Path) -> Contents:
    """The contents of a file, whose format is told by its first bytes.

    Raises:
        ValueError: it names the file, and what is wrong with it.
        OSError: the file cannot be opened.
        ImportError: a package for this format is missing.
    """
    with open(file, "rb") as stream:
        start = stream.read(16)
    with naming(file):
        try:
            return _reader(start)(file)
        except ImportError:
            raise
        except Exception as error:  # whatever a parser meets in a file that is not what it seems
            raise ValueError(str(error) or type(error).__name__) from error


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """A ``ValueError`` begins with the file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _reader(start: bytes) -> Callable[[Path], Contents]:
    if not start:
        raise ValueError("the file is empty")
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_hdf5
    if start.startswith(b"PK\x03\x04"):
        return _read_zip
    if start[8:9] == b"{":
        return _read_safetensors
    if start.startswith(b"\x80"):
        return _read_torch
    raise ValueError(f"not a file of torch, safetensors or Keras: it starts with {start!r}")


def _read_hdf5(file: Path | io.BytesIO) -> Contents:
    return Contents(*keras.read(file), {"preset": "keras", "activation": "none"})


def _read_zip(file: Path) -> Contents:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"a damaged or truncated archive: {error}") from error
    with archive:
        names = archive.namelist()
        if "model.weights.h5" in names:
            return _read_hdf5(io.BytesIO(archive.read("model.weights.h5")))
        if any(name.split("/")[-1] == "data.pkl" for name in names):
            return _read_torch(file)
    raise ValueError(f"an archive of neither torch nor Keras, with {', '.join(names[:5]) or 'nothing'} in it")


def _read_torch(file: Path) -> Contents:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything here
        what = "torch cannot read it, or it holds more than tensors, which would need unpickling and is refused"
        raise ValueError(f"{what}: {error}") from error
    state = _state_dict(found)
    metadata = getattr(state, "_metadata", None)
    record = metadata.get("xsep") if isinstance(metadata, dict) else None
    return Contents("torch", dict(state), {}, _traits(record))


def _state_dict(found: Any) -> Mapping[str, Tensor]:
    """The state dict itself, or the one a training program keeps beside its other state."""
    while isinstance(found, Mapping):
        inside = [found[name] for name in _CONTAINERS if isinstance(found.get(name), Mapping)]
        if not inside:
            break
        found = inside[0]
    if not isinstance(found, Mapping):
        raise ValueError(f"no state dict in it, but a {type(found).__name__}")
    others = [f"{key} ({type(value).__name__})" for key, value in found.items() if not isinstance(value, Tensor)]
    if others or not all(isinstance(key, str) for key in found):
        raise ValueError(f"a state dict with other things than tensors in it: {', '.join(others[:10])}")
    if not found:
        raise ValueError("an empty state dict")
    return found


def _read_safetensors(file: Path) -> Contents:
    safe_open = _safetensors().safe_open
    with safe_open(str(file), framework="pt", device="cpu") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        return Contents("safetensors", tensors, {}, _traits(opened.metadata()))


def _traits(record: Any) -> dict[str, str]:
    """What ``save`` recorded.  Files without a record are timm's and Cadene's, or made for these."""
    record = record if isinstance(record, dict) else {}
    traits = {"preset": record.get("preset", "timm"), "activation": record.get("activation", "none")}
    if traits["preset"] not in PRESETS or traits["activation"] not in ("none", "relu", "elu"):
        raise ValueError(f"its record of the model is of another version: {traits}")
    return traits


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of safetensors need the package: pip install 'xsep[checkpoints]'") from error
    return safetensors


def write(file: Path, state: dict[str, Tensor], traits: dict[str, str]) -> None:
    """Writes a state dict with timm's keys, in the format that the file's name asks for."""
    if file.suffix == ".safetensors":
        data = _safetensors().torch.save(state, {"format": "pt", **traits})
    elif file.suffix in (".pth", ".pt"):
        data = _torch_bytes(state, traits)
    elif file.name.endswith(".weights.h5"):
        if traits != {"preset": "keras", "activation": "none"}:
            raise ValueError(f"{file}: Keras's Xception is not this model, which has {traits}")
        with naming(file):
            data = keras.to_bytes(state)
    else:
        raise ValueError(f"{file}: the name must end in .safetensors, .pth, .pt or .weights.h5")
    write_bytes(file, data)


def _torch_bytes(state: dict[str, Tensor], traits: dict[str, str]) -> bytes:
    # Where torch itself keeps what it must know of the modules, by their names: programs that load the file ignore it.
    ordered = OrderedDict(state)
    ordered._metadata = {"xsep": traits}  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(ordered, buffer)
    return buffer.getvalue()
