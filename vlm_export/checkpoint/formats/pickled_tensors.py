"""Tensors as torch pickles them: a call that rebuilds a tensor from a storage, read as where its elements are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_export.checkpoint.formats.pickle_data import (
    MAX_PICKLE_BYTES,
    Call,
    Global,
    GlobalPolicy,
    PersistentId,
    load_pickle_data,
)
from vlm_export.checkpoint.formats.tensors import MAX_RANK, View
from vlm_export.checkpoint.formats.zipcheck import Member, ZipMembers
from vlm_export.errors import InputError

UNTYPED_STORAGE = Global("torch.storage", "UntypedStorage")
_STORAGE_DTYPES = {
    Global("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
DTYPES = {Global("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# Arguments in order: storage, offset, size, stride, requires_grad, hooks; then [metadata], or dtype and [metadata].
_REBUILD_OLD_TENSOR = Global("torch._utils", "_rebuild_tensor")
_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_REBUILD_PARAMETER_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
_REBUILD_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_REBUILD_PLAIN = {_REBUILD_OLD_TENSOR, _REBUILD_TENSOR, _REBUILD_UNTYPED}
_REBUILDS = {*_REBUILD_PLAIN, _REBUILD_PARAMETER, _REBUILD_PARAMETER_WITH_STATE, _REBUILD_FROM_TYPE}
# Other tensors, which are named in the error: without elements of their own, or of several parts.
_OTHER_REBUILDS = {
    Global("torch._utils", f"_rebuild_{kind}")
    for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage", "wrapper_subclass")
}
_WEIGHTS_GLOBALS = {*_STORAGE_DTYPES, *_REBUILDS, *_OTHER_REBUILDS, Global("collections", "OrderedDict")}
_MAX_WRAPPERS = 4


@dataclass(frozen=True)
class StorageId:
    """A storage that a pickle refers to; `dtype` is None where its elements are bytes."""

    dtype: torch.dtype | None
    name: str
    elements: int

    @property
    def size_bytes(self) -> int:
        return self.elements * (1 if self.dtype is None else self.dtype.itemsize)


def is_weights_global(name: Global) -> bool:
    """Whether tensors consist of it."""
    return name in _WEIGHTS_GLOBALS


def load_archive_pickle(archive: ZipMembers, allow: GlobalPolicy) -> tuple[Any, TensorReader]:
    """The data of the archive's `data.pkl`, and the reader of the tensors in it.

    Raises:
        InputError: the archive is not little-endian, or see `load_pickle_data`.
    """
    byte_order = archive.read("byteorder", 16) if "byteorder" in archive.members else b"little"
    if byte_order != b"little":
        raise InputError("the archive is not little-endian", where=str(archive.file), got=repr(byte_order))
    where = f"{archive.file}: {archive.top}/data.pkl"
    root = load_pickle_data(archive.read("data.pkl", MAX_PICKLE_BYTES), where, allow)
    prefix = "data/"
    storages = {name.removeprefix(prefix): m for name, m in archive.members.items() if name.startswith(prefix)}
    return root, TensorReader(where, storages)


def storage_from_id(value: Any) -> StorageId | None:
    """The storage that a persistent id names, or None when it names none.

    Args:
        value: ("storage", class, name, device, elements); the format before torch 1.6 adds None.
    """
    if not isinstance(value, tuple) or not (len(value) == 5 or (len(value) == 6 and value[5] is None)):
        return None
    tag, kind, name, _, elements = value[:5]
    if tag != "storage" or not isinstance(name, str) or not _are_counts((elements,)):
        return None
    if not isinstance(kind, Global) or (kind != UNTYPED_STORAGE and kind not in _STORAGE_DTYPES):
        return None
    return StorageId(_STORAGE_DTYPES.get(kind), name, elements)


def tensor_call(value: Any) -> Call | None:
    """The call that rebuilds a tensor, without the parameter around it; None when `value` is something else."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(value, Call) or value.function not in _REBUILDS:
            return None
        arguments = value.arguments
        if value.function in _REBUILD_PLAIN:
            return value
        if value.function == _REBUILD_FROM_TYPE:
            # A tensor with attributes of its own: function, class, arguments, attributes.
            if len(arguments) < 3 or not isinstance(arguments[0], Global) or not isinstance(arguments[2], tuple):
                return None
            value = Call(arguments[0], arguments[2])
        else:
            value = arguments[0] if arguments else None
    return None


@dataclass(frozen=True)
class TensorReader:
    """Turns the calls that rebuild tensors into checked Views.

    Attributes:
        where: the pickle, for errors.
        storages: storage's name → its bytes in the file.
    """

    where: str
    storages: Mapping[str, Member]

    def view(self, key: str, call: Call) -> View:
        """Where the tensor's elements are; InputError when they reach outside its storage, or are not plain ones."""
        arguments = call.arguments
        if not 4 <= len(arguments) <= 8:
            raise self.error(key, "storage, offset, size and stride", f"{len(arguments)} arguments")
        storage, start, size, stride = arguments[:4]
        stated, metadata = (arguments[6:7], arguments[7:]) if call.function == _REBUILD_UNTYPED else ((), arguments[6:])
        if any(metadata):
            raise self.error(key, "elements as they are stored", "a conjugated or negated view of others")
        dtype, member, elements = self._storage(key, storage, stated)
        if not _are_counts((start,)) or not _are_counts(size) or not _are_counts(stride) or len(size) != len(stride):
            raise self.error(key, f"an offset, and {MAX_RANK} sizes and strides at most, none negative", "others")
        view = View(dtype, member.offset + start * dtype.itemsize, size, stride)
        # A tensor larger than its storage is an expanded one; weights are not.
        if start + view.span > elements or math.prod(size) > elements:
            raise self.error(
                key, f"elements within its storage of {elements}", f"shape {size}, stride {stride}, offset {start}"
            )
        return view

    def _storage(self, key: str, storage: Any, stated: tuple[Any, ...]) -> tuple[torch.dtype, Member, int]:
        """The dtype, bytes and number of elements; `stated` is the dtype of a tensor whose storage has none."""
        found = storage_from_id(storage.value) if isinstance(storage, PersistentId) else None
        if found is None:
            raise self.error(key, "a storage of the archive", type(storage).__name__)
        named = [DTYPES.get(name) for name in stated if isinstance(name, Global)]
        dtypes = [dtype for dtype in (found.dtype, *named) if dtype is not None]
        if len(dtypes) != 1:
            raise self.error(key, "one dtype, the storage's or the tensor's", f"{len(dtypes)}")
        if (member := self.storages.get(found.name)) is None:
            raise self.error(key, "a storage of the archive", "a name that the archive lacks")
        if member.deflated or found.size_bytes > member.size_bytes:
            kept = "deflated" if member.deflated else f"{member.size_bytes} bytes"
            raise self.error(key, f"{found.size_bytes} bytes, stored uncompressed", kept)
        return dtypes[0], member, found.size_bytes // dtypes[0].itemsize

    def error(self, key: str, expected: str, got: str) -> InputError:
        """The error for the tensor that is stored as `key`."""
        return InputError(
            "a tensor of the checkpoint is damaged, or is not a plain dense one",
            where=f"{self.where}: tensor {key[:200]}",
            expected=expected,
            got=got[:300],
            fix="get the checkpoint from its publisher; where you trust it, save its state dict again",
        )


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= MAX_RANK
        and all(type(value) is int and 0 <= value < 2**48 for value in values)
    )
