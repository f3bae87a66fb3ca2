"""Every tensor of a graph on given inputs, a few nodes at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.names import captured_or_read
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.prove.program import ModelProgram
from vlm_export.lab.regions import Arrays, Region, region_model, varying_values
from vlm_export.precision.fp16_plan import is_sequence

# Tensors of one run that are held at once, beside those that later nodes read.
_LIMIT_BYTES = 256 << 20
_MOST_NODES = 64
_FIRST_NODES = 8


def walk_values(
    model: ir.Model, inputs: Sequence[Arrays], limit_bytes: int = _LIMIT_BYTES
) -> Iterator[tuple[ir.Value, Array]]:
    """Each tensor that depends on an input, in the graph's order, once for every set of inputs.

    Args:
        model: sorted, as `graph_diff.normalised` gives it.
        limit_bytes: how much a run may give at once; a single node may give more.

    Raises:
        GraphError: onnxruntime does not accept the graph, or not the inputs.
    """
    varying = varying_values(model.graph)
    nodes = [node for node in model.graph if any(value in varying for value in node.outputs)]
    last = {value: place for place, node in enumerate(nodes) for value in captured_or_read(node)}
    held = {
        value: [feeds[str(value.name)] for feeds in inputs]
        for value in model.graph.inputs
        if all(str(value.name) in feeds for feeds in inputs)
    }
    for value, arrays in held.items():
        yield from ((value, array) for array in arrays)
    start, step, largest = 0, _FIRST_NODES, 1
    while start < len(nodes):
        end = _end(nodes, last, start, start + step)
        chosen = nodes[start:end]
        wanted = [value for node in chosen for value in node.outputs if value.name and not is_sequence(value)]
        read = dict.fromkeys(value for node in chosen for value in captured_or_read(node) if value in held)
        region = Region(tuple(read), wanted[-1], tuple(chosen))
        model_of_few = region_model(model, region, {str(value.name): held[value][0] for value in read}, wanted)
        program = ModelProgram(model_of_few)
        kept: dict[ir.Value, list[Array]] = {value: [] for value in wanted if last.get(value, -1) >= end}
        for number in range(len(inputs)):
            feeds = {str(value.name): held[value][number] for value in read}
            for value, array in zip(wanted, program.run(feeds, [str(v.name) for v in wanted]), strict=True):
                largest = max(largest, array.nbytes)
                if value in kept:
                    kept[value].append(array)
                yield value, array
        held = {value: arrays for value, arrays in (held | kept).items() if last.get(value, -1) >= end}
        start, step = end, int(np.clip(limit_bytes // largest, 1, _MOST_NODES))


def _end(nodes: Sequence[ir.Node], last: dict[ir.Value, int], start: int, end: int) -> int:
    """Where to cut, at this node or behind it: no sequence of tensors is handed on."""
    open_until = start
    for place, node in enumerate(nodes[start:], start):
        open_until = max([open_until, *(last.get(value, 0) for value in node.outputs if is_sequence(value))])
        if place + 1 >= end and open_until <= place:
            return place + 1
    return len(nodes)
