"""Two aligned graphs cut into regions: what lies between tensors that both have, at the borders of modules.

A region is run on the left graph's own values, so that an error of an earlier region does not reach it, and one of its
own is not hidden. No engine ever holds more than one region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.files import save_model
from vlm_export.graph.core.inference import completed_infos
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.prove.program import ModelProgram
from vlm_export.lab.alignment import Alignment
from vlm_export.lab.canonical import read_by
from vlm_export.lab.module_paths import constant_of, mapped_for_a_while, module_paths, shared_path
from vlm_export.runtime.engines.choice import EngineChoice

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Region:
    """What one of the two graphs computes between borders.

    Attributes:
        inputs: borders and inputs of the graph that it reads.
        output: the border that it ends at.
        nodes: in the graph's order.
    """

    inputs: tuple[ir.Value, ...]
    output: ir.Value
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class RegionPair:
    """The same region in both graphs; path: dotted path of its module, in the left graph's names."""

    path: str
    left: Region
    right: Region


def region_pairs(left: ir.Model, right: ir.Model, alignment: Alignment) -> list[RegionPair]:
    """All regions, in the left graph's order; the last end at the graph's outputs, whatever computes them.

    A region is named by its nodes that differ, or else by the one that it ends with.
    """
    paths = module_paths(left.graph)
    borders = [value for value in _borders(left, paths) if value in alignment.values]
    partners = {value: alignment.values[value] for value in borders}
    mine, theirs = set(borders), set(partners.values())
    order = [{node: index for index, node in enumerate(model.graph)} for model in (left, right)]
    infos = completed_infos(left, [value for value, _ in alignment.ends])
    ends = [
        pair for pair in alignment.ends if pair[0].producer() is not None and _is_compared(pair[0], infos[pair[0]].type)
    ]
    differing = set(alignment.differing())
    pairs = []
    for value, other in [*partners.items(), *ends]:
        producer = value.producer()
        assert producer is not None
        regions = region_of(value, mine, order[0]), region_of(other, theirs, order[1])
        named = [paths[node] for node in regions[0].nodes if node in differing]
        pairs.append(RegionPair(shared_path(named) or paths[producer], *regions))
    return pairs


def _borders(model: ir.Model, paths: Mapping[ir.Node, str]) -> list[ir.Value]:
    """Tensors of numbers that one module hands to another, and the graph's outputs."""
    varying = varying_values(model.graph)
    candidates = [
        value
        for node in model.graph
        for value in node.outputs
        if value in varying
        and (value.is_graph_output() or any(paths.get(use.node) != paths[node] for use in value.uses()))
    ]
    infos = completed_infos(model, candidates)
    return [value for value in candidates if _is_compared(value, infos[value].type)]


def _is_compared(value: ir.Value, kind: ir.TypeProtocol | None) -> bool:
    """Integers inside a graph are shapes and places more often than results."""
    if not isinstance(kind, ir.TensorType) or kind.dtype == ir.DataType.STRING:
        return False
    return kind.dtype.is_floating_point() or value.is_graph_output()


def varying_values(graph: ir.Graph) -> set[ir.Value]:
    """Tensors that depend on an input."""
    found = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in found for value in read_by(node)):
            found.update(node.outputs)
    return found


def region_of(end: ir.Value, borders: set[ir.Value], order: Mapping[ir.Node, int]) -> Region:
    """What lies between a tensor and the borders before it; order: places of the graph's nodes."""
    nodes, inputs = set[ir.Node](), dict[ir.Value, None]()
    waiting = [end]
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if (value is not end and value in borders) or (producer is None and constant_of(value) is None):
            inputs[value] = None
        elif producer is not None and producer not in nodes:
            nodes.add(producer)
            waiting += [item for item in read_by(producer) if item is not None]
    return Region(tuple(inputs), end, tuple(sorted(nodes, key=order.__getitem__)))


def region_model(model: ir.Model, region: Region, examples: Arrays, outputs: Sequence[ir.Value] = ()) -> ir.Model:
    """A region as a model of its own; weights are shared.

    Args:
        examples: a value of each input, by name, for its dtype.
        outputs: tensors inside the region to return as well.
    """
    ends = list(dict.fromkeys([*outputs, region.output]))
    try:
        graph = ir.convenience.extract(model.graph, list(region.inputs), ends)
    except ValueError as error:
        raise GraphError(
            "a part of the graph cannot be cut out", where=str(region.output.name), got=str(error)
        ) from error
    for value in graph.inputs:
        array = examples[str(value.name)]
        value.dtype = ir.DataType.from_numpy(array.dtype)
        value.shape = ir.Shape([None] * array.ndim)
    return ir.Model(graph, ir_version=model.ir_version)


RunRegion = Callable[[ir.Model, Sequence[Arrays]], "list[dict[str, Array]]"]
"""Runs a region's model on every set of inputs; outputs by name."""


def run_region(model: ir.Model, feeds: Sequence[Arrays], *, optimised: bool = False) -> list[dict[str, Array]]:
    """Runs a model on every set of inputs; outputs by name."""
    program = ModelProgram(model, optimised=optimised)
    names = list(program.outputs)
    with mapped_for_a_while(*(value.const_value for value in model.graph.initializers.values())):
        return [dict(zip(names, program.run(feed, names), strict=True)) for feed in feeds]


def region_runner(choice: EngineChoice) -> RunRegion:
    """Runs regions in the engine that a user chose, as bundles run in it."""

    def run(model: ir.Model, feeds: Sequence[Arrays]) -> list[dict[str, Array]]:
        names = [str(value.name) for value in model.graph.outputs]
        with TemporaryDirectory(prefix="vlm-export-") as folder:
            path = Path(folder) / "region.onnx"
            save_model(model, path)
            engine = choice.open(path)
            found = [engine.run(feed) for feed in feeds]
        return [{name: run[name] for name in names} for run in found]

    return run


def last_uses(pairs: Sequence[RegionPair], alignment: Alignment) -> Iterator[set[ir.Value]]:
    """For each pair the left graph's tensors that no later region reads, in either graph, and their partners."""
    partners = {other: value for value, other in alignment.values.items()}
    last: dict[ir.Value, int] = {}
    for index, pair in enumerate(pairs):
        read = [
            *pair.left.inputs,
            pair.left.output,
            *(partners[value] for value in pair.right.inputs if value in partners),
        ]
        last |= dict.fromkeys(read, index)
    for index in range(len(pairs)):
        done = {value for value, place in last.items() if place == index}
        yield done | {alignment.values[value] for value in done if value in alignment.values}
