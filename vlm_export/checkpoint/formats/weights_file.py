"""One weights file of any supported kind, chosen by its content."""

from __future__ import annotations

from vlm_export.checkpoint.formats.identify import identify_weights
from vlm_export.checkpoint.formats.pickled import read_legacy_state_dict, read_state_dict
from vlm_export.checkpoint.formats.safetensors_file import read_safetensors
from vlm_export.checkpoint.formats.tensors import StoredTensors
from vlm_export.checkpoint.formats.torchscript import read_torchscript
from vlm_export.checkpoint.formats.zipcheck import check_zip
from vlm_export.checkpoint.seen_file import SeenFile


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
