"""Which weights of a quantised graph stay in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from vlm_export.precision.quantised import kept_weights
from vlm_export.precision.recipes import RECIPES

WIDTH, LAYERS = 40, 80


def chain(outputs: list[int]) -> ir.Graph:
    """Products one behind the other, those of the numbers being outputs too; each holds 1.25 % of all values."""
    value = ir.Value(name="x", shape=ir.Shape(["batch", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    first = value
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    handed: list[ir.Value] = []
    for number in range(LAYERS):
        tensor = ir.tensor(np.ones((WIDTH, WIDTH), np.float32), name=f"weight.{number}")
        weights.append(ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape([WIDTH, WIDTH]), type=first.type))
        node = ir.node("MatMul", [value, weights[-1]])
        nodes.append(node)
        value = node.outputs[0]
        value.name = f"y.{number}"
        handed += [value] if number in outputs else []
    return ir.Graph([first], handed, nodes=nodes, initializers=weights, opset_imports={"": 18})


@pytest.mark.parametrize("precision", RECIPES)
def test_a_projection_is_kept_and_the_caches_of_every_layer_are_not(precision: str) -> None:
    last = LAYERS - 1
    assert kept_weights(chain([last]), RECIPES[precision]) == {f"weight.{last}": "the last product before an output"}
    assert kept_weights(chain(list(range(LAYERS))), RECIPES[precision]) == {}
