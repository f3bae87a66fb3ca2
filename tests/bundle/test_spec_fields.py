"""Specs read from data: what may be left out, and what may not."""

from __future__ import annotations

import pytest

from vlm_export.errors import InputError
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
