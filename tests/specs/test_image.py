"""How images become pixels: ImageSpec, TileSpec and SliceSpec travel through JSON, and odd ones are refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from vlm_export.errors import InputError
from vlm_export.models.minicpmv_slicing import SliceVersion, slice_spec_from_version
from vlm_export.specs import ImageSpec, SliceSpec, TileSpec, torchvision_image_spec

STRETCHED = ImageSpec(
    size_pixels=384,
    resample="bicubic",
    rgb_stage="before_resize",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="stretch",
    resize_pixels=(384, 384),
    crop="none",
    transparency="white",
)
TILES = TileSpec(512, 2048, resize_to_max_side=True, global_tile=True)


def data_of(spec: ImageSpec | TileSpec | SliceSpec, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(spec.to_json()))
    return {**data, **changes}


def slices_of(version: str = "2.6") -> SliceSpec:
    return slice_spec_from_version(version, queries=64)


def test_image_specs_survive_json() -> None:
    cropped = torchvision_image_spec(224, "bicubic", "after_crop", (0, 0, 0), (1, 1, 1))
    for spec in (STRETCHED, cropped):
        assert ImageSpec.from_json(data_of(spec), "test") == spec


def test_a_config_leaves_out_the_usual_rescale_factor() -> None:
    data = {key: value for key, value in data_of(STRETCHED).items() if key != "rescale_factor"}
    assert ImageSpec.from_config(data) == STRETCHED
    assert STRETCHED.rescale_factor == 1 / 255
    with pytest.raises(InputError, match="got: no std"):
        ImageSpec.from_config({key: value for key, value in data.items() if key != "std"})


def test_the_pipelines_of_torchvision() -> None:
    stretched = torchvision_image_spec(32, "bilinear", "before_resize", (0, 0, 0), (1, 1, 1), "stretch")
    assert (stretched.crop, stretched.resize_pixels) == ("none", (32, 32))
    cropped = torchvision_image_spec(32, "bilinear", "before_resize", (0, 0, 0), (1, 1, 1))
    assert (cropped.crop, cropped.resize_pixels) == ("nearest_even", (32,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize", "squash"),
        ("resize_pixels", [384]),
        ("resize_pixels", [384, 380]),  # and nothing is cropped
        ("resize_pixels", [384, True]),
        ("resize_pixels", [0, 384]),
        ("resize_pixels", [384, 8193]),
        ("resample", "area"),
        ("rgb_stage", None),
        ("crop", "up"),
        ("transparency", "black"),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("rescale_factor", True),
        ("std", [1, 0, 1]),
        ("std", [1, 1]),
        ("mean", [1, 1, "1"]),
        ("mean", [0, 0, float("nan")]),
        ("size_pixels", 8193),
        ("size_pixels", 0),
        ("size_pixels", 384.0),
    ],
)
def test_an_image_spec_that_no_runtime_could_follow_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"field '{field}' has another type or value"):
        ImageSpec.from_json(data_of(STRETCHED, **{field: value}), "manifest")


def test_as_many_edges_as_the_resize_needs() -> None:
    for resize, count in (("shortest_edge", 1), ("none", 0)):
        with pytest.raises(InputError, match="'resize_pixels'") as caught:
            ImageSpec.from_json(data_of(STRETCHED, resize=resize), "manifest")
        assert f"{count} edges" in caught.value.expected


def test_tile_specs_survive_json() -> None:
    assert TileSpec.from_json(data_of(TILES), "test") == TILES


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
def test_tiles_that_cannot_be_cut_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"'{field}'"):
        TileSpec.from_json(data_of(TILES, **{field: value}), "manifest")


def test_the_number_of_tiles_is_bounded() -> None:
    assert TileSpec(64, 2048, resize_to_max_side=False, global_tile=True).max_side_pixels == 2048
    with pytest.raises(InputError, match="max_side_pixels") as caught:
        TileSpec(32, 2048, resize_to_max_side=False, global_tile=True)
    assert "1024 tiles" in caught.value.expected


@pytest.mark.parametrize("version", get_args(SliceVersion))
def test_slice_specs_survive_json(version: str) -> None:
    assert SliceSpec.from_json(data_of(slices_of(version)), "test") == slices_of(version)


def test_versions_differ_where_the_originals_do() -> None:
    specs = {version: slices_of(version) for version in get_args(SliceVersion)}
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
        ("mean", [0.5, 0.5, 1e7]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [0.5, float("nan"), 0.5]),
        ("std", ["0.5", 0.5, 0.5]),
        ("placeholder", []),
    ],
)
def test_slices_that_cannot_be_cut_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"'{field}'|PlaceholderSpec is no object"):
        SliceSpec.from_json(data_of(slices_of(), **{field: value}), "manifest")


@pytest.mark.parametrize(
    ("field", "value"),
    [("queries", 0), ("queries", 1 << 20), ("query_token", None), ("slice", ["<slice>"]), ("source", None), ("end", 3)],
)
def test_odd_placeholders_are_refused_with_their_path(field: str, value: object) -> None:
    data = data_of(slices_of())
    data["placeholder"][field] = value
    with pytest.raises(InputError, match=f"'{field}'") as caught:
        SliceSpec.from_json(data, "manifest: image")
    assert caught.value.where == "manifest: image.placeholder"


def test_unknown_versions_are_refused() -> None:
    with pytest.raises(InputError, match=r"'2\.7'") as caught:
        slice_spec_from_version("2.7", queries=64)
    assert "2.6" in caught.value.fix


def test_squares_are_not_cut_and_not_patched() -> None:
    for field, value in (("max_slices", 9), ("pixel_layout", "patches")):
        with pytest.raises(InputError, match=f"'{field}'"):
            SliceSpec.from_json(data_of(slices_of("1.0"), **{field: value}), "manifest")
