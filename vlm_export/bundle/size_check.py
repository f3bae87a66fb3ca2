"""Whether the sizes that a manifest states fit together, before anything is prepared or computed in them.

An image size or a context length is stated twice: in how inputs are prepared, and in the parts' signatures. The runtime
compares the signatures with the graphs when it opens them (`vlm_export.runtime.engines.graph_sizes`).
"""

from __future__ import annotations

from vlm_export.bundle.manifest import Manifest, PartRecord
from vlm_export.errors import InputError
from vlm_export.specs import ImageSpec, TileSpec
from vlm_export.specs.signature import Signature, TensorSpec

_FIX = "copy the bundle again, or export it again with --overwrite"


def check_stated_sizes(manifest: Manifest, where: str) -> None:
    """InputError where the manifest prepares inputs in a size that its own signatures exclude."""
    for part in manifest.parts:
        for tensor in part.signature.inputs:
            if isinstance(manifest.image, ImageSpec):
                check_image_size(part, tensor, manifest.image.size_pixels, f"{where}: image.size_pixels")
            if isinstance(manifest.image, TileSpec):
                check_image_size(part, tensor, manifest.image.tile_size_pixels, f"{where}: image.tile_size_pixels")
            if manifest.text is not None and part.name == "text" and tensor.name == "input_ids":
                _check_context(part, tensor, manifest.text.context_length, f"{where}: text.context_length")


def check_image_size(part: PartRecord, tensor: TensorSpec, size_pixels: int, where: str) -> None:
    """InputError where a part takes images (float, four axes), and none of this height and width."""
    if tensor.name != "pixel_values" or not tensor.dtype.startswith("float") or len(tensor.shape) != 4:
        return
    for entry in tensor.shape[2:]:
        least, most, step = _range(part.signature, entry)
        if size_pixels < least or (most is not None and size_pixels > most) or size_pixels % step:
            raise InputError(
                f"the manifest prepares images in a size that part {part.name!r} does not take",
                where=where,
                expected=_range_text(least, most, step),
                got=f"{size_pixels} pixels",
                fix=_FIX,
            )


def _check_context(part: PartRecord, tensor: TensorSpec, context_length: int, where: str) -> None:
    _, most, _ = _range(part.signature, tensor.shape[-1])
    if most is not None and context_length > most:
        raise InputError(
            f"the manifest prepares texts longer than part {part.name!r} takes",
            where=where,
            expected=f"at most {most} tokens",
            got=f"{context_length} tokens",
            fix=_FIX,
        )


def _range(signature: Signature, entry: int | str) -> tuple[int, int | None, int]:
    """Smallest and largest size of an axis, None for no bound, and the steps between."""
    if isinstance(entry, int):
        return entry, entry, 1
    axis = signature.axis(entry)
    return axis.minimum, axis.maximum, max(axis.multiple_of, 1)


def _range_text(least: int, most: int | None, step: int) -> str:
    if least == most:
        return f"{least} pixels"
    upper = "" if most is None else f" to {most}"
    return f"{least}{upper} pixels" + (f" in steps of {step}" if step > 1 else "")
