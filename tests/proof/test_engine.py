"""The engine of a verification: weights stay in their file when they would fill the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlm_export.errors import EnvironmentFailure
from vlm_export.proof import engine as engine_module
from vlm_export.proof.engine import engine_label, verifying_engine

GRAPH = Path(__file__).parents[1] / "data" / "runtime" / "tiny_bundle" / "onnx" / "vision_model.onnx"
GIB = 1 << 30


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with 16 GiB left."""
    monkeypatch.setattr("vlm_export.proof.engine.available_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(engine_module, "available_bytes", lambda: 16 * GIB)
    return monkeypatch


def test_only_large_weights_stay_mapped(available: pytest.MonkeyPatch) -> None:
    small = verifying_engine(GRAPH, weights_bytes=GIB, threads=1)
    large = verifying_engine(GRAPH, weights_bytes=5 * GIB, threads=1, providers=("cpu",))
    assert (small.mapped, large.mapped) == (False, True)
    (port,) = small.inputs
    feeds = {port.name: np.random.default_rng(0).standard_normal((2, *port.shape[1:]), np.float32)}  # type: ignore[arg-type]  # the image's sizes are numbers here
    for name, expected in small.run(feeds).items():
        np.testing.assert_allclose(large.run(feeds)[name], expected, rtol=0, atol=1e-5)


def test_the_label_says_so() -> None:
    assert engine_label(("A", "B")).endswith("(A, B)")
    assert engine_label(("A",), mapped=True).endswith("(A; weights mapped, not optimised)")


def test_too_little_memory_is_named(available: pytest.MonkeyPatch) -> None:
    available.setattr(engine_module, "available_bytes", lambda: GIB)
    with pytest.raises(EnvironmentFailure) as caught:
        verifying_engine(GRAPH, weights_bytes=17 * GIB)
    assert "3.0 GiB" in caught.value.expected
    assert "17.0 GiB" in caught.value.expected
    assert "1.0 GiB" in caught.value.got
    assert caught.value.exit_status == 4
    assert verifying_engine(GRAPH, weights_bytes=GIB // 2, threads=1)
    available.setattr(engine_module, "available_bytes", lambda: None)
    assert verifying_engine(GRAPH, weights_bytes=17 * GIB, threads=1).mapped
