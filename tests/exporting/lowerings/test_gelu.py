"""The tanh form of GELU: equal to torch's, and one operator wherever a runtime has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.exporting.backends import Exporter, export_part
from vlm_export.exporting.finishing import finish_graph, write_graph
from vlm_export.exporting.lowerings.operators import composed_tanh_gelu, lower_tanh_gelu
from vlm_export.family import Array, Part
from vlm_export.specs.signature import Axis, Signature, TensorSpec

ORIGINAL = F.gelu
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 8)),), (TensorSpec("y", "float32", ("batch", 8)),), (Axis("batch"),)
)
FORMS: list[tuple[Exporter, int]] = [("torchscript", 11), ("torchscript", 17), ("dynamo", 18), ("dynamo", 19)]


class Activated(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.act = nn.GELU(approximate)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x * 2) + 1
        return y


def examples(sizes: object, seed: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((3, 8), dtype=np.float32) * 4}


def written(path: Path, approximate: str, exporter: Exporter, opset: int) -> list[str]:
    """The graph's operators; the graph is at `path`."""
    part = Part("part", Activated(approximate).eval(), SIGNATURE, examples)
    write_graph(finish_graph(export_part(part, opset, exporter), SIGNATURE), path)
    return [node.op_type for node in onnx.load(path).graph.node]


def test_equal_to_torchs_operator() -> None:
    for magnitude in (1e-6, 1e-3, 1.0, 10.0, 1e4):
        x = magnitude * torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(composed_tanh_gelu(x), ORIGINAL(x, approximate="tanh"), rtol=1e-12, atol=1e-14)
    extremes = torch.tensor([0.0, -0.0, 1e30, torch.inf])
    assert torch.equal(composed_tanh_gelu(extremes), extremes)


def test_float16_holds_it_up_to_its_own_largest_value() -> None:
    """An infinite cube is a tanh of 1, and no NaN."""
    x = torch.tensor([-65504.0, -300.0, -8.0, 8.0, 300.0, 65504.0], dtype=torch.float16)
    with np.errstate(all="ignore"):
        assert torch.equal(composed_tanh_gelu(x), torch.where(x > 0, x, torch.zeros_like(x)))


@pytest.mark.parametrize(("exporter", "opset"), FORMS)
def test_onnxruntime_makes_one_operator_of_it(exporter: Exporter, opset: int, tmp_path: Path) -> None:
    path, optimized = tmp_path / "graph.onnx", tmp_path / "optimized.onnx"
    operators = written(path, "tanh", exporter, opset)
    assert "Pow" not in operators
    assert operators.count("Tanh") == 1
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    assert kinds.count("FastGelu") == 1
    assert "Tanh" not in kinds
    feeds = examples({}, 1)
    expected = Activated("tanh")(torch.from_numpy(feeds["x"])).numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 20), ("dynamo", 20), ("dynamo", 23)])
def test_from_opset_20_on_it_is_onnxs_own(exporter: Exporter, opset: int, tmp_path: Path) -> None:
    assert "Gelu" in written(tmp_path / "graph.onnx", "tanh", exporter, opset)


def test_the_exact_form_stays_exact(tmp_path: Path) -> None:
    operators = written(tmp_path / "graph.onnx", "none", "dynamo", 18)
    assert "Erf" in operators
    assert "Tanh" not in operators


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_undone_on_exit(error: type[BaseException] | None) -> None:
    if error is None:
        with lower_tanh_gelu():
            assert F.gelu is not ORIGINAL
    else:
        with pytest.raises(error), lower_tanh_gelu():
            raise error
    assert F.gelu is ORIGINAL
