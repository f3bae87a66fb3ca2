"""Transposes of weights, done once when the weights are written instead of at every run."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.graph.core.replace_uses import add_initializer
from vlm_export.graph.core.tensors import transposed_tensor


def fold_weight_transposes(model: ir.Model) -> int:
    """Replaces each Transpose of an initializer by a transposed initializer, in place; returns how many.

    The new tensors are lazy: one at a time is computed while the file is written, so memory stays flat.
    """
    graph = model.graph
    folded: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        name = weight.name if weight is not None else None
        tensor = weight.const_value if weight is not None else None
        # An output of the graph needs a node that makes it.
        if name is None or name not in graph.initializers or tensor is None or node.outputs[0].is_graph_output():
            continue
        perm = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(tensor.shape))))))
        key = (name, perm)
        if key not in folded:
            folded[key] = _transposed_initializer(graph, name, tensor, perm)
        ir.convenience.replace_all_uses_with(node.outputs[0], folded[key], replace_graph_outputs=False)
        graph.remove(node, safe=True)
    for name, _ in folded:
        if name in graph.initializers and not graph.initializers[name].uses():
            del graph.initializers[name]
    return len(folded)


def _transposed_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, perm: tuple[int, ...]) -> ir.Value:
    # The plain transpose of a matrix keeps its parameter's name recognisable to readers of the graph.
    new_name = f"{name}.transposed" if perm == tuple(reversed(range(len(perm)))) else f"{name}.{perm}"
    return add_initializer(graph, transposed_tensor(tensor, perm, new_name), new_name)
