"""Which of a model's Parts an export makes, the room that they take, and the Part `vision_from_uint8`.

That is the vision part with its preprocessing in the graph, for hosts without Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vlm_export.errors import UsageError, suggestion
from vlm_export.exporting.options import FP16
from vlm_export.exporting.verification import HUGE_PART_BYTES
from vlm_export.family import Array, Arrays, Checkpoint, Family, Model, Part, PartOutline, Reference
from vlm_export.models.layers.from_uint8 import PreprocessedVision, unsupported_steps
from vlm_export.proof.image_samples import original_pixel_values, takes_images
from vlm_export.specs import ImageSpec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import limited_tasks

_FLOAT32_BYTES = 4
_WEIGHT_BYTES = {"fp32": _FLOAT32_BYTES, "fp16": 2}
PART_NAME = "vision_from_uint8"
INPUT_NAME = "pixels"
AnyPart = TypeVar("AnyPart", Part, PartOutline)


def select_parts(model: Model, names: Sequence[str]) -> Model:
    """The model with the named parts, in its own order; with all of them when no name is given.

    Raises:
        UsageError: the model has no part of a name.
    """
    check_names(names, [part.name for part in model.parts])
    parts = tuple(part for part in model.parts if not names or part.name in names)
    return replace(model, parts=parts, tasks=limited_tasks(model.tasks, [part.name for part in parts]))


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """UsageError where one of the names is no part's."""
    for name in names:
        if name not in known:
            fix = "add --with-preprocessing" if name == PART_NAME else suggestion(name, known)
            alone = f": {known[0]} is all that this checkpoint has" if len(known) == 1 else ""
            raise UsageError(f"the model has no part {name!r}{alone}", expected=", ".join(known), got=name, fix=fix)


def planned_parts(
    family: Family, checkpoint: Checkpoint, names: Sequence[str], with_preprocessing: bool
) -> tuple[PartOutline, ...]:
    """The parts that an export makes, known before minutes are spent on weights.

    Raises:
        UsageError: the checkpoint's model has no part of a name, or none that preprocessing can stand before, or the
            names leave out what `with_preprocessing` asks for.
    """
    parts = family.describe(checkpoint).parts
    if with_preprocessing:
        # The part with preprocessing holds the image encoder once more.
        parts = (*parts, replace(find_vision(parts), name=PART_NAME))
        if names and PART_NAME not in names:
            raise UsageError(
                f"--with-preprocessing adds the part {PART_NAME}, which --part leaves out",
                got=", ".join(names),
                fix=f"add --part {PART_NAME}, or leave --with-preprocessing out",
            )
    check_names(names, [part.name for part in parts])
    return tuple(part for part in parts if not names or part.name in names)


def check_images(parts: Sequence[PartOutline], images: Sequence[Path]) -> None:
    """UsageError where images are named and none of the parts starts from one."""
    if images and not any(takes_images(part.signature) for part in parts):
        raise UsageError(
            "no part of this export takes an image to verify with",
            got=", ".join(part.name for part in parts),
            fix="leave --image out, or export a part that takes images (--part)",
        )


def needed_bytes(
    family: Family, checkpoint: Checkpoint, parts: Sequence[PartOutline], precisions: Sequence[str] = ("fp32",)
) -> int:
    """Disk that an export takes at most: weights converted to float32, those of every graph at every precision, and
    for the proof of float16 those of one part in float32 again."""
    read = (info.shape for key, info in checkpoint.tensors.items() if not family.reads or key.startswith(family.reads))
    written = sum(part.parameter_count for part in parts)
    sizes = [_FLOAT32_BYTES * part.parameter_count for part in parts] if FP16 in precisions else []
    again = max((size for size in sizes if size <= HUGE_PART_BYTES), default=0)
    return _FLOAT32_BYTES * sum(map(prod, read)) + written * sum(_WEIGHT_BYTES[name] for name in precisions) + again


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
