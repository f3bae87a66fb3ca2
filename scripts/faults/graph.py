"""Faults of a graph: each damages an exported float32 graph in one layer, as a wrong back end or converter would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GraphFault:
    """One fault.

    Attributes:
        name: for people.
        plant: changes the graph, in the layer of that number.
        in_layers: it can be planted in each layer, not in the graph as a whole alone.
    """

    name: str
    plant: Callable[[ir.Model, int], None]
    in_layers: bool = True


def change_weight(graph: ir.Model, mark: str, change: Callable[[Array], Array]) -> None:
    """Changes a copy of the first weight whose name holds the mark."""
    values = graph.graph.initializers.items()
    name, weight = next((name, value) for name, value in values if mark in name)
    assert weight.const_value is not None
    old = weight.const_value.numpy()
    weight.const_value = ir.tensor(change(old.copy()).astype(old.dtype), name=name)


def _fc1(change: Callable[[Array], Array]) -> Callable[[ir.Model, int], None]:
    return lambda graph, layer: change_weight(graph, f"blocks.{layer}.mlp.fc1.weight", change)


def _negate_the_largest(values: Array) -> Array:
    values.flat[np.abs(values).argmax()] *= -1
    return values


def _zero_a_unit(values: Array) -> Array:
    values[:, 3] = 0
    return values


def _another_quick_gelu(graph: ir.Model, layer: int) -> None:
    mark = f"blocks.{layer}/mlp/act"
    (node,) = (n for n in graph.graph if n.op_type == "Mul" and mark in str(n.name) and _number(n) is not None)
    other = ir.Value(name="another_factor", const_value=ir.tensor(np.float32(1.6), name="another_factor"))
    other.shape, other.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
    graph.graph.register_initializer(other)
    position = _number(node)
    assert position is not None
    node.replace_input_with(position, other)


def _number(node: ir.Node) -> int | None:
    """Which input is 1.702."""
    for position, value in enumerate(node.inputs):
        constant = ir.convenience.get_const_tensor(value) if value is not None else None
        if constant is not None and constant.size == 1 and abs(float(constant.numpy().item()) - 1.702) < 1e-3:
            return position
    return None


def _another_epsilon(graph: ir.Model, layer: int) -> None:
    mark = f"blocks.{layer}/norm1"
    (norm,) = (n for n in graph.graph if n.op_type == "LayerNormalization" and mark in str(n.name))
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)


def _scaled_output(factor: float) -> Callable[[ir.Model, int], None]:
    def plant(graph: ir.Model, layer: int) -> None:
        output = graph.graph.outputs[0]
        name, output.name = output.name, "unscaled"
        number = ir.Value(name="factor", const_value=ir.tensor(np.float32(factor), name="factor"))
        number.shape, number.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
        graph.graph.register_initializer(number)
        node = ir.node("Mul", [output, number], name="scale the output")
        scaled = node.outputs[0]
        scaled.name, scaled.shape, scaled.type = name, output.shape, output.type
        graph.graph.append(node)
        graph.graph.outputs[0] = scaled

    return plant


GRAPH_FAULTS: tuple[GraphFault, ...] = (
    GraphFault("largest fc1 weight negated", _fc1(_negate_the_largest)),
    GraphFault("a hidden unit zero", _fc1(_zero_a_unit)),
    GraphFault("fc1 times 1.0005", _fc1(lambda values: values * (1 + 5e-4))),
    GraphFault("QuickGELU with 1.6", _another_quick_gelu),
    GraphFault("epsilon of a norm 1e-2", _another_epsilon),
    GraphFault("output times 1.005", _scaled_output(1.005), in_layers=False),
    GraphFault("output times 1.015", _scaled_output(1.015), in_layers=False),
)
