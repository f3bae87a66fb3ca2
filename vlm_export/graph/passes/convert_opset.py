"""Another version of ONNX's operators, node by node with the library's converter.

ONNX's converter takes whole models of 2 GB at most, and drops or renames what it does not know. Here it sees one node
at a time; everything else stays as it is. onnxscript's converter calls it too, for versions below 18 and downwards: it
inlines all functions, and a Clip of float64 gets float32 bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

import onnx
import onnx_ir as ir
from onnx import helper, version_converter

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import Copy, check, copy_of, infer
from vlm_export.graph.core.names import (
    fresh_name,
    nested_graphs,
    opset_imports_of,
    root_graphs,
    root_of,
    subgraphs_of,
    taken_names,
)
from vlm_export.graph.core.replace_uses import add_constant_node, remove_node
from vlm_export.graph.core.skeleton import raise_ir_version
from vlm_export.graph.core.tensors import constant_tensor
from vlm_export.graph.passes.converted_node import recast_constants, type_fault, value_fault
from vlm_export.graph.passes.infer_shapes import infer_shapes
from vlm_export.graph.passes.opset_meanings import MeaningError, attributes_that_keep_meaning, set_attributes

_MAX_CONSTANT_BYTES = 1 << 16
# Node → the graph that takes its place, with inputs iN and outputs oN.
_Plan: TypeAlias = "dict[ir.Node, ir.Graph]"


def convert_opset(model: ir.Model, version: int) -> int:
    """Converts the model, with its subgraphs and functions, to another version of ONNX's operators, in place.

    Returns:
        How many nodes took another form.

    Raises:
        GraphError: the version does not exist, or an operator has no form at it that the library knows.
    """
    newest = onnx.defs.onnx_opset_version()
    if not 7 <= version <= newest:
        raise GraphError("there is no such opset", expected=f"7 to {newest}", got=str(version))
    plan = _plan(model, version)
    trial = copy_of(model)
    _apply(trial, plan, version)
    check(copy_of(trial.model).model)
    _check_types(model, trial.model)
    _apply(Copy(model), plan, version)
    return len(plan)


def _check_types(model: ir.Model, trial: ir.Model) -> None:
    """Operators take other dtypes at other versions; faults that the model had before are no reason to refuse."""
    try:
        infer(copy_of(model).model)
    except GraphError:
        return
    infer(copy_of(trial).model)


def _plan(model: ir.Model, version: int) -> _Plan:
    # Some forms depend on dtypes and ranks.
    typed = copy_of(model)
    raise_ir_version(typed.model, _ir_version_of(version))
    infer_shapes(typed.model)
    plan: _Plan = {}
    for root in root_graphs(model):
        source = opset_imports_of(model, root).get("", version)
        for node in (
            node for graph in nested_graphs(root) for node in graph if node.domain == "" and source != version
        ):
            converted = _converted(typed.of(node), source, version)
            if converted is not None:
                plan[node] = converted
    return plan


def _converted(node: ir.Node, source: int, version: int) -> ir.Graph | None:
    """The graph that takes a node's place; None where the node is right as it is."""
    if _since(node.op_type, source) == _since(node.op_type, version) is not None:
        return None
    if node.op_type == "Scan" and min(source, version) < 9:
        raise _refusal(node, source, version, "Scan had another form before opset 9")
    if any(True for _ in subgraphs_of(node)) and _since(node.op_type, version) is not None:
        # Other versions of If, Loop and Scan differ only in the dtypes they take: the checker looks at those.
        return None
    try:
        kept = attributes_that_keep_meaning(node, source, version)
    except MeaningError as error:
        raise _refusal(node, source, version, str(error)) from error
    proto, names = _model_of_one(node, source)
    result, reason = _library_conversion(proto.SerializeToString(deterministic=True), version)
    if result is None:
        if "No Adapter" in reason and _differ_in_dtypes_only(node.op_type, source, version):
            return None
        raise _refusal(node, source, version, reason)
    graph: ir.Graph = ir.from_proto(onnx.ModelProto.FromString(result)).graph
    for entry in graph:
        if entry.domain == "" and _since(entry.op_type, version) is None:
            raise _refusal(node, source, version, f"{entry.op_type} does not exist there")
    set_attributes(graph, kept, (node.op_type, "Resize"))
    graph = _checked(node, proto, graph, source, version)
    if _is_unchanged(node, proto.graph, graph, names):
        return None
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        raise _refusal(node, source, version, "attributes that the function's caller sets")
    return graph


def _checked(node: ir.Node, before: onnx.ModelProto, graph: ir.Graph, source: int, version: int) -> ir.Graph:
    """The converted node, if it has types that fit and gives what the node gave, on values drawn at random.

    The library's adapters write what was an attribute as a float32 constant, also where the operator takes the dtype
    of its input (onnx 1.23, version_converter/adapters: Clip, Pad, …). Such constants get the input's dtype.

    Raises:
        GraphError: the library's form has other types, or gives something else.
    """
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return graph
    fault = type_fault(before)
    if fault:
        return graph
    fault = type_fault(_model_of(graph, before, version))
    if fault and node.inputs and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        recast_constants(graph, node.inputs[0].dtype)
        fault = type_fault(_model_of(graph, before, version))
    fault = fault or value_fault(before, _model_of(graph, before, version))
    if fault:
        raise _refusal(node, source, version, f"the library's form of it is wrong: {fault}")
    return graph


def _model_of(graph: ir.Graph, before: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The converted node as a model with the interface that the node alone had."""
    proto: onnx.GraphProto = ir.to_proto(graph)
    del proto.input[:], proto.output[:], proto.value_info[:]
    proto.input.extend(before.graph.input)
    proto.output.extend(before.graph.output)
    known = {tensor.name for tensor in proto.initializer}
    proto.initializer.extend(tensor for tensor in before.graph.initializer if tensor.name not in known)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", version)], ir_version=10)


@lru_cache(maxsize=4096)
def _library_conversion(model: bytes, version: int) -> tuple[bytes | None, str]:
    """The converted model, or None and the reason; a call takes 11 ms, and models repeat their nodes."""
    try:
        return version_converter.convert_version(onnx.ModelProto.FromString(model), version).SerializeToString(), ""
    # The converter's assertions are RuntimeErrors, and it has a class of its own.
    except Exception as error:
        return None, str(error)


def _since(op_type: str, version: int) -> int | None:
    """The version that defines an operator's form at an opset; None where it does not exist or is deprecated."""
    if not onnx.defs.has(op_type, version, ""):
        return None
    schema = onnx.defs.get_schema(op_type, version, "")
    return None if schema.deprecated else schema.since_version


def _differ_in_dtypes_only(op_type: str, source: int, version: int) -> bool:
    """Whether two forms of an operator have the same inputs, outputs, and attributes with their defaults."""
    if _since(op_type, version) is None:
        return False
    forms = []
    for opset in (source, version):
        schema = onnx.defs.get_schema(op_type, opset, "")
        attributes = {
            (name, entry.type, entry.required, entry.default_value.SerializeToString())
            for name, entry in schema.attributes.items()
        }
        ends = [(end.name, end.option, end.is_homogeneous, end.min_arity) for end in (*schema.inputs, *schema.outputs)]
        forms.append((attributes, ends))
    return forms[0] == forms[1]


def _refusal(node: ir.Node, source: int, version: int, reason: str) -> GraphError:
    return GraphError(
        f"operator {node.op_type} cannot be converted from opset {source} to {version}",
        where=node.name or str(node.outputs[0].name),
        got=_plain_reason(reason, node.op_type),
        fix="choose another version, or replace the node first",
    )


def _plain_reason(reason: str, op_type: str) -> str:
    """What the library says, without places in its own source."""
    last = reason.strip().splitlines()[-1] if reason.strip() else ""
    if "Assertion `false`" in last or "No Adapter" in last:
        return f"ONNX's converter knows no form of {op_type} there"
    return last.rpartition("` failed: ")[2][-200:]


def _model_of_one(node: ir.Node, source: int) -> tuple[onnx.ModelProto, Mapping[str, str]]:
    """The node alone: inputs iN, outputs oN; small constants with their values, which some forms need."""
    names = {str(value.name): f"i{index}" for index, value in enumerate(node.inputs) if value is not None}
    proto = onnx.NodeProto(op_type=node.op_type)
    proto.input.extend("" if value is None else names[str(value.name)] for value in node.inputs)
    proto.output.extend(f"o{index}" if value.name else "" for index, value in enumerate(node.outputs))
    # Attributes that refer to a function's parameters have no value here.
    proto.attribute.extend(ir.to_proto(entry) for entry in node.attributes.values() if not entry.is_ref())
    inputs, constants = [], []
    for value in {value: None for value in node.inputs if value is not None}:
        tensor = constant_tensor(value)
        if tensor is not None and tensor.nbytes <= _MAX_CONSTANT_BYTES:
            constant: onnx.TensorProto = ir.to_proto(tensor)
            constant.name = names[str(value.name)]
            constants.append(constant)
        else:
            inputs.append(_value_info(value, names[str(value.name)]))
    outputs = [_value_info(value, f"o{index}") for index, value in enumerate(node.outputs) if value.name]
    graph = helper.make_graph([proto], "node", inputs, outputs, constants)
    opset = helper.make_opsetid("", source)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10), names


def _value_info(value: ir.Value, name: str) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto() if value.type is None else ir.to_proto(value)
    info.name = name
    info.ClearField("metadata_props")
    return info


def _is_unchanged(node: ir.Node, before: onnx.GraphProto, after: ir.Graph, names: Mapping[str, str]) -> bool:
    if len(after) != 1:
        return False
    old, new = before.node[0], ir.to_proto(after[0])
    same = (old.op_type, list(old.input), list(old.output)) == (new.op_type, list(new.input), list(new.output))
    return same and sorted(map(str, old.attribute)) == sorted(map(str, new.attribute))


def _apply(copy: Copy, plan: _Plan, version: int) -> None:
    model = copy.model
    for node, replacement in plan.items():
        _replace(model, copy.of(node), replacement)
    for root in root_graphs(model):
        imports = opset_imports_of(model, root)
        if "" in imports:
            imports[""] = version
    raise_ir_version(model, _ir_version_of(version))


def _ir_version_of(opset: int) -> int:
    """The oldest that the opset may have."""
    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)], ignore_unknown=True))


def _replace(model: ir.Model, node: ir.Node, replacement: ir.Graph) -> None:
    graph = node.graph
    assert graph is not None
    taken = taken_names(root_of(model, graph), graph)
    values: dict[str, ir.Value | None] = {f"i{index}": value for index, value in enumerate(node.inputs)}
    for name, constant in replacement.initializers.items():
        if name not in values and constant.const_value is not None:
            name_here = fresh_name(f"{node.outputs[0].name}.{name}", taken)
            values[name] = add_constant_node(node, constant.const_value, name_here)
    for entry in replacement:
        inputs = [None if value is None else values[str(value.name)] for value in entry.inputs]
        new = ir.Node("", entry.op_type, inputs, list(entry.attributes.values()), num_outputs=len(entry.outputs))
        graph.insert_before(node, new)
        for made, output in zip(entry.outputs, new.outputs, strict=True):
            values[str(made.name)] = output
            output.type, output.shape = made.type, made.shape
            if not made.name:
                output.name = ""
            elif not any(made is output for output in replacement.outputs):
                output.name = fresh_name(f"{node.outputs[0].name}.{made.name}", taken)
    for index, old in enumerate(node.outputs):
        if old.name:
            _take_over(old, values[f"o{index}"])
    remove_node(node)


def _take_over(old: ir.Value, new: ir.Value | None) -> None:
    assert new is not None
    name = old.name
    new.type, new.shape = old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    new.name = name
