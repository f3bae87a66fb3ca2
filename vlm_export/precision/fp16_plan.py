"""What of a graph runs in float16: each node's precision, decided by the rules from where its inputs come."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

import onnx_ir as ir

from vlm_export.precision.fp16_rules import (
    ACTIVATION_STARTS,
    ARITHMETIC,
    CONSTANT_BYTES,
    FLOAT32_OPERATORS,
    MOVES,
    REDUCTIONS,
    SHAPE_READERS,
    fits_float16,
    is_bound_to_float32,
    takes_float16,
)


class Origin(Enum):
    """What a float32 value is computed from.

    Attributes:
        WEIGHT: an initializer, or one that was only moved: rows of a table.
        COUNT: integers, shapes and weights: positions, masks, matrices that resample a position table.
        ACTIVATION: images, states, and what is computed from weights alone.
    """

    WEIGHT = "weight"
    COUNT = "count"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Plan:
    """Nodes and initializers that stay in float32; every other one that holds float32 becomes float16.

    Attributes:
        float32_nodes: read and write float32.
        float32_weights: names of initializers that any of these reads as it is stored.
    """

    float32_nodes: frozenset[ir.Node]
    float32_weights: frozenset[str]


def plan_fp16(model: ir.Model, wide: Collection[str] = ()) -> Plan:
    """The plan for a graph in topological order, whose values all have a dtype, without nested graphs.

    Args:
        wide: names of activations that float16 does not hold.
    """
    planner = _Planner(model.graph, model.graph.opset_imports.get("", 0), set(wide))
    for node in model.graph:
        planner.visit(node)
    planner.settle_moves()
    return planner.plan()


def is_float(value: ir.Value | None) -> bool:
    """A float32 tensor; a sequence of such tensors is none."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def is_sequence(value: ir.Value | None) -> bool:
    """A sequence, or what else holds tensors and is none."""
    return value is not None and value.type is not None and not isinstance(value.type, ir.TensorType)


def float_inputs(node: ir.Node) -> list[ir.Value]:
    """float32 inputs whose values, not just shapes, the node reads."""
    if node.op_type in SHAPE_READERS:
        return []
    return [value for value in node.inputs if value is not None and is_float(value)]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.outputs if is_float(value)]


@dataclass
class _Planner:
    """Visits nodes in the order of the graph.

    Attributes:
        wide: names of activations that float16 does not hold; what moves one gives another.
        origins: of every float32 value, and of sequences.
        unfit: values that float16 cannot hold: constants out of its range, and what is made of them and no activation.
        float32: nodes that stay, but for moves before `settle_moves`.
        moves: nodes that only move weights or activations.
    """

    graph: ir.Graph
    opset: int
    wide: set[str]
    origins: dict[ir.Value, Origin] = field(default_factory=dict)
    unfit: set[ir.Value] = field(default_factory=set)
    float32: set[ir.Node] = field(default_factory=set)
    moves: list[ir.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.origins.update((value, Origin.ACTIVATION) for value in self.graph.inputs if is_float(value))
        for value in self.graph.initializers.values():
            if not is_float(value) or value in self.origins:
                continue
            self.origins[value] = Origin.WEIGHT
            tensor = value.const_value
            if tensor is not None and tensor.nbytes <= CONSTANT_BYTES and not fits_float16(tensor):
                self.unfit.add(value)

    def visit(self, node: ir.Node) -> None:
        inputs, outputs = float_inputs(node), float_outputs(node)
        origin = self._origin(node, [*inputs, *(value for value in node.inputs if value and is_sequence(value))])
        self.origins.update((value, origin) for value in node.outputs if is_float(value) or is_sequence(value))
        has_unfit = not self.unfit.isdisjoint(inputs)
        if has_unfit and not any(self.origins[value] is Origin.ACTIVATION for value in inputs):
            self.unfit.update(outputs)
        if not inputs and not outputs:
            return
        if node.op_type in MOVES and self._is_wide(inputs):
            self.wide.update(str(value.name) for value in outputs)
        if self._stays(node, origin, has_unfit):
            self.float32.add(node)
        elif node.op_type in MOVES:
            self.moves.append(node)

    def _origin(self, node: ir.Node, inputs: Iterable[ir.Value]) -> Origin:
        # What the graph is given as a sequence was not seen before.
        found = {self.origins.get(value, Origin.ACTIVATION) for value in inputs}
        if Origin.ACTIVATION in found or (found and node.op_type in ACTIVATION_STARTS):
            return Origin.ACTIVATION
        if Origin.COUNT in found or not found:
            return Origin.COUNT
        return Origin.WEIGHT if node.op_type in MOVES else Origin.ACTIVATION

    def _stays(self, node: ir.Node, origin: Origin, has_unfit: bool) -> bool:
        if not float_outputs(node) or origin is Origin.COUNT:
            # Comparisons and conversions to integers are exact or wrong.
            return bool(float_inputs(node)) or origin is Origin.COUNT
        if node.op_type in FLOAT32_OPERATORS or is_bound_to_float32(node) or not takes_float16(node, self.opset):
            return True
        if self._is_wide((*float_inputs(node), *float_outputs(node))):
            return True
        if node.op_type in MOVES:
            return False
        return has_unfit or (node.op_type in ARITHMETIC and _is_beside_a_reduction(node))

    def _is_wide(self, values: Iterable[ir.Value]) -> bool:
        return any(value.name in self.wide for value in values)

    def settle_moves(self) -> None:
        """Moves between nodes of float32 stay, so that nothing is rounded between; those of weights follow readers."""
        reads_float32: dict[ir.Value, bool] = {}
        for node in reversed(self.graph):
            for value in float_outputs(node):
                reads_float32[value] = all(self._reads_float32(value, reads_float32))
        for node in self.moves:
            kept = all(reads_float32[value] for value in float_outputs(node))
            if kept and self._moves_float32(node):
                self.float32.add(node)
        for node in reversed(self.moves):
            if self.origins[float_outputs(node)[0]] is Origin.WEIGHT and self._is_read_as_float32(node):
                self.float32.add(node)

    def _reads_float32(self, value: ir.Value, known: dict[ir.Value, bool]) -> Iterable[bool]:
        if value.is_graph_output():
            yield True
        for user, _ in value.uses():
            if user in self.float32:
                yield True
            elif user.op_type in MOVES:
                yield all(known[output] for output in float_outputs(user))
            elif user.op_type not in SHAPE_READERS:
                yield False

    def _moves_float32(self, node: ir.Node) -> bool:
        """The activations and counts that the node moves come from nodes of float32, or from the graph's inputs."""
        moved = [value for value in float_inputs(node) if self.origins[value] is not Origin.WEIGHT]
        return bool(moved) and all((made := value.producer()) is None or made in self.float32 for value in moved)

    def _is_read_as_float32(self, node: ir.Node) -> bool:
        outputs = float_outputs(node)
        users = {user for value in outputs for user, _ in value.uses() if user.op_type not in SHAPE_READERS}
        return not users.isdisjoint(self.float32) or any(value.is_graph_output() for value in outputs)

    def plan(self) -> Plan:
        weights = {
            value.name
            for value in self.graph.initializers.values()
            if value.is_graph_input()
            or value.is_graph_output()
            or any(user in self.float32 and user.op_type not in SHAPE_READERS for user, _ in value.uses())
        }
        return Plan(frozenset(self.float32), frozenset(name for name in weights if name is not None))


def _is_beside_a_reduction(node: ir.Node) -> bool:
    """The node computes with a reduction's result, or is a square that a reduction sums."""
    made = {value.producer() for value in float_inputs(node)}
    if any(producer is not None and producer.op_type in REDUCTIONS for producer in made):
        return True
    is_square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    return is_square and any(user.op_type in REDUCTIONS for user, _ in node.outputs[0].uses())
