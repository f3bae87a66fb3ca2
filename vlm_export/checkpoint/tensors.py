"""What every format's reader gives: the tensors by stored key, without having read one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlm_export.errors import InputError
from vlm_export.family import CheckpointFormat, TensorInfo

MAX_TENSORS = 200_000
MAX_RANK = 16
# Tied weights are stored once and named twice; nothing honest is named more often than this.
_MAX_SHARING = 4
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensors:
    """Tensors as they are stored in one file or one set of shards."""

    format: CheckpointFormat
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]


def check_stored_bytes(path: Path, tensor_bytes: int) -> None:
    """InputError when the tensors together are far larger than the file: many names for the same few bytes."""
    limit = _MAX_SHARING * path.stat().st_size + _SMALL_BYTES
    if tensor_bytes > limit:
        raise InputError(
            "the checkpoint names the same bytes as many tensors",
            where=str(path),
            expected=f"tensors of at most {limit} bytes in all",
            got=f"{tensor_bytes} bytes",
            fix="get the checkpoint from its publisher",
        )
