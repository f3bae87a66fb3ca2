"""Equal initializers made one, compared by hashes that are streamed: no two large ones are held at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.names import defined_values, root_graphs, subgraphs_of
from vlm_export.graph.core.rewiring import names_used

_CHUNK_BYTES = 1 << 24


def share_initializers(model: ir.Model) -> int:
    """Makes the readers of equal initializers (dtype, shape, every bit) read one of them, in place.

    The one of an outer graph serves the graphs inside it too. Initializers that are inputs or outputs stay, and so do
    those whose reader sees another value of that name. The bytes are compared by SHA-256.

    Returns:
        How many initializers were removed.
    """
    shapes = Counter(_form(tensor) for value in _initializers(model.graph) if (tensor := value.const_value) is not None)
    repeated = {form for form, count in shapes.items() if count > 1}
    sharing = _Sharing(repeated, names_used(model))
    return sum(sharing.visit(root, {}, frozenset()) for root in root_graphs(model))


def tensor_hash(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of the content; of mapped tensors page by page."""
    digest = hashlib.sha256()
    if isinstance(tensor, ir.StringTensor) or tensor.dtype == ir.DataType.STRING:
        for text in np.asarray(tensor.numpy()).reshape(-1).tolist():
            content = text if isinstance(text, bytes) else str(text).encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()
    array = np.asarray(tensor.numpy())
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        digest.update(flat[start : start + _CHUNK_BYTES].data)
    if isinstance(tensor, ir.ExternalTensor):
        # The mapping, or the copy that was made where mapping is not possible.
        del array, flat
        tensor.release()
    return digest.hexdigest()


def _form(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tuple(tensor.shape.numpy())


def _initializers(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        for inner in subgraphs_of(node):
            yield from _initializers(inner)


class _Sharing:
    def __init__(self, repeated: set[Hashable], returned: set[str]) -> None:
        self._repeated, self._returned = repeated, returned

    def visit(self, graph: ir.Graph, outer: dict[Hashable, ir.Value], hidden: frozenset[str]) -> int:
        """Shares within the graph and with those around it; returns how many initializers were removed."""
        known = {key: value for key, value in outer.items() if value.name not in hidden}
        count = 0
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or _form(tensor) not in self._repeated:
                continue
            first = known.setdefault((_form(tensor), tensor_hash(tensor)), value)
            if first is value or value.is_graph_output() or value.name in self._returned:
                continue
            value.replace_all_uses_with(first)
            del graph.initializers[str(value.name)]
            count += 1
        for node in graph:
            for inner in subgraphs_of(node):
                names = frozenset(str(defined.name) for defined in defined_values(inner))
                count += self.visit(inner, known, names)
        return count
