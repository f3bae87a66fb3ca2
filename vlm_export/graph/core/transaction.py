"""Changes that happen wholly or not at all: tried on a copy, checked there, and only then made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import Copy, Info, check, completed_infos, copy_of, infer, only_new_faults
from vlm_export.graph.core.names import (
    all_values,
    inputs_of,
    is_sorted,
    nested_graphs,
    nested_nodes,
    nested_values,
    root_graphs,
    subgraphs_of,
)
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
    # What can be inferred is stated first, so that a change of it is seen.
    values = list(all_values(trial.model))
    before = completed_infos(trial.model, values)
    for value, info in before.items():
        value.type, value.shape = info.type, info.shape
    change, must_sort = _edit(trial, edit)
    infos = _checked_infos(model, trial.model, change)
    _edit(Copy(model), edit, must_sort)
    for tried, value in zip(all_values(trial.model), all_values(model), strict=True):
        # What is as it was stays as it was stated, also where nothing was.
        if tried in infos and (tried not in before or infos[tried] != before[tried]):
            value.type, value.shape = infos[tried].type, infos[tried].shape


def _edit(copy: Copy, edit: Edit, must_sort: bool | None = None) -> tuple[Change, bool]:
    """Makes the edit, and puts nodes in order; returns whether that was needed."""
    change = edit(copy)
    allow_plain_initializers(copy.model)
    must_sort = not is_sorted(copy.model) if must_sort is None else must_sort
    try:
        for root in root_graphs(copy.model) if must_sort else ():
            root.sort()
    except ValueError as error:
        raise GraphError(
            "the change would make a cycle", fix="connect only tensors that do not depend on the changed node"
        ) from error
    return change, must_sort


def _checked_infos(model: ir.Model, tried: ir.Model, change: Change) -> dict[ir.Value, Info]:
    """Infos of the values that depend on the change, on the tried model; refuses what the checks refuse."""
    with only_new_faults(model, check):
        check(tried)
    nodes = set(change.nodes) | _calls_of_changed(tried, change)
    if not change.values and not change.stated:
        kept = _unchanged_infos(tried, change, nodes)
        if kept is not None:
            return kept
    depending: list[ir.Value] = []

    def note(value: ir.Value) -> bool:
        depending.append(value)
        return True

    _walk(tried.graph, nodes, set(change.values), note)
    found: dict[ir.Value, Info] = {}
    with only_new_faults(model, infer):
        found = infer(tried, unknown=depending)
    return _settle(tried, change, nodes, found)


def _unchanged_infos(model: ir.Model, change: Change, nodes: set[ir.Node]) -> dict[ir.Value, Info] | None:
    """Infos of what the nodes make, if they are as before: then nothing behind them changes, or is lost by inferring.

    They are so most often; what is behind a loop, say, could not be told again.
    """
    visible = set(nested_graphs(model.graph))
    made = [value for node in nodes if node.graph in visible for value in node.outputs if value.name]
    try:
        infos = infer(model, unknown=made)
    except GraphError:
        return None
    found = {value: infos.get(value, Info()) for value in made}
    same = all(info == Info(value.type, value.shape) for value, info in found.items())
    return found if same and all(found[value].shape is not None for value in change.unsure if value in found) else None


def _calls_of_changed(model: ir.Model, change: Change) -> set[ir.Node]:
    """Calls of functions whose bodies changed, also by way of other functions."""
    graphs = {node.graph for node in change.nodes}
    touched: set[ir.OperatorIdentifier] = set()
    known = -1
    while known < len(touched):
        known = len(touched)
        for name, function in model.functions.items():
            inner = nested_nodes(function.graph)
            if any(node.graph in graphs or node.op_identifier() in touched for node in inner):
                touched.add(name)
    return {node for node in nested_nodes(model.graph) if node.op_identifier() in touched}


def _walk(graph: ir.Graph, edited: set[ir.Node], changed: set[ir.Value], decide: Callable[[ir.Value], bool]) -> bool:
    """Visits what depends on a change in order; `decide` says of each value whether it is another one now."""
    for node in graph:
        touched = node in edited or any(value in changed for value in inputs_of(node))
        inner = False
        # A Loop's first two inputs are its counter and its condition, and its first result is the next condition.
        skipped, ahead = (2, 1) if node.op_type == "Loop" else (0, 0)
        for subgraph in subgraphs_of(node):
            # The inputs of a Loop's or Scan's body stand in the order of the node's own.
            fed = list(zip(subgraph.inputs, node.inputs, strict=False))[skipped:]
            changed.update(value for value, source in fed if (node in edited or source in changed) and decide(value))
            inner = _walk(subgraph, edited, changed, decide) or inner
            # The next round takes them from the results of the last.
            rounds = zip(subgraph.inputs[skipped:], subgraph.outputs[ahead:], strict=False)
            carried = [value for value, result in rounds if result in changed and value not in changed]
            carried = [value for value in carried if decide(value)]
            if carried:
                changed.update(carried)
                _walk(subgraph, edited, changed, decide)
        if touched or inner:
            changed.update(value for value in node.outputs if value.name and decide(value))
    return any(value in changed for value in graph.outputs)


def _settle(
    model: ir.Model, change: Change, nodes: set[ir.Node], inferred: Mapping[ir.Value, Info]
) -> dict[ir.Value, Info]:
    infos: dict[ir.Value, Info] = {}

    def decide(value: ir.Value) -> bool:
        found = inferred.get(value, Info())
        stays = value.producer() in nodes and value not in change.unsure
        new = _merged(value, found, replace(change, keeps_sizes=True) if stays else change)
        if value in change.stated:
            new = Info(new.type, _stated(value, change.stated[value], found.shape))
        infos[value] = new
        may_differ = new.shape is None and not (stays or change.keeps_sizes)
        return may_differ or new != Info(value.type, value.shape)

    _walk(model.graph, nodes, set(change.values), decide)
    # A named axis is the same one everywhere, also behind tensors of which nothing is known.
    everywhere = replace(change, keeps_sizes=True)
    for value in nested_values(model.graph):
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
