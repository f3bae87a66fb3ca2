"""Specs read from data: what may be left out, and what may not."""

from __future__ import annotations

from typing import Any

import pytest
from vlm_export.bundle.spec_fields import image_spec_from_fields, signature_from_fields

from vlm_export.bundle.strict_json import Fields
from vlm_export.errors import InputError
from vlm_export.specs import ImageSpec, record_from_json
from vlm_export.specs.signature import Axis, Signature, TensorSpec

FIELDS = {
    "size_pixels": 384,
    "resample": "bicubic",
    "rgb_stage": "before_resize",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "resize": "stretch",
    "resize_pixels": [384, 384],
    "crop": "none",
    "transparency": "white",
}


def test_fields_with_a_default_may_be_left_out() -> None:
    spec = record_from_json(ImageSpec, FIELDS)
    assert spec.rescale_factor == 1 / 255
    assert spec.mean == (0.5, 0.5, 0.5)
    assert record_from_json(ImageSpec, spec.to_json()) == spec


def test_the_others_may_not_and_unknown_ones_are_named() -> None:
    with pytest.raises(InputError, match=r"got: no std") as caught:
        record_from_json(ImageSpec, {key: value for key, value in FIELDS.items() if key != "std"})
    assert caught.value.expected == ", ".join(FIELDS)
    with pytest.raises(InputError, match="no field 'crops'") as caught:
        record_from_json(ImageSpec, {**FIELDS, "crops": "down"})
    assert caught.value.fix == "did you mean 'crop'?"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resize", "squash"),
        ("resize", "shortest_edge"),  # of two edges
        ("resize_pixels", [384]),
        ("resize_pixels", [384, 380]),  # and nothing is cropped
        ("resize_pixels", [384, True]),
        ("resize_pixels", [0, 384]),
        ("resample", "area"),
        ("rgb_stage", None),
        ("crop", "up"),
        ("transparency", "black"),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("std", [1, 0, 1]),
        ("size_pixels", 8193),
    ],
)
def test_an_image_spec_that_no_runtime_could_follow_is_refused(key: str, value: Any) -> None:
    whole = {**FIELDS, "rescale_factor": 1 / 255}
    assert image_spec_from_fields(Fields(whole, "manifest")) == record_from_json(ImageSpec, FIELDS)
    with pytest.raises(InputError, match="another type or value"):
        image_spec_from_fields(Fields({**whole, key: value}, "manifest"))


RELATED = Signature(
    (TensorSpec("x", "float32", ("batch", "new", "all")),),
    (TensorSpec("y", "float32", ("batch", "kept", "height")),),
    (
        Axis("batch"),
        Axis("new", 1, 8),
        Axis("past", 0, 8),
        Axis("all", 1, 8, sum_of=("past", "new")),
        Axis("kept", 1, 8, at_most="new"),
        Axis("height", 14, 140, multiple_of=14),
    ),
)


def test_axes_keep_their_relations() -> None:
    assert signature_from_fields(Fields(RELATED.to_json(), "test")) == RELATED


@pytest.mark.parametrize(
    ("axis", "key", "value", "says"),
    [
        ("kept", "at_most", 3, "at_most"),
        ("kept", "at_most", "nowhere", "nowhere"),
        ("all", "sum_of", "past", "sum_of"),
        ("all", "sum_of", ["nowhere"], "nowhere"),
        ("height", "multiple_of", 0, "multiple_of"),
        ("kept", "at_least", "new", "at_least"),
    ],
)
def test_odd_relations_are_named(axis: str, key: str, value: Any, says: str) -> None:
    data = RELATED.to_json()
    data["axes"][axis][key] = value
    with pytest.raises(InputError, match=says):
        signature_from_fields(Fields(data, "test"))
