"""State dicts that torch.save wrote, read as data: zip archives, and the format before torch 1.6; both are mapped."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO

from vlm_export.checkpoint.formats.pickle_data import (
    MAX_PICKLE_BYTES,
    Call,
    Global,
    Instance,
    PersistentId,
    load_pickle_data,
)
from vlm_export.checkpoint.formats.pickled_tensors import (
    TensorReader,
    load_archive_pickle,
    storage_from_id,
    tensor_call,
)
from vlm_export.checkpoint.formats.tensors import StoredTensors, stored_views
from vlm_export.checkpoint.formats.zipcheck import Member, ZipMembers
from vlm_export.checkpoint.seen_file import SeenFile
from vlm_export.errors import InputError
from vlm_export.text_display import shown

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params")
"""Names under which training scripts wrap the state dict, the likeliest first."""
_USUAL = WRAPPERS[:2]
# What training keeps beside the model.
_COPIES = re.compile(r"(^|[._])(ema|swa|averaged?|shadow|momentum|teacher)([._]|$)")
_MAX_NESTING = 4
# Nothing that a pickle names is ever looked up or called, whatever it is. But no trainer's file calls one of these: a
# file that does is made to do harm in other readers, and is refused as a whole.
# fmt: off
_ACTING_MODULES = frozenset((
    "os", "posix", "nt", "posixpath", "ntpath", "subprocess", "sys", "shutil", "socket", "pty", "runpy", "importlib",
    "ctypes", "webbrowser", "pickle", "_pickle", "code", "codeop", "commands", "multiprocessing", "threading",
    "asyncio", "urllib", "http", "ftplib", "smtplib", "requests", "pip", "pydoc", "timeit", "cProfile", "profile",
    "pdb", "bdb", "trace", "_thread", "tempfile", "marshal", "zipimport", "pkgutil", "site",
))
_ACTING_BUILTINS = frozenset((
    "eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "globals", "locals", "vars",
    "setattr", "delattr", "apply",
))
# fmt: on
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
    if name.module in ("builtins", "__builtin__"):
        return name.name not in _ACTING_BUILTINS
    return name.module.split(".", 1)[0] not in _ACTING_MODULES


def _stored(file: SeenFile, root: Any, reader: TensorReader) -> StoredTensors:
    views = {}
    weights, notes = _unwrap(file, root)
    for key, value in weights.items():
        if (call := tensor_call(value)) is None:
            raise reader.error(key, "a dense tensor with its own elements", str(value.function))
        views[key] = reader.view(key, call)
    return replace(stored_views("state_dict", file, views), notes=notes)


def _unwrap(file: SeenFile, loaded: Any) -> tuple[Mapping[str, Call], tuple[str, ...]]:
    """The state dict itself, taken out of what training wrapped around it, and a note where there was a choice."""
    path: list[str] = []
    notes: list[str] = []
    for _ in range(_MAX_NESTING):
        if not isinstance(loaded, dict) or _is_state_dict(loaded) or (name := _wrapper(loaded)) is None:
            break
        path.append(name)
        others = [shown(key) for key, value in loaded.items() if key != name and _leads_to_weights(value)]
        beside = f"; {', '.join(map(repr, others[:8]))} beside it was not" if others else ""
        if others or name not in _USUAL:
            notes.append(f"the state dict under {'.'.join(map(shown, path))!r} was read{beside}")
        loaded = loaded[name]
    _check_state_dict(file, loaded, path)
    return loaded, tuple(notes)


def _wrapper(loaded: Mapping[Any, Any]) -> str | None:
    """The name under which the weights stand; None where nothing tells it."""
    found = [key for key, value in loaded.items() if isinstance(key, str) and _leads_to_weights(value)]
    if usual := [name for name in WRAPPERS if name in found]:
        return usual[0]
    own = [key for key in found if not _COPIES.search(key)] or found
    if len(own) == 1:
        return own[0]
    if any(_is_named_tensor(key, value) for key, value in loaded.items()):
        return None
    # What is in it says what is wrong.
    return next((name for name in WRAPPERS if isinstance(loaded.get(name), dict | Instance)), None)


def _leads_to_weights(value: Any, depth: int = _MAX_NESTING) -> bool:
    """Whether it is a state dict, or wraps one."""
    if not isinstance(value, dict) or depth == 0:
        return False
    return _is_state_dict(value) or any(_leads_to_weights(value.get(name), depth - 1) for name in WRAPPERS)


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(_is_named_tensor(key, item) for key, item in value.items())


def _check_state_dict(file: SeenFile, loaded: Any, path: list[str]) -> None:
    """InputError when it is anything else."""
    where = f"{file}: {shown('.'.join(path))}" if path else str(file)
    if isinstance(loaded, Instance):
        raise InputError(
            f"the .pt file holds a whole pickled object of the class {shown(str(loaded.cls))}, not named tensors; "
            "nothing of it was run",
            where=where,
            expected="a state dict",
            got=f"an object of the class {shown(str(loaded.cls))}",
            fix="load it with the code that made it, save model.state_dict() with torch.save or safetensors, and name "
            "that file",
        )
    if not isinstance(loaded, dict):
        raise InputError("the .pt file holds no state dict", where=where, got=_kind(loaded), fix=_SAVE)
    others = [
        f"{shown(str(key))} ({_kind(value)})" for key, value in loaded.items() if not _is_named_tensor(key, value)
    ]
    if others or not loaded:
        wrapped = [shown(key) for key, value in loaded.items() if isinstance(key, str) and _leads_to_weights(value)]
        raise InputError(
            "the .pt file holds several state dicts, and none of them under a usual name"
            if len(wrapped) > 1
            else "the .pt file holds more than named tensors"
            if others
            else "the .pt file holds an empty state dict",
            where=where,
            expected=f"a state dict, or a state dict under {' or '.join(map(repr, WRAPPERS))}",
            got=", ".join(wrapped if len(wrapped) > 1 else others[:20])
            + (f" … and {len(others) - 20} more" if len(others) > 20 else ""),
            fix=_SAVE,
        )


_SAVE = "save the model's state_dict() alone"


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Call) and value.function.name.startswith("_rebuild_")


def _kind(value: object) -> str:
    return shown(str(value.function if isinstance(value, Call) else type(value).__name__))
