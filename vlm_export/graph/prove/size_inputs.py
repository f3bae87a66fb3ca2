"""Which inputs of a graph decide how large its tensors are: a length, a shape, a number of repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from vlm_export.graph.core.names import all_graphs, subgraphs_of

# Operator → inputs whose values decide the size of what it makes, or how often it runs.
_SIZES: Mapping[str, Sequence[int]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1,),
    "ConstantOfShape": (0,),
    "DFT": (1,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "Loop": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "STFT": (1, 3),
    "Tile": (1,),
    "Upsample": (1,),
}
_SIZE_ONLY = frozenset({"Shape", "Size"})


def inputs_that_decide_sizes(model: ir.Model) -> set[str]:
    """Names of inputs whose values, through whatever nodes, decide sizes: large values would take all memory."""
    holders = {inner: node for graph in all_graphs(model) for node in graph for inner in subgraphs_of(node)}
    return {str(value.name) for value in model.graph.inputs if _decides_sizes(value, model, holders)}


def _decides_sizes(start: ir.Value, model: ir.Model, holders: Mapping[ir.Graph, ir.Node]) -> bool:
    seen = {start}
    waiting = [start]
    while waiting:
        for node, index in waiting.pop().uses():
            if node.domain == "" and index in _SIZES.get(node.op_type, ()):
                return True
            if node.domain == "" and node.op_type in _SIZE_ONLY:
                continue
            reached = list(node.outputs)
            for inner in subgraphs_of(node):
                reached.extend(inner.inputs)
            if node.op_identifier() in model.functions:
                reached.extend(model.functions[node.op_identifier()].graph.inputs)
            # What a subgraph computes leaves it through the node that holds it.
            holder = holders.get(node.graph) if node.graph is not None else None
            if holder is not None:
                reached.extend(holder.outputs)
            waiting += [value for value in reached if value not in seen]
            seen.update(reached)
    return False
