"""fastembed: a folder for each encoder, with `model.onnx` in it.

Facts: fastembed 0.9.1, `common/preprocessor_utils.py` and `common/onnx_model.py` (tokenizer files beside the graph;
`input_ids`, and `attention_mask` where the graph declares it; the first output) and `image/onnx_embedding.py` (the
first input, of any name; `preprocessor_config.json`; the host normalises images).
"""

from __future__ import annotations

from vlm_export.bundle import layout
from vlm_export.layouts.packing import Packing


def lay_out(packing: Packing) -> None:
    """A folder for each encoder that the bundle has."""
    if packing.embed.text is not None:
        packing.add("text", "text/model.onnx", packing.text())
        packing.copy_tokenizer("text")
        pad = packing.text_spec.pad_token_id
        config = packing.json(layout.CONFIG_NAME)
        # Without it fastembed fills texts with id 0.
        packing.write_json("text/config.json", config if pad is None else {**config, "pad_token_id": pad})
        packing.notes.append(
            "texts come as they leave the graph: register them with normalization=True in add_custom_model"
        )
    if packing.embed.image is not None:
        spec = packing.image_spec
        packing.add("image", "image/model.onnx", packing.image())
        packing.copy({name: f"image/{name}" for name in (layout.PREPROCESSOR_NAME, layout.CONFIG_NAME)})
        packing.notes += layout.preprocessor_differences(spec)
