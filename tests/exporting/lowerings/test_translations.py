"""torch's translations are read once for all graphs, and for each where a release has them elsewhere."""

from __future__ import annotations

import sys

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from vlm_export.exporting.lowerings.translations import kept_translations


def test_each_opset_is_read_once_and_each_graph_has_its_own_copy() -> None:
    own = ONNXRegistry.__dict__["from_torchlib"]
    with kept_translations():
        first, second = (ONNXRegistry.from_torchlib(opset_version=18) for _ in range(2))
        other = ONNXRegistry.from_torchlib(opset_version=20)
    assert ONNXRegistry.__dict__["from_torchlib"] is own
    assert len(first.functions) > 100
    name, (translation, *_) = next(iter(first.functions.items()))
    assert second.functions[name][0] is translation
    assert (first.opset_version, other.opset_version) == (18, 20)
    first.functions[name].clear()
    first.functions.clear()
    assert second.functions[name][0] is translation


def test_a_release_that_has_them_elsewhere_reads_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.onnx._internal.exporter._registration", None)
    own = ONNXRegistry.__dict__["from_torchlib"]
    with kept_translations():
        assert ONNXRegistry.__dict__["from_torchlib"] is own
