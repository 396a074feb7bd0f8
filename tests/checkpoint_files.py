"""Models with known values, files made of them, and what must hold when a file is refused."""

import io
import re
import zipfile

import h5py
import pytest
import safetensors.torch
import torch

from xsep.checkpoints import load, save
from xsep.checkpoints.keras import read_layers
from xsep.models import xception

CLASSES = 5


def randomized(module, seed=0):
    """Random values, BatchNorm's statistics among them, so that nothing passes for something else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "num_batches" in name:
                tensor.fill_(3 + seed)
            elif "running_var" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() == 1:
                tensor.normal_(0, 0.1, generator=generator)
            else:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return module.eval()


def blank(preset, num_classes=CLASSES, **options):
    """A model to load into, without values."""
    with torch.device("meta"):
        model = xception(preset, num_classes=num_classes, **options)
    return model.to_empty(device="cpu")


def hollow(state):
    """Tensors of the same shapes, of one zero each: for what is refused before a value is looked at."""
    return {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state.items()}


def assert_same_state(found, expected, counts=True):
    assert found.keys() == expected.keys()
    for key in expected:
        if counts or "num_batches" not in key:
            assert torch.equal(found[key], expected[key].to(found[key].dtype)), key


def written(path, state):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


def saved(model, path):
    save(model, path)
    return path


def versions(model):
    """Where the values are, and how often torch has counted a write to them."""
    return [(tensor.data_ptr(), tensor._version) for tensor in model.state_dict().values()]


def refused(model, file, *patterns):
    """The file is refused with a message that begins with its name, and the model stays as it is."""
    before = versions(model)
    with pytest.raises(ValueError) as caught:
        load(model, file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    for pattern in patterns:
        assert re.search(pattern, message, re.DOTALL), message
    assert versions(model) == before
    return message


def archive(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def layers_of(model, folder):
    return read_layers(saved(model, folder / "layers.weights.h5"))[1]


def legacy_file(path, layers, root="", ending=":0", repeated="", order=None, model=""):
    """A legacy file as old versions wrote it: ``model`` names a nested model, ``repeated`` follows layers' names."""
    with h5py.File(path, "w") as file:
        top = file.require_group(root) if root else file
        groups = {model: layers} if model else {layer.name: [layer] for layer in layers}
        top.attrs["layer_names"] = [name.encode() for name in ["input_1", *groups]]
        top.create_group("input_1").attrs["weight_names"] = []
        for name, inside in groups.items():
            group = top.create_group(name)
            variables = [
                (f"{layer.name}{repeated}/{variable}{ending}", tensor)
                for layer in inside
                for variable, tensor in layer.variables.items()
            ]
            names = [key.encode() for key, _ in sorted(variables, key=order or (lambda item: 0))]
            if model:  # Keras cuts an attribute of more than 64 KB into chunks
                group.attrs["weight_names0"], group.attrs["weight_names1"] = names[:100], names[100:]
            else:
                group.attrs["weight_names"] = names
            for key, tensor in variables:
                group[key] = tensor.numpy()
    return path
