from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

Array = npt.NDArray[Any]


@pytest.fixture(scope="session")
def parse() -> Callable[[str, Mapping[str, Array]], ir.Model]:
    """A graph in ONNX's text form, with initializers of the given values."""

    def build(text: str, weights: Mapping[str, Array]) -> ir.Model:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}')
        for name, value in weights.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        onnx.checker.check_model(proto)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))

    return build


@pytest.fixture
def run(tmp_path: Path) -> Callable[[ir.Model, Mapping[str, Array]], list[Array]]:
    """Checks a graph and runs it in ONNX Runtime, without its optimisations."""

    def execute(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
        path = tmp_path / "graph.onnx"
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [np.asarray(value) for value in session.run(None, dict(feeds))]

    return execute


@pytest.fixture(scope="session")
def operators() -> Callable[[ir.Model], list[str]]:
    """The operators of a graph, in order."""
    return lambda model: [node.op_type for node in model.graph]


@pytest.fixture(scope="session")
def random_graphs() -> ModuleType:
    """The generator of random models, with what runs, checks and compares them."""
    path = Path(__file__).with_name("random_graphs.py")
    spec = importlib.util.spec_from_file_location("random_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["random_graphs"] = module
    spec.loader.exec_module(module)
    return module
