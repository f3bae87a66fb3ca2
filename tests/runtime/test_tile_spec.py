"""The facts of tiles travel through JSON unchanged, and odd ones are refused by name."""

from __future__ import annotations

import json

import pytest

from vlm_export.errors import InputError
from vlm_export.specs.tiles import TileSpec, tile_spec_from_json

SPEC = TileSpec(512, 2048, resize_to_max_side=True)


def test_specs_survive_json() -> None:
    assert tile_spec_from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tile_size_pixels", 0),
        ("tile_size_pixels", 512.0),
        ("tile_size_pixels", True),
        ("tile_size_pixels", None),
        ("tile_size_pixels", 9000),
        ("max_side_pixels", 256),
        ("max_side_pixels", 1000),
        ("max_side_pixels", 512 * 33),
        ("max_side_pixels", 1 << 20),
        ("max_side_pixels", "2048"),
        ("resize_to_max_side", 1),
        ("resize_to_max_side", None),
    ],
)
def test_odd_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        tile_spec_from_json({**SPEC.to_json(), field: value})
    assert caught.value.where == field


def test_the_number_of_tiles_is_bounded() -> None:
    assert TileSpec(64, 2048, resize_to_max_side=False).max_side_pixels == 2048
    with pytest.raises(InputError, match="not usable") as caught:
        TileSpec(32, 2048, resize_to_max_side=False)
    assert "1024 tiles" in caught.value.expected


def test_unknown_and_missing_fields_are_refused() -> None:
    with pytest.raises(InputError, match="no field 'overlap'"):
        tile_spec_from_json({**SPEC.to_json(), "overlap": 3})
    with pytest.raises(InputError, match="lacks fields"):
        tile_spec_from_json({"tile_size_pixels": 512})
