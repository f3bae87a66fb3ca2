"""Nodes that return what they are given: casts to the same dtype, reshapes to the same shape, and the like.

That an operator's first output equals one of its inputs is proven from constants, dtypes and shapes, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.names import inputs_of, names_used, nested_graphs, root_graphs
from vlm_export.graph.core.replace_uses import bypass, remove_node
from vlm_export.graph.core.tensors import (
    attribute_ints,
    constant_argument,
    constant_integers,
    input_at,
    rank_of,
    sizes_of,
)
from vlm_export.graph.passes.dead_code import remove_unused_initializers


def remove_noops(model: ir.Model) -> Mapping[str, int]:
    """Removes nodes that provably return their input, in place.

    A Cast or Reshape goes only where its dtype or shape is proven equal from the graph's constants and stated shapes;
    symbolic axes count as equal only where the shape says "as it was" (0) or leaves one axis open (-1). Inputs and
    outputs of the graph keep their names; a no-op that leads from an input straight to an output stays. onnx_ir's
    `IdentityEliminationPass` renames one of two outputs that are Identities of one tensor, and knows Identity alone.

    Returns:
        Operator → how many were removed.
    """
    counts: Counter[str] = Counter()
    while removed := _sweep(model):
        counts += removed
    if counts:
        remove_unused_initializers(model)
    return dict(sorted(counts.items()))


def _sweep(model: ir.Model) -> Counter[str]:
    counts: Counter[str] = Counter()
    returned = names_used(model)
    scopes = [(graph, root.opset_imports.get("", 0)) for root in root_graphs(model) for graph in nested_graphs(root)]
    for graph, opset in scopes:
        for node in list(graph):
            source = returned_input(node, opset) if node.graph is graph else None
            if source is None or any(value.name in returned for value in node.outputs):
                continue
            if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
                continue
            if _changes_kind(node, source) or not bypass(node.outputs[0], source):
                continue
            counts[node.op_type] += 1
            _remove_with_feeders(node, returned)
    return counts


def _changes_kind(node: ir.Node, source: ir.Value) -> bool:
    # An Identity may turn a tensor's stated kind into another: a sequence, an optional.
    kind = node.outputs[0].type
    return kind is not None and source.type is not None and type(kind) is not type(source.type)


def _remove_with_feeders(node: ir.Node, returned: set[str]) -> None:
    """Removes the node, and what only it read: the shape of a Reshape, the first of two that undo each other."""
    feeders = [value.producer() for value in inputs_of(node)]
    remove_node(node)
    for feeder in feeders:
        if feeder is None or feeder.graph is None:
            continue
        if not any(value.uses() or value.is_graph_output() or value.name in returned for value in feeder.outputs):
            _remove_with_feeders(feeder, returned)


def returned_input(node: ir.Node, opset: int) -> ir.Value | None:
    """Returns the tensor that the node's first output equals, or None where that is not proven."""
    source = input_at(node, 0)
    if node.domain != "" or source is None:
        return None
    if node.op_type in _RULES and _RULES[node.op_type](node, source, opset):
        return source
    return _undone(node, source, opset) if node.op_type in _UNDOING else None


def _cast(node: ir.Node, source: ir.Value, opset: int) -> bool:
    to = node.attributes.get("to")
    return source.dtype is not None and to is not None and not to.is_ref() and source.dtype == to.as_int()


def _cast_like(node: ir.Node, source: ir.Value, opset: int) -> bool:
    like = input_at(node, 1)
    return source.dtype is not None and like is not None and source.dtype == like.dtype


def _dropout(node: ir.Node, source: ir.Value, opset: int) -> bool:
    if opset < 7:
        attribute = node.attributes.get("is_test")
        return attribute is not None and not attribute.is_ref() and attribute.as_int() != 0
    if opset < 12 or input_at(node, 2) is None:
        return True
    mode = constant_argument(node.inputs[2])
    return mode is not None and not bool(mode.reshape(-1)[0])


def _reshape(node: ir.Node, source: ir.Value, opset: int) -> bool:
    target, allowzero = constant_integers(input_at(node, 1)), node.attributes.get("allowzero")
    if source.shape is None or target is None or len(target) != len(source.shape):
        return False
    # An attribute that a function's caller sets may be set.
    copies_zero = allowzero is None or (not allowzero.is_ref() and allowzero.as_int() == 0)
    stated = [(size, wanted) for size, wanted in zip(source.shape, target, strict=True) if wanted != -1]
    inferred = len(target) - len(stated)
    # One axis that is inferred equals its size when all the others do. Beside an axis of size 0 it cannot be inferred:
    # an error that must stay one.
    if inferred > 1 or (inferred and any(size == 0 for size, _ in stated)):
        return False
    return all((wanted == 0 and copies_zero) or size == wanted for size, wanted in stated)


def _flatten(node: ir.Node, source: ir.Value, opset: int) -> bool:
    return rank_of(source) == 2 and node.attributes.get_int("axis", 1) in (1, -1)


def _expand(node: ir.Node, source: ir.Value, opset: int) -> bool:
    target = constant_integers(input_at(node, 1))
    if source.shape is None or target is None or len(target) > len(source.shape):
        return False
    sizes = list(source.shape)[len(source.shape) - len(target) :]
    return all(wanted in (1, size) for size, wanted in zip(sizes, target, strict=True))


def _squeeze(node: ir.Node, source: ir.Value, opset: int) -> bool:
    """Without axes, all of size 1 go."""
    sizes = sizes_of(source)
    is_all = input_at(node, 1) is None and "axes" not in node.attributes
    return is_all and sizes is not None and 1 not in sizes


def _unsqueeze(node: ir.Node, source: ir.Value, opset: int) -> bool:
    return _axes(node, opset) == []


_UNDOING: Mapping[str, str] = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}


def _undone(node: ir.Node, source: ir.Value, opset: int) -> ir.Value | None:
    """What the node before it read, where a Squeeze and an Unsqueeze of the same axes undo each other."""
    before = source.producer()
    if before is None or (before.domain, before.op_type) != ("", _UNDOING[node.op_type]):
        return None
    original, axes, others = input_at(before, 0), _axes(node, opset), _axes(before, opset)
    if not axes or not others:
        return None
    # Axes are those of the tensor that has them.
    rank = rank_of(source if node.op_type == "Squeeze" else original)
    if rank is not None:
        axes, others = [axis % rank for axis in axes], [axis % rank for axis in others]
    elif any((one < 0) != (other < 0) for one in axes for other in others):
        return None
    return original if sorted(axes) == sorted(others) else None


def _axes(node: ir.Node, opset: int) -> list[int] | None:
    """The axes of a Squeeze or Unsqueeze: an input since opset 13, an attribute before."""
    return constant_integers(input_at(node, 1)) if opset >= 13 else attribute_ints(node, "axes")


def _transpose(node: ir.Node, source: ir.Value, opset: int) -> bool:
    if "perm" not in node.attributes:
        return rank_of(source) in (0, 1)
    perm = attribute_ints(node, "perm")
    return perm is not None and perm == list(range(len(perm)))


def _single_input(node: ir.Node, source: ir.Value, opset: int) -> bool:
    return len(node.inputs) == 1


def _pad(node: ir.Node, source: ir.Value, opset: int) -> bool:
    pads = constant_integers(input_at(node, 1)) if opset >= 11 else attribute_ints(node, "pads")
    return pads is not None and not any(pads)


def _tile(node: ir.Node, source: ir.Value, opset: int) -> bool:
    repeats = constant_integers(input_at(node, 1)) if opset >= 6 else None
    return repeats is not None and all(repeat == 1 for repeat in repeats)


def _slice(node: ir.Node, source: ir.Value, opset: int) -> bool:
    """Whole axes: from 0 with steps of 1 to the end, or beyond every end."""
    starts, ends, axes, steps = (constant_integers(input_at(node, index)) for index in range(1, 5))
    if opset < 10 or source.shape is None or starts is None or ends is None or any(starts):
        return False
    axes = list(range(len(starts))) if input_at(node, 3) is None else axes
    steps = [1] * len(starts) if input_at(node, 4) is None else steps
    if axes is None or steps is None or any(step != 1 for step in steps) or len(axes) != len(ends):
        return False
    rank = len(source.shape)
    if not all(-rank <= axis < rank for axis in axes):
        return False
    sizes = [source.shape[axis] for axis in axes]
    # Exporters write the largest integer for "to the end".
    to_the_end = np.iinfo(np.int32).max
    return all(end >= (size if isinstance(size, int) else to_the_end) for size, end in zip(sizes, ends, strict=True))


# Operator → whether its first output equals its first input, by the node, that input, and the version of operators.
_RULES: Mapping[str, Callable[[ir.Node, ir.Value, int], bool]] = {
    "Identity": lambda node, source, opset: True,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Dropout": _dropout,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
    "Tile": _tile,
    **dict.fromkeys(("Concat", "Max", "Mean", "Min", "Sum"), _single_input),
}
