"""fastembed: a folder for each encoder, with `model.onnx` in it.

Facts: fastembed 0.9.1, `common/preprocessor_utils.py` and `common/onnx_model.py` (tokenizer files beside the graph;
`input_ids`, filled up to the longest text, and `attention_mask` where the graph declares it; the first output) and
`image/onnx_embedding.py` (the first input, of any name; `preprocessor_config.json`; the host normalises images).
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.bundle import layout
from vlm_export.layouts.packing import Packing
from vlm_export.specs import ImageSpec


def lay_out(packing: Packing) -> None:
    """A folder for each encoder that the bundle has."""
    if packing.embed.text is not None:
        packing.add("text", "text/model.onnx", packing.text_of_any_length())
        packing.told_cleaning()
        packing.copy_tokenizer("text")
        # Without it fastembed fills texts with the id of `pad_token`, which may not be the original's.
        config = {**packing.json(layout.CONFIG_NAME), "pad_token_id": packing.text_spec.pad_token_id}
        packing.write_json("text/config.json", config)
        packing.notes.append(
            "texts come as they leave the graph: register them with normalization=True in add_custom_model"
        )
    if packing.embed.image is not None:
        spec = packing.image_spec
        if spec.resize == "longest_edge":
            raise packing.refusal("images of a shortest edge, or stretched", "a model whose longest edge is resized")
        packing.add("image", "image/model.onnx", packing.image())
        packing.copy({name: f"image/{name}" for name in (layout.PREPROCESSOR_NAME, layout.CONFIG_NAME)})
        packing.notes += [text for differs, text in _differences(spec) if differs]


def _differences(spec: ImageSpec) -> Iterator[tuple[bool, str]]:
    """Where its `image/transform/operators.py` makes other pixels than the bundle."""
    yield (
        spec.crop == "nearest_even",
        "fastembed rounds the offset of the centre crop down, this model's original to the even side: images whose "
        "resized margin is 3 more than a multiple of 4 are cut one pixel apart",
    )
    yield (
        spec.transparency == "white",
        "fastembed drops the alpha of transparent images, this model's original puts them on white",
    )
    yield (
        spec.rgb_stage == "after_crop",
        "fastembed converts to RGB before the resize, this model's original after the crop: images with a palette, of "
        "one bit a pixel, or with transparency differ",
    )
