"""Specs read from data: what may be left out, and what may not."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_export.bundle.spec_fields import signature_from_fields
from vlm_export.bundle.strict_json import Fields
from vlm_export.errors import InputError
from vlm_export.signature import Axis, Signature, TensorSpec
from vlm_export.specs import ImageSpec, record_from_json

FIELDS = {
    "size_pixels": 384,
    "resample": "bicubic",
    "rgb_stage": "before_resize",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


def test_fields_with_a_default_may_be_left_out() -> None:
    spec = record_from_json(ImageSpec, FIELDS)
    assert spec.fit == "crop"
    assert spec.mean == (0.5, 0.5, 0.5)
    squashed = record_from_json(ImageSpec, {**FIELDS, "fit": "squash"})
    assert squashed.fit == "squash"
    assert record_from_json(ImageSpec, squashed.to_json()) == squashed


def test_the_others_may_not_and_unknown_ones_are_named() -> None:
    with pytest.raises(InputError, match=r"got: no std") as caught:
        record_from_json(ImageSpec, {key: value for key, value in FIELDS.items() if key != "std"})
    assert caught.value.expected == ", ".join(FIELDS)
    with pytest.raises(InputError, match="no field 'fits'") as caught:
        record_from_json(ImageSpec, {**FIELDS, "fits": "squash"})
    assert caught.value.fix == "did you mean 'fit'?"


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
