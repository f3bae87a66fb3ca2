"""The places of a model that hold tensors: initializers and attributes, of every subgraph and function."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

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
        """Equal for slots that hold the same tensor, or the same bytes of the same file."""
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
        """Whether the tensor refers to a file, or is computed from what may."""
        return isinstance(self.tensor, ir.ExternalTensor | ir.LazyTensor)

    def loaded(self) -> ir.TensorProtocol:
        """The tensor in memory, independent of the file it came from."""
        tensor = self.tensor
        return ir.Tensor(
            tensor.numpy().copy(),
            dtype=tensor.dtype,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )


def tensor_slots(model: ir.Model) -> Iterator[TensorSlot]:
    """Every slot of the model, in the order of its graphs."""
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
