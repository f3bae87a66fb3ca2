"""A pair of files, `visual.onnx` and `textual.onnx`, as several small runtimes read them.

Facts: modern-onnx-clip 0.2.0, `onnx_clip/model.py` (first input and first output of each; ids int64 of tokenizer.json,
cut or filled with 0 to `context_length`; it normalises) and `preprocessor.py` (bicubic, centre crop, its own mean and
deviation); clip-as-service at its last release (`pixel_values`; `input_ids` and `attention_mask` int32; one output
each; the same preparation).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlm_export.layouts.consumer_graph import ConsumerGraph, with_input_dtypes, with_mask
from vlm_export.layouts.packing import Packing
from vlm_export.specs.signature import DType

# Of both consumers' own preparation of images, which reads no file.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def lay_out(packing: Packing) -> None:
    """For modern-onnx-clip: int64 ids and no mask."""
    _write(packing, packing.text_without_mask())
    # It would fill texts with id 0, whatever the original does, and cut off their end token.
    packing.fix_length()


def lay_out_with_mask(packing: Packing) -> None:
    """For clip-as-service: int32 ids and mask, both declared."""
    dtypes: Mapping[str, DType] = {"input_ids": "int32", "attention_mask": "int32"}
    _write(packing, with_input_dtypes(with_mask(packing.text(), "input_ids"), dtypes))


def _write(packing: Packing, text: ConsumerGraph) -> None:
    spec = packing.image_spec
    if not np.allclose((spec.mean, spec.std), (_MEAN, _STD), atol=1e-6):
        raise packing.refusal(
            f"pixels of the mean and deviation that its code states, {_MEAN} and {_STD}", f"{spec.mean} and {spec.std}"
        )
    if spec.resize != "shortest_edge":
        packing.notes.append(
            f"{packing.consumer} resizes the shortest edge and crops, and this model's original does not: vectors "
            "differ for images that are not square"
        )
    packing.told_cleaning()
    packing.add("visual", "visual.onnx", packing.image())
    packing.add("textual", "textual.onnx", text)
    packing.copy_tokenizer()
    packing.write_json(
        "config.json", {"image_size": spec.size_pixels, "context_length": packing.text_spec.context_length}
    )
