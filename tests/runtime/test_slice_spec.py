"""The facts of slicing travel through JSON unchanged, and odd ones are refused by name."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from vlm_export.errors import InputError
from vlm_export.specs.slices import SliceVersion, slice_spec_from_json, slice_spec_from_version


def data_of(version: str = "2.6") -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(slice_spec_from_version(version, queries=64).to_json()))
    return data


@pytest.mark.parametrize("version", get_args(SliceVersion))
def test_specs_survive_json(version: str) -> None:
    assert slice_spec_from_json(data_of(version)) == slice_spec_from_version(version, queries=64)


def test_versions_differ_where_the_originals_do() -> None:
    specs = {version: slice_spec_from_version(version, queries=64) for version in get_args(SliceVersion)}
    assert specs["2.6"] == specs["4.0"] == specs["4.5"]
    assert len(set(specs.values())) == 5
    assert {v for v, spec in specs.items() if spec.mode == "square"} == {"1.0", "omnilmm"}
    assert {v for v, spec in specs.items() if spec.pixel_layout == "patches"} == {"2.5", "2.6", "4.0", "4.5"}
    assert {v for v, spec in specs.items() if spec.placeholder.end} == {"1.0", "2.0", "omnilmm"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "squarish"),
        ("size_pixels", 0),
        ("size_pixels", 448.0),
        ("size_pixels", 1 << 20),
        ("patch_size", 0),
        ("patch_size", 449),
        ("max_slices", 0),
        ("max_slices", True),
        ("max_slices", 1 << 20),
        ("pixel_layout", "rows"),
        ("mean", [0.5, 0.5]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [0.5, float("nan"), 0.5]),
        ("std", ["0.5", 0.5, 0.5]),
        ("placeholder", "<image>"),
    ],
)
def test_odd_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        slice_spec_from_json({**data_of(), field: value})
    assert caught.value.where == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("queries", 0), ("queries", 1 << 20), ("query_token", None), ("slice", ["<slice>"]), ("source", None), ("end", 3)],
)
def test_odd_placeholders_are_refused(field: str, value: object) -> None:
    data = data_of()
    with pytest.raises(InputError) as caught:
        slice_spec_from_json({**data, "placeholder": {**data["placeholder"], field: value}})
    assert caught.value.where == f"placeholder.{field}"


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(InputError, match="has no field 'max_slice'") as caught:
        slice_spec_from_json({**data_of(), "max_slice": 9})
    assert "max_slices" in caught.value.fix
    with pytest.raises(InputError) as caught:
        slice_spec_from_json({key: value for key, value in data_of().items() if key != "placeholder"})
    assert "placeholder" in caught.value.got


def test_unknown_versions_are_refused() -> None:
    with pytest.raises(InputError, match=r"'2\.7'") as caught:
        slice_spec_from_version("2.7", queries=64)
    assert "2.6" in caught.value.fix


def test_squares_are_not_cut_and_not_patched() -> None:
    data = data_of("1.0")
    for field, value in (("max_slices", 9), ("pixel_layout", "patches")):
        with pytest.raises(InputError) as caught:
            slice_spec_from_json({**data, field: value})
        assert caught.value.where == field
