"""Which node of one graph is which of another: told by weights and by how nodes are connected, never by nodes' names.

Two graphs are walked backwards from the outputs that they share: where two nodes compute the same operator, what they
read is compared next. Where they differ, the walk looks for the pair a few steps up (a cast that one side lacks), and
begins anew at weights that both sides have (`blocks.7.mlp.fc1.weight`, or equal values).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.lab.canonical import COMMUTATIVE, GraphTexts, contents, is_constant_node, kinds, operator_of, read_by
from vlm_export.lab.module_paths import constant_of, mapped_for_a_while, parameter_name

_CASTS = frozenset(("", name) for name in ("Cast", "CastLike", "Identity"))
# How far up a walk looks for what corresponds, where one side has nodes that the other lacks.
_LONGEST_DETOUR = 6
# Weights up to this size tell little: many have equal values.
_SPEAKING_BYTES = 64


@dataclass(frozen=True)
class AttributeChange:
    """A node that both graphs have, with another attribute."""

    left: ir.Node
    right: ir.Node
    name: str
    before: str
    after: str


Read: TypeAlias = tuple[ir.Node, ir.Value, ir.Value]


@dataclass(frozen=True)
class Alignment:
    """What corresponds.

    Attributes:
        nodes: node of the left graph → node of the right.
        values: tensor of the left graph → tensor of the right: inputs, weights, and what paired nodes compute.
        left_only, right_only: nodes without a partner, in the order of their graph; constants are none.
        changed: attributes that differ between partners.
        reads: node of the left graph, and two tensors that it and its partner read in one place, behind casts.
        strays: those of them that are no partners, and no constants.
        ends: outputs of the two graphs that stand for each other, and are no partners.
    """

    nodes: dict[ir.Node, ir.Node]
    values: dict[ir.Value, ir.Value]
    left_only: tuple[ir.Node, ...]
    right_only: tuple[ir.Node, ...]
    changed: tuple[AttributeChange, ...]
    reads: tuple[Read, ...]
    strays: tuple[Read, ...]
    ends: tuple[tuple[ir.Value, ir.Value], ...]

    def constants(self) -> Iterator[tuple[ir.Value, ir.Value, list[ir.Node]]]:
        """Constants of the left graph with those in their place in the right, and the left nodes that read them so."""
        found: dict[tuple[ir.Value, ir.Value], dict[ir.Node, None]] = {}
        for node, left, right in self.reads:
            if constant_of(left) is not None and constant_of(right) is not None:
                found.setdefault((left, right), {})[node] = None
        yield from ((left, right, list(readers)) for (left, right), readers in found.items())

    def within(self, left: Collection[ir.Node], right: Collection[ir.Node]) -> Alignment:
        """What concerns these nodes of the two graphs."""
        return replace(
            self,
            nodes={node: other for node, other in self.nodes.items() if node in left},
            left_only=tuple(node for node in self.left_only if node in left),
            right_only=tuple(node for node in self.right_only if node in right),
            changed=tuple(change for change in self.changed if change.left in left),
            reads=tuple(read for read in self.reads if read[0] in left),
            strays=tuple(read for read in self.strays if read[0] in left),
            ends=tuple(pair for pair in self.ends if pair[0].producer() in left),
        )

    def differing(self) -> Iterator[ir.Node]:
        """Nodes of the left graph that have no partner, or one with other attributes, or read something else."""
        yield from self.left_only
        yield from (change.left for change in self.changed)
        yield from (node for node, _, _ in self.strays)


def align(left: ir.Model, right: ir.Model) -> Alignment:
    """Aligns two models whose functions are inlined."""
    walk = _Walk(_Side(left), _Side(right))
    for first, second in _matched_ends(left.graph.inputs, right.graph.inputs):
        walk.pair_values(first, second)
    for first, second in _matched_ends(left.graph.outputs, right.graph.outputs):
        walk.reach(first, second)
    walk.run()
    walk.restart_at_weights()
    return walk.result()


@dataclass
class _Side:
    """One graph, with what is looked up in it."""

    model: ir.Model
    position: dict[ir.Node, int] = field(init=False)
    texts: GraphTexts = field(init=False)

    def __post_init__(self) -> None:
        """Nodes that no output needs are none of the graph."""
        needed, waiting = set[ir.Node](), [value.producer() for value in self.model.graph.outputs]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in needed:
                needed.add(node)
                waiting += [value.producer() for value in read_by(node) if value is not None]
        nodes = [node for node in self.model.graph if node in needed and not is_constant_node(node)]
        self.position = {node: index for index, node in enumerate(nodes)}
        self.texts = GraphTexts(self.model, kinds)


class _Walk:
    def __init__(self, left: _Side, right: _Side) -> None:
        self._left, self._right = left, right
        self._nodes: dict[ir.Node, ir.Node] = {}
        self._partners: set[ir.Node] = set()
        self._values: dict[ir.Value, ir.Value] = {}
        self._taken: set[ir.Value] = set()
        self._queue: deque[tuple[ir.Value, ir.Value]] = deque()
        # Names where the two share most of them, and otherwise values, which tell the weights of a renamed model.
        # A weight that many nodes read tells no place.
        self._keys = [_read_once(_weight_keys(side.model, _by_parameter)) for side in (left, right)]
        if 2 * len(set(self._keys[0].values()) & set(self._keys[1].values())) <= min(map(len, self._keys)):
            self._keys = [_read_once(_weight_keys(side.model, _by_content)) for side in (left, right)]
        self._shared_keys = set(self._keys[0].values()) & set(self._keys[1].values())

    def reach(self, left: ir.Value, right: ir.Value) -> None:
        """Two tensors that should correspond; they do if what computes them does."""
        self._queue.append((left, right))

    def pair_values(self, left: ir.Value, right: ir.Value) -> None:
        if left not in self._values and right not in self._taken:
            self._values[left] = right
            self._taken.add(right)

    def run(self) -> None:
        """Walks until nothing is left to compare: backwards, and forwards from every pair."""
        while self._queue:
            left, right = self._queue.popleft()
            if left in self._values or right in self._taken:
                continue
            if constant_of(left) is not None or constant_of(right) is not None:
                if constant_of(left) is not None and constant_of(right) is not None:
                    self.pair_values(left, right)
                continue
            first, second = left.producer(), right.producer()
            if first is None or second is None:
                continue
            if self._alike(first, second) and left.index() == right.index():
                self._pair_nodes(first, second)
            elif operator_of(first) != operator_of(second) and (_passes_on(first) or _passes_on(second)):
                self.reach(*(_behind_casts(value, node) for value, node in ((left, first), (right, second))))
            else:
                self._detour(first, second)

    def restart_at_weights(self) -> None:
        """Pairs nodes that read the same weight and were not reached, and walks on from each."""
        for left, right in [*self._same_weights(_by_parameter), *self._same_weights(_by_content)]:
            if left in self._values or right in self._taken:
                continue
            for first, second in zip(self._free_readers(left), self._free_readers(right), strict=False):
                if self._alike(first, second):
                    self._pair_nodes(first, second)
            self.run()

    def _free_readers(self, value: ir.Value) -> list[ir.Node]:
        return [use.node for use in value.uses() if use.node not in self._nodes and use.node not in self._partners]

    def result(self) -> Alignment:
        for first, second in self._nodes.items():
            for left, right in zip(first.outputs, second.outputs, strict=False):
                self.pair_values(left, right)
        nodes = {node: self._nodes[node] for node in self._left.position if node in self._nodes}
        changed = [change for first, second in nodes.items() for change in self._changes(first, second)]
        left_only = tuple(node for node in self._left.position if node not in self._nodes)
        right_only = tuple(node for node in self._right.position if node not in self._partners)
        reads = tuple(read for first, second in nodes.items() for read in self._reads(first, second))
        strays = tuple(read for read in reads if self._is_stray(*read[1:]))
        ends = _matched_ends(self._left.model.graph.outputs, self._right.model.graph.outputs)
        apart = tuple((first, second) for first, second in ends if self._values.get(first) is not second)
        return Alignment(nodes, self._values, left_only, right_only, tuple(changed), reads, strays, apart)

    def _reads(self, left: ir.Node, right: ir.Node) -> Iterator[Read]:
        for first, second in _matched_inputs(left, right, self._agree):
            if first is not None and second is not None:
                yield left, _behind_casts(first, first.producer()), _behind_casts(second, second.producer())

    def _is_stray(self, left: ir.Value, right: ir.Value) -> bool:
        """Whether two tensors do not correspond; what a node makes that only one graph has is told by that node."""
        are_constants = constant_of(left) is not None and constant_of(right) is not None
        is_told = left.producer() in self._alone or right.producer() in self._alone
        return not are_constants and not is_told and not self._agree(left, right)

    def _agree(self, left: ir.Value | None, right: ir.Value | None) -> bool:
        """Whether two tensors are partners, but for casts."""
        if left is None or right is None:
            return left is right
        first, second = (_behind_casts(value, value.producer()) for value in (left, right))
        pairs = ((left, right), (first, second), (left, second), (first, right))
        return any(self._values.get(mine) is theirs for mine, theirs in pairs)

    @cached_property
    def _alone(self) -> set[ir.Node | None]:
        """Nodes without a partner, casts excepted."""
        mine = {node for node in self._left.position if node not in self._nodes}
        theirs = {node for node in self._right.position if node not in self._partners}
        return {node for node in mine | theirs if not _passes_on(node)}

    def _alike(self, left: ir.Node, right: ir.Node) -> bool:
        """Whether the two may be one node: one operator, with as many inputs, and neither has a partner."""
        return (
            operator_of(left) == operator_of(right)
            and len(read_by(left)) == len(read_by(right))
            and len(left.outputs) == len(right.outputs)
            and left in self._left.position
            and right in self._right.position
            and left not in self._nodes
            and right not in self._partners
            and not self._contradict(left, right)
        )

    def _contradict(self, left: ir.Node, right: ir.Node) -> bool:
        """Whether two nodes, or those right above them, read weights that both graphs have, and other ones."""
        mine, theirs = (self._weights_of(node, keys) for node, keys in zip((left, right), self._keys, strict=True))
        if mine and theirs and not mine & theirs:
            return True
        makers = [
            [node for value in read_by(side) if value is not None and (node := value.producer()) is not None]
            for side in (left, right)
        ]
        mine, theirs = (
            {weight for node in nodes for weight in self._weights_of(node, keys)}
            for nodes, keys in zip(makers, self._keys, strict=True)
        )
        return bool(mine and theirs and not mine & theirs)

    def _weights_of(self, node: ir.Node, keys: Mapping[ir.Value, Hashable]) -> set[Hashable]:
        found = {keys[value] for value in node.inputs if value is not None and value in keys}
        return found & self._shared_keys

    def _pair_nodes(self, left: ir.Node, right: ir.Node) -> None:
        self._nodes[left] = right
        self._partners.add(right)
        for first, second in zip(left.outputs, right.outputs, strict=True):
            self.pair_values(first, second)
        for mine, other in _matched_inputs(left, right, self._affinity):
            if mine is not None and other is not None:
                self.reach(mine, other)
        for first, second in zip(left.outputs, right.outputs, strict=True):
            self._go_on(first, second)

    def _go_on(self, left: ir.Value, right: ir.Value) -> None:
        """Looks at the readers of two tensors, which correspond where what else they read does."""
        theirs = _readers(right)
        for key, readers in _readers(left).items():
            others = theirs.get(key, [])
            if len(readers) == len(others) == 1:
                self.reach(readers[0].outputs[0], others[0].outputs[0])
                continue
            for reader in readers:
                ranked = sorted(others, key=lambda other: -self._shared_inputs(reader, other))
                if ranked and self._shared_inputs(reader, ranked[0]) > 0:
                    self.reach(reader.outputs[0], ranked[0].outputs[0])

    def _shared_inputs(self, left: ir.Node, right: ir.Node) -> int:
        """How much speaks for two readers of one tensor being one node: what they read beside it."""
        pairs = zip(read_by(left), read_by(right), strict=False)
        return sum(self._affinity(a, b) for a, b in pairs if a not in self._values)

    def _affinity(self, left: ir.Value | None, right: ir.Value | None) -> int:
        """How much speaks for two tensors being one."""
        if left is None or right is None:
            return 0
        if left in self._values or right in self._taken:
            return 4 if self._values.get(left) is right else 0
        first, second = constant_of(left), constant_of(right)
        if first is not None or second is not None:
            if first is None or second is None or first.shape != second.shape:
                return 0
            return 3 if parameter_name(str(left.name)) == parameter_name(str(right.name)) else 2
        above, other = (_behind_casts(value, value.producer()).producer() for value in (left, right))
        if above is None or other is None or operator_of(above) != operator_of(other):
            return 0
        weights = [{_by_parameter(value) for value in read_by(node) if value is not None} for node in (above, other)]
        return 1 + len((weights[0] & weights[1]) - {None})

    def _detour(self, left: ir.Node, right: ir.Node) -> None:
        """One side has nodes that the other lacks: looks above each for what the other has."""
        for steps in range(1, _LONGEST_DETOUR + 1):
            for near, far, forwards in ((left, right, True), (right, left, False)):
                for node in _above(far, steps):
                    first, second = (near, node) if forwards else (node, near)
                    if self._alike(first, second) and self._speaks_for(first, second):
                        self._pair_nodes(first, second)
                        return

    def _speaks_for(self, left: ir.Node, right: ir.Node) -> bool:
        pairs = list(zip(read_by(left), read_by(right), strict=True))
        constants = [(a, b) for a, b in pairs if constant_of(a) is not None or constant_of(b) is not None]
        if constants:
            return all(self._affinity(a, b) == 3 for a, b in constants)
        return any(self._affinity(a, b) > 0 for a, b in pairs)

    def _same_weights(self, key: Callable[[ir.Value], Hashable]) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Weights without a partner that the key tells to be the same."""
        left = _weight_keys(self._left.model, key, self._values)
        theirs = {name: value for value, name in _weight_keys(self._right.model, key, self._taken).items()}
        for value, name in left.items():
            if name in theirs:
                yield value, theirs[name]

    def _changes(self, left: ir.Node, right: ir.Node) -> Iterator[AttributeChange]:
        before, after = self._left.texts.settings(left), self._right.texts.settings(right)
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                yield AttributeChange(left, right, name, before.get(name, "none"), after.get(name, "none"))


def _matched_ends(left: Sequence[ir.Value], right: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    """By name, and those whose name the other side lacks by position."""
    names = {str(value.name): value for value in right}
    rest = [value for value in right if str(value.name) not in {str(other.name) for other in left}]
    for value in left:
        other = names.get(str(value.name))
        if other is None and rest:
            other = rest.pop(0)
        if other is not None:
            yield value, other


def _matched_inputs(
    left: ir.Node, right: ir.Node, likeness: Callable[[ir.Value | None, ir.Value | None], int]
) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """What two nodes read, place by place, or, of a commutative operator, the most alike together."""
    mine, theirs = read_by(left), read_by(right)
    if operator_of(left) not in COMMUTATIVE:
        return list(zip(mine, theirs, strict=True))
    places = sorted((one != other, one, other) for one in range(len(mine)) for other in range(len(theirs)))
    places.sort(key=lambda place: likeness(mine[place[1]], theirs[place[2]]), reverse=True)
    chosen = dict[int, int]()
    for _, one, other in places:
        if one not in chosen and other not in chosen.values():
            chosen[one] = other
    return [(mine[one], theirs[other]) for one, other in sorted(chosen.items())]


def _passes_on(node: ir.Node) -> bool:
    """Whether the operator changes no more than how numbers are held."""
    return operator_of(node) in _CASTS


def _behind_casts(value: ir.Value, node: ir.Node | None) -> ir.Value:
    """What a tensor was before it was cast."""
    while node is not None and _passes_on(node) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _readers(value: ir.Value) -> dict[tuple[object, int], list[ir.Node]]:
    """Operator and place of the input → the nodes that read the tensor there."""
    found: dict[tuple[object, int], list[ir.Node]] = {}
    for use in value.uses():
        operator = operator_of(use.node)
        found.setdefault((operator, 0 if operator in COMMUTATIVE else use.idx), []).append(use.node)
    return found


def _above(node: ir.Node, steps: int) -> list[ir.Node]:
    """Nodes that are exactly so many steps above, by their shortest way."""
    seen, frontier = {node}, [node]
    for _ in range(steps):
        producers = [value.producer() for below in frontier for value in below.inputs if value is not None]
        frontier = [above for above in dict.fromkeys(producers) if above is not None and above not in seen]
        seen |= set(frontier)
    return frontier


def _by_parameter(value: ir.Value) -> str | None:
    if constant_of(value) is None:
        return None
    return parameter_name(str(value.name)) or None


def _weight_keys(
    model: ir.Model, key: Callable[[ir.Value], Hashable], done: Container[ir.Value] = ()
) -> dict[ir.Value, Hashable]:
    """Weights → what tells them, where no other weight of the graph has the same."""
    found = {value: key(value) for value in model.graph.initializers.values() if value not in done}
    counts = Counter(found.values())
    return {value: name for value, name in found.items() if name is not None and counts[name] == 1}


def _read_once(keys: Mapping[ir.Value, Hashable]) -> dict[ir.Value, Hashable]:
    return {value: key for value, key in keys.items() if len(value.uses()) == 1}


def _by_content(value: ir.Value) -> Hashable:
    tensor = constant_of(value)
    if tensor is None or tensor.nbytes <= _SPEAKING_BYTES:
        return None
    with mapped_for_a_while(tensor):
        return contents(value, tensor)
