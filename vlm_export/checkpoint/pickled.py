"""State dicts that torch.save wrote, read with torch's own weights-only unpickler and never with another one."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_export.checkpoint.tensors import StoredTensors, check_stored_bytes
from vlm_export.checkpoint.zipcheck import ZipMembers
from vlm_export.errors import InputError
from vlm_export.family import TensorInfo

WRAPPERS = ("model", "state_dict")
"""Names under which training scripts wrap the state dict; exactly these are unwrapped."""


def read_state_dict(path: Path, archive: ZipMembers | None) -> StoredTensors:
    """The tensors of a `.pt`/`.pth` file; memory-mapped when it is a zip archive, else (before torch 1.6) read whole.

    Args:
        path: the file.
        archive: its checked members, or None for the legacy format.

    Raises:
        InputError: the pickle holds anything but tensors in plain containers, or is damaged.
    """
    if archive is not None:
        _check_tensors_are_stored(archive)
    tensors = _unwrap(path, _load(path, mapped=archive is not None))
    _check_tensors(path, tensors)
    infos = {key: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()}
    check_stored_bytes(path, sum(t.numel() * t.element_size() for t in tensors.values()))
    return StoredTensors("state_dict", infos, tensors.__getitem__)


def _check_tensors_are_stored(archive: ZipMembers) -> None:
    deflated = [name for name, member in archive.members.items() if member.deflated]
    if deflated:
        raise InputError(
            "the archive is compressed, which torch.save never does",
            where=f"{archive.path}: {archive.top}/{deflated[0]}",
            expected="stored members",
            got=f"{len(deflated)} deflated members",
            fix="load and save it again with torch where you trust it, or get it from its publisher",
        )


def _load(path: Path, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        NotImplementedError,
        OverflowError,
        MemoryError,
        OSError,
    ) as error:
        raise InputError(
            "the .pt file is damaged, or holds more than tensors in plain containers; nothing of it was run",
            where=str(path),
            expected="a state dict: text keys and dense tensors",
            got=_first_line(error),
            fix="save model.state_dict() where you trust the file, best with safetensors.torch.save_file",
        ) from error


def _first_line(error: BaseException) -> str:
    # torch's message goes on with advice to load the file unsafely; the first line that names the cause is enough.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {cause[:300]}"


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict itself, taken out of one of `WRAPPERS` where there is one."""
    if isinstance(loaded, Mapping):
        for name in WRAPPERS:
            if isinstance(loaded.get(name), Mapping):
                loaded = loaded[name]
                break
    if not isinstance(loaded, Mapping):
        raise InputError("the .pt file holds no state dict", where=str(path), got=type(loaded).__name__)
    others = [f"{key!s:.80} ({type(v).__name__})" for key, v in loaded.items() if not _is_named_tensor(key, v)]
    if others or not loaded:
        raise InputError(
            "the .pt file holds more than named tensors" if others else "the .pt file holds an empty state dict",
            where=str(path),
            expected=f"a state dict, or a state dict under {' or '.join(map(repr, WRAPPERS))}",
            got=", ".join(others[:20]) + (f" … and {len(others) - 20} more" if len(others) > 20 else ""),
            fix="save the model's state_dict() alone",
        )
    return dict(loaded)


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        # Not by try: sparse, quantized and meta tensors have no plain storage to measure.
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(
                "a tensor is not a plain dense one",
                where=f"{path}: tensor {key[:200]}",
                expected="a dense tensor with its own elements",
                got=f"{tensor.layout} on {tensor.device}, shape {tuple(tensor.shape)}",
            )
