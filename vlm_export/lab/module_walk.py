"""A graph against PyTorch modules: each region runs on what the modules before it gave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlm_export.errors import InputError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.lab.module_paths import joined, module_paths
from vlm_export.lab.region_walk import LEAST_FLOOR, MARGIN, RegionError, held_as, relative_error
from vlm_export.lab.regions import Arrays, Region, region_model, region_of, run_region, varying_values

ModuleValues = Callable[[Collection[str]], Mapping[str, Sequence[Array]]]
"""Names → the value for each set of inputs: `blocks.0.mlp` is what that module gives, `blocks.0.mlp.fc2 input` what it
is given, `output image_embeds` what the whole gives. Those that are no one tensor there are left out."""

INPUT_OF, OUTPUT = " input", "output "
# Values of so many modules are in memory at a time, besides those that later regions read.
_TOGETHER = 24


_NOTHING: Array = np.zeros(0, np.float32)
# What is this many times the floor, deep in a graph, is the noise of all modules before it.
_NOISE_OF_ALL = 4 * MARGIN


@dataclass(frozen=True)
class Compared:
    """One region; where it differs, with what it was fed in the first set and what the modules gave of that."""

    error: RegionError
    region: Region
    feeds: Mapping[str, Array]
    expected: Array


def without_moved_tensors(compared: Sequence[Compared]) -> list[Compared]:
    """Leaves out regions that end at another tensor than the module's.

    Where a constant was folded into weights, it is added earlier or later than in the module. The graph's own values
    then differ at that border, and no longer behind it; those of a fault do.
    """
    kept = []
    for index, one in enumerate(compared):
        behind = _behind(one.region.output) if one.error.parts else set()
        healed = any(
            later.region.output in behind and later.error.total <= _NOISE_OF_ALL * later.error.floor
            for later in compared[index + 1 :]
        )
        if not healed:
            kept.append(one)
    return kept


def _behind(value: ir.Value) -> set[ir.Value]:
    """Tensors that depend on one."""
    found, waiting = set[ir.Value](), [value]
    while waiting:
        for use in waiting.pop().uses():
            new = [output for output in use.node.outputs if output not in found]
            found.update(new)
            waiting += new
    return found


def compare_with_modules(
    graph: ir.Model, modules: Sequence[str], values_of: ModuleValues, inputs: Sequence[Arrays], where: str = ""
) -> Iterator[Compared]:
    """Yields what was found of each region in order.

    Args:
        graph: without functions.
        modules: names of all submodules.
        inputs: sets of inputs of the graph by name.
        where: what stands before the names, such as the part.
    """
    paths = module_paths(graph.graph)
    order = {node: index for index, node in enumerate(graph.graph)}
    borders = _module_borders(graph, paths, modules)
    fed = {value: [feeds[str(value.name)] for feeds in inputs] for value in graph.graph.inputs}
    values: dict[ir.Value, Sequence[Array]] = dict(fed)
    own: dict[ir.Value, Sequence[Array]] = dict(fed)
    for start in range(0, len(borders), _TOGETHER):
        some = list(borders.items())[start : start + _TOGETHER]
        found = values_of([name for _, name in some])
        for value, name in some:
            if name not in found:
                continue
            region = region_of(value, set(values), order)
            feeds = _feeds(region, values, len(inputs))
            got, other = _run(graph, region, feeds), _run(graph, region, feeds, optimised=True)
            if got is not None and [array.shape for array in got] != [array.shape for array in found[name]]:
                continue  # The graph holds the tensor in another form there.
            among = _run(graph, region, _feeds(region, own, len(inputs)))
            values[value], own[value] = found[name], found[name] if among is None else among
            floor = LEAST_FLOOR if got is None else max(LEAST_FLOOR, relative_error(got, other))
            producer = value.producer()
            assert producer is not None
            path, tensor = joined(where, paths[producer]), str(value.name)
            error = RegionError(
                path, tensor, relative_error(found[name], got), relative_error(found[name], among), floor
            )
            parts = error.parts
            yield Compared(error, region, feeds[0] if parts else {}, found[name][0] if parts else _NOTHING)


def _module_borders(graph: ir.Model, paths: Mapping[ir.Node, str], modules: Sequence[str]) -> dict[ir.Value, str]:
    """Tensors that a module gives or is given, in the graph's order, with their names for `ModuleValues`."""
    varying = varying_values(graph.graph)
    found = {value: f"{OUTPUT}{value.name}" for value in graph.graph.outputs if value.producer() is not None}
    for module in modules:
        nodes = {node for node, path in paths.items() if path == module or path.startswith(f"{module}.")}
        given = [value for node in nodes for value in node.outputs if value in varying and _leaves(value, nodes)]
        taken = {
            value
            for node in nodes
            for value in node.inputs
            if value is not None and value in varying and value.producer() is not None and value.producer() not in nodes
        }
        if len(given) == 1:
            found.setdefault(given[0], module)
        if len(taken) == 1:
            found.setdefault(taken.pop(), module + INPUT_OF)
    return {value: found[value] for node in graph.graph for value in node.outputs if value in found}


def _leaves(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def _feeds(region: Region, values: Mapping[ir.Value, Sequence[Array]], count: int) -> list[dict[str, Array]]:
    return [
        {str(value.name): held_as(values[value][number], value) for value in region.inputs} for number in range(count)
    ]


def _run(graph: ir.Model, region: Region, feeds: Sequence[Arrays], *, optimised: bool = False) -> list[Array] | None:
    """What the region gives, None where it cannot be run on these values."""
    try:
        runs = run_region(region_model(graph, region, feeds[0]), feeds, optimised=optimised)
    except InputError:
        return None
    return [list(run.values())[-1] for run in runs]
