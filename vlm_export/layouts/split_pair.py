"""A pair of files, `visual.onnx` and `textual.onnx`, as several small runtimes read them.

Facts: modern-onnx-clip 0.2.0, `onnx_clip/model.py` (first input and first output of each; ids int64, cut or filled with
0 to `context_length`; it normalises); clip-as-service at its last release (`pixel_values`; `input_ids` and
`attention_mask` int32; one output each).
"""

from __future__ import annotations

from vlm_export.layouts.consumer_graph import with_input_dtypes, with_mask
from vlm_export.layouts.packing import Packing


def lay_out(packing: Packing) -> None:
    """For modern-onnx-clip: int64 ids and no mask."""
    text = packing.text()
    if "attention_mask" in text.signature.input_names:
        raise packing.refusal("a text encoder of ids alone", "one that reads a mask, which this consumer does not give")
    spec = packing.text_spec
    if spec.pad_token_id not in (0, None):
        packing.notes.append(
            f"modern-onnx-clip fills texts with id 0, and this model's original with {spec.pad_token_id}: shorter "
            "texts get other vectors where the model attends to padding"
        )
    packing.add("visual", "visual.onnx", packing.image())
    packing.add("textual", "textual.onnx", text)
    _side_files(packing)


def lay_out_with_mask(packing: Packing) -> None:
    """For clip-as-service: int32 ids and mask, both declared."""
    text = with_input_dtypes(with_mask(packing.text(), "input_ids"), {"input_ids": "int32", "attention_mask": "int32"})
    packing.add("visual", "visual.onnx", packing.image())
    packing.add("textual", "textual.onnx", text)
    _side_files(packing)


def _side_files(packing: Packing) -> None:
    packing.copy_tokenizer()
    packing.write_json(
        "config.json",
        {"image_size": packing.image_spec.size_pixels, "context_length": packing.text_spec.context_length},
    )
