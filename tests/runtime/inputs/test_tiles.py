"""Tiles as the original cuts them: its recorded pixels, sizes worked out by hand, and torch's own resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.tiles import cut_tiles, plan_tiles
from vlm_export.specs.tiles import TileSpec

IMAGE = Path(__file__).parents[2] / "data" / "nanovlm" / "split" / "image.png"
SMALL = TileSpec(16, 64, resize_to_max_side=False, global_tile=True)


@pytest.mark.needs_torch  # its reader of safetensors comes with torch's environment
def test_the_pixels_are_the_recorded_ones(nanovlm_record: Callable[[str], dict[str, Any]]) -> None:
    record = nanovlm_record("split")
    plan, tiles = cut_tiles(Image.open(IMAGE), TileSpec(32, 64, resize_to_max_side=True, global_tile=True))
    assert plan.grid == tuple(record["preprocess.grid"])
    assert tiles.dtype == np.float32
    assert tiles.shape == record["input.pixel_values"].shape
    assert np.abs(tiles - record["input.pixel_values"]).max() <= 1e-6
    # The cut ones are 8-bit numbers over 255: equal to the last bit.
    assert np.array_equal(tiles[1:], record["input.pixel_values"][1:])


@pytest.mark.parametrize(
    ("size", "whole", "resized", "grid"),
    [
        ((1000, 700), False, (1024, 1024), (2, 2)),  # 700 * 1.024 = 716.8
        ((700, 1000), False, (1024, 1024), (2, 2)),
        ((5000, 2500), False, (1536, 1024), (2, 3)),
        ((2500, 5000), False, (1024, 1536), (3, 2)),
        ((100, 90), False, (512, 512), (1, 1)),
        ((100, 90), True, (1536, 1536), (3, 3)),
        ((1000, 300), True, (1536, 512), (1, 3)),
        ((3000, 1), False, (1536, 512), (1, 3)),
        ((512, 512), False, (512, 512), (1, 1)),
        ((513, 512), False, (1024, 1024), (2, 2)),  # 512 * 1024 / 513 = 1022.004
    ],
)
def test_sizes(size: tuple[int, int], whole: bool, resized: tuple[int, int], grid: tuple[int, int]) -> None:
    plan = plan_tiles(size, TileSpec(512, 1536, resize_to_max_side=whole, global_tile=True))
    assert (plan.resized_size, plan.grid) == (resized, grid)
    assert plan.to_json() == {
        "size": list(size),
        "resized": list(resized),
        "grid": {"rows": grid[0], "columns": grid[1]},
    }


def test_tiles_stand_row_by_row_after_the_whole_image() -> None:
    values = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(values.repeat(16, axis=0).repeat(16, axis=1))
    plan, tiles = cut_tiles(image, SMALL)
    assert (plan.grid, tiles.shape) == ((2, 3), (7, 3, 16, 16))
    for tile, value in zip(tiles[1:], values.ravel(), strict=True):
        assert np.array_equal(tile, np.full((3, 16, 16), value / np.float32(255), np.float32))
    assert tiles[0, 0, 0, 0] == pytest.approx(values[0, 0] / 255)
    assert tiles[0, 2, -1, -1] == pytest.approx(values[1, 2] / 255)
    assert tiles.flags.c_contiguous


def test_the_whole_image_is_left_out_where_nothing_asks_for_it() -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    plan, with_global = cut_tiles(image, SMALL)
    assert np.array_equal(cut_tiles(image, replace(SMALL, global_tile=False))[1], with_global[1:])
    plan, alone = cut_tiles(image.resize((16, 9)), SMALL)
    assert (plan.grid, len(alone)) == ((1, 1), 1)


@pytest.mark.needs_torch
@pytest.mark.parametrize("size", [(64, 48), (64, 16), (16, 64), (32, 64)])
def test_the_whole_image_is_shrunk_as_torchs_antialiased_resize_does(size: tuple[int, int]) -> None:
    import torch
    from torch.nn.functional import interpolate

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    _, tiles = cut_tiles(Image.fromarray(pixels), SMALL)
    batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    expected = interpolate(batch, (16, 16), mode="bilinear", antialias=True, align_corners=False)[0].numpy()
    assert np.abs(tiles[0] - expected).max() <= 1e-6
    blurred = interpolate(batch, (16, 16), mode="bilinear", antialias=False, align_corners=False)[0].numpy()
    assert np.abs(tiles[0] - blurred).max() > 0.1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_other_modes_become_rgb_first(mode: str) -> None:
    image = Image.effect_noise((40, 30), 90)
    image = Image.fromarray(np.asarray(image).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    assert image.mode == mode
    assert np.array_equal(cut_tiles(image, SMALL)[1], cut_tiles(image.convert("RGB"), SMALL)[1])


def test_images_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(InputError, match="no pixels"):
        plan_tiles((0, 5), SMALL)
    with pytest.raises(InputError, match="too long and thin") as caught:
        plan_tiles((1, 50_000_000), SMALL, name="thin.png")
    assert caught.value.where == "thin.png"
    assert "1 x 50000000" in caught.value.got
