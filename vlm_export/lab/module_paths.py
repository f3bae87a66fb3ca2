"""Which module of the model each node of a graph belongs to, told by the names of the weights that nodes read.

Exporters keep the names of parameters on initializers (`blocks.7.attn.out.weight`), and lose those of modules. A node
that reads a weight stands in the weight's module. Any other stands between the last such node before it and the first
behind it: a softmax between `blocks.7.attn.qkv` and `blocks.7.attn.out` is of `blocks.7.attn`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile

import onnx_ir as ir

from vlm_export.graph.core.names import captured_or_read

# What exporters and optimisers call values that are no parameter of the module.
_NO_PARAMETER = re.compile(r"(_?v(al)?_?\d+|onnx::.*|.*::.*|/.*|_.*|\d+|constant.*|const_.*)", re.IGNORECASE)
# What this project's passes, and the fp16 conversion, put behind a parameter's name.
_MADE_FROM = re.compile(r"\.(transposed|float16|float32|\([\d, ]+\)|folded(\.\d+)?)$")


def module_paths(graph: ir.Graph, names: Mapping[ir.Value, str] | None = None) -> dict[ir.Node, str]:
    """Node → dotted path of its module; "" where no weight with a name is near.

    Args:
        graph: sorted, as a model that was opened is.
        names: of weights whose own names are not to be used.
    """
    nodes = list(graph)
    own = [_path_of_weights(node, names or {}) for node in nodes]
    position = {node: index for index, node in enumerate(nodes)}
    before = _latest_before(nodes, own, position)
    after = _earliest_behind(nodes, own, position)
    return {
        node: path if path is not None else _between(before[node], after[node], own)
        for node, path in zip(nodes, own, strict=True)
    }


def parameter_name(name: str) -> str:
    """The parameter that an initializer was made of by its name; "" where the name is none of a parameter."""
    if _NO_PARAMETER.fullmatch(name):
        return ""
    while match := _MADE_FROM.search(name):
        name = name[: match.start()]
    return name


def joined(where: str, path: str) -> str:
    """The path with what stands before it, such as a part's name; either may be empty."""
    return f"{where}.{path}" if where and path else where or path


def shared_path(paths: Sequence[str]) -> str:
    """The module that all the paths lie in: the longest beginning that they share."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output, None for anything that is computed."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain:
        return None
    attribute = node.attributes.get("value")
    if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    return ir.convenience.get_const_tensor(value)


@contextmanager
def mapped_for_a_while(*tensors: ir.TensorProtocol | None) -> Iterator[None]:
    """Lets go of the files that tensors map, so that memory does not grow with what was read."""
    try:
        yield
    finally:
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()


def _path_of_weights(node: ir.Node, names: Mapping[ir.Value, str]) -> str | None:
    """The module whose weights a node reads, None where it reads none with a name."""
    parameters = [
        parameter_name(names.get(value, str(value.name)))
        for value in captured_or_read(node)
        if value.is_initializer() and not value.is_graph_input() and _is_weight(value)
    ]
    paths = [module_of(name) for name in parameters if name]
    return paths[0] if paths else None


def _is_weight(value: ir.Value) -> bool:
    """Numbers of the code and scales of quantised tensors are scalars, and no place in the model."""
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1


def module_of(parameter: str) -> str:
    """The module of a parameter; a parameter of the model itself, such as a position embedding, is its own place."""
    head, _, last = parameter.rpartition(".")
    return head or last


def _latest_before(
    nodes: Iterable[ir.Node], own: list[str | None], position: Mapping[ir.Node, int]
) -> dict[ir.Node, int | None]:
    """Node → position of the last node with weights that it depends on."""
    found: dict[ir.Node, int | None] = {}
    for node in nodes:
        above = [value.producer() for value in captured_or_read(node)]
        places = [
            index if own[index] is not None else found[parent]
            for parent in above
            if parent is not None and (index := position.get(parent)) is not None
        ]
        found[node] = max((place for place in places if place is not None), default=None)
    return found


def _earliest_behind(
    nodes: list[ir.Node], own: list[str | None], position: Mapping[ir.Node, int]
) -> dict[ir.Node, int | None]:
    """Node → position of the first node with weights that depends on it."""
    found: dict[ir.Node, int | None] = dict.fromkeys(nodes)
    for node in reversed(nodes):
        place = position[node] if own[position[node]] is not None else found[node]
        for value in captured_or_read(node):
            maker = value.producer()
            if maker is not None and maker in position and place is not None:
                found[maker] = place if (before := found[maker]) is None else min(before, place)
    return found


def _between(before: int | None, after: int | None, own: list[str | None]) -> str:
    first = None if before is None else own[before]
    last = None if after is None else own[after]
    if first is None or last is None:
        return first or last or ""
    left, right = first.split("."), last.split(".")
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    # Between two parts of the model, or two blocks of a list: what ends there belongs to the first.
    shared = shared or 1
    if shared < len(left) and left[shared].isdigit():
        shared += 1
    return ".".join(left[:shared])
