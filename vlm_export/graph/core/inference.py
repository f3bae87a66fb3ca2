"""Types and shapes as ONNX infers them, from a copy without weights: its size does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx
import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import (
    all_graphs,
    captured_or_read,
    defined_values,
    fresh_name,
    is_sorted,
    names_in,
    nested_graphs,
    root_graphs,
    unbound_outputs,
)
from vlm_export.graph.core.replace_uses import place_first
from vlm_export.graph.core.skeleton import SKELETON_THRESHOLD_BYTES, detach_weights
from vlm_export.graph.core.tensors import tensor_slots

_Key = TypeVar("_Key", ir.Graph, ir.Node, ir.Value)


@dataclass(frozen=True)
class Info:
    """What is known of a value.

    Attributes:
        type: dtype and kind (tensor, sequence, optional), or None.
        shape: or None; axes are ints, names, or unknown.
    """

    type: ir.TypeProtocol | None
    shape: ir.Shape | None


class Copy:
    """A model and where the objects of another one are in it: the stage on which a change is tried.

    Attributes:
        model: a copy that shares the tensors, or the model itself.
    """

    def __init__(self, model: ir.Model, places: dict[object, object] | None = None) -> None:
        self.model, self._places = model, places

    def of(self, item: _Key) -> _Key:
        """Returns the graph, node or value of the copy that stands for the model's."""
        if self._places is None:
            return item
        found = self._places[item]
        assert isinstance(found, type(item))
        return found


def copy_of(model: ir.Model) -> Copy:
    """Copies a model: graphs, nodes and values are the copy's own, tensors are the model's.

    Raises:
        GraphError: the model cannot be copied, since a node stands before what it reads, or reads what nothing makes.
    """
    try:
        clone = model.clone()
    except Exception as error:
        raise GraphError(
            "the graph is malformed: a node stands before what it reads, or reads what nothing makes",
            fix="sort the graph, and check it with onnx.checker",
        ) from error
    places: dict[object, object] = {}
    for old_graph, new_graph in zip(all_graphs(model), all_graphs(clone), strict=True):
        places[old_graph] = new_graph
        places |= zip(old_graph, new_graph, strict=True)
        for old_node, new_node in zip(old_graph, new_graph, strict=True):
            places |= zip(old_node.outputs, new_node.outputs, strict=True)
        places |= zip(old_graph.inputs, new_graph.inputs, strict=True)
        places |= zip(old_graph.outputs, new_graph.outputs, strict=True)
        places |= zip(old_graph.initializers.values(), new_graph.initializers.values(), strict=True)
    for value in (value for graph in all_graphs(clone) for value in (*defined_values(graph), *graph.outputs)):
        # Copies share type objects with their originals, and those can change.
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(value.type.dtype, denotation=value.type.denotation)
    return Copy(clone, places)


def skeleton_proto(scratch: ir.Model) -> onnx.ModelProto:
    """Returns the model as a protobuf without external data, in which weights are inputs; `scratch` is spent."""
    detach_weights(scratch)
    for root in root_graphs(scratch):
        if root is scratch.graph:
            _hoist_nested_weights(root)
    # ONNX's tools would look for the files of those that stay in the working directory.
    for slot in tensor_slots(scratch):
        if isinstance(slot.tensor, ir.ExternalTensor):
            slot.tensor = slot.loaded()
    proto: onnx.ModelProto = ir.to_proto(scratch)
    return proto


def _hoist_nested_weights(root: ir.Graph) -> None:
    """Large initializers of nested graphs become inputs of the outermost one, which nested graphs can read."""
    taken = set().union(*(names_in(graph) for graph in nested_graphs(root)))
    for graph in [graph for graph in nested_graphs(root) if graph is not root]:
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= SKELETON_THRESHOLD_BYTES or value.is_graph_input():
                continue
            weight = ir.val(fresh_name(f"{name}_hoisted", taken), tensor.dtype, ir.Shape(tensor.shape.numpy()))
            # The nested graph goes on making a value of this name: it may be what it returns.
            local = ir.val(name)
            graph.initializers.pop(name)
            value.replace_all_uses_with(local, replace_graph_outputs=True)
            place_first(graph, ir.node("Identity", [weight], outputs=[local]))
            root.inputs.append(weight)


def infer(scratch: ir.Model, *, strict: bool = True) -> dict[ir.Value, Info]:
    """Infers types and shapes of each value of the main graph and of the graphs in it; `scratch` is spent.

    Args:
        strict: refuse what does not fit together; otherwise it is left unknown, as are foreign operators.

    Raises:
        GraphError: dtypes that an operator does not take, or shapes that do not fit together; not strict: a graph that
            ONNX cannot go through at all.
    """
    values = [(graph, list(defined_values(graph))) for graph in nested_graphs(scratch.graph)]
    axes = {
        str(axis) for _, known in values for value in known for axis in value.shape or () if not isinstance(axis, int)
    }
    proto = skeleton_proto(scratch)
    inferred = ir.from_proto(_tried("types or shapes do not fit together", lambda: _infer_proto(proto, strict)))
    found: dict[ir.Value, Info] = {}
    for (_, known), graph in zip(values, nested_graphs(inferred.graph), strict=True):
        by_name = {value.name: value for value in defined_values(graph)}
        for value in known:
            if value.name in by_name:
                found[value] = Info(by_name[value.name].type, _without_new_axes(by_name[value.name].shape, axes))
    return found


def _without_new_axes(shape: ir.Shape | None, known: set[str]) -> ir.Shape | None:
    """ONNX names axes that it does not know `unk__0` and so on: names that say nothing."""
    if shape is None:
        return None
    return ir.Shape([None if str(axis).startswith("unk__") and str(axis) not in known else axis for axis in shape])


def _infer_proto(proto: onnx.ModelProto, strict: bool) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=strict, strict_mode=strict, data_prop=True)
    except Exception:
        # onnx 1.23 mixes up the values that it propagates where two subgraphs have tensors of equal names, and it
        # fails where it cannot follow the values of shapes.
        return onnx.shape_inference.infer_shapes(proto, check_type=strict, strict_mode=strict, data_prop=False)


def check(scratch: ir.Model) -> None:
    """Runs ONNX's checker on the model without weights; `scratch` is spent.

    Raises:
        GraphError: what the checker found first.
    """
    for value in (*scratch.graph.inputs, *scratch.graph.outputs):
        # The checker wants shapes of these; of an unknown rank none can be stated, and engines need none.
        if isinstance(value.type, ir.TensorType) and value.shape is None:
            value.shape = ir.Shape([])
    proto = skeleton_proto(scratch)
    _tried("the checker refuses the model", lambda: onnx.checker.check_model(proto))


def known_infos(model: ir.Model, values: Sequence[ir.Value]) -> dict[ir.Value, Info]:
    """Returns types and shapes of values of the main graph, inferred where the model does not state them.

    Raises:
        GraphError: a value whose type cannot be told.
    """
    infos = {value: Info(value.type, value.shape) for value in values}
    if any(info.type is None or info.shape is None for info in infos.values()):
        copy = copy_of(model)
        try:
            found = infer(copy.model)
        except GraphError:
            found = {}
        for value in values:
            new = found.get(copy.of(value), Info(None, None))
            infos[value] = Info(value.type or new.type, new.shape if value.shape is None else value.shape)
    for value, info in infos.items():
        if info.type is None:
            raise GraphError(
                f"the dtype of tensor {value.name!r} is not known", fix="state it in the model, or name another tensor"
            )
    return infos


_Result = TypeVar("_Result")


def _tried(what: str, call: Callable[[], _Result]) -> _Result:
    try:
        return call()
    # The two functions raise exceptions of several unrelated classes.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("==>")]
        raise GraphError(what, got=" ".join(lines)[:400]) from error


def validate(model: ir.Model, *, types: bool = True) -> None:
    """Refuses a model that is not valid; weights are not read, so its size does not matter.

    Args:
        types: infer types and shapes strictly, too.

    Raises:
        GraphError: what was found first: a tensor that nothing makes or two things make, nodes out of order or in a
            cycle, what ONNX's checker refuses, dtypes or shapes that do not fit together.
    """
    _check_makers(model)
    _check_order(model)
    check(copy_of(model).model)
    if types:
        infer(copy_of(model).model)


def _check_makers(model: ir.Model) -> None:
    known: set[ir.Value] = set()
    for graph in all_graphs(model):
        own = list(defined_values(graph))
        names = [value.name for value in own]
        twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if twice:
            raise GraphError(f"graph {graph.name!r} defines tensors twice", got=str(sorted(map(str, twice))))
        known.update(own)
        for value in unbound_outputs(graph):
            raise GraphError(
                f"graph {graph.name!r} returns {value.name!r}, which nothing in it makes",
                fix="return an Identity of the outer tensor",
            )
    for graph in all_graphs(model):
        for node in graph:
            for read in node.inputs:
                if read is not None and read not in known:
                    raise GraphError(f"node {node.name!r} reads {read.name!r}, which nothing makes")


def _check_order(model: ir.Model) -> None:
    if is_sorted(model):
        return
    for graph in all_graphs(model):
        done: set[ir.Node] = set()
        waiting = list(graph)
        while waiting:
            ready = [node for node in waiting if _is_ready(node, graph, done)]
            if not ready:
                names = [node.name or str(node.outputs[0].name) for node in waiting][:8]
                raise GraphError("the graph has a cycle", got=f"among nodes {names}")
            done.update(ready)
            waiting = [node for node in waiting if node not in done]
    raise GraphError("nodes stand before what they read", fix="sort the graph")


def _is_ready(node: ir.Node, graph: ir.Graph, done: set[ir.Node]) -> bool:
    producers = (value.producer() for value in captured_or_read(node))
    return all(producer is None or producer.graph is not graph or producer in done for producer in producers)
