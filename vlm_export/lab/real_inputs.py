"""What a part is run on by its bundle's own means: the golden records, and the contract's images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import PartRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.proof.contract import image_feeds
from vlm_export.proof.contract_record import ContractRecord, image_content, read_record
from vlm_export.proof.golden import iterate_golden
from vlm_export.proof.points import Arrays
from vlm_export.runtime.engines.onnxruntime import batches
from vlm_export.runtime.inputs.images import open_image, preprocess_image
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import ImageSpec, PatchSpec

_TOGETHER = 4


def real_inputs(bundle: OpenBundle, part: PartRecord) -> list[Arrays]:
    """The inputs of a part's golden records and, of an encoder, the contract's images or texts, a few rows each.

    Raises:
        InputError: a record was changed, or the bundle cannot prepare what it records.
    """
    prepared = contract_inputs(bundle)
    return [*(record.inputs for record in iterate_golden(bundle, part.name)), *_batches_for(part, prepared)]


def contract_inputs(bundle: OpenBundle) -> dict[str, Array]:
    """The contract's images and texts as the bundle itself prepares them, by the names of encoders' inputs."""
    record = read_record(bundle)
    if record is None:
        return {}
    return {**_images(bundle, record), **_texts(bundle, record)}


def _images(bundle: OpenBundle, record: ContractRecord) -> Mapping[str, Array]:
    spec = bundle.manifest.image
    if not isinstance(spec, ImageSpec | PatchSpec):
        return {}
    pixels = [
        preprocess_image(open_image(image_content(bundle, image), name=image.file), spec, name=image.file)
        for image in record.images
    ]
    return image_feeds(bundle, pixels)


def _texts(bundle: OpenBundle, record: ContractRecord) -> Mapping[str, Array]:
    spec = bundle.manifest.text
    if spec is None or not record.texts or TOKENIZER_NAME not in bundle.manifest.files:
        return {}
    tokenizer = Tokenizer(bundle.file(TOKENIZER_NAME), spec)
    ids, mask = tokenizer.pad_masked(tokenizer.encode_rows([text.text for text in record.texts], truncate=True))
    return {"input_ids": ids, "attention_mask": mask}


def _batches_for(part: PartRecord, prepared: Mapping[str, Array]) -> Iterator[Arrays]:
    """Rows of what was prepared, where it is all that the part takes."""
    inputs = part.signature.inputs
    fits = all(
        spec.name in prepared
        and prepared[spec.name].dtype.kind == np.dtype(spec.dtype).kind
        and prepared[spec.name].ndim == len(spec.shape)
        for spec in inputs
    )
    if fits:
        count = len(prepared[inputs[0].name])
        for rows in batches(range(count), _TOGETHER):
            yield {spec.name: prepared[spec.name][list(rows)].astype(spec.dtype) for spec in inputs}
