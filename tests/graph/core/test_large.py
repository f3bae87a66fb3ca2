"""Large models are edited without holding their weights: anonymous memory is sampled in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

_SCRIPT = Path(__file__).with_name("edit_large.py")


def _edit(folder: Path, layers: int, width: int) -> dict[str, int]:
    """Peaks of anonymous memory in bytes, by operation; "start" is before the first."""
    command = [sys.executable, str(_SCRIPT), str(folder), str(layers), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def _data_bytes(path: Path) -> int:
    return path.with_name(f"{path.name}_data").stat().st_size


def test_memory_does_not_grow_with_the_weights(scratch: Path) -> None:
    # 192 MiB of weights in 24 tensors of 8 MiB: the bound is below a tenth of them.
    peaks = _edit(scratch, 24, 2048)
    start = peaks.pop("start")
    assert max(peaks.values()) - start < 18 << 20, peaks
    assert _data_bytes(scratch / "renamed.onnx") == 24 * 2048 * 2048 * 2
    assert _data_bytes(scratch / "part.onnx") == 23 * 2048 * 2048 * 2
    x = np.random.default_rng(0).standard_normal((1, 2048)).astype(np.float16)
    results = [
        _run(scratch / name, {feed: value}).astype(np.float16)
        for name, feed, value in (
            ("large.onnx", "x", x),
            ("renamed.onnx", "pixels", x),
            ("float32.onnx", "x", x.astype(np.float32)),
            ("part.onnx", "relu.0.out", np.maximum(x, 0)),
        )
    ]
    # Every second layer doubles.
    assert (results[0] == np.maximum(x, 0) * 2**12).all()
    assert all((result == results[0]).all() for result in results)


def _run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory that is emptied at once, since pytest keeps those of the last runs."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.slow
def test_three_gigabytes_in_less_than_one_of_memory(scratch: Path) -> None:
    peaks = _edit(scratch, 24, 8192)
    assert _data_bytes(scratch / "renamed.onnx") == 3 << 30
    assert max(peaks.values()) < 1 << 30, peaks
    assert max(peaks.values()) - peaks["start"] < 64 << 20, peaks
