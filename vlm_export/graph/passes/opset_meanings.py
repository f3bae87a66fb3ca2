"""Operators whose meaning changed from one version to another while their form did not.

The library's converter looks at forms: what it leaves as it is would compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.tensors import constant_argument, input_at, rank_of, sizes_of

Attributes: TypeAlias = "dict[str, int | str]"


class MeaningError(Exception):
    """The node cannot be said at the other version; the message says why."""


def attributes_that_keep_meaning(node: ir.Node, source: int, version: int) -> Attributes:
    """Returns what must be set on the converted node for it to compute the same.

    Raises:
        MeaningError: no attributes can do that.
    """
    found: Attributes = {}
    for (op_type, boundary, is_up), rule in _RULES.items():
        crosses = source < boundary <= version if is_up else version < boundary <= source
        if node.op_type == op_type and crosses:
            found |= rule(node, version)
    return found


def set_attributes(graph: ir.Graph, attributes: Attributes, op_types: tuple[str, ...]) -> None:
    """Sets them on the graph's nodes of these operators."""
    for node in graph:
        if node.op_type in op_types:
            for name, value in attributes.items():
                node.attributes[name] = (
                    ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrString(name, value)
                )


def _last_axis(node: ir.Node, version: int) -> Attributes:
    """Before opset 13 the axes from `axis` (default: 1) on are taken together; since then only `axis` (default: -1)."""
    axis, rank = _integer(node, "axis", 1 if version >= 13 else -1), rank_of(input_at(node, 0))
    if axis != -1 and (rank is None or axis % rank != rank - 1):
        raise MeaningError("another axis than the last means something else there")
    if version >= 11:
        return {"axis": -1}
    if rank is None:
        raise MeaningError("the input's rank is not known, and negative axes do not exist there")
    return {"axis": rank - 1}


def _resize(node: ir.Node, version: int) -> Attributes:
    """Before opset 11 coordinates are asymmetric; the nearest element is below, or above where an axis shrinks."""
    if _text(node, "mode", "nearest") != "nearest":
        return {"coordinate_transformation_mode": "asymmetric"}
    if node.op_type == "Resize":
        scales = constant_argument(input_at(node, 1))
        if scales is None or not all(scale >= 1 or float(1 / np.float32(scale)).is_integer() for scale in scales):
            raise MeaningError("which element is nearest where an axis shrinks cannot be said there")
    return {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _group_norm(node: ir.Node, version: int) -> Attributes:
    """Before opset 21 scale and bias are per group, since then per channel."""
    sizes, groups = sizes_of(input_at(node, 1)), node.attributes.get("num_groups")
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if groups is None or groups.is_ref() or sizes is None or not sizes == [groups.as_int()] == [channels]:
        raise MeaningError("scale and bias are per group, and would have to be per channel")
    return {}


def _without(name: str, values: tuple[str, ...], default: str) -> Callable[[ir.Node, int], Attributes]:
    def rule(node: ir.Node, version: int) -> Attributes:
        value = _text(node, name, default)
        if value in values:
            raise MeaningError(f"{name} has no {value!r} there")
        return {}

    return rule


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = _stated(node, name)
    return default if attribute is None else attribute.as_int()


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = _stated(node, name)
    return default if attribute is None else attribute.as_string()


def _stated(node: ir.Node, name: str) -> ir.Attr | None:
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        raise MeaningError(f"{name} is what the function's caller sets")
    return attribute


# Operator, the version from which it means something else, and whether the conversion is to that version or back.
_RULES: Mapping[tuple[str, int, bool], Callable[[ir.Node, int], Attributes]] = {
    ("GroupNormalization", 21, True): _group_norm,
    ("GroupNormalization", 21, False): _group_norm,
    # Upwards, the library writes the two others in their new form.
    ("Hardmax", 13, True): _last_axis,
    ("Hardmax", 13, False): _last_axis,
    ("LogSoftmax", 13, False): _last_axis,
    ("Softmax", 13, False): _last_axis,
    ("Pad", 19, False): _without("mode", ("wrap",), "constant"),
    ("Resize", 11, True): _resize,
    ("Resize", 19, False): _without("coordinate_transformation_mode", ("half_pixel_symmetric",), "half_pixel"),
    ("ScatterElements", 18, False): _without("reduction", ("max", "min"), "none"),
    ("ScatterND", 18, False): _without("reduction", ("max", "min"), "none"),
    ("Upsample", 11, True): _resize,
}
