"""typesense: both encoders in one `model.onnx`, whose inputs and outputs have one order.

Facts: typesense/typesense, src/image_embedder.cpp at ead8a3f8 (inputs `input_ids`, `pixel_values` float32
(N, 3, 224, 224) and `attention_mask`, output `image_embeds`; it feeds one empty text with images) and
src/image_processor.cpp at bd655c7f (a graph of its own that decodes and prepares images).
"""

from __future__ import annotations

from vlm_export.bundle import layout
from vlm_export.layouts.consumer_graph import in_order, paired, with_mask
from vlm_export.layouts.packing import Packing

_SIZE_PIXELS = 224
_PROCESSOR = "clip_image_processor.onnx"


def lay_out(packing: Packing) -> None:
    """The combined graph, the tokenizer, and the config that names both."""
    if packing.image_spec.size_pixels != _SIZE_PIXELS:
        raise packing.refusal(
            f"images of {_SIZE_PIXELS} pixels, which its code states", f"{packing.image_spec.size_pixels} pixels"
        )
    graph = paired(with_mask(packing.text(), "input_ids"), packing.image(), packing.score)
    graph = in_order(graph, ("input_ids", "pixel_values", "attention_mask"), ("text_embeds", "image_embeds"))
    packing.add("model", "model.onnx", graph)
    packing.copy_tokenizer()
    files = {"vocab_file_name": layout.TOKENIZER_NAME, "image_processor_file_name": _PROCESSOR}
    packing.write_json("config.json", {"model_type": "clip", **files})
    packing.notes.append(
        f"typesense decodes and prepares images with {_PROCESSOR}, its own: copy it from a model that it publishes"
    )
