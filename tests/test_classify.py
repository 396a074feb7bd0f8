"""``python -m xsep.classify``."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from skimage import data
from timm.data import create_transform

from xsep.checkpoints import save
from xsep.classify import SIZE, classify, main, read_image, read_labels
from xsep.models import xception

CLASSES = ["cat", "dog", "tree", "house", "ship", "cloud", "stone"]


@pytest.fixture(scope="module")
def model():
    """Random weights, and a classifier for which the photographs are unlike each other."""
    torch.manual_seed(0)
    model = xception("timm", num_classes=len(CLASSES)).eval()
    with torch.no_grad():
        pixels = [torch.from_numpy(image[:300, :300]) / 127.5 - 1 for image in (data.astronaut(), data.chelsea())]
        features = model.forward_features(torch.stack([image.permute(2, 0, 1) for image in pixels])).mean((2, 3))
        a, b = features
        model.fc.weight.normal_(std=4 / (a - b).norm())
        model.fc.bias.copy_(-model.fc.weight @ (a + b) / 2)
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save(model, folder / "x.pth")
    yield folder / "x.pth"
    (folder / "x.pth").unlink()


@pytest.fixture
def photographs(tmp_path):
    """A folder with a few, one of them upright by its EXIF only, and a text."""
    folder = tmp_path / "photographs"
    (folder / "below").mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(folder / "a.png")
    Image.fromarray(data.chelsea()).save(folder / "b.JPG", "JPEG")
    Image.fromarray(data.camera()).save(folder / "below" / "grey.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(capsys, *arguments, status=0):
    try:
        found = main([str(argument) for argument in arguments])
    except SystemExit as error:
        found = error.code
    captured = capsys.readouterr()
    assert found == status, captured
    return captured


def expected(model, file):
    with torch.no_grad():
        probabilities = model(read_image(file)[None])[0].softmax(0)
    order = probabilities.argsort(descending=True)
    return [(i, probabilities[i].item()) for i in order.tolist()]


def test_the_input_is_timms(tmp_path):
    """timm's evaluation transform of its own legacy_xception, on extents that round up and down."""
    transform = create_transform(
        (3, SIZE, SIZE), interpolation="bicubic", crop_pct=0.8975, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for image in (data.chelsea(), data.astronaut()[:401, :333], data.coffee()[:97, :60]):
        Image.fromarray(image).save(tmp_path / "x.png")
        found = read_image(tmp_path / "x.png")
        assert torch.equal(found, transform(Image.open(tmp_path / "x.png"))) and found.shape == (3, SIZE, SIZE)
        assert found.min() >= -1 and found.max() <= 1


def test_images_of_other_modes_and_orientations(tmp_path):
    upright = Image.fromarray(data.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert torch.equal(read_image(tmp_path / "turned.png"), read_image(tmp_path / "upright.png"))
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        file = tmp_path / "x.tif"
        upright.convert(mode).save(file)
        assert read_image(file).shape == (3, SIZE, SIZE)


def test_json(model, weights, photographs, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASSES) + "\n")
    out = run(capsys, photographs, "--weights", weights, "--labels", labels, "--json", "--batch-size", 2).out
    results = json.loads(out)
    files = [photographs / name for name in ("a.png", "b.JPG", "below/grey.png")]
    assert [result["image"] for result in results] == [str(file) for file in files]
    for file, result in zip(files, results):
        assert len(result["predictions"]) == 5
        for found, (i, probability) in zip(result["predictions"], expected(model, file)):
            assert (found["number"], found["label"]) == (i, CLASSES[i])
            assert found["probability"] == pytest.approx(probability, abs=1e-4)
    assert len({result["predictions"][0]["label"] for result in results}) > 1


def test_table(model, weights, photographs, capsys):
    file = photographs / "a.png"
    out = run(capsys, file, "--weights", weights, "--top", 2).out
    (first, p), (second, q), *_ = expected(model, file)
    assert out == f"{file}\n  {100 * p:6.2f} %  {first}\n  {100 * q:6.2f} %  {second}\n"


def test_unreadable_files_are_reported_and_the_rest_is_done(weights, photographs, tmp_path, capsys):
    whole = (photographs / "b.JPG").read_bytes()
    (photographs / "aa.jpg").write_bytes(whole[: len(whole) // 2])
    (photographs / "b.png").write_bytes(b"no picture")
    Image.new("RGB", (1, 5000)).save(photographs / "line.png")
    (tmp_path / "empty").mkdir()
    found = run(
        capsys, photographs, tmp_path / "absent.png", tmp_path / "empty", "--weights", weights, "--json", status=1
    )
    names = [result["image"].rsplit("/", 1)[1] for result in json.loads(found.out)]
    assert names == ["a.png", "b.JPG", "grey.png"]
    lines = found.err.splitlines()
    assert len(lines) == 5 and all(line.startswith("cannot read ") for line in lines)
    for line, pattern in zip(
        lines, ("aa.jpg: .*trunc", "b.png: ", "line.png: 1 x 5000", "absent.png: ", "empty: no image")
    ):
        assert re.search(pattern, line), line


def test_standard_input(model, weights, photographs, capsys, monkeypatch):
    content = (photographs / "a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    results = json.loads(run(capsys, "-", "--weights", weights, "--json").out)
    assert results[0]["image"] == "standard input"
    assert results[0]["predictions"][0]["number"] == expected(model, photographs / "a.png")[0][0]


def test_as_a_program(weights, tmp_path):
    command = [sys.executable, "-m", "xsep.classify", "-", "--weights", str(weights)]
    # Elsewhere than in the checkout, whose folder would hide the installed package.
    done = subprocess.run(command, input=b"no picture", capture_output=True, cwd=tmp_path)
    assert done.returncode == 1 and b"cannot read standard input" in done.stderr and not done.stdout
    assert b"Traceback" not in done.stderr


def test_what_is_refused(weights, photographs, tmp_path, capsys):
    file = photographs / "a.png"
    assert "absent.pth" in run(capsys, file, "--weights", tmp_path / "absent.pth", status=2).err
    (tmp_path / "x.pth").write_bytes(b"nothing")
    assert "x.pth: not a file of" in run(capsys, file, "--weights", tmp_path / "x.pth", status=2).err
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    labels = ("--labels", tmp_path / "labels.txt")
    assert "2 names for 7 classes" in run(capsys, file, "--weights", weights, *labels, status=2).err
    assert "must be at least 1; got 0" in run(capsys, file, "--weights", weights, "--top", 0, status=2).err
    assert "tpu9" in run(capsys, file, "--weights", weights, "--device", "tpu9", status=2).err
    assert "image" in run(capsys, "--weights", weights, status=2).err
    for options, pattern in (({"num_classes": 0}, "no classifier"), ({"num_classes": 2, "in_chans": 1}, "1 channels")):
        save(xception("timm", **options), tmp_path / "x.safetensors")
        assert pattern in run(capsys, file, "--weights", tmp_path / "x.safetensors", status=2).err


def test_labels(tmp_path):
    file = tmp_path / "labels.json"
    names = ["tench", "goldfish", "shark"]
    for content in (
        names,
        {str(i): name for i, name in enumerate(names)},
        {str(i): ["n0", n] for i, n in enumerate(names)},
    ):
        file.write_text(json.dumps(content))
        assert read_labels(file, 3) == names
    for text in ("{", "3", '{"a": "tench"}', "[1, 2, 3]", "[[], [], []]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="labels.json: neither a list of names"):
            read_labels(file, 3)
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"labels\.txt: not a text"):
        read_labels(tmp_path / "labels.txt", 1)
    assert read_labels(None, 2) == ["0", "1"]


def test_fewer_classes_than_asked_for(model):
    assert [len(row) for row in classify(model, torch.zeros(2, 3, 75, 75), CLASSES, top=50)] == [7, 7]


def test_help(capsys):
    out = run(capsys, "--help").out
    assert "--weights FILE" in out and "exit status:" in out and max(map(len, out.splitlines())) <= 80
