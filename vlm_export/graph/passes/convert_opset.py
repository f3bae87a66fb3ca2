"""Another version of ONNX's operators, node by node with the library's converter.

ONNX's converter takes whole models of 2 GB at most, and drops or renames what it does not know. Here it sees one node
at a time; everything else stays as it is. onnxscript's converter calls it too, for versions below 18 and downwards: it
inlines all functions, and a Clip of float64 gets float32 bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, version_converter

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import Copy, check, copy_of, infer, only_new_faults
from vlm_export.graph.core.names import (
    fresh_name,
    graph_of,
    inputs_of,
    nested_nodes,
    root_graphs,
    root_of,
    subgraphs_of,
    taken_names,
)
from vlm_export.graph.core.onnxruntime_session import Array, run_in_onnxruntime
from vlm_export.graph.core.operators import RANDOM
from vlm_export.graph.core.replace_uses import add_constant, remove_node, replace_uses
from vlm_export.graph.core.skeleton import raise_ir_version
from vlm_export.graph.core.tensors import constant_argument, constant_tensor, input_at, rank_of, sizes_of
from vlm_export.graph.passes.infer_shapes import infer_shapes
from vlm_export.graph.prove.random_inputs import draw_feeds

_MAX_CONSTANT_BYTES = 1 << 16
# Larger tensors are cut down where their axes are open, and otherwise not tried.
_MAX_ELEMENTS = 1 << 18
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
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
    check(trial.model)
    # Operators take other dtypes at other versions.
    with only_new_faults(model, infer):
        infer(trial.model)
    _apply(Copy(model), plan, version)
    return len(plan)


def _plan(model: ir.Model, version: int) -> _Plan:
    # Some forms depend on dtypes and ranks.
    typed = copy_of(model)
    raise_ir_version(typed.model, _ir_version_of(version))
    infer_shapes(typed.model)
    plan: _Plan = {}
    for root in root_graphs(model):
        source = root.opset_imports.get("", version)
        for node in nested_nodes(root) if source != version else ():
            converted = _converted(typed.of(node), source, version) if node.domain == "" else None
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
        kept = _kept_meaning(node, source, version)
    except _MeaningError as error:
        raise _refusal(node, source, version, str(error)) from error
    proto = _model_of_one(node, source)
    result, reason = _library_conversion(proto.SerializeToString(deterministic=True), version)
    if result is None:
        if "No Adapter" in reason and _differ_in_dtypes_only(node.op_type, source, version):
            return None
        raise _refusal(node, source, version, reason)
    graph: ir.Graph = ir.from_proto(onnx.ModelProto.FromString(result)).graph
    for entry in graph:
        if entry.domain == "" and _since(entry.op_type, version) is None:
            raise _refusal(node, source, version, f"{entry.op_type} does not exist there")
    for entry in graph:
        if entry.op_type in (node.op_type, "Resize"):
            entry.attributes.update({attribute.name: attribute for attribute in kept})
    graph = _checked(node, proto, graph, source, version)
    if _is_unchanged(proto.graph, graph):
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
    fault = _type_fault(before)
    if fault:
        return graph
    fault = _type_fault(_model_of(graph, before, version))
    if fault and node.inputs and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        _recast_constants(graph, node.inputs[0].dtype)
        fault = _type_fault(_model_of(graph, before, version))
    models = (before, _model_of(graph, before, version))
    fault = fault or _value_fault(*(model.SerializeToString(deterministic=True) for model in models))
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


def _model_of_one(node: ir.Node, source: int) -> onnx.ModelProto:
    """The node alone: inputs iN, outputs oN; small constants with their values, which some forms need."""
    names = {str(value.name): f"i{index}" for index, value in enumerate(node.inputs) if value is not None}
    proto = onnx.NodeProto(op_type=node.op_type)
    proto.input.extend("" if value is None else names[str(value.name)] for value in node.inputs)
    proto.output.extend(f"o{index}" if value.name else "" for index, value in enumerate(node.outputs))
    # Attributes that refer to a function's parameters have no value here.
    proto.attribute.extend(ir.to_proto(entry) for entry in node.attributes.values() if not entry.is_ref())
    inputs, constants = [], []
    for value in dict.fromkeys(inputs_of(node)):
        tensor = constant_tensor(value)
        if tensor is not None and tensor.nbytes <= _MAX_CONSTANT_BYTES:
            constant: onnx.TensorProto = ir.to_proto(tensor)
            constant.name = names[str(value.name)]
            constants.append(constant)
        else:
            inputs.append(_value_info(value, names[str(value.name)]))
    outputs = [_value_info(value, f"o{index}") for index, value in enumerate(node.outputs) if value.name]
    graph = helper.make_graph([proto], "node", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", source)], ir_version=10)


def _value_info(value: ir.Value, name: str) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto() if value.type is None else ir.to_proto(value)
    info.name = name
    info.ClearField("metadata_props")
    return info


def _is_unchanged(before: onnx.GraphProto, after: ir.Graph) -> bool:
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
        if "" in root.opset_imports:
            root.opset_imports[""] = version
    raise_ir_version(model, _ir_version_of(version))


def _ir_version_of(opset: int) -> int:
    """The oldest that the opset may have."""
    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)], ignore_unknown=True))


def _replace(model: ir.Model, node: ir.Node, replacement: ir.Graph) -> None:
    graph = graph_of(node)
    root = root_of(model, graph)
    taken = taken_names(root, graph)
    values: dict[str, ir.Value | None] = {f"i{index}": value for index, value in enumerate(node.inputs)}
    for name, constant in replacement.initializers.items():
        if name not in values and constant.const_value is not None:
            name_here = fresh_name(f"{node.outputs[0].name}.{name}", taken)
            values[name] = add_constant(graph, constant.const_value, name_here, before=node)
    for entry in replacement:
        inputs = [None if value is None else values[str(value.name)] for value in entry.inputs]
        new = ir.Node("", entry.op_type, inputs, list(entry.attributes.values()), num_outputs=len(entry.outputs))
        graph.insert_before(node, new)
        for source, output in zip(entry.outputs, new.outputs, strict=True):
            values[str(source.name)] = output
            output.type, output.shape = source.type, source.shape
            if not source.name:
                output.name = ""
            elif not source.is_graph_output():
                output.name = fresh_name(f"{node.outputs[0].name}.{source.name}", taken)
    for index, old in enumerate(node.outputs):
        made = values[f"o{index}"] if old.name else None
        if made is not None:
            made.type, made.shape = old.type, old.shape
            made.metadata_props.update(old.metadata_props)
            replace_uses(old, made)
            made.name, old.name = old.name, None
    remove_node(node)


def _type_fault(model: onnx.ModelProto) -> str:
    """What ONNX's inference says against the types of a model; "" where it says nothing."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    # Inference raises exceptions of several unrelated classes.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1][-200:] if lines else type(error).__name__
    return ""


def _recast_constants(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Gives the float constants that a converter added the dtype of what they are used with.

    Constants that were inputs of the node (named iN) keep theirs.
    """
    if dtype not in _FLOATS:
        return

    def recast(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
        # A bound beyond the dtype's range becomes infinite, and bounds nothing as before.
        with np.errstate(over="ignore"):
            return ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name)

    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS and not name.startswith("i"):
            value.const_value, value.type = recast(tensor, name), ir.TensorType(dtype)
    for node in graph:
        tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None and tensor.dtype in _FLOATS:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", recast(tensor, tensor.name))
            node.outputs[0].type = ir.TensorType(dtype)


@lru_cache(maxsize=4096)
def _value_fault(before: bytes, after: bytes) -> str:
    """How the values of two models of one node differ on random inputs; "" where they do not, or are not comparable."""
    first, second = onnx.ModelProto.FromString(before), onnx.ModelProto.FromString(after)
    if any(node.op_type in RANDOM for node in (*first.graph.node, *second.graph.node)):
        return ""
    feeds = _feeds(first)
    # An engine lacks some operators in some dtypes: that is no fault of the form.
    expected = run_in_onnxruntime(first, feeds) if feeds is not None else None
    got = run_in_onnxruntime(second, feeds) if feeds is not None and expected is not None else None
    if expected is None or got is None:
        return ""
    for name, left, right in zip((entry.name for entry in first.graph.output), expected, got, strict=True):
        fault = _difference(left, right)
        if fault:
            return f"output {name[1:]} {fault}"
    return ""


def _feeds(model: onnx.ModelProto) -> Mapping[str, Array] | None:
    given = {tensor.name for tensor in model.graph.initializer}
    inputs = {entry.name: ir.from_proto(entry) for entry in model.graph.input if entry.name not in given}
    for value in inputs.values():
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            return None
        if prod(size if isinstance(size, int) else 8 for size in value.shape) > _MAX_ELEMENTS:
            return None
    try:
        return draw_feeds(inputs, {}, (2, 3, 5, 4), {}, 0)
    # No values can be drawn for some dtypes.
    except Exception:
        return None


def _difference(left: Array, right: Array) -> str:
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        return ""
    if left.dtype != right.dtype or left.shape != right.shape:
        return f"is {right.dtype} {right.shape} instead of {left.dtype} {left.shape}"
    if left.dtype.kind != "f":
        return "" if np.array_equal(left, right) else "has other values"
    close = np.allclose(left.astype(np.float64), right.astype(np.float64), rtol=1e-3, atol=1e-5, equal_nan=True)
    return "" if close else "has other values"


class _MeaningError(Exception):
    """The node cannot be said at the other version; the message says why."""


_Rule: TypeAlias = "Callable[[ir.Node, int], list[ir.Attr]]"


def _kept_meaning(node: ir.Node, source: int, version: int) -> list[ir.Attr]:
    """The attributes with which the converted node computes the same, where a meaning changed and the form did not.

    The library's converter looks at forms: what it leaves as it is would compute something else.

    Raises:
        _MeaningError: no attributes can do that.
    """
    found: list[ir.Attr] = []
    for (op_type, boundary, is_up), rule in _RULES.items():
        crosses = source < boundary <= version if is_up else version < boundary <= source
        if node.op_type == op_type and crosses:
            found += rule(node, version)
    return found


def _last_axis(node: ir.Node, version: int) -> list[ir.Attr]:
    """Before opset 13 the axes from `axis` (default: 1) on are taken together; since then only `axis` (default: -1)."""
    stated, rank = _stated(node, "axis"), rank_of(input_at(node, 0))
    axis = (1 if version >= 13 else -1) if stated is None else stated.as_int()
    if axis != -1 and (rank is None or axis % rank != rank - 1):
        raise _MeaningError("another axis than the last means something else there")
    if version < 11 and rank is None:
        raise _MeaningError("the input's rank is not known, and negative axes do not exist there")
    return [ir.AttrInt64("axis", -1 if version >= 11 or rank is None else rank - 1)]


def _resize(node: ir.Node, version: int) -> list[ir.Attr]:
    """Before opset 11 coordinates are asymmetric; the nearest element is below, or above where an axis shrinks."""
    asymmetric, mode = ir.AttrString("coordinate_transformation_mode", "asymmetric"), _stated(node, "mode")
    if mode is not None and mode.as_string() != "nearest":
        return [asymmetric]
    if node.op_type == "Resize":
        scales = constant_argument(input_at(node, 1))
        if scales is None or not all(scale >= 1 or float(1 / np.float32(scale)).is_integer() for scale in scales):
            raise _MeaningError("which element is nearest where an axis shrinks cannot be said there")
    return [asymmetric, ir.AttrString("nearest_mode", "floor")]


def _group_norm(node: ir.Node, version: int) -> list[ir.Attr]:
    """Before opset 21 scale and bias are per group, since then per channel."""
    scales, groups = sizes_of(input_at(node, 1)), node.attributes.get("num_groups")
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if groups is None or groups.is_ref() or scales is None or not scales == (groups.as_int(),) == (channels,):
        raise _MeaningError("scale and bias are per group, and would have to be per channel")
    return []


def _without(name: str, *values: str) -> _Rule:
    def rule(node: ir.Node, version: int) -> list[ir.Attr]:
        value = _stated(node, name)
        if value is not None and value.as_string() in values:
            raise _MeaningError(f"{name} has no {value.as_string()!r} there")
        return []

    return rule


def _stated(node: ir.Node, name: str) -> ir.Attr | None:
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        raise _MeaningError(f"{name} is what the function's caller sets")
    return attribute


# Operator, the version from which it means something else, and whether the conversion is to that version or back.
_RULES: Mapping[tuple[str, int, bool], _Rule] = {
    ("GroupNormalization", 21, True): _group_norm,
    ("GroupNormalization", 21, False): _group_norm,
    # Upwards, the library writes the two others in their new form.
    ("Hardmax", 13, True): _last_axis,
    ("Hardmax", 13, False): _last_axis,
    ("LogSoftmax", 13, False): _last_axis,
    ("Softmax", 13, False): _last_axis,
    ("Pad", 19, False): _without("mode", "wrap"),
    ("Resize", 11, True): _resize,
    ("Resize", 19, False): _without("coordinate_transformation_mode", "half_pixel_symmetric"),
    ("ScatterElements", 18, False): _without("reduction", "max", "min"),
    ("ScatterND", 18, False): _without("reduction", "max", "min"),
    ("Upsample", 11, True): _resize,
}
