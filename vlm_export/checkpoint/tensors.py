"""What every format's reader gives: the tensors by stored key, mapped from the file, without having read one."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_export.checkpoint.seen_file import SeenFile
from vlm_export.errors import InputError
from vlm_export.family import CheckpointFormat, StoredTensorInfo

MAX_TENSORS = 200_000
MAX_RANK = 16
# Tied weights are stored once and named twice; nothing honest is named more often than this.
_MAX_SHARING = 4
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensors:
    """Tensors as they are stored in one file or one set of shards; `notes` say which of several state dicts."""

    format: CheckpointFormat
    tensors: Mapping[str, StoredTensorInfo]
    read: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """Where a tensor's elements are: `size` and `stride` from byte `offset` of the file."""

    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


def stored_views(format: CheckpointFormat, file: SeenFile, views: Mapping[str, View]) -> StoredTensors:
    """The tensors at `views`, each of which lies within the file.

    Raises:
        InputError: the tensors together are far larger than the file: many names for the same few bytes.
    """
    tensor_bytes = sum(math.prod(view.size) * view.dtype.itemsize for view in views.values())
    limit = _MAX_SHARING * file.size_bytes + _SMALL_BYTES
    if tensor_bytes > limit:
        raise InputError(
            "the checkpoint names the same bytes as many tensors",
            where=str(file),
            expected=f"tensors of at most {limit} bytes in all",
            got=f"{tensor_bytes} bytes",
            fix="get the checkpoint from its publisher",
        )
    infos = {key: StoredTensorInfo(view.size, str(view.dtype).removeprefix("torch.")) for key, view in views.items()}
    return StoredTensors(format, infos, _MappedViews(file, views))


class _MappedViews:
    """key → the tensor, on one private mapping of the file that opens at the first read."""

    def __init__(self, file: SeenFile, views: Mapping[str, View]) -> None:
        self.file, self.views = file, views
        self.mapping: mmap.mmap | None = None

    def __call__(self, key: str) -> Tensor:
        view = self.views[key]
        if view.span == 0:
            return torch.empty(view.size, dtype=view.dtype)
        if self.mapping is None:
            # Copy-on-write: nobody can write into the checkpoint through a tensor.
            with self.file.open() as opened:
                self.mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self.mapping, dtype=view.dtype, count=view.span, offset=view.offset)
        tensor = flat.as_strided(view.size, view.stride)
        # Old archives do not align every storage; kernels expect it.
        return tensor if view.offset % view.dtype.itemsize == 0 else tensor.clone()
