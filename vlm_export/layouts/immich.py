"""immich: `visual/` and `textual/`, int32 ids, embeddings of unit length.

Facts: immich-app/immich, machine-learning/immich_ml/models/clip/textual.py at 1b5006ce (input `text` int32 (1, L),
padded with the tokenizer's pad token to `text_cfg.context_length`; row 0 of output 0 is stored as it is) and visual.py
at 8ed38849 (input `image` float32 (1, 3, S, S); the shortest edge is resized and the centre cropped, whatever
`resize_mode` says).
"""

from __future__ import annotations

from vlm_export.layouts.consumer_graph import renamed, unit_length, with_input_dtypes
from vlm_export.layouts.packing import Packing


def lay_out(packing: Packing) -> None:
    """Both encoders, what immich prepares images and texts by, and open_clip's form of a config."""
    image, text = packing.image_spec, packing.text_spec
    pixels, ids = packing.image(), packing.text()
    if "attention_mask" in ids.signature.input_names:
        raise packing.refusal("a text encoder of ids alone", "one that reads a mask, which immich does not give")
    visual = renamed(unit_length(pixels), {"pixel_values": "image"})
    textual = with_input_dtypes(renamed(unit_length(ids), {"input_ids": "text"}), {"text": "int32"})
    packing.add("visual", "visual/model.onnx", visual)
    packing.add("textual", "textual/model.onnx", textual)
    resize = "squash" if image.resize == "stretch" else "shortest"
    packing.write_json(
        "visual/preprocess_cfg.json",
        {
            "size": [image.size_pixels, image.size_pixels],
            "mode": "RGB",
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.resample,
            "resize_mode": resize,
            "fill_color": 0,
        },
    )
    packing.copy_tokenizer("textual")
    canonical = {"tokenizer_kwargs": {"clean": "canonicalize"}} if text.cleaning == "canonicalize" else {}
    embed_dim = visual.signature.outputs[0].shape[1]
    packing.write_json(
        "config.json",
        {
            "embed_dim": embed_dim,
            "vision_cfg": {"image_size": image.size_pixels},
            "text_cfg": {"context_length": text.context_length, "vocab_size": text.vocab_size, **canonical},
        },
    )
    if resize == "squash":
        packing.notes.append(
            "immich resizes the shortest edge and crops, and this model's images are stretched: its vectors differ for "
            "images that are not square"
        )
