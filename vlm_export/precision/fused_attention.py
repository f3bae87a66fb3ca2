"""Attention in one node of ONNX Runtime, in the place of two products and a softmax.

The pattern is onnxscript's (`onnxscript.rewriter.ort_fusions.sdpa`, 0.7.2). Its own way from there to
`MultiHeadAttention` (`sdpa_via_mha`) keeps the transposes of heads and adds further ones; the rule here reads queries,
keys and values where they lie before heads are split, as that operator wants them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.ort_fusions.sdpa import SDPA
from onnxscript.rewriter.rules.common import transpose_transpose_rule

_MICROSOFT = "com.microsoft"
_TO_HEADS, _PACKED_TO_HEADS = (0, 2, 1, 3), (2, 0, 3, 1, 4)


def fuse_attention(model: ir.Model) -> int:
    """Makes one `com.microsoft.MultiHeadAttention` of each attention without a mask, in place; how many.

    ONNX Runtime's kernel goes through the scores in blocks that stay in the processor's cache, and stores none of them,
    only where nothing masks them (`contrib_ops/cpu/bert/multihead_attention.cc`). So attention with a mask stays as it
    is, and so do queries, keys and values that do not lie with their heads side by side, such as those of a cache.
    OpenVINO reads the operator, too.

    This goes when ONNX Runtime fuses the standard form by itself, or when its kernel of the standard operator
    `Attention` (opset 23) is as fast and graphs have it.
    """
    count = int(RewriteRuleSet([_Unmasked.rule()]).apply_to_model(model))
    if count:
        transpose_transpose_rule.apply_to_model(model)
        passes.IdentityEliminationPass()(model)
        model.graph.opset_imports[_MICROSOFT] = 1
        passes.RemoveUnusedNodesPass()(model)
    return count


@dataclass(frozen=True)
class _Columns:
    """Where a value (B, H, T, d) lies before its heads are split: (B, T, H * d) from a column on."""

    source: ir.Value
    start: int
    size: int


class _Unmasked(SDPA):  # type: ignore[misc]
    """The library's pattern where nothing is masked, and heads lie side by side."""

    def pattern(
        self, op: Any, query: Any, key: Any, value: Any, query_scale: Any, key_scale: Any, qk_scale: Any
    ) -> Any:
        # The library's pattern takes the name of a mask; without one it matches what has none.
        return super().pattern(op, query, key, value, None, query_scale, key_scale, qk_scale)

    def check(self, context: Any, query: ir.Value, key: ir.Value, value: ir.Value, **found: Any) -> Any:
        result = super().check(context, query=query, key=key, value=value, mask=None, **found)
        heads = [_columns_of(query), _columns_of(key, split=found["key_format"] == "BSHd"), _columns_of(value)]
        number = None if query.shape is None else query.shape[1]
        if None in heads or not isinstance(number, int):
            return result.fail("its heads do not lie side by side")
        self._heads, self._number = [one for one in heads if one is not None], number
        return result

    def rewrite(self, op: Any, **found: Any) -> Any:
        sides = [_read(op, one) for one in self._heads]
        scale = {} if self._scale is None else {"scale": self._scale}
        joined = op.MultiHeadAttention(*sides, num_heads=self._number, _domain=_MICROSOFT, **scale)
        split = op.Reshape(joined, _constant(op, [0, 0, self._number, -1]))
        return op.Transpose(split, perm=list(_TO_HEADS))


def _read(op: Any, columns: _Columns) -> Any:
    """(B, T, H * d)."""
    width = columns.source.shape[-1] if columns.source.shape is not None else None
    if width == columns.size:
        return columns.source
    edges = (columns.start, columns.start + columns.size, -1)
    return op.Slice(columns.source, *(_constant(op, [edge]) for edge in edges))


def _constant(op: Any, numbers: list[int]) -> Any:
    return op.Constant(value=ir.tensor(numbers, dtype=ir.DataType.INT64))


def _columns_of(value: ir.Value, *, split: bool = False) -> _Columns | None:
    """Where a value's heads lie side by side; None where that is not proven.

    Args:
        value: (B, H, T, d), or where it is `split` (B, T, H, d).
    """
    before, number = (value, 0) if split else _before_heads(value)
    maker = None if before is None else before.producer()
    if before is None or before.shape is None or maker is None or maker.op_type != "Reshape":
        return None
    source, sizes = maker.inputs[0], before.shape
    if source is None or source.shape is None or source.shape.rank() != 3:
        return None
    widths = [size for size in sizes[2:] if isinstance(size, int)]
    size = widths[-2] * widths[-1] if len(widths) > 1 else 0
    count = widths[0] if len(widths) > 2 else 1
    # Tokens stay where they are, so that the batch does, too.
    is_same = sizes[1] == source.shape[1] and source.shape[2] == count * size and len(widths) == len(sizes) - 2
    return _Columns(source, number * size, size) if is_same else None


def _before_heads(value: ir.Value) -> tuple[ir.Value | None, int]:
    """What heads were moved to the front of, and which of several that lie in it side by side the value is."""
    node = value.producer()
    packed, number = (None, None) if node is None else _picked(node)
    if packed is not None and number is not None:
        return (packed.inputs[0], number) if _permutes(packed, _PACKED_TO_HEADS) else (None, 0)
    return (node.inputs[0], 0) if node is not None and _permutes(node, _TO_HEADS) else (None, 0)


def _permutes(node: ir.Node, perm: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == perm


def _picked(node: ir.Node) -> tuple[ir.Node | None, int | None]:
    """What makes the tensor of whose first axis a node takes one, and which."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        index = _input(node, 1)
        is_one = index is not None and index.shape is not None and index.shape.rank() == 0
        return _made(node), _first(_integers(index)) if is_one else None
    part = _made(node) if node.op_type == "Squeeze" and _integers(_input(node, 1)) == [0] else None
    if part is not None and part.op_type == "Split" and part.attributes.get_int("axis", 0) == 0:
        return _made(part), [output is node.inputs[0] for output in part.outputs].index(True)
    if part is not None and part.op_type == "Slice":
        start, end, axes, steps = (_integers(_input(part, number)) for number in (1, 2, 3, 4))
        if start is not None and end == [start[0] + 1] and axes == [0] and steps in (None, [1]):
            return _made(part), _first(start)
    return None, None


def _first(numbers: list[int] | None) -> int | None:
    """A number that counts from the front."""
    return numbers[0] if numbers is not None and numbers[0] >= 0 else None


def _made(node: ir.Node) -> ir.Node | None:
    """What makes the first input."""
    return node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


def _input(node: ir.Node, number: int) -> ir.Value | None:
    return node.inputs[number] if number < len(node.inputs) else None


def _integers(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
