"""What everything behind `open_model` takes for granted, checked once, on the file as it was read.

Protobuf parses nearly any bytes into something. A name that is not UTF-8, an attribute of another type than its
operator's, a tensor with too few bytes: each would fail later, somewhere, without saying where it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]  # protobuf ships no types
from google.protobuf.message import Message  # type: ignore[import-untyped]

from vlm_export.errors import GraphError

_FIX = "the file is damaged: fetch or export it again"
# Type of an attribute → the field that holds its value.
_FIELDS: Mapping[int, str] = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}
# Dtype → the field for values that are not raw, by onnx.proto; all others share int32_data.
_TYPED_FIELDS: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.COMPLEX64: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.COMPLEX128: "double_data",
    onnx.TensorProto.INT64: "int64_data",
    onnx.TensorProto.UINT32: "uint64_data",
    onnx.TensorProto.UINT64: "uint64_data",
    onnx.TensorProto.STRING: "string_data",
}


def check_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Refuses a file that the rest could only stumble over; the GraphError names the node, attribute or tensor."""
    try:
        _check_model(proto)
    except GraphError as error:
        raise GraphError(error.what, where=str(path), expected=error.expected, got=error.got, fix=_FIX) from None


def _check_model(proto: onnx.ModelProto) -> None:
    _check_texts(proto, "the model")
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    for graph in graph_protos(proto):
        _check_nodes(graph.node, opsets)
        for entry in graph.input:
            _check_type(entry, is_input=True)
        for entry in (*graph.output, *graph.value_info):
            _check_type(entry, is_input=False)
    _check_names(proto.graph, set())
    for function in proto.functions:
        made = {*function.input, *(name for node in function.node for name in node.output)}
        _check_readers(function.node, function.output, made)
        _check_nodes(function.node, {entry.domain: entry.version for entry in function.opset_import})
    for tensor in tensor_protos(proto):
        _check_tensor(tensor)
    for attribute in attribute_protos(proto):
        if attribute.HasField("tp"):
            _check_elements(attribute.tp, f"attribute {attribute.name!r}", may_be_unknown=False)


def _check_texts(message: Message, where: str) -> None:
    """Every name is text: protobuf gives bytes for what is not UTF-8."""
    place = _place(message) or where
    for field, value in message.ListFields():
        is_repeated = (
            field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
        )
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in value if is_repeated else (value,):
                if isinstance(text, bytes):
                    raise GraphError(f"the {field.name} of {place} is not UTF-8", got=repr(text[:80]))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if is_repeated else (value,):
                _check_texts(inner, place)


def _place(message: Message) -> str:
    if isinstance(message, onnx.NodeProto):
        return _node_text(message)
    if isinstance(message, onnx.ValueInfoProto | onnx.TensorProto):
        return f"tensor {message.name!r}"
    if isinstance(message, onnx.AttributeProto):
        return f"attribute {message.name!r}"
    return "the graph" if isinstance(message, onnx.GraphProto) else ""


def _node_text(node: onnx.NodeProto) -> str:
    return f"node {node.name or (node.output[0] if node.output else node.op_type)!r} ({node.op_type})"


def _check_nodes(nodes: Iterable[onnx.NodeProto], opsets: Mapping[str, int]) -> None:
    for node in nodes:
        if not node.op_type:
            raise GraphError(f"{_node_text(node)} has no operator")
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = opsets.get(domain, opsets.get(node.domain, 0))
        known = {}
        if 0 < version < 1 << 31 and onnx.defs.has(node.op_type, version, domain):
            known = onnx.defs.get_schema(node.op_type, version, domain).attributes
        names = set()
        for attribute in node.attribute:
            _check_attribute(node, attribute, known)
            if attribute.name in names:
                raise GraphError(f"{_node_text(node)} has attribute {attribute.name!r} twice")
            names.add(attribute.name)
        if (domain, node.op_type) == ("", "Constant") and known and not names & set(known):
            raise GraphError(
                f"{_node_text(node)} holds no value", expected=f"one of {sorted(known)}", got=repr(sorted(names))
            )


def _check_attribute(
    node: onnx.NodeProto, attribute: onnx.AttributeProto, known: Mapping[str, onnx.defs.OpSchema.Attribute]
) -> None:
    place = f"attribute {attribute.name!r} of {_node_text(node)}"
    if attribute.type == onnx.AttributeProto.UNDEFINED:
        raise GraphError(f"{place} has no type")
    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
    if attribute.name in known:
        wanted = str(known[attribute.name].type).rpartition(".")[2]
        if wanted != kind:
            raise GraphError(f"{place} has another type than the operator's", expected=wanted, got=kind)
    field = _FIELDS.get(attribute.type)
    if field in ("t", "g", "tp", "sparse_tensor") and not attribute.ref_attr_name and not attribute.HasField(field):
        raise GraphError(f"{place} is a {kind} and holds none")


def _check_names(graph: onnx.GraphProto, outer: set[str]) -> None:
    """Each name is made once, so that a reader means one tensor; an initializer may be an input's default."""
    inputs = [entry.name for entry in graph.input]
    computed = [name for node in graph.node for name in node.output if name]
    weights = [tensor.name for tensor in graph.initializer]
    if "" in weights:
        raise GraphError(f"an initializer of graph {graph.name!r} has no name")
    for makers in (inputs + computed, weights + computed):
        for name, count in Counter(makers).items():
            if count > 1 and name:
                raise GraphError(f"tensor {name!r} of graph {graph.name!r} is made twice")
    known = outer.union(inputs, computed, weights, (entry.values.name for entry in graph.sparse_initializer))
    _check_readers(graph.node, [entry.name for entry in graph.output], known)


def _check_readers(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str], known: set[str]) -> None:
    """Everything that is read is made in the graph or in one around it; the order of the nodes does not matter here."""
    for name in outputs:
        if name not in known:
            raise GraphError(f"output {name!r} is made by nothing")
    for node in nodes:
        for name in node.input:
            if name and name not in known:
                raise GraphError(f"{_node_text(node)} reads {name!r}, which nothing makes")
        for attribute in node.attribute:
            for graph in _graphs_in(attribute):
                _check_names(graph, known)


def _check_type(entry: onnx.ValueInfoProto, *, is_input: bool) -> None:
    if not entry.name:
        kind = "an input" if is_input else "an output or a stated tensor"
        raise GraphError(f"{kind} has no name")
    if entry.HasField("type"):
        _check_elements(entry.type, f"tensor {entry.name!r}", may_be_unknown=not is_input)


def _check_elements(kind: onnx.TypeProto, place: str, *, may_be_unknown: bool) -> None:
    name = kind.WhichOneof("value")
    if name in ("sequence_type", "optional_type"):
        _check_elements(getattr(kind, name).elem_type, place, may_be_unknown=False)
        return
    if name not in ("tensor_type", "sparse_tensor_type"):
        if name is None and not may_be_unknown:
            raise GraphError(f"{place} has no type")
        return
    tensor = getattr(kind, name)
    known = onnx.TensorProto.DataType.values()
    if tensor.elem_type not in known or (tensor.elem_type == 0 and not may_be_unknown):
        got = str(tensor.elem_type) if tensor.elem_type else "none"
        raise GraphError(f"{place} has no element type that ONNX knows", got=got)
    if tensor.elem_type == 0:
        # Nothing is known of it, which is no fault of what is in between.
        kind.Clear()
        return
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value < -1:
            raise GraphError(f"{place} has a negative size", got=str(dim.dim_value))


def _check_tensor(tensor: onnx.TensorProto) -> None:
    place = f"tensor {tensor.name!r}"
    if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type == 0:
        raise GraphError(f"{place} has no dtype that ONNX knows", got=str(tensor.data_type))
    if any(size < 0 for size in tensor.dims):
        raise GraphError(f"{place} has a negative size", got=str(list(tensor.dims)))
    count, dtype = prod(tensor.dims), ir.DataType(tensor.data_type)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise GraphError(f"{place} holds strings outside of the graph file")
        return
    if dtype == ir.DataType.STRING:
        if tensor.HasField("raw_data"):
            raise GraphError(f"{place} holds strings as raw data")
        wanted, got, unit = count, len(tensor.string_data), "values in string_data"
    elif tensor.HasField("raw_data"):
        wanted, got, unit = -(-count * dtype.bitwidth // 8), len(tensor.raw_data), "bytes"
    else:
        field = _TYPED_FIELDS.get(tensor.data_type, "int32_data")
        per_value = 2 if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128) else 1
        packed = 8 // dtype.bitwidth if dtype.bitwidth < 8 else 1
        wanted, got, unit = -(-count * per_value // packed), len(getattr(tensor, field)), f"values in {field}"
    if wanted != got:
        shape = list(tensor.dims)
        raise GraphError(
            f"{place} holds another number of values than its shape says",
            expected=f"{wanted} {unit} for {dtype.name} {shape}",
            got=str(got),
        )


def graph_protos(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yields the main graph and all nested graphs, those of functions included; function bodies are no graphs
    themselves."""
    yield model.graph
    for attribute in attribute_protos(model):
        yield from _graphs_in(attribute)


def _graphs_in(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def attribute_protos(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Yields attributes of all nodes, at every depth."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        for attribute in waiting.pop().attribute:
            yield attribute
            waiting += (node for graph in _graphs_in(attribute) for node in graph.node)


def tensor_protos(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yields initializers of all graphs, and tensors in attributes."""
    for graph in graph_protos(model):
        yield from graph.initializer
    for attribute in attribute_protos(model):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
