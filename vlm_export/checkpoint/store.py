"""Weights that cannot be used as they are stored live in one scratch file, so that they are never anonymous memory."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.errors import EnvironmentFailure
from vlm_export.machine_faults import machine_fault

_ALIGNMENT = 64
_ZEROS = bytes(1 << 20)


class ScratchStore:
    """A WeightStore on one growing file, which is deleted on exit.

    Tensors stay usable after exit: their mappings keep the deleted file's space until they are freed.
    """

    def __init__(self, path: Path) -> None:
        """Creates the file at `path`, which must not exist; EnvironmentFailure when that fails."""
        self.path = path
        self.size_bytes = 0
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        except OSError as error:
            raise machine_fault(error, str(path)) or EnvironmentFailure(
                "the scratch file cannot be created",
                where=str(path),
                got=str(error),
                fix="choose a directory that exists and can be written to",
            ) from error

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """A writable float32 tensor of that shape, zero-filled, in a shared mapping of the file.

        Raises:
            EnvironmentFailure: the disk has no room for it; the space is reserved here, so that a later write into
                the tensor cannot fail.
        """
        elements = math.prod(shape)
        if elements == 0:
            return torch.zeros(shape)
        offset = -(-self.size_bytes // _ALIGNMENT) * _ALIGNMENT
        self._grow(offset + elements * 4)
        mapped = np.memmap(self.path, dtype=np.float32, mode="r+", offset=offset, shape=(elements,))
        return torch.from_numpy(mapped).reshape(shape)

    def close(self) -> None:
        """Deletes the file; calling it again does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _grow(self, size_bytes: int) -> None:
        needed = size_bytes - self.size_bytes
        check_free_space(self.path.parent, needed)
        with environment_errors(f"reserving room for weights in {self.path}", self.path.parent, needed):
            try:
                self._reserve(self.size_bytes, needed)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._handle, self.size_bytes)
                raise
        self.size_bytes = size_bytes

    def _reserve(self, offset: int, length: int) -> None:
        # A sparse file would take a full disk as SIGBUS at the first touch of a page.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._handle, offset, length)
            return
        os.lseek(self._handle, offset, os.SEEK_SET)
        while length > 0:
            length -= os.write(self._handle, _ZEROS[: min(length, len(_ZEROS))])

    def __enter__(self) -> ScratchStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
