"""One weights file of any supported kind, chosen by its content."""

from __future__ import annotations

from pathlib import Path

from vlm_export.checkpoint.identify import identify_weights
from vlm_export.checkpoint.pickled import read_state_dict
from vlm_export.checkpoint.safetensors_file import read_safetensors
from vlm_export.checkpoint.tensors import StoredTensors
from vlm_export.checkpoint.torchscript import read_torchscript
from vlm_export.checkpoint.zipcheck import check_zip


def read_weights_file(path: Path) -> StoredTensors:
    """The tensors of a TorchScript archive, a state dict or a safetensors file.

    Raises:
        InputError: the file is none of these, or is damaged or unsafe.
    """
    kind = identify_weights(path)
    if kind == "safetensors":
        return read_safetensors(path)
    if kind == "legacy_pickle":
        return read_state_dict(path, archive=None)
    archive = check_zip(path)
    return read_torchscript(archive) if archive.is_torchscript else read_state_dict(path, archive)
