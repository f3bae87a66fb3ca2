"""One weights file of any supported kind, chosen by its content."""

from __future__ import annotations

from vlm_export.checkpoint.identify import identify_weights
from vlm_export.checkpoint.pickled import read_legacy_state_dict, read_state_dict
from vlm_export.checkpoint.safetensors_file import read_safetensors
from vlm_export.checkpoint.seen_file import SeenFile
from vlm_export.checkpoint.tensors import StoredTensors
from vlm_export.checkpoint.torchscript import read_torchscript
from vlm_export.checkpoint.zipcheck import check_zip


def read_weights_file(file: SeenFile) -> StoredTensors:
    """The tensors of a TorchScript archive, a state dict or a safetensors file.

    Raises:
        InputError: the file is none of these, or is damaged or unsafe.
    """
    kind = identify_weights(file)
    if kind == "safetensors":
        return read_safetensors(file)
    if kind == "legacy_pickle":
        return read_legacy_state_dict(file)
    archive = check_zip(file)
    return read_torchscript(archive) if archive.is_torchscript else read_state_dict(archive)
