"""Hugging Face directories: config as data, weights by precedence, tokenizer files; and directories of one file.

A hub cache links its files to blobs elsewhere, so links are followed for reading; but a name that the checkpoint
itself states never leaves the directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.checkpoint.formats.identify import error_from_bad_file
from vlm_export.checkpoint.formats.safetensors_file import (
    INDEX_SUFFIX,
    ReadPrefixes,
    everything,
    find_shards,
    read_bounded,
    read_index,
    select_shards,
)
from vlm_export.checkpoint.formats.tensors import StoredTensors
from vlm_export.checkpoint.formats.weights_file import read_weights_file
from vlm_export.checkpoint.names import is_plain_name
from vlm_export.checkpoint.seen_file import SeenFile, see_file
from vlm_export.errors import InputError
from vlm_export.family import CheckpointFormat
from vlm_export.machine_faults import machine_fault
from vlm_export.text_display import shown

CONFIG_FILE = "config.json"
# peft 0.18, utils/constants.py.
# Of a LoRA adapter, which is no model (`adapters.py`).
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The first that is there is read, the others are not.
WEIGHTS_PRECEDENCE = (
    "model.safetensors",
    f"model{INDEX_SUFFIX}",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Configs beside config.json, and a key of the weights that each describes: open_clip's image encoders, whichever they
# are, stand under this name, behind a prefix perhaps.
SIDE_CONFIGS: Mapping[str, re.Pattern[str]] = {"open_clip_config.json": re.compile(r"(^|\.)visual\.")}
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
)
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What trainers keep beside the weights under the same suffixes.
_TRAINING_FILE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|(rng|random)_states?(_\d+)?)\.(bin|pt|pth|ckpt)"
)
_RUN = re.compile(r"checkpoint-(\d+)")
# Key names of OpenAI's, open_clip's and Salesforce's files, whose models config.json does not describe.
_UNDESCRIBED_KEY = re.compile(r"(^|\.)(visual|visual_encoder)\.")
# Keys that make transformers import or download code: CVE-2026-4372, CVE-2026-5241, CVE-2026-9856.
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code", "kernel_config", "use_kernels"})
_CODE_KEY_PARTS = ("attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class Directory:
    """What a directory holds, before any tensor file is opened.

    Attributes:
        weights: the file that is read, or the index that names the shards.
        shards: key → shard, where `weights` is an index; without the shards left aside.
        shard_files: the shards by name.
        left_aside: shards that hold nothing that is read; they need not be there.
        config_file: `config.json`, or None.
        config: its data without the keys that name code, or None.
        side_files: tokenizer and preprocessing files by name.
    """

    path: Path
    weights: SeenFile
    shards: Mapping[str, str]
    shard_files: Mapping[str, SeenFile]
    left_aside: tuple[str, ...]
    config_file: SeenFile | None
    config: Mapping[str, Any] | None
    side_files: Mapping[str, SeenFile]

    @property
    def weight_files(self) -> list[SeenFile]:
        """The files that hold tensors."""
        return list(self.shard_files.values()) or [self.weights]

    @property
    def files(self) -> list[SeenFile]:
        """Every file that is read: config, index, weights, side files."""
        config = [self.config_file] if self.config_file is not None else []
        index = [self.weights] if self.shards else []
        return [*config, *index, *self.weight_files, *self.side_files.values()]

    def check_unchanged(self) -> None:
        """InputError where one of them is another file now."""
        for file in self.files:
            file.check_unchanged()


def scan_directory(path: Path, reads: ReadPrefixes = everything, named: Path | None = None) -> Directory:
    """Finds config, weights and side files.

    Args:
        reads: which keys of an index are read.
        named: the weights file or index there that the user named; None: the one that comes first.

    Raises:
        InputError: no weights or several, a missing shard, a malformed config or index, or a name that leaves the
            directory.
    """
    weights = see_file(named or _find_weights(path))
    config = see_file(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else None
    side_files = {name: see_file(path / name) for name in SIDE_FILES if (path / name).is_file()}
    if "tokenizer_config.json" in side_files:
        _check_templates(side_files["tokenizer_config.json"])
    return Directory(
        path,
        weights,
        *_scan_shards(weights, reads),
        config_file=config,
        config=_without_code(_read_json(config)) if config is not None else None,
        side_files=side_files,
    )


def _scan_shards(weights: SeenFile, reads: ReadPrefixes) -> tuple[dict[str, str], dict[str, SeenFile], tuple[str, ...]]:
    """key → shard, the shards' files, and those left aside; nothing where `weights` is no index."""
    if not weights.path.name.endswith(".index.json"):
        return {}, {}, ()
    shards, left_aside = select_shards(read_index(weights), reads)
    return shards, find_shards(weights, shards), left_aside


def read_directory(directory: Directory) -> StoredTensors:
    """The tensors of the directory's weights; nothing else is read here."""
    stored = _read_shards(directory) if directory.shards else read_weights_file(directory.weights)
    return stored if directory.config is None else replace(stored, format="hf_directory")


def has_described_config(folder: Path, stored: StoredTensors) -> bool:
    """Whether `config.json` beside a weights file that the user named can be meant for it.

    It is not for OpenAI's, open_clip's and Salesforce's files, which people keep in any folder.
    """
    is_undescribed = stored.format == "torchscript" or any(map(_UNDESCRIBED_KEY.search, stored.tensors))
    return not is_undescribed and (folder / CONFIG_FILE).is_file()


def find_side_configs(folder: Path, stored: StoredTensors) -> list[SeenFile]:
    """The `SIDE_CONFIGS` beside weights with the key names of the models that they describe.

    Beside others it is not read: some publishers put transformers' weights into the same directory. OpenAI's
    TorchScript archives need none.
    """
    if stored.format == "torchscript":
        return []
    described = [name for name, key in SIDE_CONFIGS.items() if any(map(key.search, stored.tensors))]
    return [see_file(folder / name) for name in described if (folder / name).is_file()]


def read_side_config(file: SeenFile) -> dict[str, Any]:
    """The config as data; InputError when it is malformed."""
    return _read_json(file)


def _find_weights(path: Path) -> Path:
    for name in WEIGHTS_PRECEDENCE:
        if (path / name).is_file():
            return path / name
    candidates = _weights_in(path)
    if len(candidates) == 1:
        return candidates[0]
    raise InputError(
        "the directory has several weights" if candidates else "the directory has no weights that could be meant",
        where=str(path),
        expected=f"one of {', '.join(WEIGHTS_PRECEDENCE)}, or exactly one .safetensors, .pt, .pth, .bin or .ckpt file",
        got=", ".join(shown(p.name) for p in candidates[:5]) or "none",
        fix="name the weights file itself" if candidates else _nearest_weights(path),
    )


def _weights_in(path: Path) -> list[Path]:
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES and file.is_file())
    except OSError as error:
        raise machine_fault(error, str(path)) or InputError(
            "the directory cannot be listed", where=str(path), got=str(error)
        ) from error
    return [file for file in files if not _TRAINING_FILE.fullmatch(file.name) and file.name not in ADAPTER_WEIGHTS]


def _nearest_weights(path: Path) -> str:
    """Where the weights may be: the newest of a Trainer's checkpoints, or a folder within this one that has some."""
    try:
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    except OSError:
        folders = []
    full = [folder for folder in folders if _has_weights(folder)]
    runs = {int(found[1]): folder for folder in full if (found := _RUN.fullmatch(folder.name))}
    if runs:
        return f"name the newest checkpoint of this run: {shown(str(runs[max(runs)]))}"
    if full:
        return f"name the folder or the file that is meant, such as {shown(str(full[0]))}"
    return "name a directory that holds weights, or a weights file"


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in WEIGHTS_PRECEDENCE):
        return True
    try:
        return bool(_weights_in(folder))
    except InputError:
        return False


def _read_shards(directory: Directory) -> StoredTensors:
    parts = {name: read_weights_file(file) for name, file in directory.shard_files.items()}
    shards = directory.shards
    absent = [f"{key} in {name}" for key, name in shards.items() if key not in parts[name].tensors]
    unlisted = [f"{key} in {name}" for name, part in parts.items() for key in part.tensors if shards.get(key) != name]
    if absent or unlisted:
        raise InputError(
            "the index and the shards disagree",
            where=str(directory.path),
            expected="each key in the shard that the index names, and no other keys",
            got=f"{len(absent)} absent {absent[:3]}, {len(unlisted)} unlisted {unlisted[:3]}",
            fix="download the index and all shards again, from one revision",
        )
    tensors = {key: parts[name].tensors[key] for key, name in shards.items()}
    form: CheckpointFormat = "safetensors" if directory.weights.path.name.endswith(INDEX_SUFFIX) else "state_dict"
    return StoredTensors(form, tensors, lambda key: parts[shards[key]].read(key))


def _read_json(file: SeenFile) -> dict[str, Any]:
    raw = read_bounded(file, MAX_JSON_BYTES)
    if not raw.lstrip().startswith(b"{"):
        raise error_from_bad_file(file)
    return json_object_from_bytes(raw, str(file))


def _without_code(value: Any) -> Any:
    """The data without the keys whose values transformers would follow to code; depth is bounded by the reader."""
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if not _names_code(key)}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value


def _names_code(key: str) -> bool:
    return key in _CODE_KEYS or any(part in key for part in _CODE_KEY_PARTS)


def _check_templates(file: SeenFile) -> None:
    """Tokenizers save named chat templates as files of those names (CVE-2026-9856): the names must be plain."""
    templates = _read_json(file).get("chat_template")
    names: list[Any] = []
    if isinstance(templates, list):
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in templates]
    elif isinstance(templates, dict):
        names = list(templates)
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(
                "a chat template has a name that leads out of its directory",
                where=f"{file}: chat_template",
                expected="plain names",
                got=repr(name)[:200],
                fix="do not trust this checkpoint; get it from its publisher",
            )
