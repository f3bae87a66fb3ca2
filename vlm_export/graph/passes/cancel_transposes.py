"""Transposes that undo each other, also across elementwise operators: the fewest that give the same values.

For one permutation p, every value v of the graph can be had in two layouts: as it is, or as w with v = transpose(w, p).
`Transpose(perm=p)` reads the second and gives the first, its inverse the other way round, and an elementwise operator
works in either layout, if all its inputs and outputs are in the same one. A Transpose is needed for each value that is
made in one layout and read in the other, so the fewest Transposes are a minimum cut between what is bound to the one
layout and what is bound to the other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.graph.core.names import names_used, nested_graphs, root_graphs
from vlm_export.graph.core.replace_uses import bypass, remove_node
from vlm_export.graph.core.skeleton import allow_plain_initializers
from vlm_export.graph.passes.dead_code import remove_unused_initializers
from vlm_export.graph.passes.layout_roles import (
    Perm,
    Roles,
    axis_inputs,
    has_no_layout,
    is_identity,
    perm_of,
    possible_roles,
)
from vlm_export.graph.passes.transposed_layout import Rewrite, Scope, make_identity


def cancel_transposes(model: ir.Model) -> int:
    """Removes, in place, Transposes that others undo; returns how many fewer the model has.

    Elementwise operators between them are moved to the other layout: their constants are permuted when the file is
    written. A value that is also needed in its old layout, by other readers or as an output of the graph, gets a
    Transpose of its own where that still leaves fewer. Results are the same to the last bit, but for engines whose
    kernels round by an element's place in memory.
    """
    count = 0
    returned = names_used(model)
    for root in root_graphs(model):
        opset = root.opset_imports.get("", 0)
        for graph in list(nested_graphs(root)):
            scope = Scope(root, graph, opset, returned, in_function=root is not model.graph)
            before = _count(graph)
            moved = True
            while moved:
                moved = _merge(graph, returned)
                perms = {perm for _, perm in _transposes(graph) if not is_identity(perm)}
                moved = moved or any(_move(scope, perm) for perm in sorted(perms))
            count += before - _count(graph)
    if count:
        remove_unused_initializers(model)
        allow_plain_initializers(model)
    return count


def _transposes(graph: ir.Graph) -> Iterable[tuple[ir.Node, Perm]]:
    for node in list(graph):
        perm = perm_of(node)
        if perm is not None and node.graph is graph:
            yield node, perm


def _count(graph: ir.Graph) -> int:
    return sum(node.op_type == "Transpose" and node.domain == "" for node in graph)


def _merge(graph: ir.Graph, returned: set[str]) -> bool:
    """Two Transposes in a row become one or none, equal ones of one tensor one; returns whether any did."""
    merged = False
    seen: dict[tuple[ir.Value, Perm], ir.Value] = {}
    for node, perm in _transposes(graph):
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        before = source.producer()
        inner = perm_of(before) if before is not None and before.graph is graph else None
        if before is not None and inner is not None and len(inner) == len(perm) and before.inputs[0] is not None:
            perm, source = tuple(inner[axis] for axis in perm), before.inputs[0]
            node.replace_input_with(0, source)
            node.attributes["perm"] = ir.AttrInt64s("perm", perm)
            if _drop(before, returned):
                seen = {key: value for key, value in seen.items() if value is not before.outputs[0]}
                merged = True
        same = source if is_identity(perm) else seen.setdefault((source, perm), output)
        if same is output:
            continue
        if output.name not in returned and bypass(output, same):
            remove_node(node)
        else:
            make_identity(node, same)
        merged = True
    return merged


def _drop(node: ir.Node, returned: set[str]) -> bool:
    output = node.outputs[0]
    if output.uses() or output.is_graph_output() or output.name in returned:
        return False
    remove_node(node)
    return True


def _move(scope: Scope, perm: Perm) -> bool:
    """Moves elementwise nodes to the layout before `perm` where that takes fewer Transposes; returns whether it did."""
    for roles in possible_roles(scope.graph, perm, scope.opset):
        readings = list(_readings(roles, scope.returned))
        cost, moved = _network(readings).cut()
        nodes = [node for node in roles.free if node in moved]
        if nodes and cost < sum(map(_crosses, readings)):
            Rewrite(scope, roles).move(nodes)
            return True
    return False


# Who makes a value, and who reads it: free nodes, or the layout that others are bound to.
_Reading: TypeAlias = "tuple[Hashable, set[Hashable]]"


def _readings(roles: Roles, returned: set[str]) -> Iterable[_Reading]:
    values = dict.fromkeys(
        value for node in (*roles.free, *roles.back) for value in (*node.inputs, *node.outputs) if value is not None
    )
    for value in dict.fromkeys((*roles.forward, *values)):
        if has_no_layout(value):
            continue
        readers: set[Hashable] = {_reader(user, index, roles) for user, index in value.uses()}
        if value.is_graph_output() or value.name in returned:
            readers.add(SINK)
        producer = value.producer()
        made: Hashable = producer if producer is not None and producer in roles.free else SINK
        yield SOURCE if value in roles.forward else made, readers


def _reader(user: ir.Node, index: int, roles: Roles) -> Hashable:
    if user in roles.back:
        return SOURCE
    return user if user in roles.free and index in axis_inputs(user) else SINK


def _crosses(reading: _Reading) -> bool:
    """Whether the value needs a Transpose as long as no node moves."""
    made, readers = reading
    return bool(readers - {SOURCE}) if made == SOURCE else SOURCE in readers


def _network(readings: Iterable[_Reading]) -> Network:
    """The source's side works in the layout before the permutation; each value costs one if both layouts meet in it."""
    network = Network()
    for number, (made, readers) in enumerate(readings):
        others = readers - {made}
        if not others:
            continue
        network.add(made, ("leaves", number), 1)
        network.add(("enters", number), made, 1)
        for reader in others:
            network.add(("leaves", number), reader, UNBOUNDED)
            network.add(reader, ("enters", number), UNBOUNDED)
    return network


SOURCE, SINK = "source", "sink"
UNBOUNDED = 1 << 30


class Network:
    """Directed edges with whole capacities between any hashable points."""

    def __init__(self) -> None:
        self._capacity: defaultdict[Hashable, dict[Hashable, int]] = defaultdict(dict)

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Adds to the capacity from `start` to `end`."""
        self._capacity[start][end] = self._capacity[start].get(end, 0) + capacity
        self._capacity[end].setdefault(start, 0)

    def cut(self) -> tuple[int, set[Hashable]]:
        """Returns the least total capacity that separates source and sink, and the points on the source's side.

        Of several cheapest divisions, the one with the fewest points on that side. Uses the network up.
        """
        total = 0
        while True:
            before = self._reach()
            if SINK not in before:
                return total, set(before)
            total += self._augment(before)

    def _reach(self) -> dict[Hashable, Hashable]:
        """Points that spare capacity reaches, breadth first, each with the one before it."""
        before: dict[Hashable, Hashable] = {SOURCE: SOURCE}
        queue: deque[Hashable] = deque([SOURCE])
        while queue and SINK not in before:
            point = queue.popleft()
            for following, capacity in self._capacity[point].items():
                if capacity and following not in before:
                    before[following] = point
                    queue.append(following)
        return before

    def _augment(self, before: dict[Hashable, Hashable]) -> int:
        path: list[tuple[Hashable, Hashable]] = [(before[SINK], SINK)]
        while path[-1][0] != SOURCE:
            path.append((before[path[-1][0]], path[-1][0]))
        flow = min(self._capacity[start][end] for start, end in path)
        for start, end in path:
            self._capacity[start][end] -= flow
            self._capacity[end][start] += flow
        return flow
