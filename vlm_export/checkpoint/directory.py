"""Hugging Face directories: config as data, weights by precedence, tokenizer files; and directories of one file.

A hub cache links its files to blobs elsewhere, so links are followed for reading; but a name that the checkpoint
itself states never leaves the directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.checkpoint.identify import error_from_bad_file
from vlm_export.checkpoint.names import is_plain_name
from vlm_export.checkpoint.safetensors_file import (
    INDEX_SUFFIX,
    check_present,
    read_bounded,
    read_index,
    read_sharded,
)
from vlm_export.checkpoint.shards import ReadPrefixes, everything, select_shards
from vlm_export.checkpoint.tensors import StoredTensors
from vlm_export.checkpoint.weights_file import read_weights_file
from vlm_export.errors import InputError
from vlm_export.family import TensorInfo

CONFIG_FILE = "config.json"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"
# The first that is there is read, the others are not.
WEIGHTS_PRECEDENCE = (
    "model.safetensors",
    f"model{INDEX_SUFFIX}",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_OPENAI_CLIP_KEY = "visual.conv1.weight"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
)
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Keys that make transformers import or download code: CVE-2026-4372, CVE-2026-5241, CVE-2026-9856.
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code", "kernel_config", "use_kernels"})
_CODE_KEY_PARTS = ("attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class Directory:
    """What a directory holds, before any tensor file is opened.

    Attributes:
        weights: the file that is read, or the index that names the shards.
        shards: key → shard, where `weights` is an index; without the shards left aside.
        left_aside: shards that hold nothing that is read; they need not be there.
        config: `config.json` without the keys that name code, or None.
        side_files: tokenizer and preprocessing files by name.
    """

    path: Path
    weights: Path
    shards: Mapping[str, str]
    left_aside: tuple[str, ...]
    config: Mapping[str, Any] | None
    side_files: Mapping[str, Path]

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold tensors."""
        names = sorted(set(self.shards.values()))
        return [self.path / name for name in names] or [self.weights]

    @property
    def files(self) -> list[Path]:
        """Every file that is read: config, index, weights, side files."""
        config = [self.path / CONFIG_FILE] if self.config is not None else []
        index = [self.weights] if self.shards else []
        return [*config, *index, *self.weight_files, *self.side_files.values()]


def scan_directory(path: Path, reads: ReadPrefixes = everything) -> Directory:
    """Finds config, weights and side files.

    Args:
        reads: which keys of an index are read.

    Raises:
        InputError: no weights or several, a missing shard, a malformed config or index, or a name that leaves the
            directory.
    """
    weights = _find_weights(path)
    config_path = path / CONFIG_FILE
    side_files = {name: path / name for name in SIDE_FILES if (path / name).is_file()}
    if "tokenizer_config.json" in side_files:
        _check_templates(side_files["tokenizer_config.json"])
    shards, left_aside = _scan_shards(weights, reads) if weights.name.endswith(".index.json") else ({}, ())
    return Directory(
        path=path,
        weights=weights,
        shards=shards,
        left_aside=left_aside,
        config=_without_code(_read_json(config_path)) if config_path.is_file() else None,
        side_files=side_files,
    )


def scan_index(index: Path, reads: ReadPrefixes = everything) -> Directory:
    """The Directory around an index that the user named, instead of the weights that come first there."""
    return Directory(index.parent, index, *_scan_shards(index, reads), None, {})


def _scan_shards(index: Path, reads: ReadPrefixes) -> tuple[dict[str, str], tuple[str, ...]]:
    shards, left_aside = select_shards(read_index(index), reads)
    check_present(index, shards)
    return shards, left_aside


def read_directory(directory: Directory) -> StoredTensors:
    """The tensors of the directory's weights; nothing else is read here."""
    if not directory.shards:
        stored = read_weights_file(directory.weights)
    elif directory.weights.name.endswith(INDEX_SUFFIX):
        stored = read_sharded(directory.path, directory.shards)
    else:
        stored = _read_pickled_shards(directory)
    if directory.config is None:
        return stored
    return StoredTensors("hf_directory", stored.tensors, stored.read)


def find_open_clip_config(folder: Path, stored: StoredTensors) -> Path | None:
    """`open_clip_config.json` beside weights with the key names of the models that it describes.

    Beside others it is not read: some publishers put transformers' weights into the same directory. OpenAI's
    TorchScript archives need none.
    """
    path = folder / OPEN_CLIP_CONFIG_FILE
    is_described = stored.format != "torchscript" and _OPENAI_CLIP_KEY in stored.tensors
    return path if is_described and path.is_file() else None


def read_open_clip_config(path: Path) -> dict[str, Any]:
    """The config as data; InputError when it is malformed."""
    return _read_json(path)


def _find_weights(path: Path) -> Path:
    for name in WEIGHTS_PRECEDENCE:
        if (path / name).is_file():
            return path / name
    try:
        candidates = sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES and p.is_file())
    except OSError as error:
        raise InputError("the directory cannot be listed", where=str(path), got=str(error)) from error
    if len(candidates) == 1:
        return candidates[0]
    raise InputError(
        "the directory has no weights that could be meant" if not candidates else "the directory has several weights",
        where=str(path),
        expected=f"one of {', '.join(WEIGHTS_PRECEDENCE)}, or exactly one .safetensors, .pt or .pth file",
        got=", ".join(p.name for p in candidates[:5]) or "none",
        fix="name the weights file itself",
    )


def _read_pickled_shards(directory: Directory) -> StoredTensors:
    parts = {path.name: read_weights_file(path) for path in directory.weight_files}
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for name, part in parts.items():
        for key, info in part.tensors.items():
            if directory.shards.get(key) != name:
                raise InputError("the index and the shards disagree", where=f"{directory.path}: {key} in {name}")
            tensors[key], readers[key] = info, part.read
    absent = sorted(set(directory.shards) - set(tensors))
    if absent:
        raise InputError("shards lack keys that the index names", where=str(directory.path), got=", ".join(absent[:5]))
    return StoredTensors("state_dict", tensors, lambda key: readers[key](key))


def _read_json(path: Path) -> dict[str, Any]:
    raw = read_bounded(path, MAX_JSON_BYTES)
    if not raw.lstrip().startswith(b"{"):
        raise error_from_bad_file(path)
    return json_object_from_bytes(raw, str(path))


def _without_code(value: Any) -> Any:
    """The data without the keys whose values transformers would follow to code; depth is bounded by the reader."""
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if not _names_code(key)}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value


def _names_code(key: str) -> bool:
    return key in _CODE_KEYS or any(part in key for part in _CODE_KEY_PARTS)


def _check_templates(path: Path) -> None:
    """Tokenizers save named chat templates as files of those names (CVE-2026-9856): the names must be plain."""
    templates = _read_json(path).get("chat_template")
    names: list[Any] = []
    if isinstance(templates, list):
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in templates]
    elif isinstance(templates, dict):
        names = list(templates)
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(
                "a chat template has a name that leads out of its directory",
                where=f"{path}: chat_template",
                expected="plain names",
                got=repr(name)[:200],
                fix="do not trust this checkpoint; get it from its publisher",
            )
