"""What graphs compute as texts, in which no name of a node or tensor, and no order of nodes, occurs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from vlm_export.graph.core.names import graphs_in, subgraphs_of
from vlm_export.lab.module_paths import constant_of, mapped_for_a_while

COMMUTATIVE = frozenset(("", name) for name in ("Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"))
SEPARATOR = " | "
"""Between operators and the digest of their attributes, constants and connections."""
_DIGEST_CHARACTERS = 12

ConstantText = Callable[[ir.Value, ir.TensorProtocol], str]
Known = Mapping[ir.Value, str]
"""Tensors whose text is known."""
_NOTHING: Known = {}


def contents(_value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """A constant by its dtype, shape and values."""
    with mapped_for_a_while(tensor):
        return f"{kinds(_value, tensor)} {digest(*held_bytes(tensor))}"


def held_bytes(tensor: ir.TensorProtocol) -> Sequence[bytes]:
    """The content of a tensor; of texts each by itself."""
    return tensor.string_data() if isinstance(tensor, ir.StringTensor) else [tensor.tobytes()]


def kinds(_value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """A constant by its dtype and shape: `FLOAT [128, 512]`."""
    return f"{tensor.dtype} {list(tensor.shape.numpy())}"


def computed_digests(model: ir.Model, constant_text: ConstantText) -> dict[str, str]:
    """Output → digest of all that it is computed of: where two are equal, the graphs compute the same.

    Args:
        model: sorted, without functions.
    """
    texts = GraphTexts(model, constant_text)
    known = texts.computed(model.graph)
    return {str(value.name): digest(texts.value(value, known)) for value in model.graph.outputs}


class GraphTexts:
    """Texts of one model's nodes and tensors."""

    def __init__(self, model: ir.Model, constant_text: ConstantText) -> None:
        """
        Args:
            constant_text: what tells a constant of the main graph; those of subgraphs are told by their values.
        """
        self._model, self._constant_text = model, constant_text

    def computed(self, graph: ir.Graph, around: Known = _NOTHING, depth: int = 0) -> dict[ir.Value, str]:
        """What each node makes → digest of all that it is computed of.

        Args:
            around: texts of what a subgraph is given, and of what it captures.
            depth: of the subgraph.
        """
        known = dict(around)
        for node in graph:
            if not is_constant_node(node):
                settings = sorted(self.settings(node, known, depth).items())
                place = digest(f"{operator_text(node)} {settings} {self.inputs(node, known)}")
                known |= {value: f"{place}:{index}" for index, value in enumerate(node.outputs)}
        return known

    def settings(self, node: ir.Node, known: Known = _NOTHING, depth: int = 0) -> dict[str, str]:
        """The attributes of a node, those that are left out with the operator's defaults."""
        opset = node.version or self._model.graph.opset_imports.get(node.domain)
        found = {name: _plain(onnx.helper.get_attribute_value(entry)) for name, entry in _defaults(node, opset)}
        for name, attribute in node.attributes.items():
            graphs = graphs_in(attribute)
            found[name] = (
                "; ".join(self._subgraph(graph, known, depth + 1) for graph in graphs)
                if graphs
                else _plain(attribute.value)
            )
        return found

    def inputs(self, node: ir.Node, known: Known = _NOTHING) -> list[str]:
        """What a node reads, sorted where the order makes no difference."""
        found = ["-" if value is None else self.value(value, known) for value in read_by(node)]
        return sorted(found) if operator_of(node) in COMMUTATIVE else found

    def value(self, value: ir.Value, known: Known = _NOTHING) -> str:
        """What a tensor is: what is known of it, or else a constant, an input, or the operator that makes it."""
        if value in known:
            return known[value]
        tensor = constant_of(value)
        if tensor is not None:
            return self._constant_text(value, tensor)
        node = value.producer()
        if node is not None:
            return f"{operator_text(node)}:{node.outputs.index(value)}"
        default = "" if value.const_value is None else f", or {self._constant_text(value, value.const_value)}"
        return f"input {value.name}{default}"

    def _subgraph(self, graph: ir.Graph, known: Known, depth: int) -> str:
        """Operators, and a digest of what each output is computed of."""
        inside = GraphTexts(self._model, contents)
        around = {value: self.value(value, known) for value in captured_by(graph)}
        given = {value: f"given {depth}.{index}" for index, value in enumerate(graph.inputs)}
        computed = inside.computed(graph, {**known, **around, **given}, depth)
        ends = [inside.value(value, computed) for value in graph.outputs]
        names = sorted(operator_text(node) for node in graph if not is_constant_node(node))
        return counted(names) + SEPARATOR + digest(*ends)


def read_by(node: ir.Node) -> list[ir.Value | None]:
    """What a node reads, without inputs at the end that are left out, and then what its subgraphs capture."""
    found = list(node.inputs)
    while found and found[-1] is None:
        found.pop()
    return [*found, *(value for graph in subgraphs_of(node) for value in captured_by(graph))]


def captured_by(graph: ir.Graph) -> list[ir.Value]:
    """What a subgraph reads of the graphs around it, in the order in which a walk from its outputs comes upon it."""
    seen, found = set[ir.Value](), list[ir.Value]()
    waiting = list(reversed(graph.outputs))
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.graph is not graph:
            found.append(value)
        elif (producer := value.producer()) is not None:
            waiting += [read for read in reversed(read_by(producer)) if read is not None]
    return found


def operator_of(node: ir.Node) -> tuple[str, str]:
    """Domain and operator, ONNX's own domain as ""."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def operator_text(node: ir.Node) -> str:
    domain, name = operator_of(node)
    return f"{domain}:{name}" if domain else name


def is_constant_node(node: ir.Node) -> bool:
    return operator_of(node) == ("", "Constant")


def counted(names: Sequence[str]) -> str:
    """`Add, 2 MatMul`."""
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in Counter(names).items())


def digest(*parts: str | bytes) -> str:
    """The beginning of a sha256 of the parts and of where they end."""
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "little") + raw)
    return found.hexdigest()[:_DIGEST_CHARACTERS]


def _plain(value: object) -> str:
    """A value of an attribute as text; floats are float32, whose shortest digits are told."""
    if isinstance(value, float):
        return str(np.float32(value))
    if isinstance(value, bytes | str):
        return repr(value if isinstance(value, str) else value.decode("utf-8", "replace"))
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, ir.TensorProtocol):
        return f"{value.dtype} {list(value.shape.numpy())} {digest(*held_bytes(value))}"
    return str(value)


def _defaults(node: ir.Node, opset: int | None) -> Iterator[tuple[str, onnx.AttributeProto]]:
    if opset is None or not onnx.defs.has(node.op_type, node.domain):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return
    for name, attribute in schema.attributes.items():
        if attribute.default_value.type:
            yield name, attribute.default_value
