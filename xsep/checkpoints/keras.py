"""Keras's weight files: legacy HDF5, and Keras 3's ``.weights.h5``, which a ``.keras`` archive holds too.

Legacy files name every variable by its layer.  Keras 3's number the layers of each class in the model's order and the
variables in the layer's; newer ones note the layers' names as well.  Keras's block k is timm's block k - 1, its block
14 is timm's ``conv3`` and ``conv4``, and its residual convolutions and their BatchNorms have no fixed names.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import torch
from torch import Tensor

from ..models.xception import BLOCKS

# By Keras 3's name of a class: its variables in the order of their numbers, with timm's keys.
VARIABLES = {
    "conv2d": {"kernel": "weight", "bias": "bias"},
    "separable_conv2d": {
        "depthwise_kernel": "conv1.weight",
        "pointwise_kernel": "pointwise.weight",
        "bias": "pointwise.bias",
    },
    "batch_normalization": {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    },
    "dense": {"kernel": "weight", "bias": "bias"},
}


class Layer(NamedTuple):
    """A layer with weights as it lies in a file."""

    kind: str  # its class, as Keras 3 writes it
    scope: str  # the model that it belongs to
    name: str  # empty where the file has none
    path: str
    variables: dict[str, Tensor]  # in Keras's order of dimensions


class Target(NamedTuple):
    """A layer of Keras's Xception and the module of ours that it is.

    A residual's has no fixed name, but no other has the channels of its last dimensions, ``shape``.
    """

    kind: str
    name: str
    module: str
    shape: tuple[int, ...] = ()


def _targets() -> Iterator[Target]:
    """The layers with weights of Keras's Xception, those of each kind in the order of its ``layers``."""
    for i in (1, 2):
        yield Target("conv2d", f"block1_conv{i}", f"conv{i}")
        yield Target("batch_normalization", f"block1_conv{i}_bn", f"bn{i}")
    for i, widths in BLOCKS.items():
        for j in range(len(widths) - 1):
            n = 3 * j + (i > 1)  # block 1 does not start with a ReLU
            yield Target("separable_conv2d", f"block{i + 1}_sepconv{j + 1}", f"block{i}.rep.{n}")
            yield Target("batch_normalization", f"block{i + 1}_sepconv{j + 1}_bn", f"block{i}.rep.{n + 1}")
        if widths[0] != widths[-1]:
            yield Target("conv2d", "", f"block{i}.skip", (widths[0], widths[-1]))
            yield Target("batch_normalization", "", f"block{i}.skipbn", (widths[-1],))
    for i in (1, 2):
        yield Target("separable_conv2d", f"block14_sepconv{i}", f"conv{i + 2}")
        yield Target("batch_normalization", f"block14_sepconv{i}_bn", f"bn{i + 2}")
    yield Target("dense", "predictions", "fc")


TARGETS = tuple(_targets())


def h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Keras's files need the package h5py: pip install 'xsep[checkpoints]'") from error
    return h5py


def read(file: Path | io.BytesIO) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The format's name, tensors by timm's keys, and the variables' own names by these keys.

    What is not part of Xception keeps its own name.
    """
    format, layers = read_layers(file)
    modules = _modules(layers)
    tensors, sources = {}, {}
    for layer in layers:
        for variable, tensor in layer.variables.items():
            key = source = f"{layer.path}/{variable}"
            if layer.path in modules:
                key = f"{modules[layer.path]}.{VARIABLES[layer.kind].get(variable, variable)}"
                tensor = to_torch(layer.kind, variable, tensor)
            tensors[key], sources[key] = tensor, source
    return format, tensors, sources


def read_layers(file: Path | io.BytesIO) -> tuple[str, list[Layer]]:
    """The format's name, and every layer with weights, in the model's order among those of its class."""
    with h5py().File(file, "r") as opened:
        datasets: dict[str, Any] = {}
        # This follows no link out of the file.
        opened.visititems(lambda path, found: datasets.update({path: found} if hasattr(found, "shape") else {}))
        root = "model_weights" if "model_weights" in opened else "/"
        if _attribute(opened[root], "layer_names"):
            return "Keras legacy HDF5", list(_legacy_layers(opened[root], datasets))
        layers = list(_numbered_layers(opened, datasets))
    if not layers:
        raise ValueError("HDF5, but with no layers in it as Keras writes them")
    return "Keras 3", layers


def _legacy_layers(root: Any, datasets: dict[str, Any]) -> Iterator[Layer]:
    for group in _attribute(root, "layer_names"):
        found: dict[str, dict[str, Tensor]] = {}
        for name in _attribute(root[group], "weight_names"):
            layer, _, variable = name.rpartition("/")
            path = f"{root.name}/{group}/{name}".lstrip("/")
            if path not in datasets:
                raise ValueError(f"{path} is announced, and not there")
            found.setdefault(layer, {})[variable.split(":")[0]] = _tensor(datasets[path])
        for layer, variables in found.items():
            scope = group if len(found) > 1 else ""  # a model within the model is one group with all its layers
            yield Layer(_kind(variables), scope, layer.split("/")[-1], f"{group}/{layer}", variables)


def _kind(variables: dict[str, Tensor]) -> str:
    if variables.keys() >= {"depthwise_kernel", "pointwise_kernel"}:
        return "separable_conv2d"
    if "moving_mean" in variables:
        return "batch_normalization"
    return {4: "conv2d", 2: "dense"}.get(variables["kernel"].dim(), "") if "kernel" in variables else ""


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; Keras cuts long ones into ``name0``, ``name1``, ..."""
    attributes = group.attrs
    parts = (
        [name] if name in attributes else [f"{name}{i}" for i in range(len(attributes)) if f"{name}{i}" in attributes]
    )
    return [item.decode() if isinstance(item, bytes) else str(item) for part in parts for item in attributes[part]]


def _numbered_layers(opened: Any, datasets: dict[str, Any]) -> Iterator[Layer]:
    found: dict[str, dict[int, Any]] = {}
    for path, dataset in datasets.items():
        layer, _, number = path.rpartition("/vars/")
        # Beside layers there are the optimizer and the metrics, and within them generators of random numbers.
        if number.isdigit() and layer.startswith("layers/") and not layer.endswith("seed_generator"):
            found.setdefault(layer, {})[int(number)] = dataset
    for path in sorted(found, key=_natural):
        scope, _, counted = path.rpartition("/")
        kind = re.sub(r"_\d+$", "", counted)
        names = dict(enumerate(VARIABLES.get(kind, ())))
        variables = {names.get(i, str(i)): _tensor(dataset) for i, dataset in sorted(found[path].items())}
        yield Layer(kind, scope, str(opened[f"{path}/vars"].attrs.get("name", "")), path, variables)


def _natural(path: str) -> list[tuple[str, int]]:
    """Sorts ``conv2d``, ``conv2d_1``, ``conv2d_2``, ``conv2d_10``."""
    parts = [re.fullmatch(r"(.*?)(?:_(\d+))?", part) for part in path.split("/")]
    return [(part[1], int(part[2] or 0)) for part in parts if part]


def _tensor(dataset: Any) -> Tensor:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} is kept in another file")
    array = dataset[()]
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy has no bfloat16
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def to_torch(kind: str, variable: str, tensor: Tensor) -> Tensor:
    """A variable in torch's order of dimensions; one of other dimensions than its kind's as it is."""
    if variable == "depthwise_kernel" and tensor.dim() == 4:
        return tensor.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
    if variable.endswith("kernel") and tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.t() if (kind, variable, tensor.dim()) == ("dense", "kernel", 2) else tensor


def _modules(layers: Iterable[Layer]) -> dict[str, str]:
    """The module that a layer is, by the layer's path: Xception's, without what is around them."""
    sizes = Counter(layer.scope for layer in layers if layer.kind == "separable_conv2d")
    if not sizes:
        raise ValueError("no Xception in it: no separable convolution")
    (scope, size), *others = sizes.most_common()
    if others and others[0][1] == size:
        raise ValueError(f"more than one model in it that may be meant: {scope} and {others[0][0]}")
    inside = [layer for layer in layers if layer.scope == scope]
    names = [_plain_name(layer.name) for layer in inside]
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise ValueError(f"more than one layer named {', '.join(twice)}")
    convolutions = [target for target in TARGETS if target.name and target.kind != "dense"]
    matched: dict[str, str] = {}
    if any(target.name in names for target in convolutions):
        named = dict(zip(names, inside))
        for target in TARGETS:
            layer = named.get(target.name) if target.name else _unnamed(target, inside, names, matched)
            if layer is not None and layer.kind == target.kind:
                matched[layer.path] = target.module
        return matched
    for kind in VARIABLES:
        of_kind = [layer for layer in inside if layer.kind == kind]
        if kind == "dense" and (len(of_kind) != 1 or of_kind[0].name):
            continue  # the head of another model
        matched.update(zip((layer.path for layer in of_kind), (t.module for t in TARGETS if t.kind == kind)))
    return matched


def _plain_name(name: str) -> str:
    """The name of Keras's Xception that this is, without the number of later copies, or an empty string."""
    match = re.fullmatch(r"(block\d+_(?:sep)?conv\d(?:_bn)?|predictions)(?:_\d+)?", name)
    return match[1] if match else ""


def _unnamed(target: Target, layers: list[Layer], names: list[str], taken: dict[str, str]) -> Layer | None:
    """The first layer of the target's kind and shape that has no name of its own."""
    size = len(target.shape)
    for layer, name in zip(layers, names):
        if layer.kind == target.kind and not name and layer.path not in taken:
            if any(tensor.shape[-size:] == target.shape for tensor in layer.variables.values()):
                return layer
    return None


def to_bytes(state: dict[str, Tensor]) -> bytes:
    """The ``.weights.h5`` from which Keras's Xception, without a top if ``state`` has no ``fc``, loads ``state``."""
    left = {key for key in state if not key.endswith("num_batches_tracked")}
    counts: Counter[str] = Counter()
    buffer = io.BytesIO()
    with h5py().File(buffer, "w") as file:
        for target in TARGETS:
            if target.kind == "dense" and "fc.weight" not in state:
                continue
            path = f"{target.kind}_{counts[target.kind]}" if counts[target.kind] else target.kind
            counts[target.kind] += 1
            group = file.create_group(f"layers/{path}/vars")
            group.attrs["name"] = target.name or path
            for i, (variable, key) in enumerate(VARIABLES[target.kind].items()):
                tensor = state.get(f"{target.module}.{key}")
                if tensor is None and variable != "bias":
                    raise ValueError(f"Keras's Xception has what this model has not: {target.module}")
                if tensor is not None:
                    if variable == "depthwise_kernel" and tensor.shape[1] != 1:
                        raise ValueError(f"Keras's Xception is depthwise, and not in segments as {target.module} is")
                    group[str(i)] = _from_torch(target.kind, variable, tensor).numpy()
                    left.remove(f"{target.module}.{key}")
    if left:
        raise ValueError(f"Keras's Xception has no {', '.join(sorted(left))}")
    return buffer.getvalue()


def _from_torch(kind: str, variable: str, tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    if tensor.dim() == 4:
        # A depthwise weight has one channel per filter: its first two dimensions are (C, 1).
        tensor = tensor.permute(2, 3, 0, 1) if variable == "depthwise_kernel" else tensor.permute(2, 3, 1, 0)
    return tensor.t() if (kind, variable) == ("dense", "kernel") else tensor
