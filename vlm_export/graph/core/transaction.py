"""Changes that happen wholly or not at all: tried on a copy, checked there, and only then made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import Copy, Info, check, copy_of, infer
from vlm_export.graph.core.names import all_graphs, defined_values, is_sorted, nested_graphs, root_graphs, subgraphs_of
from vlm_export.graph.core.skeleton import allow_plain_initializers

Dim: TypeAlias = "int | ir.SymbolicDim"


@dataclass(frozen=True)
class Change:
    """What an edit did, so that what follows from it can be inferred anew.

    Attributes:
        nodes: new ones, and those whose operator, inputs or attributes are others now.
        values: inputs whose type or shape the edit stated anew.
        axes: named axis → what it is now wherever it occurs; None: not the same everywhere.
        keeps_sizes: whether all fixed sizes stay right behind the changed values.
        keeps_ranks: whether only sizes can have changed.
        unsure: outputs of `nodes` whose types and shapes are only a guess, where inference says nothing.
        stated: shapes that outputs of `nodes` are said to have; refused where inference knows better.
    """

    nodes: Collection[ir.Node] = ()
    values: Collection[ir.Value] = ()
    axes: Mapping[str, int | str | None] = field(default_factory=dict)
    keeps_sizes: bool = False
    keeps_ranks: bool = False
    unsure: Collection[ir.Value] = ()
    stated: Mapping[ir.Value, ir.Shape] = field(default_factory=dict)


# An edit is deterministic: done on equal models, it leaves equal models.
Edit: TypeAlias = Callable[[Copy], Change]


def apply(model: ir.Model, edit: Edit) -> None:
    """Makes an edit, and infers types and shapes anew for all that depends on it; what refuses it leaves no trace.

    What inference cannot tell (behind operators that ONNX does not know, or loops) is kept as long as it cannot have
    changed. Faults that the model had before are no reason to refuse.

    Raises:
        GraphError: a cycle, dtypes or shapes that do not fit together, attributes that an operator does not have, or
            what else ONNX's checker refuses.
    """
    trial = copy_of(model)
    _complete(trial.model)
    before = {value: Info(value.type, value.shape) for value in _all_values(trial.model)}
    change = edit(trial)
    allow_plain_initializers(trial.model)
    must_sort = not is_sorted(trial.model)
    if must_sort:
        _sort(trial.model)
    infos = _checked_infos(model, trial.model, change)
    edit(Copy(model))
    allow_plain_initializers(model)
    if must_sort:
        _sort(model)
    values = zip(_all_values(trial.model), _all_values(model), strict=True)
    for tried, value in values:
        # What is as it was stays as it was stated, also where nothing was.
        if tried in infos and (tried not in before or not _is_same(infos[tried], before[tried])):
            value.type, value.shape = infos[tried].type, infos[tried].shape


def _complete(scratch: ir.Model) -> None:
    """States the types and shapes that can be inferred and are not stated, so that a change of them is seen."""
    unknown = [value for value in _all_values(scratch) if value.type is None or value.shape is None]
    if not unknown:
        return
    copy = copy_of(scratch)
    try:
        infos = infer(copy.model)
    except GraphError:
        return
    for value in unknown:
        info = infos.get(copy.of(value), Info(None, None))
        value.type = value.type or info.type
        value.shape = info.shape if value.shape is None else value.shape


def _all_values(model: ir.Model) -> list[ir.Value]:
    return [value for graph in all_graphs(model) for value in defined_values(graph)]


def _sort(model: ir.Model) -> None:
    try:
        for root in root_graphs(model):
            root.sort()
    except ValueError as error:
        raise GraphError(
            "the change would make a cycle", fix="connect only tensors that do not depend on the changed node"
        ) from error


def _checked_infos(model: ir.Model, tried: ir.Model, change: Change) -> dict[ir.Value, Info]:
    """Infos of the values that depend on the change, on the tried model; refuses what the checks refuse."""
    try:
        check(copy_of(tried).model)
    except GraphError:
        if _passes(model, check):
            raise
    nodes = set(change.nodes) | _calls_of_changed(tried, change)
    if not change.values and not change.stated:
        kept = _unchanged_infos(tried, change, nodes)
        if kept is not None:
            return kept
    try:
        found = _inferred(tried, _dependent_values(tried, change, nodes))
    except GraphError:
        if _passes(model, infer):
            raise
        found = {}
    return _settle(tried, change, nodes, found)


def _unchanged_infos(model: ir.Model, change: Change, nodes: set[ir.Node]) -> dict[ir.Value, Info] | None:
    """Infos of what the nodes make, if they are as before: then nothing behind them changes, or is lost by inferring.

    They are so most often; what is behind a loop, say, could not be told again.
    """
    visible = set(nested_graphs(model.graph))
    made = [value for node in nodes if node.graph in visible for value in node.outputs if value.name]
    try:
        infos = _inferred(model, made)
    except GraphError:
        return None
    found = {value: infos.get(value, Info(None, None)) for value in made}
    same = all(_is_same(info, Info(value.type, value.shape)) for value, info in found.items())
    return found if same and all(found[value].shape is not None for value in change.unsure if value in found) else None


def _inferred(model: ir.Model, unknown: Sequence[ir.Value]) -> dict[ir.Value, Info]:
    """What is inferred when the types and shapes of some values are not stated."""
    scratch = copy_of(model)
    for value in unknown:
        _forget(scratch.of(value), is_input=value.is_graph_input())
    found = infer(scratch.model)
    return {value: found[scratch.of(value)] for value in _all_values(model) if scratch.of(value) in found}


def _passes(model: ir.Model, judge: Callable[[ir.Model], object]) -> bool:
    try:
        judge(copy_of(model).model)
    except GraphError:
        return False
    return True


def _forget(value: ir.Value, is_input: bool) -> None:
    value.shape = None
    # A body's inputs must state a type.
    if not is_input:
        value.type = None


def _dependent_values(model: ir.Model, change: Change, nodes: set[ir.Node]) -> list[ir.Value]:
    found: list[ir.Value] = []

    def decide(value: ir.Value) -> bool:
        found.append(value)
        return True

    _walk(model.graph, nodes, set(change.values), decide)
    return found


def _calls_of_changed(model: ir.Model, change: Change) -> set[ir.Node]:
    """Calls of functions whose bodies changed, also by way of other functions."""
    graphs = {node.graph for node in change.nodes}
    touched: set[ir.OperatorIdentifier] = set()
    grows = True
    while grows:
        grows = False
        for name, function in model.functions.items():
            inner = ir.traversal.RecursiveGraphIterator(function)
            if name not in touched and any(node.graph in graphs or node.op_identifier() in touched for node in inner):
                touched.add(name)
                grows = True
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return {node for node in nodes if node.op_identifier() in touched}


def _walk(graph: ir.Graph, edited: set[ir.Node], changed: set[ir.Value], decide: Callable[[ir.Value], bool]) -> bool:
    """Visits what depends on a change in order; `decide` says of each value whether it is another one now."""
    for node in graph:
        touched = node in edited or any(value in changed for value in node.inputs if value is not None)
        inner = False
        for subgraph in subgraphs_of(node):
            changed.update(value for value in _fed_inputs(node, subgraph, node in edited, changed) if decide(value))
            inner = _walk(subgraph, edited, changed, decide) or inner
            carried = [value for value in _carried_inputs(node, subgraph, changed) if decide(value)]
            if carried:
                changed.update(carried)
                _walk(subgraph, edited, changed, decide)
        if touched or inner:
            changed.update(value for value in node.outputs if value.name and decide(value))
    return any(value in changed for value in graph.outputs)


def _fed_inputs(node: ir.Node, body: ir.Graph, edited: bool, changed: Collection[ir.Value]) -> list[ir.Value]:
    """Inputs of a body that get another value: those of Loop and Scan stand in the order of the node's own."""
    # A Loop's first two are its counter and its condition.
    first = 2 if node.op_type == "Loop" else 0
    pairs = list(zip(body.inputs, node.inputs, strict=False))[first:]
    return [value for value, fed in pairs if edited or fed in changed]


def _carried_inputs(node: ir.Node, body: ir.Graph, changed: Collection[ir.Value]) -> list[ir.Value]:
    """Inputs of a body that the next round takes from outputs that changed."""
    ahead = 1 if node.op_type == "Loop" else 0
    pairs = zip(body.inputs[ahead + 1 :] if ahead else body.inputs, body.outputs[ahead:], strict=False)
    return [value for value, result in pairs if result in changed and value not in changed]


def _settle(
    model: ir.Model, change: Change, nodes: set[ir.Node], inferred: Mapping[ir.Value, Info]
) -> dict[ir.Value, Info]:
    infos: dict[ir.Value, Info] = {}

    def decide(value: ir.Value) -> bool:
        found = inferred.get(value, Info(None, None))
        stays = value.producer() in nodes and value not in change.unsure
        new = _merged(value, found, replace(change, keeps_sizes=True) if stays else change)
        if value in change.stated:
            new = Info(new.type, _stated(value, change.stated[value], found.shape))
        infos[value] = new
        may_differ = new.shape is None and not (stays or change.keeps_sizes)
        return may_differ or not _is_same(new, Info(value.type, value.shape))

    _walk(model.graph, nodes, set(change.values), decide)
    # A named axis is the same one everywhere, also behind tensors of which nothing is known.
    everywhere = replace(change, keeps_sizes=True)
    for value in (value for graph in nested_graphs(model.graph) for value in defined_values(graph)):
        if change.axes and value not in infos and value.shape is not None and value not in change.values:
            infos[value] = Info(value.type, ir.Shape([_kept(dim, everywhere) for dim in value.shape]))
    return infos


def _stated(value: ir.Value, stated: ir.Shape, inferred: ir.Shape | None) -> ir.Shape:
    """What is said of an output, with what inference knows of the axes that it leaves open."""
    if inferred is None:
        return stated
    dims = [_agreed(known, said) for known, said in zip(inferred, stated, strict=False)]
    if len(stated) != len(inferred) or None in dims:
        raise GraphError(
            f"output {value.name!r} cannot have this shape",
            expected=str(inferred),
            got=str(stated),
            fix="change the shapes of the inputs; those of the outputs follow",
        )
    return ir.Shape([dim for dim in dims if dim is not None])


def _agreed(known: Dim, said: Dim) -> Dim | None:
    """The axis as it is said to be, or as it is known where nothing is said; None where these contradict."""
    if isinstance(said, ir.SymbolicDim) and said.value is None:
        return known
    if isinstance(known, int):
        return known if said == known else None
    return said if isinstance(said, ir.SymbolicDim) or known.value is None else None


def _is_same(left: Info, right: Info) -> bool:
    dims = [None if info.shape is None else info.shape.dims for info in (left, right)]
    return left.type == right.type and dims[0] == dims[1]


def _merged(value: ir.Value, new: Info, change: Change) -> Info:
    """What is inferred, completed by what was known and cannot have changed."""
    kind, old = new.type or value.type, value.shape
    if new.shape is None:
        keeps = old is not None and (change.keeps_sizes or change.keeps_ranks)
        return Info(kind, ir.Shape([_kept(dim, change) for dim in old or ()]) if keeps else None)
    if old is None or len(old) != len(new.shape):
        return Info(kind, new.shape)
    pairs = zip(new.shape, old, strict=True)
    dims = [_kept(was, change) if not isinstance(dim, int) and dim.value is None else dim for dim, was in pairs]
    return Info(kind, ir.Shape(dims))


def _kept(dim: Dim, change: Change) -> Dim:
    """A size of before, unknown where it may be another one now."""
    if isinstance(dim, int):
        return dim if change.keeps_sizes else ir.SymbolicDim(None)
    if dim.value in change.axes:
        now = change.axes[str(dim.value)]
        return now if isinstance(now, int) else ir.SymbolicDim(now)
    # An axis may be named by an expression of others, in more notations than one.
    depends = any(axis in str(dim.value) for axis in change.axes)
    return dim if change.keeps_sizes and not depends else ir.SymbolicDim(None)
