"""safetensors files and indexes of shards: the header is checked, the tensors are mapped where they lie.

The library `safetensors` reads them too, and is not used: it opens a file by its name, where another one may lie by
then, takes a key that stands twice for one, and does not tell a file that is cut off from one with bytes behind it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.checkpoint.formats.identify import error_from_bad_file, identify_weights
from vlm_export.checkpoint.formats.tensors import MAX_RANK, MAX_TENSORS, StoredTensors, View, stored_views
from vlm_export.checkpoint.names import check_plain_name
from vlm_export.checkpoint.seen_file import SeenFile, error_from_unreadable, see_file
from vlm_export.errors import InputError

INDEX_SUFFIX = ".safetensors.index.json"
# safetensors itself stops at 100 MB; the header of a 100 000-tensor file has 12 MB.
MAX_HEADER_BYTES = 16 << 20
MAX_SHARDS = 10_000
ReadPrefixes = Callable[[Collection[str]], tuple[str, ...]]
"""Keys of an index → the prefixes of those that are read; () when all are."""
_LENGTH = struct.Struct("<Q")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(file: SeenFile) -> StoredTensors:
    """The tensors of one file.

    Raises:
        InputError: the file is cut off, too long, damaged or something else; the real cause is named.
    """
    return stored_views("safetensors", file, _read_header(file))


def read_index(file: SeenFile) -> dict[str, str]:
    """key → shard of a `*.index.json`, each shard a plain name; whether it is there, `find_shards` says.

    Raises:
        InputError: the index is malformed, or a shard's name leaves the directory.
    """
    if file.size_bytes == 0:
        raise error_from_bad_file(file)
    weight_map = json_object_from_bytes(read_bounded(file), str(file)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("the index has no weight_map", where=str(file), expected="key → file name of the shard")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS or len(weight_map) > MAX_TENSORS:
        raise InputError("the index is too large", where=str(file), got=f"{len(weight_map)} keys, {len(names)} shards")
    for name in names:
        check_plain_name(name, where=str(file))
    return weight_map


def everything(keys: Collection[str]) -> tuple[str, ...]:
    """A ReadPrefixes: all keys are read."""
    return ()


def select_shards(shards: Mapping[str, str], reads: ReadPrefixes) -> tuple[dict[str, str], tuple[str, ...]]:
    """The entries of key → shard whose shard holds a key that is read, and the names of the other shards.

    A shard that is read keeps all its keys: its file is opened, and the index must agree with it.
    """
    prefixes = reads(shards)
    if not prefixes:
        return dict(shards), ()
    needed = {name for key, name in shards.items() if key.startswith(prefixes)}
    left_aside = sorted(set(shards.values()) - needed)
    return {key: name for key, name in shards.items() if name in needed}, tuple(left_aside)


def find_shards(index: SeenFile, shards: Mapping[str, str]) -> dict[str, SeenFile]:
    """The files beside the index that `shards` names, by name; InputError when one is not there."""
    names = sorted(set(shards.values()))
    for name in names:
        if not (index.path.parent / name).is_file():
            raise InputError(
                "a shard that the index names is not there",
                where=str(index),
                expected=f"the file {name}",
                got=f"no such file; {len(names)} shards are needed",
                fix="download the missing shard into the same directory",
            )
    return {name: see_file(index.path.parent / name) for name in names}


def read_bounded(file: SeenFile, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """The first `max_bytes` of a file and one more, so that a larger one is noticed and never read whole."""
    with file.open() as opened:
        try:
            return opened.read(max_bytes + 1)
        except OSError as error:
            raise error_from_unreadable(file.path, error) from error


def _read_header(file: SeenFile) -> dict[str, View]:
    if identify_weights(file) != "safetensors":
        raise error_from_bad_file(file)
    file_bytes = file.size_bytes
    with file.open() as opened:
        (header_bytes,) = _LENGTH.unpack(opened.read(_LENGTH.size))
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - _LENGTH.size):
            raise _damaged(
                file,
                f"a header of at most {MAX_HEADER_BYTES} bytes within the file",
                f"a stated header of {header_bytes} bytes in a file of {file_bytes} bytes",
            )
        header = json_object_from_bytes(opened.read(header_bytes), f"{file}: header")
    header.pop("__metadata__", None)
    if not header or len(header) > MAX_TENSORS:
        raise _damaged(file, f"1 to {MAX_TENSORS} tensors", f"{len(header)}")
    data_start = _LENGTH.size + header_bytes
    _check_extent(file, header, data_start, file_bytes)
    return {key: _view(file, key, entry, data_start) for key, entry in header.items()}


def _check_extent(file: SeenFile, header: Mapping[str, Any], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the file exactly, one after the other."""
    offsets = [entry.get("data_offsets") if isinstance(entry, dict) else None for entry in header.values()]
    spans = [tuple(o) for o in offsets if isinstance(o, list) and len(o) == 2 and all(type(v) is int for v in o)]
    if len(spans) != len(offsets):
        raise _damaged(file, "data_offsets of two integers for each tensor", f"{len(offsets) - len(spans)} without")
    position = 0
    for begin, end in sorted(spans):
        if begin != position or end < begin:
            raise _damaged(file, f"a tensor that starts at byte {position} of the data", f"bytes {begin} to {end}")
        position = end
    expected = data_start + position
    if file_bytes != expected:
        cause = "the file is cut off" if file_bytes < expected else "bytes follow the last tensor"
        raise _damaged(file, f"{expected} bytes", f"{file_bytes} bytes: {cause}")


def _view(file: SeenFile, key: str, entry: Mapping[str, Any], data_start: int) -> View:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(file, f"{key}: one of {', '.join(DTYPES)}", f"dtype {dtype!r:.50}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise _damaged(file, f"{key}: a shape of at most {MAX_RANK} sizes", f"{shape!r:.100}")
    item_bytes = DTYPES[dtype].itemsize
    begin, end = entry["data_offsets"]
    if math.prod(shape) * item_bytes != end - begin:
        raise _damaged(file, f"{key}: {math.prod(shape) * item_bytes} bytes for {dtype} {shape}", f"{end - begin}")
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return View(DTYPES[dtype], data_start + begin, tuple(shape), stride)


def _damaged(file: SeenFile, expected: str, got: str) -> InputError:
    return InputError(
        "the safetensors file is damaged",
        where=str(file),
        expected=expected,
        got=got,
        fix="download it again and compare its size and sha256 with its publisher's",
    )
