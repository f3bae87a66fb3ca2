"""Two models made one: outputs of the first feed inputs of the second."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.errors import GraphError, suggestion
from vlm_export.graph.core.inference import Copy, copy_of
from vlm_export.graph.core.names import (
    all_graphs,
    all_nodes,
    defined_values,
    fresh_name,
    names_in,
    nested_graphs,
    rename_values,
)
from vlm_export.graph.core.replace_uses import replace_uses
from vlm_export.graph.core.tensors import tensor_hash
from vlm_export.graph.core.transaction import Change, apply

Pairs: TypeAlias = "list[tuple[ir.Value, ir.Value]]"


def compose(
    first: ir.Model,
    second: ir.Model,
    connections: Iterable[tuple[str, str]],
    *,
    prefix_first: str = "",
    prefix_second: str = "",
    shared_inputs: Sequence[str] = (),
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> ir.Model:
    """Makes a model that runs the first and feeds the second from it. Weights are shared with both, which stay as they
    are.

    Weights of equal name and content become one, as do functions. Metadata of both is kept, the first's where they
    contradict. Named axes of the second are called as the first calls them where they meet.

    Args:
        connections: output of the first, input of the second, in their own names without prefixes.
        prefix_first: put before all names of the first, its inputs and outputs too.
        prefix_second: the same for the second.
        shared_inputs: inputs of both, of equal names (before prefixes), that become one: the first's.
        inputs: the new model's inputs in order; by default the first's, then the second's.
        outputs: the new model's outputs in order; by default the first's that are not connected, then the second's.

    Raises:
        GraphError: an unknown name, tensors of equal names, dtypes or shapes that do not fit, or opset imports that
            differ.
    """
    connections = list(connections)
    pairs = [(_named(first.graph.outputs, out, "output"), into) for out, into in connections]
    joints = [(out, _named(second.graph.inputs, into, "input")) for out, into in pairs]
    joints += [
        (_named(first.graph.inputs, name, "input"), _named(second.graph.inputs, name, "input"))
        for name in shared_inputs
    ]
    _check_joints(joints)
    _check_opsets(first, second)
    left, right = copy_of(first), copy_of(second)
    _prefix(left.model, prefix_first)
    _prefix(right.model, prefix_second)
    joined = [(left.of(out), right.of(into)) for out, into in joints]
    changed = [node for out, into in joined if out.shape != into.shape for node in into.consumers()]
    joined += _equal_weights(left.model.graph, right.model.graph)
    _check_names(left.model.graph, right.model.graph, {into for _, into in joined})
    _rename_axes(right, joints)
    connected = {left.of(_named(first.graph.outputs, out, "output")) for out, _ in connections}
    _join(left.model, right.model, joined, connected)
    _choose(left.model.graph.inputs, inputs, left.model.graph.inputs, "input", all_of_them=True)
    _choose(left.model.graph.outputs, outputs, [*left.model.graph.outputs, *connected], "output")
    apply(left.model, lambda copy: Change(nodes=[copy.of(node) for node in changed], keeps_sizes=True))
    return left.model


def _named(values: Sequence[ir.Value], name: str, kind: str) -> ir.Value:
    known = {str(value.name): value for value in values}
    if name not in known:
        raise GraphError(f"there is no {kind} {name!r}", fix=suggestion(name, known))
    return known[name]


def _check_joints(joints: Pairs) -> None:
    seen: set[ir.Value] = set()
    for out, into in joints:
        if into in seen:
            raise GraphError(f"input {into.name!r} is fed twice", fix="name each input of the second once")
        seen.add(into)
        if out.type is not None and into.type is not None and out.type != into.type:
            raise GraphError(
                f"{out.name!r} and {into.name!r} have different dtypes",
                expected=str(into.type),
                got=str(out.type),
                fix="change the dtype of one of them first",
            )
        if out.shape is None or into.shape is None:
            continue
        sizes = zip(out.shape, into.shape, strict=False)
        differ = any(isinstance(have, int) and isinstance(want, int) and have != want for have, want in sizes)
        if differ or len(out.shape) != len(into.shape):
            raise GraphError(
                f"{out.name!r} and {into.name!r} have different shapes", expected=str(into.shape), got=str(out.shape)
            )


def _check_opsets(first: ir.Model, second: ir.Model) -> None:
    for domain, version in first.opset_imports.items():
        other = second.opset_imports.get(domain, version)
        if other != version:
            raise GraphError(
                f"the models use different opsets of {domain or 'ai.onnx'!r}",
                expected=str(version),
                got=str(other),
                fix="convert one of them to the other's opset first",
            )


def _prefix(model: ir.Model, prefix: str) -> None:
    if not prefix:
        return
    values = dict.fromkeys(value for graph in nested_graphs(model.graph) for value in defined_values(graph))
    rename_values(model.graph, {value: f"{prefix}{value.name}" for value in values})
    for graph in nested_graphs(model.graph):
        for node in graph:
            node.name = f"{prefix}{node.name}" if node.name else node.name


def _equal_weights(first: ir.Graph, second: ir.Graph) -> Pairs:
    return [
        (first.initializers[name], value)
        for name, value in second.initializers.items()
        if name in first.initializers and not value.is_graph_input() and not first.initializers[name].is_graph_input()
        if _same_content(first.initializers[name].const_value, value.const_value)
    ]


def _same_content(left: ir.TensorProtocol | None, right: ir.TensorProtocol | None) -> bool:
    """Whether all bytes are equal, those of NaN too; of mapped tensors only a part at a time is looked at."""
    if left is right or left is None or right is None:
        return left is right
    if left.dtype != right.dtype or left.shape.numpy() != right.shape.numpy():
        return False
    return tensor_hash(left) == tensor_hash(right)


def _check_names(first: ir.Graph, second: ir.Graph, vanishing: set[ir.Value]) -> None:
    inner = [set().union(*map(names_in, nested_graphs(graph))) for graph in (first, second)]
    gone = {str(value.name) for value in vanishing}
    # Graphs inside of one never see those inside of the other.
    twice = (names_in(first) & (inner[1] - gone)) | (inner[0] & (names_in(second) - gone))
    if twice:
        raise GraphError(
            "both models have tensors of these names",
            got=", ".join(sorted(twice)[:8]) + (" …" if len(twice) > 8 else ""),
            fix="give one of the models a prefix, or name inputs that both share",
        )


def _rename_axes(second: Copy, joints: Pairs) -> None:
    """Axes of the second that meet one of the first are what they are there, in all of the second."""
    now: dict[str, int | ir.SymbolicDim] = {}
    for out, into in joints:
        for have, want in zip(out.shape or (), into.shape or (), strict=False):
            if isinstance(want, int) or want.value is None or (not isinstance(have, int) and have.value is None):
                continue
            if isinstance(have, int) and isinstance(now.get(want.value), int) and now[want.value] != have:
                raise GraphError(
                    f"axis {want.value!r} of the second model would have two sizes",
                    got=f"{now[want.value]} and {have}, by {out.name!r}",
                )
            if isinstance(have, int) or want.value not in now:
                now[want.value] = have
    for value in {value for graph in all_graphs(second.model) for value in defined_values(graph)}:
        if value.shape is not None:
            dims = [now.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)


def _join(first: ir.Model, second: ir.Model, joined: Pairs, connected: set[ir.Value]) -> None:
    """Moves everything of the second model into the first."""
    _merge_functions(first, second)
    graph, other = first.graph, second.graph
    replaced = {into: out for out, into in joined}
    outputs = [replaced.get(value, value) for value in other.outputs]
    inputs = [value for value in other.inputs if value not in replaced]
    weights = [value for value in other.initializers.values() if value not in replaced]
    other.outputs.clear()
    other.inputs.clear()
    other.initializers.clear()
    for into, out in replaced.items():
        replace_uses(into, out)
    nodes = list(other)
    other.remove(nodes)
    names = {node.name for node in all_nodes(first) if node.name}
    for node in nodes:
        node.name = fresh_name(node.name, names) if node.name else node.name
    graph.extend(nodes)
    graph.inputs.extend(inputs)
    for value in weights:
        graph.initializers.add(value)
    kept = [value for value in graph.outputs if value not in connected]
    graph.outputs.clear()
    graph.outputs.extend(dict.fromkeys([*kept, *outputs]))
    graph.opset_imports.update(second.opset_imports)
    first.ir_version = max(first.ir_version, second.ir_version)
    for ours, theirs in ((first, second), (graph, other)):
        ours.metadata_props.update(
            {key: text for key, text in theirs.metadata_props.items() if key not in ours.metadata_props}
        )


def _merge_functions(first: ir.Model, second: ir.Model) -> None:
    for name, function in list(second.functions.items()):
        known = first.functions.get(name)
        if known is None:
            first.functions[name] = function
        elif ir.to_proto(known) != ir.to_proto(function):
            raise GraphError(
                f"both models have a function {function.domain}:{function.name}, and they differ",
                fix="rename one of them, or inline it",
            )


def _choose(
    values: MutableSequence[ir.Value],
    names: Sequence[str] | None,
    known: Sequence[ir.Value],
    kind: str,
    all_of_them: bool = False,
) -> None:
    if names is None:
        return
    chosen = [_named(known, name, kind) for name in names]
    if len(set(chosen)) != len(chosen) or (all_of_them and set(chosen) != set(values)) or not chosen:
        raise GraphError(
            f"these are not the new model's {kind}s, once each",
            expected=str([value.name for value in known]),
            got=str(list(names)),
        )
    values.clear()
    values.extend(chosen)
