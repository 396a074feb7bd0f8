"""The programs: ``python -m xsep.info`` and the benchmarks, at their smallest."""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(*arguments, ok=True):
    # Elsewhere than in the checkout, whose folder would hide the installed package.
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def throughput(*arguments, ok=True):
    return run(ROOT / "benchmarks" / "throughput.py", *arguments, ok=ok)


def test_info():
    out = run("-m", "xsep.info")
    for word in (
        "compiled module",
        "CPU instruction sets",
        "in use:",
        "CUDA kernels",
        "CUDA emulated",
        "Triton kernels",
        "torch",
        "cpu   float16",
        "its block: 128 channels",
    ):
        assert word in out


SMALL = ("--batch-size", 2, "--img-size", 75, "--num-warm-iter", 1, "--num-bench-iter", 2)


def test_throughput(tmp_path):
    results, picture = tmp_path / "new" / "results.json", tmp_path / "plot.png"
    out = throughput(*SMALL, "--bench", "both", "--results-file", results, "--plot", picture)
    assert "numerics: outputs and input gradients" in out and "not cuda: " in out
    assert "Xception fused / torch's best Inception V3" in out and "blocks backward: one kernel" in out
    assert out.count("in multiples of      measured  target") == 2 and "time of its matrix products alone" in out
    found = json.loads(results.read_text())
    assert len(found["rows"]) == 10 and found["header"]["layout"] == "channels_last"
    parameters = {row["model"]: row["parameters"] for row in found["rows"]}
    assert parameters == {"xception": 22_855_952, "inception_v3": 23_834_568}
    for row in found["rows"]:
        assert row["images_per_s"] == pytest.approx(2 * row["steps_per_s"]) and row["ms"] > 0
    assert picture.stat().st_size > 1000


def test_throughput_on_ones_own_photographs(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    results = tmp_path / "results.csv"
    throughput(
        *(*SMALL, "--data", tmp_path, "--amp", "--no-channels-last", "--models", "xception"),
        *("--results-file", results, "--results-format", "csv"),
    )
    lines = [line for line in results.read_text().splitlines() if not line.startswith("#")]
    assert [row["variant"] for row in csv.DictReader(lines)] == ["fused", "xsep", "torch"]


def test_throughput_refuses_what_cannot_be(tmp_path):
    assert "is not a folder" in throughput("--data", tmp_path / "absent", ok=False)
    assert "no image" in throughput("--data", tmp_path, ok=False)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    message = throughput("--data", tmp_path, ok=False)
    assert "cannot read" in message and "broken.jpg" in message and "Traceback" not in message
    assert "--batch-size must be at least 2; got 0" in throughput("--batch-size", 0, ok=False)
    assert "exclude each other" in throughput("--synthetic", "--data", tmp_path, ok=False)
    assert "invalid choice: 'fast'" in throughput("--bench", "fast", ok=False)


def test_layers(tmp_path):
    results, picture = tmp_path / "layers.csv", tmp_path / "plot.png"
    out = run(
        *(ROOT / "benchmarks" / "layers.py", "--networks", "efficientnet_b0", "--batch-sizes", 1, "--passes", "fprop"),
        *("--samples", 1, "--results-file", results, "--results-format", "csv", "--plot", picture),
    )
    assert "NCHW: geometric mean" in out and "(target 4.0x)" in out and "NHWC: geometric mean" in out
    rows = list(csv.DictReader(line for line in results.read_text().splitlines() if not line.startswith("#")))
    assert len(rows) == 24 and picture.stat().st_size > 1000


def test_help():
    for name in ("throughput.py", "layers.py"):
        assert "--results-file" in run(ROOT / "benchmarks" / name, "--help")
    assert "--torchcompile" in run(ROOT / "benchmarks" / "block.py", "--help")
    assert "--batch-size" in run(ROOT / "benchmarks" / "block_bytes.py", "--help")
    assert "racecheck" in run(ROOT / "scripts" / "sanitize.py", "--help")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_sanitize_says_what_is_missing():
    script = ROOT / "scripts" / "sanitize.py"
    assert "cannot run: " in run(script, ok=False)
    assert "invalid choice: 'leakcheck'" in run(script, "--tools", "leakcheck", ok=False)
