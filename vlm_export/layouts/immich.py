"""immich: `visual/` and `textual/`, int32 ids, embeddings of unit length.

Facts: immich-app/immich, machine-learning/immich_ml/models/clip/textual.py at 1b5006ce (input `text` int32 (1, L),
padded with the tokenizer's pad token to `text_cfg.context_length`; row 0 of output 0 is stored as it is) and visual.py
at 8ed38849 (input `image` float32 (1, 3, S, S); the shortest edge is resized and the centre cropped, whatever
`resize_mode` says) and at 0538dd7a (which stretches where `resize_mode` is "squash", and gives a graph that normalises
its input the prepared image as uint8 (1, S, S, 3) instead); immich-app/ml-models, immich_model/onnx/transforms.py at
807c9b1c (its own graphs of that form). By what a server tells the two forms could not be read; the float32 form is
taken by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm_export.layouts.consumer_graph import ConsumerGraph, from_levels, renamed, unit_length, with_input_dtypes
from vlm_export.layouts.packing import Packing
from vlm_export.proof.contract_record import image_content, levels, read_record
from vlm_export.proof.golden import GoldenRecord
from vlm_export.runtime.inputs.images import open_image, preprocess_image


def lay_out(packing: Packing) -> None:
    """Both encoders, what immich prepares images and texts by, and open_clip's form of a config."""
    _write(packing, packing.image())


def lay_out_from_bytes(packing: Packing) -> None:
    """As `lay_out`, with an image encoder that takes prepared images as bytes."""
    _write(packing, from_levels(packing.image(), packing.image_spec, lambda: _levels_of_contract(packing)))


def _levels_of_contract(packing: Packing) -> Iterator[GoldenRecord]:
    """The images of the contract as prepared bytes, with the original's vectors.

    Raises:
        InputError: the bundle has no record of them.
    """
    encoder, record = packing.embed.image, read_record(packing.bundle)
    rows = {} if record is None or encoder is None else record.vectors.get(encoder.part, {})
    if record is None or encoder is None or encoder.pooling != "in_graph" or encoder.output not in rows:
        raise packing.refusal("vectors of the original for images, by which a graph of bytes is proved", "no record")
    prepared = []
    for image in record.images:
        content = image_content(packing.bundle, image)
        pixels = preprocess_image(open_image(content, name=image.file), packing.image_spec, name=image.file)
        prepared.append(levels(pixels, record.black, record.white)[0].transpose(1, 2, 0))
    yield GoldenRecord({"pixel_values": np.stack(prepared)}, {encoder.output: rows[encoder.output]})


def _write(packing: Packing, pixels: ConsumerGraph) -> None:
    image, text = packing.image_spec, packing.text_spec
    ids = packing.text_without_mask()
    packing.told_cleaning("canonicalize")
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
    packing.fix_length("textual")
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
            "this model's images are stretched, which immich does in its newest releases alone; others resize the "
            "shortest edge and crop, and give other vectors for images that are not square"
        )
