"""The Part `vision_from_uint8`: the vision part with its preprocessing in the graph, for hosts without Pillow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from PIL import Image

from vlm_export.errors import UsageError
from vlm_export.family import Array, Arrays, Model, Part, PartOutline, Reference
from vlm_export.models.layers.from_uint8 import PreprocessedVision, unsupported_steps
from vlm_export.proof.image_samples import original_pixel_values
from vlm_export.specs import ImageSpec
from vlm_export.specs.signature import Axis, Signature, TensorSpec

PART_NAME = "vision_from_uint8"
INPUT_NAME = "pixels"
AnyPart = TypeVar("AnyPart", Part, PartOutline)


def add_preprocessing(model: Model) -> Model:
    """The model with the extra Part; its Reference is the original host pipeline and the vision part's Reference.

    Raises:
        UsageError: the model has no vision part that takes images alone, images are cut before it, or the graph
            lacks a step of their preparation.
    """
    vision = find_vision(model.parts)
    if not isinstance(model.image, ImageSpec):
        raise UsageError(
            "this model's images are cut into slices or tiles, which no graph does",
            got=f"family {model.family}",
            fix="leave --with-preprocessing out",
        )
    if reasons := unsupported_steps(model.image):
        raise UsageError(
            "this checkpoint prepares images with steps that no graph does here",
            where="--with-preprocessing",
            got="; ".join(reasons),
            fix="leave --with-preprocessing out: the runtime prepares its images as the checkpoint says",
        )
    part = _preprocessed_part(vision, model.image)
    load = _reference_loader(model.references[vision.name], model.image)
    return replace(model, parts=(*model.parts, part), references={**model.references, PART_NAME: load})


def find_vision(parts: Sequence[AnyPart]) -> AnyPart:
    """The part that preprocessing can stand before; UsageError when none takes images alone."""
    vision = next((part for part in parts if part.signature.input_names == ("pixel_values",)), None)
    if vision is None:
        raise UsageError(
            "this model has no vision part that takes images alone",
            got=", ".join(f"{part.name} ({', '.join(part.signature.input_names)})" for part in parts),
            fix="leave --with-preprocessing out",
        )
    return vision


def _preprocessed_part(vision: Part, spec: ImageSpec) -> Part:
    signature = Signature(
        inputs=(TensorSpec(INPUT_NAME, "uint8", ("batch", "height", "width", 3)),),
        outputs=vision.signature.outputs,
        axes=(Axis("batch"), Axis("height"), Axis("width")),
    )
    return Part(PART_NAME, PreprocessedVision(spec, vision.module).eval(), signature, _noise)


def _noise(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    shape = (sizes["batch"], sizes["height"], sizes["width"], 3)
    return {INPUT_NAME: np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)}


def _reference_loader(load_vision: Callable[[], Reference], spec: ImageSpec) -> Callable[[], Reference]:
    def load() -> Reference:
        encode = load_vision()

        def run(inputs: Arrays) -> dict[str, Array]:
            images = [Image.fromarray(image) for image in inputs[INPUT_NAME]]
            return encode({"pixel_values": np.stack([original_pixel_values(image, spec) for image in images])})

        return run

    return load
