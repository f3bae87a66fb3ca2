"""Elementwise nodes rewritten to work before a permutation of axes instead of after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.graph.core.names import fresh_name, taken_names
from vlm_export.graph.core.replace_uses import add_constant_node, add_initializer, bypass, remove_node
from vlm_export.graph.core.tensors import constant_tensor, transposed_tensor
from vlm_export.graph.passes.layout_roles import Perm, Roles, axis_inputs, has_one_element, inverse_of


@dataclass(frozen=True)
class Scope:
    """A graph, the main graph or function body that it lies in, and the names that subgraphs return as they are."""

    root: ir.Graph
    graph: ir.Graph
    opset: int
    returned: set[str]
    in_function: bool


def make_identity(node: ir.Node, source: ir.Value) -> None:
    """Turns a node into an Identity of `source`: an output of the graph whose name must stay."""
    node.op_type = "Identity"
    node.attributes.clear()
    node.replace_input_with(0, source)


class Rewrite:
    """One change of layout in one graph. A value v and its other form w: v = transpose(w, perm)."""

    def __init__(self, scope: Scope, roles: Roles) -> None:
        self._graph, self._returned, self._in_function = scope.graph, scope.returned, scope.in_function
        self._roles, self._inverse = roles, inverse_of(roles.perm)
        self._taken = taken_names(scope.root, scope.graph)
        sources = ((value, node.inputs[0]) for value, node in roles.forward.items())
        self._forms: dict[ir.Value, ir.Value] = {value: source for value, source in sources if source is not None}

    def move(self, nodes: Sequence[ir.Node]) -> None:
        """Rewrites the nodes, which are in the order of the graph, and settles who reads which form."""
        for node in nodes:
            self._forms[node.outputs[0]] = self._rewrite(node)
        made = {node.outputs[0]: self._forms[node.outputs[0]] for node in nodes}
        for node in self._roles.back:
            source = node.inputs[0]
            if source is not None and source in made:
                self._settle_back(node, made[source])
        for node in reversed(nodes):
            self._settle_old(node, made[node.outputs[0]], set(nodes))
        for node in reversed(nodes):
            remove_node(node)
        for value, node in self._roles.forward.items():
            if not value.uses() and not value.is_graph_output() and value.name not in self._returned:
                remove_node(node)

    def _rewrite(self, node: ir.Node) -> ir.Value:
        moving = axis_inputs(node)
        inputs = [self._form(value, node) if index in moving else value for index, value in enumerate(node.inputs)]
        output = node.outputs[0]
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=1,
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        self._describe(new.outputs[0], output, self._inverse)
        self._graph.insert_before(node, new)
        return new.outputs[0]

    def _describe(self, new: ir.Value, old: ir.Value, perm: Perm) -> None:
        """Name, dtype and shape of a value whose axes are those of another, permuted."""
        new.name = fresh_name(f"{old.name}.transposed", self._taken)
        new.type = old.type
        if old.shape is not None and len(old.shape) == len(perm):
            new.shape = ir.Shape([old.shape[axis] for axis in perm])

    def _form(self, value: ir.Value | None, reader: ir.Node) -> ir.Value | None:
        if value is None or has_one_element(value):
            return value
        if value not in self._forms:
            tensor = constant_tensor(value)
            self._forms[value] = (
                self._permuted_constant(value, tensor, reader) if tensor is not None else self._turned(value, reader)
            )
        return self._forms[value]

    def _permuted_constant(self, value: ir.Value, tensor: ir.TensorProtocol, reader: ir.Node) -> ir.Value:
        if tensor.size == 1:
            return value
        name = fresh_name(f"{value.name}.transposed", self._taken)
        permuted = transposed_tensor(tensor, self._inverse, name)
        if self._in_function:
            return add_constant_node(reader, permuted, name)
        return add_initializer(self._graph, permuted, name)

    def _turned(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """The other form of a value that stays as it is: from a Transpose that is there already, or a new one."""
        for node in self._roles.back:
            if node.inputs[0] is value:
                self._move_up(node, value)
                return node.outputs[0]
        return self._transpose(value, self._inverse, before=reader)

    def _move_up(self, node: ir.Node, value: ir.Value) -> None:
        """Puts a node that reads only `value` right behind what makes it, before any reader to come."""
        producer = value.producer()
        self._graph.remove(node)
        if producer is not None and producer.graph is self._graph:
            self._graph.insert_after(producer, node)
        else:
            self._graph.insert_before(next(iter(self._graph)), node)

    def _transpose(self, value: ir.Value, perm: Perm, before: ir.Node) -> ir.Value:
        node = ir.node("Transpose", [value], {"perm": perm})
        self._describe(node.outputs[0], value, perm)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _settle_back(self, node: ir.Node, form: ir.Value) -> None:
        """What a Transpose by the inverse gave is there without it."""
        output = node.outputs[0]
        if output.name not in self._returned and bypass(output, form):
            remove_node(node)
        else:
            make_identity(node, form)

    def _settle_old(self, node: ir.Node, form: ir.Value, moved: set[ir.Node]) -> None:
        """Gives the readers that need the old form a Transpose that makes it, under the old name."""
        old = node.outputs[0]
        readers = [(user, index) for user, index in old.uses() if user not in moved or index not in axis_inputs(user)]
        if not readers and not old.is_graph_output() and old.name not in self._returned:
            return
        kept = self._transpose(form, self._roles.perm, before=node)
        name, shape = old.name, old.shape
        for user, index in readers:
            user.replace_input_with(index, kept)
        if old.is_graph_output():
            outputs = self._graph.outputs
            for index, output in enumerate(outputs):
                if output is old:
                    outputs[index] = kept
        old.name = None
        kept.name, kept.shape = name, shape
