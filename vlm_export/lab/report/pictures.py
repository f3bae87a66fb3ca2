"""The contract's images side by side: the file as it is, and the pixels that the bundle's preparation makes of it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.lab.report.findings import Picture
from vlm_export.proof.contract_record import ContractRecord, ImageRecord, image_content, levels, read_record
from vlm_export.runtime.inputs.images import open_image, preprocess_image
from vlm_export.specs import ImageSpec, PatchSpec

_MOST_PIXELS = 96
"""Edge of a picture in the page."""


def contract_pictures(bundle: OpenBundle, failures: Sequence[str]) -> tuple[Picture, ...]:
    """A picture for each image of the contract's record.

    Args:
        failures: what the contract's proof said; a sentence begins with the name of its image.
    """
    try:
        record = read_record(bundle)
    except InputError:
        return ()
    return () if record is None else tuple(_picture(bundle, record, image, failures) for image in record.images)


def _picture(bundle: OpenBundle, record: ContractRecord, image: ImageRecord, failures: Sequence[str]) -> Picture:
    name = image.file.rpartition("/")[2]
    failure = next((text.removeprefix(f"{name}: ") for text in failures if text.startswith(f"{name}: ")), "")
    original: bytes | None = None
    try:
        opened = open_image(image_content(bundle, image), name=name)
        original = _png(opened)
        prepared = _prepared(opened, bundle, record, name)
    except InputError as error:
        return Picture(name, original, None, image.size, failure or error.what)
    return Picture(name, original, prepared, image.size, failure)


def _prepared(image: Image.Image, bundle: OpenBundle, record: ContractRecord, name: str) -> bytes | None:
    spec = bundle.manifest.image
    if not isinstance(spec, ImageSpec | PatchSpec):
        return None
    whole, _ = levels(preprocess_image(image, spec, name=name), record.black, record.white)
    return _png(Image.fromarray(whole.transpose(1, 2, 0)))


def _png(image: Image.Image) -> bytes:
    """A PNG file of at most `_MOST_PIXELS` a side; larger images are made smaller."""
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    small = image.convert("RGBA" if has_alpha else "RGB")
    small.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    written = io.BytesIO()
    small.save(written, "PNG")
    return written.getvalue()
