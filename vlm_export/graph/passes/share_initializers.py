"""Equal initializers made one, compared by hashes that are streamed: no two large ones are held at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping

import onnx_ir as ir

from vlm_export.graph.core.names import defined_values, names_used, nested_graphs, root_graphs, subgraphs_of
from vlm_export.graph.core.replace_uses import replace_uses
from vlm_export.graph.core.tensors import TensorSlot, tensor_hash, tensor_slots


def share_initializers(model: ir.Model) -> int:
    """Makes the readers of equal initializers (dtype, shape, every bit) read one of them, in place.

    The one of an outer graph serves the graphs inside it too. Initializers that are inputs or outputs stay, and so do
    those whose reader sees another value of that name. The bytes are compared by SHA-256. onnx_ir's
    `DeduplicateHashedInitializersPass` leaves an initializer of an inner graph that equals one of the outer graph.

    Returns:
        How many initializers were removed.
    """
    values = (value for graph in nested_graphs(model.graph) for value in graph.initializers.values())
    shapes = Counter(_form(tensor) for value in values if (tensor := value.const_value) is not None)
    repeated = {form for form, count in shapes.items() if count > 1}
    used = names_used(model)

    def share(graph: ir.Graph, outer: Mapping[Hashable, ir.Value]) -> int:
        hidden = {str(value.name) for value in defined_values(graph)}
        known = {key: value for key, value in outer.items() if value.name not in hidden}
        count = 0
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or _form(tensor) not in repeated:
                continue
            first = known.setdefault((_form(tensor), tensor_hash(tensor)), value)
            if first is value or value.is_graph_output() or value.name in used:
                continue
            replace_uses(value, first)
            del graph.initializers[str(value.name)]
            count += 1
        return count + sum(share(inner, known) for node in graph for inner in subgraphs_of(node))

    return sum(share(root, {}) for root in root_graphs(model))


def _form(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tuple(tensor.shape.numpy())


# Below this, a tensor stays in the graph file by default, where sharing saves nothing.
_LEAST_BYTES = 1024


def share_stored_weights(model: ir.Model) -> int:
    """Makes initializers with equal content refer to one tensor, in place: `save_model` then writes it once.

    The graph stays as it is, each initializer under its name (`share_initializers` removes the others instead).

    Returns:
        How many bytes need not be written.
    """
    groups: defaultdict[Hashable, list[TensorSlot]] = defaultdict(list)
    for slot in tensor_slots(model):
        if slot.can_be_external and slot.nbytes > _LEAST_BYTES:
            groups[_form(slot.tensor)].append(slot)
    saved = 0
    for group in groups.values():
        first: dict[str, TensorSlot] = {}
        for slot in group if len({slot.identity for slot in group}) > 1 else ():
            kept = first.setdefault(tensor_hash(slot.tensor), slot)
            if kept.identity != slot.identity:
                saved += slot.nbytes
                slot.tensor = kept.tensor
    return saved
