"""State dicts that torch.save wrote, read as data: zip archives, and the format before torch 1.6; both are mapped."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO

from vlm_export.checkpoint.pickle_data import MAX_PICKLE_BYTES, Call, Global, PersistentId, load_pickle_data
from vlm_export.checkpoint.pickled_tensors import (
    DTYPES,
    UNTYPED_STORAGE,
    TensorReader,
    is_weights_global,
    load_archive_pickle,
    storage_from_id,
    tensor_call,
)
from vlm_export.checkpoint.seen_file import SeenFile
from vlm_export.checkpoint.tensors import StoredTensors, stored_views
from vlm_export.checkpoint.zipcheck import Member, ZipMembers
from vlm_export.errors import InputError

WRAPPERS = ("model", "state_dict")
"""Names under which training scripts wrap the state dict; exactly these are unwrapped."""
# What stands beside weights in trainers' files, as torch's own weights-only reader takes it: plain data of other types.
_PLAIN_DATA = {
    UNTYPED_STORAGE,
    Global("collections", "Counter"),
    Global("torch", "Size"),
    Global("torch", "device"),
    Global("torch", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.serialization", "_get_layout"),
    Global("_codecs", "encode"),
    *(Global(module, name) for module in ("__builtin__", "builtins") for name in ("set", "bytearray", "complex")),
    *(Global("torch", f"per_{kind}_{form}") for kind in ("tensor", "channel") for form in ("affine", "symmetric")),
    *(Global("torch", f"{kind}Storage") for kind in ("QInt8", "QUInt8", "QInt32")),
}
_LEGACY_PROTOCOL = 1001
_LENGTH = struct.Struct("<q")


def read_state_dict(archive: ZipMembers) -> StoredTensors:
    """The tensors of a zip archive that torch.save wrote.

    Raises:
        InputError: the pickle holds anything but tensors in plain containers, or is damaged.
    """
    deflated = [name for name, member in archive.members.items() if member.deflated]
    if deflated:
        raise InputError(
            "the archive is compressed, which torch.save never does",
            where=f"{archive.file}: {archive.top}/{deflated[0]}",
            expected="stored members",
            got=f"{len(deflated)} deflated members",
            fix="load and save it again with torch where you trust it, or get it from its publisher",
        )
    return _stored(archive.file, *load_archive_pickle(archive, _is_allowed))


def read_legacy_state_dict(file: SeenFile) -> StoredTensors:
    """The tensors of a file that torch.save wrote before torch 1.6: five pickles, then the storages.

    Raises:
        InputError: as `read_state_dict`.
    """
    where = f"{file}: pickle"
    ids: list[PersistentId] = []

    def remember(value: Any) -> PersistentId:
        ids.append(PersistentId(value))
        return ids[-1]

    with file.open() as opened:
        stream = BytesIO(opened.read(min(MAX_PICKLE_BYTES, file.size_bytes)))
        load = partial(load_pickle_data, stream, where, _is_allowed)
        _, protocol, system = load(), load(), load()
        if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise InputError("the file is not one that torch wrote on a little-endian machine", where=where)
        root = load(remember)
        names = load()
        storages = dict(_legacy_storages(file, opened, stream.tell(), names, ids))
    return _stored(file, root, TensorReader(where, storages))


def _legacy_storages(
    file: SeenFile, opened: BinaryIO, position: int, names: Any, ids: list[PersistentId]
) -> Iterator[tuple[str, Member]]:
    """Each storage's name and bytes, in their order in the file: the number of elements, then the elements."""
    named = {found.name: found for found in (storage_from_id(record.value) for record in ids) if found is not None}
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or name not in named:
            raise InputError("the file lists a storage that no tensor has", where=str(file))
        opened.seek(position)
        raw = opened.read(_LENGTH.size)
        position += _LENGTH.size
        size_bytes = named[name].size_bytes
        if len(raw) < _LENGTH.size or position + size_bytes > file.size_bytes:
            raise InputError(
                "the .pt file is cut off",
                where=str(file),
                expected=f"{size_bytes} bytes of a storage at byte {position}",
                got=f"a file of {file.size_bytes} bytes",
                fix="download or copy the file again and compare its size and sha256 with its publisher's",
            )
        if _LENGTH.unpack(raw)[0] != named[name].elements:
            raise InputError("the .pt file is damaged: a storage has not its stated size", where=str(file))
        yield name, Member(position, size_bytes, size_bytes, deflated=False)
        position += size_bytes


def _is_allowed(name: Global) -> bool:
    return is_weights_global(name) or name in _PLAIN_DATA or name in DTYPES


def _stored(file: SeenFile, root: Any, reader: TensorReader) -> StoredTensors:
    views = {}
    for key, value in _unwrap(file, root).items():
        if (call := tensor_call(value)) is None:
            raise reader.error(key, "a dense tensor with its own elements", str(value.function))
        views[key] = reader.view(key, call)
    return stored_views("state_dict", file, views)


def _unwrap(file: SeenFile, loaded: Any) -> Mapping[str, Call]:
    """The state dict itself, taken out of one of `WRAPPERS` where there is one."""
    if isinstance(loaded, dict):
        loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    if not isinstance(loaded, dict):
        raise InputError("the .pt file holds no state dict", where=str(file), got=_kind(loaded))
    others = [f"{key!s:.80} ({_kind(value)})" for key, value in loaded.items() if not _is_named_tensor(key, value)]
    if others or not loaded:
        raise InputError(
            "the .pt file holds more than named tensors" if others else "the .pt file holds an empty state dict",
            where=str(file),
            expected=f"a state dict, or a state dict under {' or '.join(map(repr, WRAPPERS))}",
            got=", ".join(others[:20]) + (f" … and {len(others) - 20} more" if len(others) > 20 else ""),
            fix="save the model's state_dict() alone",
        )
    return loaded


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Call) and value.function.name.startswith("_rebuild_")


def _kind(value: object) -> str:
    return str(value.function if isinstance(value, Call) else type(value).__name__)
