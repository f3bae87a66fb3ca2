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
        if found.get("has_mask") or not isinstance(query.shape and query.shape[1], int) or None in heads:
            return result.fail("it is masked, or its heads do not lie side by side")
        self._heads, self._number = [one for one in heads if one is not None], query.shape[1]
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
    before, number = value, 0
    if not split:
        node, number = _picked(value)
        perm = _PACKED_TO_HEADS if number is not None else _TO_HEADS
        if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != perm:
            return None
        before, number = node.inputs[0], number or 0
    maker = before.producer()
    if maker is None or maker.op_type != "Reshape" or before.shape is None:
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


def _picked(value: ir.Value) -> tuple[ir.Node | None, int | None]:
    """What makes a value, and which of a packed tensor's first axis it is where it is one of these."""
    node = value.producer()
    if node is None:
        return None, None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        picked = _integers(node.inputs[1])
        is_one = node.inputs[1] is not None and node.inputs[1].shape is not None and node.inputs[1].shape.rank() == 0
        return (node.inputs[0].producer(), picked[0]) if picked and is_one and picked[0] >= 0 else (None, None)
    if node.op_type != "Squeeze" or _integers(node.inputs[1] if len(node.inputs) > 1 else None) != [0]:
        return node, None
    part = node.inputs[0].producer()
    if part is None:
        return None, None
    if part.op_type == "Split" and part.attributes.get_int("axis", 0) == 0:
        return part.inputs[0].producer(), list(part.outputs).index(node.inputs[0])
    starts, ends, axes, steps = (_integers(one) for one in (*part.inputs[1:], *[None] * 4)[:4])
    is_one = part.op_type == "Slice" and starts and ends == [starts[0] + 1] and axes == [0] and steps in (None, [1])
    return (part.inputs[0].producer(), starts[0]) if is_one and starts and starts[0] >= 0 else (None, None)


def _integers(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
