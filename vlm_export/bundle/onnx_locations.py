"""What an ONNX graph would make an engine read: the data files that it names, and whether its tensors fit in them."""

from __future__ import annotations

import math
import mmap
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_export.bundle.manifest import Manifest, VariantRecord, checked_relative_name, is_ir
from vlm_export.bundle.onnx_protobuf import Buffer, OnnxContents, StoredTensor, read_onnx
from vlm_export.bundle.openvino_ir import check_ir
from vlm_export.bundle.safe_files import opened_real_file
from vlm_export.errors import InputError

_REFUSE = "do not use this bundle; export the model again"
MAX_GRAPH_BYTES = 1 << 31
# Protobuf's own default; onnxruntime 1.31 and onnx 1.23 refuse one more.
_MAX_MESSAGE_DEPTH = 100
# TensorProto.DataType → bits of one element.
_ELEMENT_BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
# Types whose typed data field holds one entry for each element: all but complex numbers and those below a byte.
_ONE_ENTRY_EACH = frozenset(range(1, 14)) | {16}
# Operators of ONNX and of the engines' own sets; every other needs a library that a bundle cannot carry.
KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft", "com.microsoft.nchwc"}
)
# EPContext makes an engine read, or run, a file of its own.
_REFUSED_OPERATORS = frozenset({("com.microsoft", "EPContext")})


READS_ELSEWHERE = (b"_ORT_MEM_ADDR_", b"EPContext")
"""What makes ONNX Runtime read an address in memory, or a file that a provider made."""


def holds_any(path: Path, words: Sequence[bytes]) -> bool:
    """Whether a file holds one of the words, or nothing at all."""
    if not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(word) >= 0 for word in words)


def check_variant_files(manifest: Manifest, variant: VariantRecord, where: str) -> None:
    """InputError when the manifest lists no size and sha256 for one of the variant's files."""
    for name in (variant.file, *variant.external_data):
        if name not in manifest.files:
            raise InputError(
                "a variant names a file that the bundle does not list",
                where=where,
                expected=f"{name} under 'files'",
                fix="export the model again",
            )


def check_variant_graph(root: Path, manifest: Manifest, variant: VariantRecord) -> None:
    """InputError when the graph names other data files, or its tensors do not fit in them."""
    check_variant_files(manifest, variant, str(root))
    sizes = {name: manifest.files[name].size_bytes for name in variant.external_data}
    (check_ir if is_ir(variant.file) else check_graph)(root, variant.file, sizes)


def check_graph(root: Path, graph: str, data_sizes: Mapping[str, int]) -> None:
    """Checks that an engine that loads the graph touches the named data files only, inside their bounds.

    Args:
        root: the bundle.
        graph: the graph's path relative to it.
        data_sizes: path of each external data file, relative to `root` → its size in bytes.

    Raises:
        InputError: not a well-formed model, or empty; a location that is none of these files; a tensor whose range
            or shape does not fit its data; an operator of an unknown domain or one that opens files.
    """
    where = str(root / graph)
    contents = _read_graph_file(root, graph)
    if contents.graphs != 1:
        raise InputError(
            "a graph file holds no model" if not contents.graphs else "a graph file holds several models",
            where=where,
            fix="copy the bundle again, or export again",
        )
    for tensor in contents.tensors:
        if tensor.is_external or tensor.external:
            _check_external(tensor, posixpath.dirname(graph), data_sizes, where)
        else:
            _check_inline(tensor, where)
    _check_operators(contents, where)
    if contents.depth > _MAX_MESSAGE_DEPTH:
        raise InputError(
            "the graphs in a graph are nested deeper than any engine reads",
            where=where,
            expected=f"{_MAX_MESSAGE_DEPTH} messages inside each other",
            got=str(contents.depth),
            fix=_REFUSE,
        )


def _read_graph_file(root: Path, graph: str) -> OnnxContents:
    where = str(root / graph)
    with opened_real_file(root, graph) as descriptor:
        size = os.fstat(descriptor).st_size
        if not 0 < size <= MAX_GRAPH_BYTES:
            raise InputError(
                "a graph file is empty" if not size else "a graph file is larger than an ONNX file can be",
                where=where,
                expected=f"1 to {MAX_GRAPH_BYTES} bytes",
                got=f"{size} bytes",
                fix="copy the bundle again, or export again",
            )
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
            buffer: Buffer = data
            return read_onnx(buffer, where)


def _check_operators(contents: OnnxContents, where: str) -> None:
    for domain, operator in sorted(contents.operators - contents.functions):
        if domain not in KNOWN_DOMAINS:
            raise InputError(
                f"the graph uses operator {operator!r} of the unknown domain {domain!r}",
                where=where,
                expected="operators of ONNX and ONNX Runtime, or functions that the graph defines",
                fix=_REFUSE,
            )
        if (domain, operator) in _REFUSED_OPERATORS:
            raise InputError(f"the graph uses {operator}, which opens other files", where=where, fix=_REFUSE)


def _check_external(tensor: StoredTensor, directory: str, data_sizes: Mapping[str, int], where: str) -> None:
    at = f"{where}: tensor {tensor.name!r}"
    locations = _values(tensor, "location")
    if not locations:
        raise InputError("a tensor is stored outside the graph, but says not where", where=at, fix=_REFUSE)
    for location in locations:
        file = posixpath.join(directory, checked_relative_name(location, at))
        if file not in data_sizes:
            raise InputError(
                "a graph names a data file that the manifest does not list for it",
                where=at,
                expected=", ".join(sorted(data_sizes)) or "no data file",
                got=file,
                fix=_REFUSE,
            )
        needed = _needed_bytes(tensor, at)
        offset = max((_number(text, at) for text in _values(tensor, "offset")), default=0)
        lengths = [_number(text, at) for text in _values(tensor, "length")]
        if any(needed is not None and length != needed for length in lengths):
            raise _does_not_fit(at, tensor, f"{lengths} bytes of external data")
        if offset + max(lengths, default=needed or 0) > data_sizes[file]:
            raise _does_not_fit(at, tensor, f"byte {offset} onwards of {file}, which has {data_sizes[file]} bytes")


def _check_inline(tensor: StoredTensor, where: str) -> None:
    at = f"{where}: tensor {tensor.name!r}"
    needed = _needed_bytes(tensor, at)
    if tensor.raw_bytes is not None:
        if needed is not None and tensor.raw_bytes != needed:
            raise _does_not_fit(at, tensor, f"{tensor.raw_bytes} bytes of data")
    elif tensor.data_type in _ONE_ENTRY_EACH and tensor.typed_elements != math.prod(tensor.dims):
        raise _does_not_fit(at, tensor, f"{tensor.typed_elements} values")


def _needed_bytes(tensor: StoredTensor, at: str) -> int | None:
    """Bytes that the shape takes, or None for strings and types that came later."""
    if any(size < 0 for size in tensor.dims):
        raise _does_not_fit(at, tensor, "a negative size")
    bits = _ELEMENT_BITS.get(tensor.data_type)
    return None if bits is None else (math.prod(tensor.dims) * bits + 7) // 8


def _values(tensor: StoredTensor, key: str) -> list[str]:
    return [value for name, value in tensor.external if name == key]


def _number(text: str, at: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InputError(
            "an offset or length of external data is no number", where=at, got=repr(text[:100]), fix=_REFUSE
        )
    return int(text)


def _does_not_fit(at: str, tensor: StoredTensor, got: str) -> InputError:
    return InputError(
        "a tensor's shape does not fit its data",
        where=at,
        expected=f"data for shape {tensor.dims[:16]}, element type {tensor.data_type}",
        got=got,
        fix=_REFUSE,
    )
