"""What consumers' models do otherwise, as changes of the bundle's own graph: pooling, projection and activation.

Needs the extra `graph`. A change is made on a copy in memory; the bundle stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.files import open_model
from vlm_export.graph.core.inference import Info, copy_of, infer
from vlm_export.graph.core.names import fresh_name, names_in
from vlm_export.graph.core.replace_uses import add_initializer, replace_uses
from vlm_export.graph.core.tensors import constant_argument
from vlm_export.lab.output_diff import RunGraph, graph_runner
from vlm_export.proof.metrics import Array

_QUICK = 1.702
_POOLS = (_FIRST, _LAST, _MEAN, _MEAN_OF_OTHERS) = (
    "the first token",
    "the last token",
    "the mean of all tokens",
    "the mean of all tokens but the first",
)
_OTHER_POOLING, _NO_PROJECTION = "another pooling", "projection missing"
_FIX_POOLING = "take the graph's own output, whose pooling is the original's"
_FIX_PROJECTION = "take the graph's own output, behind the projection, not hidden states"


@dataclass(frozen=True)
class GraphChange:
    """A mistake of a model.

    Attributes:
        word, detail, fix: as of the other hypotheses.
        output: which output of the changed graph shows it.
    """

    word: str
    detail: str
    fix: str
    output: str


def changed_graphs(path: Path, output: str) -> Iterator[tuple[RunGraph, tuple[GraphChange, ...]]]:
    """Changed copies of the graph at `path`, and what each of their outputs stands for.

    Raises:
        GraphError: the graph cannot be read.
    """
    model = open_model(path)
    for change in (_other_activation, _other_poolings):
        copy = copy_of(model).model
        if changes := change(copy, output):
            yield graph_runner(copy), tuple(changes)


class _Writer:
    """Writes float32 nodes into a graph: at its end, or before the node `before`."""

    def __init__(self, model: ir.Model) -> None:
        self._graph, self._taken = model.graph, names_in(model.graph)
        self.before: ir.Node | None = None

    def __call__(self, operator: str, *inputs: ir.Value | Array, **attributes: int | Sequence[int]) -> ir.Value:
        return self.copy(ir.node(operator, [self._value(given) for given in inputs], attributes))

    def copy(self, node: ir.Node, first: ir.Value | None = None) -> ir.Value:
        """The node, or with another first input a copy of it."""
        if first is not None:
            node = ir.node(node.op_type, [first, *node.inputs[1:]], dict(node.attributes), domain=node.domain)
        value = node.outputs[0]
        value.name, value.type = fresh_name("doctor", self._taken), ir.TensorType(ir.DataType.FLOAT)
        if self.before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self.before, node)
        return value

    def _value(self, given: ir.Value | Array) -> ir.Value:
        if isinstance(given, ir.Value):
            return given
        return add_initializer(self._graph, ir.tensor(given), fresh_name("doctor_number", self._taken))


def _other_activation(model: ir.Model, output: str) -> list[GraphChange]:
    """GELU for QuickGELU, x · sigmoid(1.702 x), or the other way.

    GELU is x · (1 + erf(x/√2))/2, and sigmoid(1.702 x) is (1 + tanh(0.851 x))/2: so the two change places where a
    graph has one function of a scaled x.
    """
    was, write = "", _Writer(model)
    for node in list(model.graph):
        write.before, x = node, node.inputs[0] if node.inputs else None
        if x is None:
            continue
        if node.op_type == "Sigmoid" and _is_scaled(x, _QUICK):
            was = "QuickGELU"
            error = write("Erf", write("Mul", x, np.float32(1 / (_QUICK * math.sqrt(2)))))
            new = write("Mul", write("Add", error, np.float32(1)), np.float32(0.5))
        elif node.op_type == "Erf":
            was = "GELU"
            new = write("Tanh", write("Mul", x, np.float32(_QUICK / math.sqrt(2))))
        elif node.op_type == "Gelu":
            was = "GELU"
            new = write("Mul", x, write("Sigmoid", write("Mul", x, np.float32(_QUICK))))
        else:
            continue
        replace_uses(node.outputs[0], new)
    if not was:
        return []
    other = "GELU" if was == "QuickGELU" else "QuickGELU"
    return [GraphChange(f"{other} instead of {was}", "", f"run the model with {was} (hidden_act)", output)]


def _is_scaled(value: ir.Value, factor: float) -> bool:
    """Whether a value is another one times the factor."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return False
    numbers = map(constant_argument, node.inputs)
    return any(number is not None and number.size == 1 and abs(number.item() - factor) < 1e-3 for number in numbers)


def _other_poolings(model: ir.Model, output: str) -> list[GraphChange]:
    """Outputs with other poolings and without the projection are added; none where the graph's end has another form."""
    infos = infer(model, strict=False)
    chain: list[ir.Node] = []
    states = next((value for value in model.graph.outputs if value.name == output), None)
    while states is not None and not _is_tokens(infos.get(states)):
        node = states.producer()
        if node is None or not node.inputs:
            return []
        chain.insert(0, node)
        states = node.inputs[0]
    # The states of tokens become one state: up to there the chain pools, behind it it normalises and projects.
    pools = next((i for i, node in enumerate(chain) if _rank(infos.get(node.outputs[0])) == 2), None)
    if states is None or pools is None:
        return []
    chain = chain[pools + 1 :]
    last = next((i for i in reversed(range(len(chain))) if chain[i].op_type in ("MatMul", "Gemm")), None)
    write, changes = _Writer(model), list[GraphChange]()

    def show(value: ir.Value | None, word: str, detail: str, fix: str) -> None:
        if value is not None:
            model.graph.outputs.append(value)
            changes.append(GraphChange(word, detail, fix, str(value.name)))

    def continued(value: ir.Value, nodes: Sequence[ir.Node]) -> ir.Value:
        for node in nodes:
            value = write.copy(node, value)
        return value

    if last is not None and (hidden := chain[last].inputs[0]) is not None:
        show(write("Identity", hidden), _NO_PROJECTION, "", _FIX_PROJECTION)
    normed = [write.copy(chain[0], states)] if chain and chain[0].op_type == "LayerNormalization" else []
    for pool in _POOLS:
        ways = [(states, chain), *((value, chain[1:]) for value in (*normed, *([states] if normed else [])))]
        for tokens, rest in ways:
            one = _pooled(write, tokens, pool)
            show(continued(one, rest), _OTHER_POOLING, pool, _FIX_POOLING)
            if last is not None:
                state = continued(one, rest[: len(rest) - len(chain) + last])
                show(write("Identity", state), _OTHER_POOLING, f"{pool}, and the projection missing", _FIX_PROJECTION)
    return changes


def _pooled(write: _Writer, states: ir.Value, pool: str) -> ir.Value:
    """States (B, T, W) to (B, W)."""
    if pool in (_FIRST, _LAST):
        return write("Gather", states, np.array(0 if pool == _FIRST else -1), axis=1)
    if pool == _MEAN_OF_OTHERS:
        states = write("Slice", states, np.array([1]), np.array([np.iinfo(np.int64).max]), np.array([1]))
    # ReduceMean has its axes as an attribute or as an input, by the opset.
    return write("Flatten", write("GlobalAveragePool", write("Transpose", states, perm=[0, 2, 1])), axis=1)


def _is_tokens(info: Info | None) -> bool:
    """Whether a value is (B, T, W) with more than one token."""
    return _rank(info) == 3 and info is not None and info.shape is not None and info.shape[1] != 1


def _rank(info: Info | None) -> int | None:
    return None if info is None or info.shape is None else len(info.shape)
