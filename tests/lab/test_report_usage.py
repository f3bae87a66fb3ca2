"""The code that a page shows runs as it stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import onnxruntime
import pytest

from vlm_export.bundle.opened import open_bundle
from vlm_export.lab.report.usage import usage_samples

PHOTO = Path(__file__).parents[2] / "configs" / "demo" / "images" / "red-circle-large-one-bottom.png"


def ran(folder: Path, *command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def node_modules() -> Path | None:
    """Where Node.js finds onnxruntime-node, None where it does not."""
    if shutil.which("node") is None:
        return None
    script = "console.log(require.resolve('onnxruntime-node/package.json'))"
    found = subprocess.run(["node", "-e", script], capture_output=True, text=True, encoding="utf-8", check=False)
    return Path(found.stdout.strip()).parents[1] if found.returncode == 0 else None


@cache
def compiles() -> bool:
    """Whether g++ finds ONNX Runtime's headers."""
    if shutil.which("g++") is None:
        return False
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-include", "onnxruntime_cxx_api.h", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def beside(demo: Path, folder: Path) -> list[str]:
    """The codes, in a folder with the bundle and a photo."""
    (folder / "clip-demo").symlink_to(demo)
    shutil.copy(PHOTO, folder / "photo.jpg")
    return [code for _, code in usage_samples(open_bundle(demo).manifest, "clip-demo")]


def test_in_python(demo: Path, tmp_path: Path) -> None:
    python, _, _ = beside(demo, tmp_path)
    assert ran(tmp_path, sys.executable, "-c", python).startswith("[[")


@pytest.mark.slow
@pytest.mark.skipif(node_modules() is None, reason="needs Node.js, and onnxruntime-node on NODE_PATH")
def test_in_javascript(demo: Path, tmp_path: Path) -> None:
    _, javascript, _ = beside(demo, tmp_path)
    (tmp_path / "node_modules").symlink_to(node_modules() or "")
    (tmp_path / "usage.mjs").write_text(javascript, encoding="utf-8")
    assert ran(tmp_path, "node", "usage.mjs").startswith("[ 1, 128 ] Float32Array(128)")


@pytest.mark.slow
@pytest.mark.skipif(not compiles(), reason="needs g++, and ONNX Runtime's headers on CPATH")
def test_in_cpp(demo: Path, tmp_path: Path) -> None:
    _, _, cpp = beside(demo, tmp_path)
    (tmp_path / "usage.cpp").write_text(cpp, encoding="utf-8")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    ran(tmp_path, "g++", "-std=c++17", "-Wall", "-Werror", "usage.cpp", "libonnxruntime.so.1", "-o", "usage")
    assert ran(tmp_path, "./usage", LD_LIBRARY_PATH=str(tmp_path)) == "1 128 \n"
