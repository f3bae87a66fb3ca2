"""Dtypes of inputs and outputs changed, with casts between them and the graph, which computes as before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from vlm_export.errors import GraphError, suggestion
from vlm_export.graph.core.inference import Copy
from vlm_export.graph.core.names import fresh_name, fresh_node_name, rename_values, taken_names
from vlm_export.graph.core.replace_uses import discard_nodes, place_first, replace_uses
from vlm_export.graph.core.transaction import Change, apply

_USUAL_NAMES = {"float32": ir.DataType.FLOAT, "float64": ir.DataType.DOUBLE}
_NO_CAST = {ir.DataType.UNDEFINED, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}


def set_dtype(model: ir.Model, dtypes: Mapping[str, ir.DataType | str]) -> int:
    """Changes the dtypes of inputs and outputs; a Cast stands between each and the graph.

    Changing a dtype back removes the Cast that this function put there (it knows it by its name) and gives the original
    graph; Casts of the model's own stay, since they round. Weights and everything inside keep their dtypes.

    Args:
        dtypes: input or output → "float16", "int64", …

    Returns:
        How many inputs and outputs have another dtype than before.

    Raises:
        GraphError: no such input, output or dtype, one that is no tensor, one that is input and output at once, or a
            Cast that does not exist at the model's opset.
    """
    wanted = {_interface_value(model, name): dtype_of(dtype) for name, dtype in dtypes.items()}
    changed = {value: dtype for value, dtype in wanted.items() if value.dtype != dtype}

    def edit(copy: Copy) -> Change:
        nodes: list[ir.Node] = []
        values: list[ir.Value] = []
        for value, dtype in changed.items():
            cast = _cast_input if value.is_graph_input() else _cast_output
            nodes += cast(copy.model.graph, copy.of(value), dtype)
            values += [copy.of(value)] if value.is_graph_input() else []
        return Change([node for node in nodes if node.graph is not None], values, keeps_sizes=True)

    apply(model, edit)
    return len(changed)


def dtype_of(name: ir.DataType | str) -> ir.DataType:
    """Returns the dtype of a name as numpy or ONNX has it ("float32", "FLOAT", "bfloat16"); GraphError for another
    one."""
    if isinstance(name, ir.DataType):
        return name
    names = {entry.name.lower(): entry for entry in ir.DataType if entry not in _NO_CAST} | _USUAL_NAMES
    if name.lower() not in names:
        raise GraphError(f"unknown dtype {name!r}", fix=suggestion(name.lower(), names))
    return names[name.lower()]


def _interface_value(model: ir.Model, name: str) -> ir.Value:
    known = {str(value.name): value for value in (*model.graph.outputs, *model.graph.inputs)}
    if name not in known:
        raise GraphError(f"the model has no input or output {name!r}", fix=suggestion(name, known))
    value = known[name]
    if value.is_graph_input() and value.is_graph_output():
        raise GraphError(f"tensor {name!r} is input and output at once", fix="insert an Identity for the output first")
    if not isinstance(value.type, ir.TensorType):
        raise GraphError(f"{name!r} is no tensor, or its dtype is not known", got=str(value.type))
    return value


def _cast(value: ir.Value, dtype: ir.DataType, graph: ir.Graph, base: str) -> ir.Node:
    shape = value.shape.copy() if value.shape is not None else None
    out = ir.val(fresh_name(f"{base}_cast", taken_names(graph, graph)), dtype, shape)
    return ir.node("Cast", [value], {"to": dtype}, outputs=[out], name=fresh_node_name(graph, f"{base}_cast"))


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
    """Returns the nodes that read another dtype or are new."""
    assert value.dtype is not None
    old, readers = value.dtype, value.consumers()
    value.type = ir.TensorType(dtype, denotation=value.type.denotation if value.type is not None else None)
    if value.is_initializer() and value.const_value is not None:
        value.const_value = _converted(value.const_value, dtype)
    if readers and all(_is_own(node, value, dtype) and not node.outputs[0].is_graph_output() for node in readers):
        beyond = [user for node in readers for user in node.outputs[0].consumers()]
        for node in readers:
            replace_uses(node.outputs[0], value)
            discard_nodes([node])
        return beyond
    if not readers:
        return []
    cast = _cast(value, old, graph, str(value.name))
    replace_uses(value, cast.outputs[0], besides=cast)
    place_first(graph, cast)
    return [cast]


def _cast_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
    producer, name = value.producer(), str(value.name)
    assert value.dtype is not None
    if producer is not None and _is_own(producer, value, value.dtype) and not value.uses():
        source = producer.inputs[0]
        maker = source.producer() if source is not None else None
        own = maker is not None and maker.graph is graph and source is not None and not source.is_graph_output()
        if source is not None and own and source.dtype == dtype:
            replace_uses(value, source)
            discard_nodes([producer])
            value.name = None
            rename_values(graph, {source: name})
            return []
    cast = _cast(value, dtype, graph, name)
    inner = str(cast.outputs[0].name)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = cast.outputs[0]
    rename_values(graph, {value: inner, cast.outputs[0]: name})
    if producer is not None:
        graph.insert_after(producer, cast)
    else:
        graph.append(cast)
    return [cast]


def _is_own(node: ir.Node, value: ir.Value, dtype: ir.DataType) -> bool:
    """Whether this module put the node between the value and the graph."""
    casts = (node.domain, node.op_type) == ("", "Cast") and node.attributes.get_int("to") == dtype.value
    return casts and re.fullmatch(re.escape(f"{value.name}_cast") + r"(_\d+)?", node.name or "") is not None


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    compute = partial(_convert, tensor, dtype)
    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _convert(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)
