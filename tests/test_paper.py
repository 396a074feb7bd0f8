"""``benchmarks/paper.py`` at its smallest, and that what it trains is what the paper says."""

import csv

import numpy as np
import paper
import paper_training
import pytest
import torch
from PIL import Image
from test_commands import ROOT, run
from torch import nn

from xsep.train.recipes import RECIPES

FIGURES = ("fig6", "fig7", "fig8", "fig9", "fig10", "spectrum", "stack")


def start(*arguments):
    paper.main(list(map(str, arguments)))


def rows(file):
    return list(csv.DictReader(line for line in file.read_text().splitlines() if not line.startswith("#")))


def make_images(folder, count, seed=0):
    random = np.random.default_rng(seed)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def test_everything_on_ones_own_images(tmp_path):
    make_images(tmp_path / "data", 6)
    out = tmp_path / "out"
    options = ("--quick", "--device", "cpu", "--data", tmp_path / "data", "--out", out)
    printed = run(ROOT / "benchmarks" / "paper.py", *options)
    names = ("table1", "table2", "table3", *FIGURES)
    pictures = [f"{name}.png" for name in FIGURES]
    assert {file.name for file in out.iterdir()} == {"results.md", *(f"{name}.csv" for name in names), *pictures}
    assert all((out / name).stat().st_size > 1000 for name in pictures)

    text = (out / "results.md").read_text()
    assert "10 images, 2 others for validation, 2 classes" in text and "its numbers mean nothing" in text
    assert "not ImageNet" not in text and all(f"]({name})" in text for name in pictures)

    for name, labels in (
        ("table1", ["Inception V3", "Xception"]),
        ("table2", [f"{n} {fc} FC layers" for fc in ("no", "with") for n in ("Inception V3", "Xception")]),
    ):
        found = rows(out / f"{name}.csv")
        assert [row["network"].replace(",", "") for row in found] == labels
        for row in found:
            # Two classes: the right one is always among the five most probable.
            assert row["seeds"] == "1" and float(row["top1"]) in (0, 0.5, 1) and float(row["top5"]) == 1
            assert f"| {row['network']} | 1 | {row['top1']} |" in text and row["network"] in printed
    assert [row["paper: MAP@100, JFT"] for row in rows(out / "table2.csv")] == ["6.36", "6.70", "6.50", "6.78"]

    xception, inception, ratio = rows(out / "table3.csv")
    assert (xception["parameters"], inception["parameters"]) == ("22855952", "23834568")
    for variant in ("xsep", "torch"):
        speeds = [float(row[f"steps/s, {variant}"]) for row in (xception, inception)]
        assert float(ratio[f"steps/s, {variant}"]) == pytest.approx(speeds[0] / speeds[1], abs=0.01)

    profiles = {name: rows(out / f"{name}.csv") for name in FIGURES}
    for name, count in zip(FIGURES, (2, 2, 2, 2, 3, 2, 3)):
        assert [row["step"] for row in profiles[name]] == ["1", "2"] * count, name
        assert len({row["network"] for row in profiles[name]}) == count
    # The same seed, and trained once: the profile of Xception is the same in all figures, other networks have another.
    same = [[row for row in profiles[name] if row["network"] == "Xception"] for name in FIGURES if name[3:] not in "78"]
    assert all(profile == same[0] for profile in same)
    assert len({row["loss"] for row in profiles["fig10"]}) == 6


def test_digits_and_several_seeds(tmp_path, capsys):
    steps = ("--quick", "--device", "cpu", "--seeds", 2, "--evaluations", 1, "--only", "fig6,table1")
    start(*steps, "--out", tmp_path)
    printed = capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert "**This is not ImageNet" in text and "scikit-learn's handwritten digits" in text
    assert "1437 images, 360 others for validation, 10 classes" in text
    assert "# trained on: not ImageNet: scikit-learn's handwritten digits" in (tmp_path / "fig6.csv").read_text()
    assert "seeds" in printed and not (tmp_path / "table2.csv").exists()
    table, figure = rows(tmp_path / "table1.csv"), rows(tmp_path / "fig6.csv")
    assert [row["seeds"] for row in table] == ["2", "2"] and [row["seed"] for row in figure] == ["0", "0"]
    for row, point in zip(table, figure):
        # Of two values, the mean is a deviation / sqrt(2) away from either.
        away = float(row["top1_deviation"]) / 2**0.5
        assert abs(float(row["top1"]) - float(point["top1"])) == pytest.approx(away, abs=2e-4)


def test_errors(tmp_path, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit) as end:
            start("--out", tmp_path / "out", *arguments)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "no fig11; there are table1, table2" in message("--only", "fig6,fig11")
    assert "--image-size must be at least 75; got 32" in message("--image-size", 32)
    assert "is not a folder" in message("--data", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "error: --data" in message("--data", tmp_path / "empty")
    make_images(tmp_path / "data", 2)
    assert "no class of" in message("--data", tmp_path / "data")
    make_images(tmp_path / "both" / "train", 3)
    make_images(tmp_path / "both" / "val", 1, seed=1)
    assert "more than the 6 training images" in message("--data", tmp_path / "both")
    (tmp_path / "both" / "train" / "cats" / "0.png").write_bytes(b"no picture")
    broken = message("--quick", "--data", tmp_path / "both", "--only", "fig9", "--steps", 4, "--device", "cpu")
    assert "cannot read" in broken and "0.png" in broken


@pytest.mark.parametrize(("name", "parameters"), [("xception", 22_855_952), ("inception_v3", 23_834_568)])
def test_networks_narrow(name, parameters):
    recipe = RECIPES["imagenet"]
    full = paper_training.network(name, 1000, 1, recipe, {})
    assert sum(p.numel() for p in full.parameters()) == parameters
    narrow = paper_training.network(name, 10, 8, recipe, {})
    assert not any(t.is_meta for t in narrow.state_dict().values())
    for (key, wide), slim in zip(full.named_parameters(), narrow.parameters()):
        if wide.dim() == 4 and wide.shape[1] > 3:
            assert slim.shape == (wide.shape[0] // 8, wide.shape[1] // 8, *wide.shape[2:]), key
    depthwise = [m for m in narrow.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == (34 if name == "xception" else 0) and all(m.groups == m.in_channels for m in depthwise)
    assert narrow(torch.randn(2, 3, 75, 75)).shape == (2, 10)
    hidden = paper_training.network(name, 10, 8, RECIPES["jft"], {"fc_layers": 2})
    linear = [(m.in_features, m.out_features) for m in hidden.modules() if isinstance(m, nn.Linear)]
    assert linear == [(256, 512), (512, 512), (512, 10)]
    rates = [m.p for m in full.modules() if isinstance(m, nn.Dropout)] or [full.drop_rate]
    assert rates == [0.5]
