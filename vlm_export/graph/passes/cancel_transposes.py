"""Transposes that undo each other, also across elementwise operators: the fewest that give the same values.

For one permutation p, every value v of the graph can be had in two layouts: as it is, or as w with v = transpose(w, p).
`Transpose(perm=p)` reads the second and gives the first, its inverse the other way round, and an elementwise operator
works in either layout, if all its inputs and outputs are in the same one. A Transpose is needed for each value that is
made in one layout and read in the other, so the fewest Transposes are a minimum cut between what is bound to the one
layout and what is bound to the other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.graph.core.names import fresh_name, names_used, nested_graphs, root_graphs, taken_names
from vlm_export.graph.core.replace_uses import add_constant, bypass, place_behind, remove_node
from vlm_export.graph.core.skeleton import allow_plain_initializers
from vlm_export.graph.core.tensors import attribute_ints, constant_tensor, rank_of, transposed_tensor
from vlm_export.graph.passes.dead_code import remove_unused_initializers

# One tensor in, one out; further inputs (bounds of Clip, the model of CastLike's dtype) have no axes of their own.
_UNARY = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu",
        "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
        "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
        "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
# All inputs are broadcast against one another, from the last axis on.
_BROADCASTING = frozenset(
    {
        "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
        "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
_Perm: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class _Scope:
    """A graph, the main graph or function body that it lies in, and the names that subgraphs return as they are."""

    root: ir.Graph
    graph: ir.Graph
    returned: set[str]
    in_function: bool

    def is_needed(self, value: ir.Value) -> bool:
        """Whether the value has to stay under its name."""
        return value.is_graph_output() or value.name in self.returned


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
        for graph in list(nested_graphs(root)):
            scope = _Scope(root, graph, returned, in_function=root is not model.graph)
            before = _count(graph)
            moved = True
            while moved:
                moved = _merge(scope)
                perms = {perm for _, perm in _transposes(graph) if not _is_identity(perm)}
                moved = moved or any(_move(scope, perm) for perm in sorted(perms))
            count += before - _count(graph)
    if count:
        remove_unused_initializers(model)
        allow_plain_initializers(model)
    return count


def _count(graph: ir.Graph) -> int:
    return sum(node.op_type == "Transpose" and node.domain == "" for node in graph)


def _transposes(graph: ir.Graph) -> Iterable[tuple[ir.Node, _Perm]]:
    for node in list(graph):
        perm = _perm_of(node)
        if perm is not None and node.graph is graph:
            yield node, perm


def _perm_of(node: ir.Node | None) -> _Perm | None:
    """The permutation of a Transpose, or None for other nodes and where it is not known."""
    if node is None or node.domain != "" or node.op_type != "Transpose" or not node.inputs or node.inputs[0] is None:
        return None
    if "perm" in node.attributes:
        perm = attribute_ints(node, "perm")
        return None if perm is None else tuple(perm)
    rank = rank_of(node.inputs[0])
    return None if rank is None else tuple(reversed(range(rank)))


def _is_identity(perm: _Perm) -> bool:
    return perm == tuple(range(len(perm)))


def _inverse_of(perm: _Perm) -> _Perm:
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def _merge(scope: _Scope) -> bool:
    """Two Transposes in a row become one or none, equal ones of one tensor one; returns whether any did."""
    merged = False
    seen: dict[tuple[ir.Value, _Perm], ir.Value] = {}
    for node, perm in _transposes(scope.graph):
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        before = source.producer()
        inner = _perm_of(before) if before is not None and before.graph is scope.graph else None
        if before is not None and inner is not None and len(inner) == len(perm) and before.inputs[0] is not None:
            perm, source = tuple(inner[axis] for axis in perm), before.inputs[0]
            node.replace_input_with(0, source)
            node.attributes["perm"] = ir.AttrInt64s("perm", perm)
            made = before.outputs[0]
            if not made.uses() and not scope.is_needed(made):
                remove_node(before)
                seen = {key: value for key, value in seen.items() if value is not made}
                merged = True
        same = source if _is_identity(perm) else seen.setdefault((source, perm), output)
        if same is not output:
            _take_away(scope, node, same)
            merged = True
    return merged


def _take_away(scope: _Scope, node: ir.Node, source: ir.Value) -> None:
    """Removes a node that only gives `source`; where its output's name must stay, it becomes an Identity."""
    if node.outputs[0].name not in scope.returned and bypass(node.outputs[0], source):
        remove_node(node)
        return
    node.op_type = "Identity"
    node.attributes.clear()
    node.replace_input_with(0, source)


def _move(scope: _Scope, perm: _Perm) -> bool:
    """Moves elementwise nodes to the layout before `perm` where that takes fewer Transposes; returns whether it did."""
    for roles in _possible_roles(scope, perm):
        readings = list(_readings(roles, scope))
        cost, moved = _network(readings).cut()
        nodes = [node for node in roles.free if node in moved]
        if nodes and cost < sum(map(_crosses, readings)):
            _Rewrite(scope, roles).move(nodes)
            return True
    return False


def _axis_inputs(node: ir.Node) -> list[int]:
    """Which inputs of an elementwise node have the axes of its output."""
    inputs = node.inputs[:1] if node.op_type in _UNARY else node.inputs
    return [index for index, value in enumerate(inputs) if value is not None]


def _has_no_layout(value: ir.Value | None) -> bool:
    """Constants, which are permuted when they are written, and tensors of one element."""
    return constant_tensor(value) is not None or _has_one_element(value)


def _has_one_element(value: ir.Value | None) -> bool:
    """Known to have no axis longer than 1."""
    return value is None or (value.shape is not None and all(size == 1 for size in value.shape))


@dataclass(frozen=True)
class _Roles:
    """The nodes of one graph that concern one permutation.

    Attributes:
        free: elementwise nodes that can work in either layout, in the order of the graph.
        forward: outputs of `Transpose(perm)`, with their node.
        back: Transposes by the inverse.
    """

    perm: _Perm
    free: dict[ir.Node, None] = field(default_factory=dict)
    forward: dict[ir.Value, ir.Node] = field(default_factory=dict)
    back: dict[ir.Node, None] = field(default_factory=dict)


def _possible_roles(scope: _Scope, perm: _Perm) -> Iterator[_Roles]:
    """Yields one division of roles; two for a permutation that is its own inverse, whose Transposes may be either
    end."""
    roles, inverse = _Roles(perm, free=_free_nodes(scope, len(perm))), _inverse_of(perm)
    ends = {node: found for node in scope.graph if (found := _perm_of(node)) in (perm, inverse)}
    if inverse != perm:
        forward = {node.outputs[0]: node for node, found in ends.items() if found == perm}
        yield replace(roles, forward=forward, back={node: None for node, found in ends.items() if found == inverse})
        return
    regions = _regions(roles.free)
    colours = _colours(ends, regions)
    for colour in (True, False):
        yield _coloured(roles, ends, {node for node, region in regions.items() if colours[region] is colour})


def _free_nodes(scope: _Scope, rank: int) -> dict[ir.Node, None]:
    # Before opset 7 broadcasting had other rules.
    elementwise = _UNARY | _BROADCASTING if scope.root.opset_imports.get("", 0) >= 7 else _UNARY
    free: dict[ir.Node, None] = {}
    ranks: dict[ir.Value, int] = {}
    for node in scope.graph:
        perm = _perm_of(node)
        if perm is not None:
            ranks[node.outputs[0]] = len(perm)
        if node.domain != "" or len(node.outputs) != 1 or node.op_type not in elementwise:
            continue
        inputs = [value for index in _axis_inputs(node) if (value := node.inputs[index]) is not None]
        known = [ranks.get(value, _rank(value)) for value in inputs]
        if not known or None in known:
            continue
        widest = ranks[node.outputs[0]] = max(entry for entry in known if entry is not None)
        # A tensor with fewer axes would need a Reshape before its axes can be permuted.
        fits = (entry == rank or _has_no_layout(value) for entry, value in zip(known, inputs, strict=True))
        if widest == rank and all(fits) and not all(map(_has_no_layout, inputs)):
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
            if node in free and node not in regions:
                regions[node] = number
                stack += [*node.predecessors(), *node.successors()]
    return regions


def _colours(ends: Iterable[ir.Node], regions: dict[ir.Node, int]) -> dict[int, bool]:
    """Gives regions on the two sides of a Transpose different colours, as far as that goes."""
    neighbours: dict[int, set[int]] = {region: set() for region in regions.values()}
    for node in ends:
        before = {regions[maker] for maker in node.predecessors() if maker in regions}
        after = {regions[user] for user in node.successors() if user in regions}
        for region, others in [(region, after) for region in before] + [(region, before) for region in after]:
            neighbours[region] |= others
    colours: dict[int, bool] = {}
    for start in neighbours:
        stack = [(start, True)]
        while stack:
            region, colour = stack.pop()
            if region not in colours:
                colours[region] = colour
                stack += [(other, not colour) for other in neighbours[region]]
    return colours


def _coloured(roles: _Roles, ends: Iterable[ir.Node], free: set[ir.Node]) -> _Roles:
    """The nodes in `free` may move; a Transpose leads into them or out of them, and concerns no one if it does both."""
    forward: dict[ir.Value, ir.Node] = {}
    back: dict[ir.Node, None] = {}
    for node in ends:
        leaves, enters = (any(end in free for end in side) for side in (node.predecessors(), node.successors()))
        if enters and not leaves:
            forward[node.outputs[0]] = node
        elif leaves and not enters:
            back[node] = None
    return replace(roles, free={node: None for node in roles.free if node in free}, forward=forward, back=back)


# Who makes a value, and who reads it: free nodes, or the layout that others are bound to.
_Reading: TypeAlias = "tuple[Hashable, set[Hashable]]"
_SOURCE, _SINK = "source", "sink"
_UNBOUNDED = 1 << 30


def _readings(roles: _Roles, scope: _Scope) -> Iterable[_Reading]:
    nodes = (*roles.free, *roles.back)
    values = (value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None)
    for value in dict.fromkeys((*roles.forward, *values)):
        if _has_no_layout(value):
            continue
        readers: set[Hashable] = {_reader(user, index, roles) for user, index in value.uses()}
        if scope.is_needed(value):
            readers.add(_SINK)
        producer = value.producer()
        made: Hashable = producer if producer is not None and producer in roles.free else _SINK
        yield _SOURCE if value in roles.forward else made, readers


def _reader(user: ir.Node, index: int, roles: _Roles) -> Hashable:
    if user in roles.back:
        return _SOURCE
    return user if user in roles.free and index in _axis_inputs(user) else _SINK


def _crosses(reading: _Reading) -> bool:
    """Whether the value needs a Transpose as long as no node moves."""
    made, readers = reading
    return bool(readers - {_SOURCE}) if made == _SOURCE else _SOURCE in readers


def _network(readings: Iterable[_Reading]) -> _Network:
    """The source's side works in the layout before the permutation; each value costs one if both layouts meet in it."""
    network = _Network()
    for number, (made, readers) in enumerate(readings):
        others = readers - {made}
        if others:
            network.add(made, ("leaves", number), 1)
            network.add(("enters", number), made, 1)
        for reader in others:
            network.add(("leaves", number), reader, _UNBOUNDED)
            network.add(reader, ("enters", number), _UNBOUNDED)
    return network


class _Network:
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
            if _SINK not in before:
                return total, set(before)
            path: list[tuple[Hashable, Hashable]] = [(before[_SINK], _SINK)]
            while path[-1][0] != _SOURCE:
                path.append((before[path[-1][0]], path[-1][0]))
            flow = min(self._capacity[start][end] for start, end in path)
            for start, end in path:
                self._capacity[start][end] -= flow
                self._capacity[end][start] += flow
            total += flow

    def _reach(self) -> dict[Hashable, Hashable]:
        """Points that spare capacity reaches, breadth first, each with the one before it."""
        before: dict[Hashable, Hashable] = {_SOURCE: _SOURCE}
        queue: deque[Hashable] = deque([_SOURCE])
        while queue and _SINK not in before:
            point = queue.popleft()
            for following, capacity in self._capacity[point].items():
                if capacity and following not in before:
                    before[following] = point
                    queue.append(following)
        return before


class _Rewrite:
    """One change of layout in one graph. A value v and its other form w: v = transpose(w, perm)."""

    def __init__(self, scope: _Scope, roles: _Roles) -> None:
        self._scope, self._graph = scope, scope.graph
        self._roles, self._inverse = roles, _inverse_of(roles.perm)
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
                # What a Transpose by the inverse gave is there without it.
                _take_away(self._scope, node, made[source])
        for node in reversed(nodes):
            self._settle_old(node, made[node.outputs[0]], set(nodes))
        for node in reversed(nodes):
            remove_node(node)
        for value, node in self._roles.forward.items():
            if not value.uses() and not self._scope.is_needed(value):
                remove_node(node)

    def _rewrite(self, node: ir.Node) -> ir.Value:
        moving = _axis_inputs(node)
        inputs = [self._form(value, node) if index in moving else value for index, value in enumerate(node.inputs)]
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
        self._describe(new.outputs[0], node.outputs[0], self._inverse)
        self._graph.insert_before(node, new)
        return new.outputs[0]

    def _describe(self, new: ir.Value, old: ir.Value, perm: _Perm) -> None:
        """Name, dtype and shape of a value whose axes are those of another, permuted."""
        new.name, new.type = fresh_name(f"{old.name}.transposed", self._taken), old.type
        if old.shape is not None and len(old.shape) == len(perm):
            new.shape = ir.Shape([old.shape[axis] for axis in perm])

    def _form(self, value: ir.Value | None, reader: ir.Node) -> ir.Value | None:
        if value is None or _has_one_element(value):
            return value
        if value not in self._forms:
            tensor = constant_tensor(value)
            if tensor is None:
                self._forms[value] = self._turned(value, reader)
            elif tensor.size == 1:
                self._forms[value] = value
            else:
                name = fresh_name(f"{value.name}.transposed", self._taken)
                permuted = transposed_tensor(tensor, self._inverse, name)
                before = reader if self._scope.in_function else None
                self._forms[value] = add_constant(self._graph, permuted, name, before=before)
        return self._forms[value]

    def _turned(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """The other form of a value that stays as it is: from a Transpose that is there already, or a new one."""
        for node in self._roles.back:
            if node.inputs[0] is value:
                # It reads only `value`, and comes before any reader to come.
                self._graph.remove(node)
                place_behind(value.producer(), self._graph, node)
                return node.outputs[0]
        return self._transpose(value, self._inverse, before=reader)

    def _transpose(self, value: ir.Value, perm: _Perm, before: ir.Node) -> ir.Value:
        node = ir.node("Transpose", [value], {"perm": perm})
        self._describe(node.outputs[0], value, perm)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _settle_old(self, node: ir.Node, form: ir.Value, moved: set[ir.Node]) -> None:
        """Gives the readers that need the old form a Transpose that makes it, under the old name."""
        old = node.outputs[0]
        readers = [(user, index) for user, index in old.uses() if user not in moved or index not in _axis_inputs(user)]
        if not readers and not self._scope.is_needed(old):
            return
        kept = self._transpose(form, self._roles.perm, before=node)
        for user, index in readers:
            user.replace_input_with(index, kept)
        if old.is_graph_output():
            self._graph.outputs[:] = [kept if output is old else output for output in self._graph.outputs]
        kept.name, kept.shape, old.name = old.name, old.shape, None
