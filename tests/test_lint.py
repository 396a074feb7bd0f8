"""Formatting, lint and types are tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPP = sorted(
    str(f)
    for folder in ("csrc", "tests/cpp")
    for f in (ROOT / folder).rglob("*")
    if f.suffix in (".h", ".cpp", ".cu", ".cuh")
)


def tool(name):
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["clang-format", "--dry-run", "-Werror", *CPP],
    ],
    ids=["ruff check", "ruff format", "mypy", "clang-format"],
)
def test_lint(command):
    run = subprocess.run([tool(command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_csrc_knows_nothing_of_torch():
    for file in CPP:
        text = Path(file).read_text()
        assert not any(f"#include {quote}{name}/" in text for quote in '<"' for name in ("torch", "ATen", "c10")), file


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
