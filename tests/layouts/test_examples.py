"""The programs of docs/deploying.md in Python, Node.js and C++, each in an environment without this package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_export
from vlm_export.layouts.package import package

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
IMAGE = ROOT / "configs" / "demo" / "images" / "purple-ring-small-four-right.png"
TEXT = "four purple rings"
PYTHON = ("onnxruntime==1.26.0", "tokenizers==0.23.3", "pillow")
NODE = ("onnxruntime-node@1.30.0", "@huggingface/tokenizers", "sharp")
OPENVINO = "openvino==2026.4.1"


def program(language: str, mark: str) -> str:
    """The program of the page that has a mark; of at most thirty lines."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if mark in code)
    assert len(found.splitlines()) <= 30
    return str(found)


def said(command: Sequence[Any], folder: Path) -> list[str]:
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=folder, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def expected(demo_from_uint8: Path) -> tuple[float, list[int]]:
    model = vlm_export.load(demo_from_uint8, threads=1)
    (ids,) = model.session.tokenizer.encode_rows([TEXT])
    return float((model.encode_image([IMAGE]) @ model.encode_text([TEXT]).T)[0, 0]), list(ids)


def assert_says(words: Sequence[str], expected: tuple[float, list[int]]) -> None:
    assert abs(float(words[0]) - expected[0]) < 2e-4
    assert [int(word) for word in words[1:]] == expected[1]


def test_python(
    python_with: Callable[..., Path], demo_from_uint8: Path, tmp_path: Path, expected: tuple[float, list[int]]
) -> None:
    python = python_with("example", *PYTHON)
    (tmp_path / "cosine.py").write_text(program("python", "Tokenizer.from_file"), encoding="utf-8")
    assert_says(said([python, "cosine.py", demo_from_uint8, IMAGE, TEXT], tmp_path), expected)


def test_node(node_with: Callable[..., Path], demo_from_uint8: Path, expected: tuple[float, list[int]]) -> None:
    home = node_with("example-node", *NODE)
    (home / "cosine.mjs").write_text(program("js", "onnxruntime-node"), encoding="utf-8")
    assert_says(said(["node", "cosine.mjs", demo_from_uint8, IMAGE, TEXT], home), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_cpp(
    python_with: Callable[..., Path], demo_from_uint8: Path, tmp_path: Path, expected: tuple[float, list[int]]
) -> None:
    """Compiled with the headers and the library of OpenVINO's wheel."""
    python = python_with("example-openvino", OPENVINO)
    (home,) = said([python, "-c", "import openvino, os; print(os.path.dirname(openvino.__file__))"], tmp_path)
    (library,) = Path(home, "libs").glob("libopenvino.so.*")
    (tmp_path / "cosine.cpp").write_text(program("cpp", "openvino.hpp"), encoding="utf-8")
    place = ["-I", f"{home}/include", "-L", library.parent, f"-l:{library.name}", f"-Wl,-rpath,{library.parent}"]
    said(["g++", "-std=c++17", "-Wall", "-Werror", "-O1", "cosine.cpp", *place, "-o", "cosine"], tmp_path)
    package(demo_from_uint8, tmp_path / "out", "openvino", threads=1)
    Image.open(IMAGE).convert("RGB").save(tmp_path / "image.ppm")
    cosine, ids = expected
    assert_says(said(["./cosine", "out", "image.ppm", *ids], tmp_path), (cosine, []))
