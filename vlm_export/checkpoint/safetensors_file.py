"""safetensors files, alone or as shards with an index: header checked here, tensors memory-mapped by safetensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.checkpoint.identify import error_from_bad_file, identify_weights
from vlm_export.checkpoint.names import check_plain_name
from vlm_export.checkpoint.tensors import MAX_RANK, MAX_TENSORS, StoredTensors
from vlm_export.errors import InputError
from vlm_export.family import TensorInfo

INDEX_SUFFIX = ".safetensors.index.json"
# safetensors itself stops at 100 MB; the header of a 100 000-tensor file has 12 MB.
MAX_HEADER_BYTES = 16 << 20
MAX_SHARDS = 10_000
_LENGTH = struct.Struct("<Q")
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def read_safetensors(path: Path) -> StoredTensors:
    """The tensors of one file.

    Raises:
        InputError: the file is cut off, too long, damaged or something else; the real cause is named.
    """
    tensors = _read_header(path)
    return StoredTensors("safetensors", tensors, _Shards(dict.fromkeys(tensors, path)))


def read_sharded(directory: Path, shards: Mapping[str, str]) -> StoredTensors:
    """The tensors that the index places in `shards` (key → file name, as `read_index` gives it)."""
    headers = {name: _read_header(directory / name) for name in sorted(set(shards.values()))}
    misplaced = [f"{key} in {name}" for key, name in shards.items() if key not in headers[name]]
    unlisted = [f"{key} in {name}" for name, header in headers.items() for key in header if shards.get(key) != name]
    if misplaced or unlisted:
        raise InputError(
            "the index and the shards disagree",
            where=str(directory),
            expected="each key in the shard that the index names, and no other keys",
            got=f"{len(misplaced)} absent {misplaced[:3]}, {len(unlisted)} unlisted {unlisted[:3]}",
            fix="download the index and all shards again, from one revision",
        )
    tensors = {key: headers[name][key] for key, name in shards.items()}
    return StoredTensors("safetensors", tensors, _Shards({key: directory / name for key, name in shards.items()}))


def read_index(path: Path) -> dict[str, str]:
    """key → shard of a `*.index.json`, each shard a plain name; whether it is there, `check_present` says.

    Raises:
        InputError: the index is malformed, or a shard's name leaves the directory.
    """
    if path.stat().st_size == 0:
        raise error_from_bad_file(path)
    weight_map = json_object_from_bytes(read_bounded(path), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("the index has no weight_map", where=str(path), expected="key → file name of the shard")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS or len(weight_map) > MAX_TENSORS:
        raise InputError("the index is too large", where=str(path), got=f"{len(weight_map)} keys, {len(names)} shards")
    for name in names:
        check_plain_name(name, where=str(path))
    return weight_map


def check_present(index: Path, shards: Mapping[str, str]) -> None:
    """InputError when one of the shards is no file beside the index."""
    names = sorted(set(shards.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise InputError(
                "a shard that the index names is not there",
                where=str(index),
                expected=f"the file {name}",
                got=f"no such file; {len(names)} shards are needed",
                fix="download the missing shard into the same directory",
            )


def read_bounded(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """The first `max_bytes` of a file and one more, so that a larger one is noticed and never read whole."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise InputError("a file of the checkpoint cannot be read", where=str(path), got=str(error)) from error


@dataclass
class _Shards:
    """key → the tensor; each file is mapped when its first tensor is read, and stays so."""

    paths: Mapping[str, Path]
    opened: dict[Path, Any] = field(default_factory=dict)

    def __call__(self, key: str) -> Tensor:
        path = self.paths[key]
        try:
            if path not in self.opened:
                self.opened[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self.opened[path].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError("a safetensors file is damaged", where=f"{path}: {key}", got=str(error)) from error
        return tensor


def _read_header(path: Path) -> dict[str, TensorInfo]:
    if identify_weights(path) != "safetensors":
        raise error_from_bad_file(path)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        (header_bytes,) = _LENGTH.unpack(file.read(_LENGTH.size))
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - _LENGTH.size):
            raise _damaged(
                path,
                f"a header of at most {MAX_HEADER_BYTES} bytes within the file",
                f"a stated header of {header_bytes} bytes in a file of {file_bytes} bytes",
            )
        header = json_object_from_bytes(file.read(header_bytes), f"{path}: header")
    header.pop("__metadata__", None)
    if not header or len(header) > MAX_TENSORS:
        raise _damaged(path, f"1 to {MAX_TENSORS} tensors", f"{len(header)}")
    _check_extent(path, header, _LENGTH.size + header_bytes, file_bytes)
    return {key: _info(path, key, entry) for key, entry in header.items()}


def _check_extent(path: Path, header: Mapping[str, Any], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the file exactly, one after the other."""
    offsets = [entry.get("data_offsets") if isinstance(entry, dict) else None for entry in header.values()]
    spans = [tuple(o) for o in offsets if isinstance(o, list) and len(o) == 2 and all(type(v) is int for v in o)]
    if len(spans) != len(offsets):
        raise _damaged(path, "data_offsets of two integers for each tensor", f"{len(offsets) - len(spans)} without")
    position = 0
    for begin, end in sorted(spans):
        if begin != position or end < begin:
            raise _damaged(path, f"a tensor that starts at byte {position} of the data", f"bytes {begin} to {end}")
        position = end
    expected = data_start + position
    if file_bytes != expected:
        cause = "the file is cut off" if file_bytes < expected else "bytes follow the last tensor"
        raise _damaged(path, f"{expected} bytes", f"{file_bytes} bytes: {cause}")


def _info(path: Path, key: str, entry: Mapping[str, Any]) -> TensorInfo:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(path, f"{key}: one of {', '.join(_DTYPES)}", f"dtype {dtype!r:.50}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise _damaged(path, f"{key}: a shape of at most {MAX_RANK} sizes", f"{shape!r:.100}")
    name, item_bytes = _DTYPES[dtype]
    begin, end = entry["data_offsets"]
    if math.prod(shape) * item_bytes != end - begin:
        raise _damaged(path, f"{key}: {math.prod(shape) * item_bytes} bytes for {dtype} {shape}", f"{end - begin}")
    return TensorInfo(tuple(shape), name)


def _damaged(path: Path, expected: str, got: str) -> InputError:
    return InputError(
        "the safetensors file is damaged",
        where=str(path),
        expected=expected,
        got=got,
        fix="download it again and compare its size and sha256 with its publisher's",
    )
