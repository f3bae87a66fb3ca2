"""How the nodes of a graph stand to one permutation: what makes its layouts, and what works in either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.graph.core.tensors import constant_tensor, rank_of

# One tensor in, one out; further inputs (bounds of Clip, the model of CastLike's dtype) have no axes of their own.
UNARY = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu",
        "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
        "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
        "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
# All inputs are broadcast against one another, from the last axis on.
BROADCASTING = frozenset(
    {
        "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
        "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip


def is_elementwise(node: ir.Node, opset: int) -> bool:
    """Tells whether the axes of the node's tensors may be permuted together. Before opset 7 broadcasting had other
    rules."""
    if node.domain != "" or len(node.outputs) != 1:
        return False
    return node.op_type in UNARY or (node.op_type in BROADCASTING and opset >= 7)


def axis_inputs(node: ir.Node) -> list[int]:
    """Returns which inputs of an elementwise node have the axes of its output."""
    indices = range(min(1, len(node.inputs))) if node.op_type in UNARY else range(len(node.inputs))
    return [index for index in indices if node.inputs[index] is not None]


Perm: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class Roles:
    """The nodes of one graph that concern one permutation.

    Attributes:
        free: elementwise nodes that can work in either layout, in the order of the graph.
        forward: outputs of `Transpose(perm)`, with their node.
        back: Transposes by the inverse.
    """

    perm: Perm
    free: dict[ir.Node, None] = field(default_factory=dict)
    forward: dict[ir.Value, ir.Node] = field(default_factory=dict)
    back: dict[ir.Node, None] = field(default_factory=dict)


def is_identity(perm: Perm) -> bool:
    return perm == tuple(range(len(perm)))


def inverse_of(perm: Perm) -> Perm:
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def perm_of(node: ir.Node | None) -> Perm | None:
    """Returns the permutation of a Transpose, or None for other nodes and where it is not known."""
    if node is None or node.domain != "" or node.op_type != "Transpose" or not node.inputs or node.inputs[0] is None:
        return None
    attribute = node.attributes.get("perm")
    if attribute is not None:
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    rank = rank_of(node.inputs[0])
    return None if rank is None else tuple(reversed(range(rank)))


def has_no_layout(value: ir.Value | None) -> bool:
    """Constants, which are permuted when they are written, and tensors of one element."""
    return constant_tensor(value) is not None or has_one_element(value)


def has_one_element(value: ir.Value | None) -> bool:
    """Known to have no axis longer than 1."""
    return value is None or (value.shape is not None and all(size == 1 for size in value.shape))


def possible_roles(graph: ir.Graph, perm: Perm, opset: int) -> Iterator[Roles]:
    """Yields one division of roles; two for a permutation that is its own inverse, whose Transposes may be either
    end."""
    roles = Roles(perm, free=_free_nodes(graph, len(perm), opset))
    inverse = inverse_of(perm)
    ends = [(node, found) for node in graph if (found := perm_of(node)) in (perm, inverse)]
    if inverse != perm:
        forward = {node.outputs[0]: node for node, found in ends if found == perm}
        yield replace(roles, forward=forward, back={node: None for node, found in ends if found == inverse})
        return
    regions = _regions(roles.free)
    colours = _colours([node for node, _ in ends], regions)
    for colour in (True, False):
        yield _coloured(roles, [node for node, _ in ends], {n for n, r in regions.items() if colours[r] is colour})


def _free_nodes(graph: ir.Graph, rank: int, opset: int) -> dict[ir.Node, None]:
    free: dict[ir.Node, None] = {}
    ranks: dict[ir.Value, int] = {}
    for node in graph:
        perm = perm_of(node)
        if perm is not None:
            ranks[node.outputs[0]] = len(perm)
        if not is_elementwise(node, opset):
            continue
        inputs = [node.inputs[index] for index in axis_inputs(node)]
        known = [ranks[value] if value in ranks else _rank(value) for value in inputs if value is not None]
        if not known or None in known:
            continue
        widest = ranks[node.outputs[0]] = max(entry for entry in known if entry is not None)
        # A tensor with fewer axes would need a Reshape before its axes can be permuted.
        fits = (entry == rank or has_no_layout(value) for entry, value in zip(known, inputs, strict=True))
        if widest == rank and all(fits) and not all(has_no_layout(value) for value in inputs):
            free[node] = None
    return free


def _rank(value: ir.Value) -> int | None:
    # Constants of functions state no shape.
    tensor = constant_tensor(value)
    return rank_of(value) if tensor is None else len(tensor.shape)


def _regions(free: dict[ir.Node, None]) -> dict[ir.Node, int]:
    """Free node → the number of the connected region that it lies in."""
    regions: dict[ir.Node, int] = {}
    for number, start in enumerate(free):
        stack = [start] if start not in regions else []
        while stack:
            node = stack.pop()
            if node not in free or node in regions:
                continue
            regions[node] = number
            stack += [producer for value in node.inputs if value is not None and (producer := value.producer())]
            stack += [user for value in node.outputs for user, _ in value.uses()]
    return regions


def _colours(ends: list[ir.Node], regions: dict[ir.Node, int]) -> dict[int, bool]:
    """Gives regions on the two sides of a Transpose different colours, as far as that goes."""
    pairs = [
        (before, after) for node in ends for before in _sides(node, regions)[0] for after in _sides(node, regions)[1]
    ]
    neighbours: dict[int, set[int]] = {region: set() for region in regions.values()}
    for before, after in pairs:
        neighbours[before].add(after)
        neighbours[after].add(before)
    colours: dict[int, bool] = {}
    for start in neighbours:
        stack = [(start, True)]
        while stack:
            region, colour = stack.pop()
            if region not in colours:
                colours[region] = colour
                stack += [(other, not colour) for other in neighbours[region]]
    return colours


def _sides(node: ir.Node, regions: dict[ir.Node, int]) -> tuple[set[int], set[int]]:
    """The regions that make a Transpose's input, and those that read its output."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    before = {regions[producer]} if producer is not None and producer in regions else set()
    return before, {regions[user] for user, _ in node.outputs[0].uses() if user in regions}


def _coloured(roles: Roles, ends: list[ir.Node], free: set[ir.Node]) -> Roles:
    """The nodes in `free` may move; a Transpose leads into them or out of them, and concerns no one if it does both."""
    forward: dict[ir.Value, ir.Node] = {}
    back: dict[ir.Node, None] = {}
    for node in ends:
        source = node.inputs[0]
        leaves = source is not None and source.producer() in free
        enters = any(user in free for user, _ in node.outputs[0].uses())
        if enters and not leaves:
            forward[node.outputs[0]] = node
        elif leaves and not enters:
            back[node] = None
    return replace(roles, free={node: None for node in roles.free if node in free}, forward=forward, back=back)
