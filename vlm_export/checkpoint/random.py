"""Checkpoints with seeded random weights: any architecture at full size without a download."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.checkpoint.formats.safetensors_file import read_safetensors
from vlm_export.checkpoint.seen_file import see_file
from vlm_export.family import Checkpoint, CheckpointFile, StoredTensorInfo

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}
# What CLIP clamps its learned scale to: ln(100).
_ROTARY_BASE = 100_000.0
_LOGIT_SCALE = math.log(100.0)
_EMBEDDING_STD = 0.02
_SMALL = 0.1
# Norms that close a residual branch, and the size that they give it: with size 1, each of a ResNet's 60 blocks would
# double the variance, and EVA-02's 63 would make attention so sharp that rounding decides what it picks.
_BRANCH_ENDS = (
    (re.compile(r"\.\d+\.bn3\.weight"), 0.2),
    (re.compile(r"\bvision_tower\.blocks\.\d+\.norm[12]\.weight"), 0.1),
)
_CHUNK = 1 << 20
Floats = npt.NDArray[np.float32]


def random_checkpoint(
    source_name: str,
    tensors: Mapping[str, StoredTensorInfo],
    seed: int,
    path: Path,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Writes seeded weights to a safetensors file at `path` and opens it, memory-mapped.

    Each tensor has its own generator, from the seed and its key: neither the order nor other tensors change it.

    Args:
        source_name: what the Checkpoint calls its source.
        tensors: keys, shapes and dtypes, as `Family.published_tensors` gives them.
        seed: any integer.
        path: the file to write; the caller deletes it.
        config: `config.json` for families that need one.

    Raises:
        EnvironmentFailure: the disk has no room.
    """
    header = _header(tensors)
    needed_bytes = len(header) + sum(tensor_bytes(info) for info in tensors.values())
    check_free_space(path.parent, needed_bytes)
    digest = hashlib.sha256()
    with environment_errors("writing random weights", path.parent, needed_bytes), path.open("wb") as file:
        for piece in chain([header], *(_pieces(key, info, seed) for key, info in tensors.items())):
            file.write(piece)
            digest.update(piece)
    stored = read_safetensors(see_file(path))
    files = (CheckpointFile(path.name, needed_bytes, digest.hexdigest()),)
    return Checkpoint(source_name, "random", files, stored.tensors, stored.read, config)


def tensor_bytes(info: StoredTensorInfo) -> int:
    """Room that a tensor takes as it is stored."""
    return math.prod(info.shape) * _torch_dtype(info).itemsize


def _torch_dtype(info: StoredTensorInfo) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, info.dtype)
    return dtype


def _header(tensors: Mapping[str, StoredTensorInfo]) -> bytes:
    entries: dict[str, Any] = {}
    position = 0
    for key, info in tensors.items():
        end = position + tensor_bytes(info)
        entries[key] = {"dtype": _DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(key: str, info: StoredTensorInfo, seed: int) -> Iterator[bytes]:
    """The tensor's bytes, a few MiB at a time."""
    dtype = _torch_dtype(info)
    key_seed = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little")
    rng = np.random.default_rng(key_seed)
    left = math.prod(info.shape)
    while left:
        count = min(left, _CHUNK)
        values = torch.from_numpy(_values(key, info.shape, count, rng)).to(dtype)
        yield values.view(torch.uint8).numpy().tobytes()
        left -= count


def _values(key: str, shape: tuple[int, ...], count: int, rng: np.random.Generator) -> Floats:
    """`count` values of a distribution that keeps signals neither vanishing nor exploding through a deep model."""
    name = key.rsplit(".", 1)[-1]
    if name == "logit_scale":
        return np.full(count, _LOGIT_SCALE, np.float32)
    if name == "running_var":
        variances: Floats = rng.random(count, dtype=np.float32) * np.float32(0.4) + np.float32(0.8)
        return variances
    if not shape:
        return np.zeros(count, np.float32)
    if name == "inv_freq":
        # Stored, but never trained: a rotary embedding's frequencies.
        exponents: Floats = np.arange(count, dtype=np.float32) / np.float32(count)
        frequencies: Floats = np.float32(1) / np.float32(_ROTARY_BASE) ** exponents
        return frequencies
    mean, std = _mean_and_std(key, name, shape)
    values: Floats = rng.standard_normal(count, dtype=np.float32) * np.float32(std) + np.float32(mean)
    return values


def _mean_and_std(key: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) == 2 and "embedding" in key:
        return 0.0, _EMBEDDING_STD
    if len(shape) >= 2:
        # Linear and convolution weights are (output, input, …); a bare projection stands on the right: (input, output).
        fan_in = math.prod(shape[1:]) if name.endswith("weight") else shape[0]
        # A ReLU follows a convolution and halves the second moment.
        gain = 2.0 if len(shape) == 4 else 1.0
        return 0.0, math.sqrt(gain / max(fan_in, 1))
    if name == "weight":
        scale = next((scale for pattern, scale in _BRANCH_ENDS if pattern.search(key)), 1.0)
        return scale, scale * _SMALL
    if name in ("bias", "running_mean") or name.endswith("_bias"):
        return 0.0, _SMALL
    return 0.0, 1 / math.sqrt(shape[0])
