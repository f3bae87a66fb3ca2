"""When an operator's first output equals one of its inputs: proofs from constants, dtypes and shapes, never guesses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.tensors import constant_argument, constant_integers, input_at, rank_of, sizes_of

# Node and version of ONNX's operators → the input that the first output equals, None where that is not proven.
Rule = Callable[[ir.Node, int], "ir.Value | None"]


def _identity(node: ir.Node, opset: int) -> ir.Value | None:
    return input_at(node, 0)


def _cast(node: ir.Node, opset: int) -> ir.Value | None:
    source, to = input_at(node, 0), node.attributes.get("to")
    if source is None or source.dtype is None or to is None or to.is_ref():
        return None
    return source if int(source.dtype) == to.as_int() else None


def _cast_like(node: ir.Node, opset: int) -> ir.Value | None:
    source, like = input_at(node, 0), input_at(node, 1)
    if source is None or like is None or source.dtype is None:
        return None
    return source if source.dtype == like.dtype else None


def _dropout(node: ir.Node, opset: int) -> ir.Value | None:
    if opset < 7:
        attribute = node.attributes.get("is_test")
        inferring = attribute is not None and not attribute.is_ref() and attribute.as_int() != 0
    elif opset < 12 or input_at(node, 2) is None:
        inferring = True
    else:
        mode = constant_argument(node.inputs[2])
        inferring = mode is not None and not bool(mode.reshape(-1)[0])
    return input_at(node, 0) if inferring else None


def _reshape(node: ir.Node, opset: int) -> ir.Value | None:
    source, target = input_at(node, 0), constant_integers(input_at(node, 1))
    if source is None or source.shape is None or target is None or len(target) != len(source.shape):
        return None
    copies_zero = not _flag(node, "allowzero")
    wildcards = 0
    for size, wanted in zip(source.shape, target, strict=True):
        if wanted == -1:
            # One axis that is inferred equals its size when all the others do.
            wildcards += 1
        elif not (wanted == 0 and copies_zero) and not (isinstance(size, int) and size == wanted):
            return None
    # With an axis of size 0 among the others, -1 cannot be inferred: an error that must stay one.
    others = [size for size, wanted in zip(source.shape, target, strict=True) if wanted != -1]
    if wildcards and any(isinstance(size, int) and size == 0 for size in others):
        return None
    return source if wildcards <= 1 else None


def _flatten(node: ir.Node, opset: int) -> ir.Value | None:
    source = input_at(node, 0)
    return source if rank_of(source) == 2 and node.attributes.get_int("axis", 1) in (1, -1) else None


def _expand(node: ir.Node, opset: int) -> ir.Value | None:
    source, target = input_at(node, 0), constant_integers(input_at(node, 1))
    if source is None or source.shape is None or target is None or len(target) > len(source.shape):
        return None
    sizes = list(source.shape)[len(source.shape) - len(target) :]
    fits = (
        wanted == 1 or (isinstance(size, int) and size == wanted) for size, wanted in zip(sizes, target, strict=True)
    )
    return source if all(fits) else None


def _squeeze(node: ir.Node, opset: int) -> ir.Value | None:
    """Undoes an Unsqueeze of the same axes."""
    source = input_at(node, 0)
    axes = squeeze_axes(node, opset)
    producer = source.producer() if source is not None else None
    if source is None or axes is None or producer is None or not _is(producer, "Unsqueeze"):
        if axes is None and input_at(node, 1) is None and "axes" not in node.attributes:
            sizes = sizes_of(source)
            return source if sizes is not None and 1 not in sizes else None
        return None
    inner, outer_rank = squeeze_axes(producer, opset), rank_of(source)
    return input_at(producer, 0) if _same_axes(axes, inner, outer_rank) else None


def _unsqueeze(node: ir.Node, opset: int) -> ir.Value | None:
    """Undoes a Squeeze of the same axes."""
    source, axes = input_at(node, 0), squeeze_axes(node, opset)
    producer = source.producer() if source is not None else None
    if axes == []:
        return source
    if axes is None or producer is None or not _is(producer, "Squeeze"):
        return None
    original = input_at(producer, 0)
    return original if _same_axes(axes, squeeze_axes(producer, opset), rank_of(original)) else None


def squeeze_axes(node: ir.Node, opset: int) -> list[int] | None:
    """Returns the axes of a Squeeze or Unsqueeze: an input since opset 13, an attribute before."""
    if opset >= 13:
        return constant_integers(input_at(node, 1))
    attribute = node.attributes.get("axes")
    return None if attribute is None or attribute.is_ref() else list(attribute.as_ints())


def _same_axes(first: list[int], second: list[int] | None, rank: int | None) -> bool:
    if second is None or not second:
        return False
    if rank is not None:
        first, second = [axis % rank for axis in first], [axis % rank for axis in second]
    elif any((a < 0) != (b < 0) for a in first for b in second):
        return False
    return sorted(first) == sorted(second)


def _transpose(node: ir.Node, opset: int) -> ir.Value | None:
    source, attribute = input_at(node, 0), node.attributes.get("perm")
    if attribute is None:
        return source if rank_of(source) in (0, 1) else None
    if attribute.is_ref():
        return None
    perm = list(attribute.as_ints())
    return source if perm == list(range(len(perm))) else None


def _single_input(node: ir.Node, opset: int) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _pad(node: ir.Node, opset: int) -> ir.Value | None:
    if opset >= 11:
        pads = constant_integers(input_at(node, 1))
    else:
        attribute = node.attributes.get("pads")
        pads = None if attribute is None or attribute.is_ref() else list(attribute.as_ints())
    return input_at(node, 0) if pads is not None and not any(pads) else None


def _tile(node: ir.Node, opset: int) -> ir.Value | None:
    repeats = constant_integers(input_at(node, 1)) if opset >= 6 else None
    return input_at(node, 0) if repeats is not None and all(repeat == 1 for repeat in repeats) else None


def _slice(node: ir.Node, opset: int) -> ir.Value | None:
    """Whole axes: from 0 with steps of 1 to the end, or beyond every end."""
    source = input_at(node, 0)
    if opset < 10 or source is None or source.shape is None:
        return None
    starts, ends = constant_integers(input_at(node, 1)), constant_integers(input_at(node, 2))
    if starts is None or ends is None:
        return None
    given_axes, given_steps = input_at(node, 3), input_at(node, 4)
    axes = list(range(len(starts))) if given_axes is None else constant_integers(given_axes)
    steps = [1] * len(starts) if given_steps is None else constant_integers(given_steps)
    if axes is None or steps is None or any(starts) or any(step != 1 for step in steps):
        return None
    rank = len(source.shape)
    if len(axes) != len(ends) or not all(-rank <= axis < rank for axis in axes):
        return None
    for axis, end in zip(axes, ends, strict=True):
        size = source.shape[axis]
        # Exporters write the largest integer for "to the end".
        if not (isinstance(size, int) and end >= size) and end < np.iinfo(np.int32).max:
            return None
    return source


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    # An attribute that a function's caller sets may be set.
    return attribute is not None and (attribute.is_ref() or attribute.as_int() != 0)


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


RULES: Mapping[str, Rule] = {
    "Identity": _identity,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Dropout": _dropout,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _single_input,
    "Max": _single_input,
    "Mean": _single_input,
    "Min": _single_input,
    "Sum": _single_input,
    "Pad": _pad,
    "Slice": _slice,
    "Tile": _tile,
}
