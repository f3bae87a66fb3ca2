"""Signatures and preprocessing specs read from a manifest, with types and ranges that a runtime can rely on."""

from __future__ import annotations

import dataclasses
from typing import get_args

from vlm_export.bundle.strict_json import Fields
from vlm_export.errors import InputError
from vlm_export.signature import Signature, signature_from_json
from vlm_export.specs import (
    Crop,
    ImageSpec,
    Origins,
    Resample,
    Resize,
    RgbStage,
    Side,
    TextCase,
    TextCleaning,
    TextPooling,
    TextSpec,
    Transparency,
    record_from_json,
)

MAX_IMAGE_SIZE_PIXELS = 8192
_RESIZE_EDGES = {"shortest_edge": 1, "stretch": 2, "none": 0}
MAX_NORMALISER = 1e6
"""Of a mean, a deviation and a factor of pixels; and one over it the least of the last two. float32 holds them all."""
MAX_CONTEXT_LENGTH = 1 << 20
MAX_AXIS_SIZE = (1 << 31) - 1
MAX_TOKEN_ID = (1 << 31) - 1


def image_spec_from_fields(fields: Fields) -> ImageSpec:
    """The ImageSpec; InputError on odd types, sizes out of range, or steps that no runtime can follow."""
    spec = record_from_json(ImageSpec, fields.data)
    fields.only([entry.name for entry in dataclasses.fields(ImageSpec)])
    edge = fields.integer("size_pixels", minimum=1, maximum=MAX_IMAGE_SIZE_PIXELS)
    for key, choices in (
        ("resample", Resample),
        ("rgb_stage", RgbStage),
        ("resize", Resize),
        ("crop", Crop),
        ("transparency", Transparency),
    ):
        fields.choice(key, get_args(choices))
    count = _RESIZE_EDGES[spec.resize]
    edges = fields.sequence("resize_pixels")
    if len(edges) != count or not all(type(e) is int and 1 <= e <= MAX_IMAGE_SIZE_PIXELS for e in edges):
        raise fields.fail("resize_pixels", f"{count} edges of 1 to {MAX_IMAGE_SIZE_PIXELS}, as of {spec.resize!r}")
    if spec.crop == "none" and any(e != edge for e in edges):
        raise fields.fail("resize_pixels", f"{edge} where nothing is cropped")
    least = 1 / MAX_NORMALISER
    if not _is_within(fields.data["rescale_factor"], least):
        raise fields.fail("rescale_factor", f"a number from {least:g} to {MAX_NORMALISER:g}")
    for key, minimum in (("mean", -MAX_NORMALISER), ("std", least)):
        values = fields.sequence(key)
        if len(values) != 3 or not all(_is_within(value, minimum) for value in values):
            raise fields.fail(key, f"three numbers from {minimum:g} to {MAX_NORMALISER:g}")
    return spec


def _is_within(value: object, minimum: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= MAX_NORMALISER


def text_spec_from_fields(fields: Fields) -> TextSpec:
    """The TextSpec; InputError on odd types or ids outside the vocabulary."""
    spec = record_from_json(TextSpec, fields.data)
    fields.integer("context_length", minimum=1, maximum=MAX_CONTEXT_LENGTH)
    vocab_size = fields.integer("vocab_size", minimum=1, maximum=MAX_TOKEN_ID)
    for key in ("end_token_id", "pad_token_id"):
        fields.integer(key, minimum=0, maximum=vocab_size - 1)
    fields.choice("cleaning", get_args(TextCleaning))
    if "ends_texts" in fields.data:
        fields.boolean("ends_texts")
    if "added_tokens" in fields.data:
        fields.texts("added_tokens")
    later = {"pooling": get_args(TextPooling), "case": get_args(TextCase), "truncation_side": get_args(Side)}
    for key, choices in later.items():
        if key in fields.data:
            fields.choice(key, choices)
    return spec


def origins_from_fields(fields: Fields) -> Origins:
    """The Origins; InputError when a value is no string."""
    fields.only(("values", "ignored_files"))
    values, ignored = fields.fields("values"), fields.fields("ignored_files")
    return Origins({key: values.text(key) for key in values.data}, {key: ignored.text(key) for key in ignored.data})


def signature_from_fields(fields: Fields) -> Signature:
    """The Signature; InputError when a name, shape or axis has an odd type."""
    fields.only(("inputs", "outputs", "axes"))
    for key in ("inputs", "outputs"):
        fields.some(key, _check_tensor)
    axes = fields.fields("axes")
    for name in axes.data:
        optional = [key for key in ("multiple_of", "sum_of", "at_most") if key in axes.fields(name).data]
        axis = axes.fields(name).only(("minimum", "maximum", *optional))
        minimum = axis.integer("minimum")
        if "multiple_of" in optional:
            axis.integer("multiple_of", minimum=1)
        if "sum_of" in optional:
            axis.texts("sum_of")
        if "at_most" in optional:
            axis.text("at_most")
        axis.integer_or_none("maximum", minimum=minimum)
    try:
        return signature_from_json(fields.data)
    except InputError as error:
        raise InputError(error.what, where=f"{fields.where}: {error.where}", got=error.got) from error


def _check_tensor(fields: Fields) -> None:
    fields.only(("name", "dtype", "shape"))
    fields.text("name")
    for entry in fields.sequence("shape"):
        size = isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry <= MAX_AXIS_SIZE
        if not size and not isinstance(entry, str):
            raise fields.fail("shape", "sizes and axis names")
