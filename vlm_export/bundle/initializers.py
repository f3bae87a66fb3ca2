"""Where the values of a graph's initializers lie in the files of a bundle, for readers that map them."""

from __future__ import annotations

import mmap
import posixpath
from dataclasses import dataclass
from pathlib import Path

from vlm_export.bundle.onnx_protobuf import StoredTensor, read_onnx
from vlm_export.bundle.safe_files import opened_real_file
from vlm_export.errors import InputError


@dataclass(frozen=True)
class StoredValues:
    """The bytes of one initializer.

    Attributes:
        path: the file.
        offset, length: of the bytes in it.
        data_type: the number of TensorProto.DataType.
        shape: of the values.
    """

    path: Path
    offset: int
    length: int
    data_type: int
    shape: tuple[int, ...]


def stored_initializers(root: Path, graph: str) -> dict[str, StoredValues]:
    """Name → where the values lie; of those whose bytes are in one piece.

    Args:
        root: the bundle.
        graph: the graph's path relative to it, whose references to data files were checked (`check_graph`).

    Raises:
        InputError: the file is not a well-formed model.
    """
    with (
        opened_real_file(root, graph) as descriptor,
        mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data,
    ):
        tensors = [tensor for tensor in read_onnx(data, str(root / graph)).tensors if tensor.is_initializer]
        found = [(tensor, _place(tensor, root, graph)) for tensor in tensors]
    return {tensor.name: place for tensor, place in found if place is not None}


def _place(tensor: StoredTensor, root: Path, graph: str) -> StoredValues | None:
    shape = tuple(tensor.dims)
    if tensor.is_external:
        stated = dict(tensor.external)
        path = root / posixpath.join(posixpath.dirname(graph), stated.get("location", ""))
        start, length = int(stated.get("offset", "0")), int(stated.get("length", "0"))
        return StoredValues(path, start, length, tensor.data_type, shape)
    if len(tensor.spans) != 1:
        return None
    ((start, end),) = tensor.spans
    return StoredValues(root / graph, start, end - start, tensor.data_type, shape)


def required(values: dict[str, StoredValues], name: str, graph: str) -> StoredValues:
    """The values of that name; InputError where the graph has none."""
    if name not in values:
        raise InputError(
            "a graph lacks a tensor that its ledger names",
            where=graph,
            expected=name,
            fix="do not use this bundle; export the model again",
        )
    return values[name]
