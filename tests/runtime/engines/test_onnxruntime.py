"""The ONNX Runtime engine: checked feeds, named failures, no optimiser that changes values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import Engine, OrtEngine


@pytest.fixture(scope="module")
def text_graph(data: Path) -> Path:
    return data / "runtime" / "tiny_bundle" / "onnx" / "text_model.onnx"


@pytest.fixture(scope="module")
def text_engine(text_graph: Path) -> OrtEngine:
    return OrtEngine(text_graph, threads=1)


def test_ports_tell_names_dtypes_and_axes(text_engine: OrtEngine) -> None:
    engine: Engine = text_engine
    assert [(port.name, port.dtype, port.shape) for port in engine.inputs] == [
        ("input_ids", "int64", ("batch", "sequence"))
    ]
    assert engine.outputs[0].name == "text_embeds"


def test_outputs_are_named(text_engine: OrtEngine) -> None:
    outputs = text_engine.run({"input_ids": np.array([[1, 2, 524]])})
    assert list(outputs) == ["text_embeds"]
    assert outputs["text_embeds"].shape == (1, 12)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "other inputs"),
        ({"ids": np.ones((1, 2), np.int64)}, "other inputs"),
        ({"input_ids": np.ones((1, 2), np.int32)}, "expected: int64"),
        ({"input_ids": np.ones((1, 2), np.float32)}, "got: float32"),
        ({"input_ids": np.ones((2,), np.int64)}, r"got: int64 \(2\)"),
        ({"input_ids": np.full((1, 2), 10**6)}, "failed while running"),
    ],
)
def test_wrong_feeds_are_explained(text_engine: OrtEngine, feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_engine.run(feeds)


def test_fixed_axes_are_checked(data: Path) -> None:
    engine = OrtEngine(data / "runtime" / "tiny_bundle" / "onnx" / "vision_model.onnx", threads=1)
    with pytest.raises(InputError, match=r"expected: float32 \(batch, 3, 24, 24\)"):
        engine.run({"pixel_values": np.zeros((1, 3, 25, 24), np.float32)})


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", None])
def test_broken_graph_is_named(content: bytes | None, text_graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    whole = text_graph.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match=r"broken\.onnx") as caught:
        OrtEngine(path)
    assert "\n  fix:" in str(caught.value)
    with pytest.raises(InputError, match=r"absent\.onnx"):
        OrtEngine(tmp_path / "absent.onnx")


def test_unknown_provider_lists_those_there_are(text_graph: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="CPUExecutionProvider") as caught:
        OrtEngine(text_graph, providers=["NoSuchExecutionProvider"])
    assert caught.value.exit_status == 4
    OrtEngine(text_graph, providers=["cpu"], threads=1)
    with pytest.raises(UsageError):
        OrtEngine(text_graph, threads=0)


@pytest.mark.needs_torch
@pytest.mark.parametrize("exact", [False, True])
def test_zero_pad_before_max_pool_keeps_its_zeros(exact: bool, tmp_path: Path) -> None:
    """onnxruntime's Pad fusion gives -1 here; the padding's own zeros are the maximum of each corner."""
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 4, 4])
    pads = helper.make_tensor("pads", TensorProto.INT64, [8], [0, 0, 1, 1, 0, 0, 1, 1])
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[3, 3]),
    ]
    graph = helper.make_graph(nodes, "pad", [x], [y], [pads])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "p.onnx")
    values = OrtEngine(tmp_path / "p.onnx", exact=exact).run({"x": -np.ones((1, 1, 4, 4), np.float32)})["y"]
    assert values[0, 0].tolist() == [[0, 0, 0, 0], [0, -1, -1, 0], [0, -1, -1, 0], [0, 0, 0, 0]]


@pytest.mark.needs_torch
@pytest.mark.parametrize(("opset", "ir_version", "needed"), [(17, 8, "1.15.1"), (18, 10, "1.18.0"), (23, 10, "1.23.0")])
def test_an_onnxruntime_that_is_too_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: int, ir_version: int, needed: str
) -> None:
    """Measured: see `oldest_engine`. The failure of an old release is played."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    path = tmp_path / "m.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.save(model, str(path))
    assert oldest_onnxruntime(path) == (needed, opset)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"opset {opset} is under development")

    monkeypatch.setattr("vlm_export.runtime.engines.onnxruntime.start_session", refuse)
    monkeypatch.setattr("onnxruntime.__version__", "1.15.0")
    with pytest.raises(EnvironmentFailure, match="too old") as caught:
        OrtEngine(path)
    assert f"onnxruntime {needed} or newer, for its opset {opset}" in caught.value.expected
    assert ("lower --opset" in caught.value.fix) == (opset == 23)
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    with pytest.raises(InputError, match="cannot be loaded"):
        OrtEngine(path)
