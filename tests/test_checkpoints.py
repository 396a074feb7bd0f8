"""Checkpoints: round trips, what torch's programs write, and files that are none."""

import copy
import io
import pickle
import re
import resource
import sys

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

from checkpoint_files import (  # noqa: E402
    CLASSES,
    archive,
    assert_same_state,
    blank,
    hollow,
    layers_of,
    legacy_file,
    randomized,
    refused,
    saved,
    versions,
    written,
)

import xsep  # noqa: E402
from xsep.checkpoints import build, load, save  # noqa: E402
from xsep.models import xception  # noqa: E402


@pytest.fixture(scope="module")
def timms():
    """timm's model."""
    return randomized(timm.create_model("legacy_xception", pretrained=False, num_classes=CLASSES))


@pytest.fixture(scope="module")
def ours():
    """Our model with Keras's constants, and other values than timm's."""
    return randomized(xception("keras", num_classes=CLASSES), seed=1)


# What other programs make of a state dict.


def without_counts(state):
    return {key: tensor for key, tensor in state.items() if "num_batches" not in key}


def generation(state, depthwise, pointwise):
    """Old files lack dimensions of 1."""
    found = {}
    for key, tensor in state.items():
        if re.search(r"(rep\.\d|conv[34])\.conv1\.weight", key) and not depthwise:
            tensor = tensor.squeeze(1)
        if "pointwise.weight" in key and not pointwise:
            tensor = tensor.squeeze(-1).squeeze(-1)
        found[key] = tensor
    return found


def renamed(state, prefix="", fc="fc"):
    return {prefix + re.sub(r"^fc\.", f"{fc}.", key): tensor for key, tensor in state.items()}


VARIANTS = {
    "timm": lambda state: state,
    "b0b7af25": lambda state: without_counts(generation(state, depthwise=False, pointwise=True)),
    "b5690688": lambda state: without_counts(generation(state, depthwise=True, pointwise=False)),
    "pretrainedmodels": lambda state: renamed(generation(state, depthwise=True, pointwise=False), fc="last_linear"),
    "DataParallel": lambda state: renamed(state, "module."),
    "Lightning": lambda state: {"epoch": 3, "state_dict": renamed(state, "model.")},
    "both": lambda state: {"net": renamed(state, "module.model.", fc="last_linear"), "step": torch.tensor(1)},
    "float64": lambda state: {key: tensor.double() for key, tensor in state.items() if "num_batches" not in key},
    "parameters": lambda state: {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in state.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_of_torch(variant, timms, tmp_path):
    model = blank("timm")
    file = written(tmp_path / "x.pth", VARIANTS[variant](timms.state_dict()))
    before = versions(model)
    assert load(model, file) == ("torch", "timm", [])
    assert not set(before) & set(versions(model))  # which is how ``refused`` would notice a write
    counted = variant in ("timm", "pretrainedmodels", "DataParallel", "Lightning", "both", "parameters")
    assert_same_state(model.state_dict(), timms.state_dict(), counts=counted)
    assert all(b == (3 if counted else 0) for name, b in model.named_buffers() if "num_batches" in name)


def test_the_old_serialization_of_torch(timms, tmp_path):
    model = blank("timm")
    torch.save(timms.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    load(model, tmp_path / "x.pth")
    assert_same_state(model.state_dict(), timms.state_dict())


def test_safetensors_of_timm(timms, tmp_path):
    model = blank("timm")
    file = written(tmp_path / "x.safetensors", renamed(timms.state_dict(), "backbone."))
    assert load(model, file) == ("safetensors", "timm", [])
    assert_same_state(model.state_dict(), timms.state_dict())


def test_outputs_are_timms(timms, tmp_path):
    model = blank("timm")
    load(model, written(tmp_path / "x.pth", timms.state_dict()))
    x = torch.randn(2, 3, 96, 107)
    with torch.no_grad(), xsep.backend("aten"):
        assert torch.equal(model.eval()(x), timms(x))


ENDINGS = (".safetensors", ".pth", ".pt", ".weights.h5")


@pytest.mark.parametrize("ending", ENDINGS)
def test_round_trip(ending, ours, tmp_path):
    model = blank("keras")
    file = tmp_path / "new folder" / f"x{ending}"
    save(ours, file)
    loaded = load(model, file)
    assert loaded.preset == "keras" and not loaded.left_out
    assert_same_state(model.state_dict(), ours.state_dict(), counts=ending != ".weights.h5")
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [(".safetensors", torch.bfloat16), (".weights.h5", torch.bfloat16), (".weights.h5", torch.float64)],
)
def test_round_trip_of_another_dtype(ending, dtype, ours, tmp_path):
    model = copy.deepcopy(ours).to(dtype)
    with torch.no_grad():
        model.fc.bias.fill_(1 / 3)
    other = xception("keras", num_classes=CLASSES).to(dtype)
    load(other, saved(model, tmp_path / f"x{ending}"))
    assert_same_state(other.state_dict(), model.state_dict(), counts=ending != ".weights.h5")


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_timm_loads_what_is_saved(ending, ours, tmp_path):
    file = saved(ours, tmp_path / f"x{ending}")
    model = timm.create_model("legacy_xception", num_classes=CLASSES, checkpoint_path=str(file))
    assert_same_state(model.state_dict(), ours.state_dict())


def test_build_makes_the_model_that_was_saved(tmp_path):
    options = dict(num_classes=3, in_chans=4, residual=False, activation="elu", fc_layers=1)
    model = randomized(xception("keras", **options))
    for ending in (".safetensors", ".pth"):
        built, loaded = build(saved(model, tmp_path / f"x{ending}"), drop_rate=0.5)
        assert loaded.preset == built.preset == "keras" and not loaded.left_out
        assert (built.num_classes, built.in_chans, built.activation, built.drop_rate) == (3, 4, "elu", 0.5)
        assert type(built.conv3.act) is nn.ELU
        assert_same_state(built.state_dict(), model.state_dict())


def test_build_of_a_base_and_with_other_options(ours, tmp_path):
    model = xception("timm", num_classes=0)
    assert build(saved(model, tmp_path / "base.safetensors"))[0].num_classes == 0
    built, loaded = build(saved(ours, tmp_path / "x.pth"), num_classes=0)
    assert built.num_classes == 0 and loaded.left_out == ["fc.weight", "fc.bias"]


# The preset.


@pytest.mark.parametrize("ending", ENDINGS)
def test_another_preset_is_refused(ending, ours, tmp_path):
    model = blank("timm")
    file = saved(ours, tmp_path / f"x{ending}")
    refused(model, file, "preset='keras'.*'timm'")
    assert load(model, file, preset="timm").preset == "timm"
    assert_same_state(model.state_dict(), ours.state_dict(), counts=ending != ".weights.h5")


def test_files_without_a_record_are_timms(timms, tmp_path):
    model = blank("keras")
    file = written(tmp_path / "x.pth", hollow(timms.state_dict()))
    with pytest.raises(ValueError, match="preset='timm'.*'keras'"):
        load(model, file)
    assert build(file)[0].preset == "timm" and build(file, preset="keras")[0].preset == "keras"
    with pytest.raises(ValueError, match="one of keras, timm; got 'tensorflow'"):
        load(model, file, preset="tensorflow")


def test_another_activation_is_refused(tmp_path):
    file = saved(xception("keras", num_classes=CLASSES, activation="relu"), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="activation 'relu'.*'none'"):
        load(blank("keras"), file)


def test_an_unknown_record_is_refused(timms, tmp_path):
    safetensors.torch.save_file(timms.state_dict(), str(tmp_path / "x.safetensors"), {"preset": "jax"})
    with pytest.raises(ValueError, match=r"x\.safetensors.*record.*jax"):
        load(blank("timm"), tmp_path / "x.safetensors")


# Strictness.


def test_what_does_not_fit_is_listed(timms, tmp_path):
    state = hollow(timms.state_dict())
    del state["block2.skipbn.weight"], state["fc.bias"]
    state["block13.rep.0.weight"] = state["aux.weight"] = torch.zeros(2)
    state["conv2.weight"] = torch.zeros(64, 32, 3, 5)
    state["conv4.pointwise.weight"] = torch.zeros(1536, 2048)
    state["bn2.bias"] = torch.zeros(64, dtype=torch.int32)
    state["bn3.bias"] = torch.zeros(1536, dtype=torch.complex64)
    message = refused(blank("timm"), written(tmp_path / "x.pth", renamed(state, "module.")))
    body = message.split("it does not fit the model\n")[1]
    assert body == "\n".join(
        [
            "  missing:",
            "    block2.skipbn.weight",
            "    fc.bias",
            "  unexpected:",
            "    block13.rep.0.weight (module.block13.rep.0.weight)",
            "    aux.weight (module.aux.weight)",
            "  of another shape or type:",
            "    conv2.weight (module.conv2.weight): (64, 32, 3, 5) in the file, (64, 32, 3, 3) in the model",
            "    bn2.bias (module.bn2.bias): torch.int32 in the file, torch.float32 in the model",
            "    bn3.bias (module.bn3.bias): torch.complex64 in the file, torch.float32 in the model",
            "    conv4.pointwise.weight (module.conv4.pointwise.weight): (1536, 2048) in the file, "
            "(2048, 1536, 1, 1) in the model",
        ]
    )


def test_long_lists_are_cut(timms, tmp_path):
    state = {key: tensor for key, tensor in hollow(timms.state_dict()).items() if "pointwise" not in key}
    message = refused(blank("timm"), written(tmp_path / "x.pth", state), "and 14 more")
    assert message.count("pointwise") == 20


def test_another_number_of_classes_says_what_to_do(timms, tmp_path):
    state = {**hollow(timms.state_dict()), "fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}
    file = written(tmp_path / "x.pth", state)
    refused(blank("timm"), file, r"fc\.weight: \(10, 2048\) in the file, \(5, 2048\)", r"xception\(num_classes=0\)")


def test_variants_of_the_network_do_not_pass_for_each_other(timms, tmp_path):
    file = written(tmp_path / "x.pth", hollow(timms.state_dict()))
    refused(blank("timm", residual=False), file, "unexpected:.*block1.skip.weight")
    refused(blank("timm", fc_layers=1), file, "missing:.*hidden.0.weight")
    refused(blank("timm", in_chans=1), file, r"conv1.weight: \(32, 3, 3, 3\)")


def test_a_base_under_another_head(timms, tmp_path):
    state = {key: tensor for key, tensor in timms.state_dict().items() if not key.startswith("fc.")}
    heads = {"head.0.weight": torch.zeros(3, 2048), "conv9.bias": torch.zeros(3)}
    file = written(tmp_path / "x.pth", {**renamed(state, "backbone."), **heads})
    model = blank("timm", num_classes=0)
    assert load(model, file).left_out == list(heads)
    assert_same_state(model.state_dict(), state)
    refused(blank("timm", num_classes=3), file, "missing:.*fc.weight.*unexpected:.*head.0.weight", "num_classes=0")
    # What looks like a part of the base is none of the head.
    file = written(tmp_path / "y.pth", {**state, "block4.rep.1.pointwise.bias": torch.zeros(728)})
    refused(model, file, "unexpected:.*block4.rep.1.pointwise.bias")


def test_feature_extractors_load(timms, tmp_path):
    model = blank("timm", features_only=True)
    assert load(model, written(tmp_path / "x.pth", hollow(timms.state_dict()))).left_out == ["fc.weight", "fc.bias"]


def test_two_models_in_a_file(timms, tmp_path):
    model = blank("timm")
    state = hollow(timms.state_dict())
    file = written(tmp_path / "x.pth", {**renamed(state, "teacher."), **renamed(state, "student.")})
    refused(model, file, "more than once: under 'teacher.' and under 'student.'")
    file = written(tmp_path / "y.pth", {**state, "last_linear.bias": torch.zeros(CLASSES)})
    refused(model, file, "last_linear.bias and fc.bias are the same")


def test_only_an_xception_can_be_loaded_and_saved(timms, ours, tmp_path):
    file = saved(ours, tmp_path / "x.pth")
    for call in (load, save):
        with pytest.raises(TypeError, match="xsep.models.Xception; got .*Xception"):
            call(timms, file)
        with torch.device("meta"):
            model = xception("keras", num_classes=CLASSES)
        with pytest.raises(ValueError, match="meta"):
            call(model, file)


# Files that are no checkpoints.


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(timms, tmp_path):
    model = blank("timm")
    victim = tmp_path / "victim"
    content = {**hollow(timms.state_dict()), "payload": Malicious(victim)}
    for zipped in (True, False):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        refused(model, tmp_path / "x.pth", "refused")
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Malicious(victim), protocol=2))
    refused(model, tmp_path / "x.pth", "refused")
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim))).close()
    assert victim.exists()  # so the file was dangerous


def test_an_absent_file_and_a_folder(tmp_path):
    model = blank("timm")
    with pytest.raises(FileNotFoundError, match="absent"):
        load(model, tmp_path / "absent.pth")
    with pytest.raises(IsADirectoryError):
        load(model, tmp_path)


def serialized(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def hdf5(fill):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


def announces_too_much(file):
    file.attrs["layer_names"] = ["block1_conv1"]
    file.create_group("block1_conv1").attrs["weight_names"] = ["block1_conv1/kernel"]


def kept_elsewhere(file):
    group = file.create_group("layers/separable_conv2d/vars")
    group.create_dataset("0", (3, 3, 64, 1), "f4", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


FOREIGN = {
    "empty": (b"", "empty"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "starts with b'version https:"),
    "html": (b"<!DOCTYPE html>", "not a file of torch, safetensors or Keras"),
    "pickle": (pickle.dumps([1, 2], protocol=2), "torch cannot read it"),
    "number": (serialized(3), "a int"),
    "list": (serialized([torch.zeros(2)]), "a list"),
    "nothing": (serialized({}), "empty state dict"),
    "no state dict": (serialized({"epoch": 3}), r"epoch \(int\)"),
    "unnamed": (serialized({3: torch.zeros(2)}), "other things than tensors"),
    "another network": (
        serialized(
            {"conv1.weight": torch.zeros(2), "bn1.bias": torch.zeros(2), "layer1.0.conv1.weight": torch.ones(1)}
        ),
        "not the weights of an Xception, but 3 tensors: conv1.weight, bn1.bias",
    ),
    "safetensors of another network": (safetensors.torch.save({"a": torch.zeros(2)}), "1 tensors: a"),
    "safetensors header": ((10**15).to_bytes(8, "little") + b"{}" + bytes(20), ""),
    "zip": (archive(a="b", c="d"), "an archive of neither torch nor Keras, with a, c in it"),
    "keras with something else inside": (archive(**{"model.weights.h5": b"no HDF5"}), ""),
    "hdf5": (hdf5(lambda file: file.create_dataset("x", (3,), "f4")), "no layers"),
    "hdf5 that lacks a variable": (hdf5(announces_too_much), "block1_conv1/kernel is announced, and not there"),
    "hdf5 with data in another file": (hdf5(kept_elsewhere), "layers/separable_conv2d/vars/0 is kept in another file"),
    "hdf5 of another network": (
        hdf5(lambda file: file.create_dataset("layers/dense/vars/0", (3, 4), "f4")),
        "no separable convolution",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind, tmp_path):
    content, pattern = FOREIGN[kind]
    (tmp_path / "x.bin").write_bytes(content)
    refused(blank("timm"), tmp_path / "x.bin", pattern)


@pytest.mark.parametrize("kind", [".safetensors", ".pth", ".weights.h5", ".keras", ".h5", "old .pth"])
def test_truncated_files(kind, ours, tmp_path):
    file = tmp_path / f"x{kind}"
    if kind == ".keras":
        content = archive(
            **{"config.json": "{}", "model.weights.h5": saved(ours, tmp_path / "a.weights.h5").read_bytes()}
        )
    elif kind == ".h5":
        legacy_file(file, layers_of(ours, tmp_path))
        content = file.read_bytes()
    elif kind == "old .pth":
        torch.save(ours.state_dict(), file, _use_new_zipfile_serialization=False)
        content = file.read_bytes()
    else:
        content = saved(ours, file).read_bytes()
    for size in (12, 5000, len(content) - 1):
        file.write_bytes(content[:size])
        refused(blank("keras"), file)


def test_a_damaged_archive(ours, tmp_path):
    content = saved(ours, tmp_path / "a.weights.h5").read_bytes()
    zipped = bytearray(archive(**{"model.weights.h5": content}))
    zipped[len(zipped) // 2] ^= 1
    (tmp_path / "x.keras").write_bytes(zipped)
    refused(blank("keras"), tmp_path / "x.keras", "CRC")


# Saving.


def test_keras_has_no_other_variants(tmp_path):
    for model, pattern in (
        (xception("timm"), "preset.*timm"),
        (xception("keras", activation="elu"), "activation.*elu"),
        (xception("keras", residual=False), "block1.skip"),
        (xception("keras", fc_layers=1), "hidden.0.weight"),
    ):
        with pytest.raises(ValueError, match=f"x.weights.h5.*{pattern}"):
            save(model, tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match=r"x\.h5.*\.weights\.h5"):
        save(model, tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_loses_nothing(ending, ours, tmp_path):
    file = saved(ours, tmp_path / f"x{ending}")
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError):
            save(blank("keras"), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(("ending", "package"), [(".weights.h5", "h5py"), (".safetensors", "safetensors.torch")])
def test_missing_packages(ending, package, ours, tmp_path, monkeypatch):
    file = saved(ours, tmp_path / f"x{ending}")
    monkeypatch.setitem(sys.modules, package, None)
    for call in (load, save):
        with pytest.raises(ImportError, match=r"pip install 'xsep\[checkpoints\]'"):
            call(blank("keras"), file)
