"""TorchScript archives (OpenAI's downloads) as data: tensors by dotted name, memory-mapped; no code of it is run.

The module tree is `data.pkl`: an object per module whose state is a dict of attributes. Class names and code differ
from one archive to another and are not looked at.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_export.checkpoint.pickle_data import (
    MAX_PICKLE_BYTES,
    Call,
    Global,
    Instance,
    PersistentId,
    load_pickle_data,
)
from vlm_export.checkpoint.tensors import MAX_RANK, MAX_TENSORS, StoredTensors, check_stored_bytes
from vlm_export.checkpoint.zipcheck import Member, ZipMembers
from vlm_export.errors import InputError
from vlm_export.family import TensorInfo

_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_INERT = {
    Global("collections", "OrderedDict"),
    Global("torch", "device"),
    Global("builtins", "complex"),
    *(
        Global("torch.jit._pickle", name)
        for name in (
            "build_intlist",
            "build_tensorlist",
            "build_doublelist",
            "build_boollist",
            "build_tensor_from_id",
            "restore_type_tag",
        )
    ),
}
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_DEPTH = 100
_MAX_VISITS = 300_000
_MAX_NAME_CHARACTERS = 1000


@dataclass(frozen=True)
class _View:
    """Where a tensor's elements are: `size` and `stride` from element `start` of the storage in `member`."""

    dtype: torch.dtype
    member: Member
    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


def read_torchscript(archive: ZipMembers) -> StoredTensors:
    """The parameters and buffers of the archive's module, by dotted name.

    Raises:
        InputError: the pickle names foreign code, or a tensor reaches outside its member of the archive.
    """
    where = f"{archive.path}: {archive.top}/data.pkl"
    byte_order = archive.read("byteorder", 16) if "byteorder" in archive.members else b"little"
    if byte_order != b"little":
        raise InputError("the archive is not little-endian", where=str(archive.path), got=repr(byte_order))
    root = load_pickle_data(archive.read("data.pkl", MAX_PICKLE_BYTES), where, _is_allowed)
    reader = _TensorReader(archive, where)
    views: dict[str, _View] = {}
    for key, call in _named_tensors(root, where):
        if key in views or len(views) >= MAX_TENSORS:
            raise InputError("a tensor stands twice in the archive, or there are too many", where=f"{where}: {key}")
        views[key] = reader.view(key, call)
    if not views:
        raise InputError("the TorchScript archive holds no tensors", where=where, got=type(root).__name__)
    tensors = {key: TensorInfo(view.size, str(view.dtype).removeprefix("torch.")) for key, view in views.items()}
    check_stored_bytes(archive.path, sum(math.prod(v.size) * v.dtype.itemsize for v in views.values()))
    return StoredTensors("torchscript", tensors, _MappedViews(archive, views))


class _MappedViews:
    """key → the tensor, on one private mapping of the file that opens at the first read."""

    def __init__(self, archive: ZipMembers, views: Mapping[str, _View]) -> None:
        self.archive, self.views = archive, views
        self.mapping: mmap.mmap | None = None

    def __call__(self, key: str) -> Tensor:
        view = self.views[key]
        if view.span == 0:
            return torch.empty(view.size, dtype=view.dtype)
        if self.mapping is None:
            # Copy-on-write, as torch.load(mmap=True) maps: nobody can write into the checkpoint through a tensor.
            with self.archive.path.open("rb") as file:
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        offset = view.member.offset + view.start * view.dtype.itemsize
        flat = torch.frombuffer(self.mapping, dtype=view.dtype, count=view.span, offset=offset)
        tensor = flat.as_strided(view.size, view.stride)
        # Old archives do not align every storage; kernels expect it.
        return tensor if offset % view.dtype.itemsize == 0 else tensor.clone()


def _is_allowed(name: Global) -> bool:
    if name.module == "__torch__" or name.module.startswith("__torch__."):
        return True
    if name.module == "torch" and name.name in _STORAGE_DTYPES:
        return True
    return name in _INERT or name in (_REBUILD_TENSOR, _REBUILD_PARAMETER)


def _named_tensors(root: Any, where: str) -> Iterator[tuple[str, Call]]:
    """The tensors among the modules' attributes, depth first; shared modules appear under each of their names."""
    # Bounded, because a small pickle can nest itself, or refer to one module from two attributes 60 times over.
    pending = [("", root, 0)]
    visits = 0
    while pending:
        prefix, node, depth = pending.pop()
        if not isinstance(node, Instance) or not isinstance(node.state, dict):
            continue
        children = []
        for name, value in node.state.items():
            visits += 1
            if visits > _MAX_VISITS or depth > _MAX_DEPTH:
                raise InputError("the TorchScript archive nests its modules without end", where=where)
            if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME_CHARACTERS:
                raise InputError("the TorchScript archive has an attribute without a proper name", where=where)
            key = prefix + name
            if isinstance(value, Instance):
                children.append((f"{key}.", value, depth + 1))
            elif (call := _unwrap_parameter(value)) is not None:
                yield key, call
        pending.extend(reversed(children))


def _unwrap_parameter(value: Any) -> Call | None:
    if isinstance(value, Call) and value.function == _REBUILD_PARAMETER and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, Call) and value.function == _REBUILD_TENSOR else None


@dataclass(frozen=True)
class _TensorReader:
    """Turns the arguments of `_rebuild_tensor_v2` into a checked `_View`."""

    archive: ZipMembers
    where: str

    def view(self, key: str, call: Call) -> _View:
        if len(call.arguments) < 4:
            raise self._error(key, "storage, offset, size and stride", f"{len(call.arguments)} arguments")
        storage, start, size, stride = call.arguments[:4]
        dtype, member, elements = self._storage(key, storage)
        if not _are_counts((start,)) or not _are_counts(size) or not _are_counts(stride) or len(size) != len(stride):
            raise self._error(key, "an offset, sizes and strides that are not negative", "something else")
        if len(size) > MAX_RANK:
            raise self._error(key, f"at most {MAX_RANK} axes", f"{len(size)}")
        view = _View(dtype, member, start, size, stride)
        # A tensor larger than its storage is an expanded one; weights are not.
        if start + view.span > elements or math.prod(size) > elements:
            raise self._error(
                key, f"elements within its storage of {elements}", f"shape {size}, stride {stride}, offset {start}"
            )
        return view

    def _storage(self, key: str, storage: Any) -> tuple[torch.dtype, Member, int]:
        value = storage.value if isinstance(storage, PersistentId) else None
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage" or not _are_counts(value[4:]):
            raise self._error(key, "a storage in the archive", type(value).__name__)
        _, kind, name, _, elements = value
        if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in _STORAGE_DTYPES:
            raise self._error(key, f"one of {', '.join(_STORAGE_DTYPES)}", "another storage")
        dtype = _STORAGE_DTYPES[kind.name]
        if not isinstance(name, str) or (member := self.archive.members.get(f"data/{name}")) is None:
            raise self._error(key, "a storage in the archive", "a name that the archive lacks")
        if member.deflated or elements * dtype.itemsize > member.size_bytes:
            kept = "deflated" if member.deflated else f"{member.size_bytes} bytes"
            raise self._error(key, f"{elements * dtype.itemsize} bytes, stored uncompressed", kept)
        return dtype, member, elements

    def _error(self, key: str, expected: str, got: str) -> InputError:
        return InputError(
            "a tensor of the archive is damaged",
            where=f"{self.where}: tensor {key}",
            expected=expected,
            got=got,
            fix="get the checkpoint from its publisher",
        )


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**48 for value in values)
