"""The places of a model that hold tensors: initializers and attributes, of every subgraph and function."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.graph.core.names import all_graphs


@dataclass
class TensorSlot:
    """One place that holds a tensor; assigning `tensor` puts another one there.

    Attributes:
        holder: an initializer, or the node whose attribute holds the tensor.
        attribute: the attribute's name; "" for initializers.
        index: position in an attribute that holds several tensors.
    """

    holder: ir.Value | ir.Node
    attribute: str = ""
    index: int | None = field(default=None)

    @property
    def tensor(self) -> ir.TensorProtocol:
        if isinstance(self.holder, ir.Value):
            assert self.holder.const_value is not None
            return self.holder.const_value
        attribute = self.holder.attributes[self.attribute]
        return attribute.as_tensor() if self.index is None else attribute.as_tensors()[self.index]

    @tensor.setter
    def tensor(self, tensor: ir.TensorProtocol) -> None:
        if isinstance(self.holder, ir.Value):
            self.holder.const_value = tensor
            return
        old = self.holder.attributes[self.attribute]
        if self.index is None:
            new = ir.AttrTensor(old.name, tensor, doc_string=old.doc_string)
        else:
            tensors = list(old.as_tensors())
            tensors[self.index] = tensor
            new = ir.AttrTensors(old.name, tensors, doc_string=old.doc_string)
        self.holder.attributes[self.attribute] = new

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def identity(self) -> Hashable:
        """Returns a key that is equal for slots that hold the same tensor, or the same bytes of the same file."""
        tensor = self.tensor
        if isinstance(tensor, ir.ExternalTensor):
            return tensor.path, tensor.offset, tensor.dtype, tuple(tensor.shape.numpy())
        return id(tensor)

    @property
    def can_be_external(self) -> bool:
        # Strings have no fixed width; engines read tensors of attributes from the graph file.
        return isinstance(self.holder, ir.Value) and self.tensor.dtype != ir.DataType.STRING

    @property
    def is_stored_elsewhere(self) -> bool:
        """Tells whether the tensor refers to a file, or is computed from what may."""
        return isinstance(self.tensor, ir.ExternalTensor | ir.LazyTensor)

    def loaded(self) -> ir.TensorProtocol:
        """Returns the tensor in memory, independent of the file it came from."""
        tensor = self.tensor
        return ir.Tensor(
            tensor.numpy().copy(),
            dtype=tensor.dtype,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )


def tensor_slots(model: ir.Model) -> Iterator[TensorSlot]:
    """Yields every slot of the model, in the order of its graphs."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield TensorSlot(value)
        for node in graph:
            yield from _attribute_slots(node)


def _attribute_slots(node: ir.Node) -> Iterator[TensorSlot]:
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            yield TensorSlot(node, name)
        elif attribute.type == ir.AttributeType.TENSORS:
            for index in range(len(attribute.as_tensors())):
                yield TensorSlot(node, name, index)


def is_plain_number(dtype: np.dtype[Any]) -> bool:
    """Tells whether it is one of numpy's own booleans, integers and floats: some narrow types of others say that they
    are."""
    return dtype.kind in "biuf" and dtype.isbuiltin != 2


# Of shapes, axes, permutations and the like: what is larger is no argument.
MAX_ARGUMENT_BYTES = 1 << 16


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Returns the tensor of an initializer that no caller can override, or of a Constant node."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Constant":
        return None
    return ir.convenience.get_const_tensor(value)


def constant_argument(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Returns the content of a small constant (an axis, a shape, a permutation), or None of any other value."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > MAX_ARGUMENT_BYTES:
        return None
    array: npt.NDArray[Any] = np.asarray(tensor.numpy())
    return array


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """Returns a small constant's integers, flat."""
    array = constant_argument(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(entry) for entry in array.reshape(-1)]


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Returns an input, or None, also where the node states fewer."""
    return node.inputs[index] if index < len(node.inputs) else None


def sizes_of(value: ir.Value | None) -> list[int] | None:
    """Returns the sizes of all axes, or None unless the shape is known and fixed."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return list(value.shape.numpy())


def rank_of(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


_CHUNK_BYTES = 1 << 24


def tensor_hash(tensor: ir.TensorProtocol) -> str:
    """Hashes the content with SHA-256; mapped tensors are read page by page."""
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


def transposed_tensor(tensor: ir.TensorProtocol, perm: Sequence[int], name: str) -> ir.LazyTensor:
    """Returns the tensor with its axes permuted, computed when it is read; one with fewer axes gets leading ones
    first."""
    sizes = [*(1 for _ in range(len(perm) - len(tensor.shape))), *tensor.shape.numpy()]
    shape = ir.Shape([sizes[axis] for axis in perm])
    return ir.LazyTensor(partial(_transpose, tensor, tuple(sizes), perm), dtype=tensor.dtype, shape=shape, name=name)


def _transpose(tensor: ir.TensorProtocol, sizes: tuple[int, ...], perm: Sequence[int]) -> ir.TensorProtocol:
    array = np.ascontiguousarray(np.transpose(tensor.numpy().reshape(sizes), perm))
    return ir.Tensor(array, dtype=tensor.dtype)
