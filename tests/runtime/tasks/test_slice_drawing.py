"""A drawing of a plan shows one rule between neighbouring slices, around each of them, and a label in each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vlm_export.models.minicpmv.slicing import slice_spec_from_version
from vlm_export.runtime.inputs.slice_plan import SlicePlan, plan_slices
from vlm_export.runtime.tasks.slice_drawing import PANEL_PIXELS, draw_plan

BLUE = (0, 0, 200)
RULE = (230, 30, 60)


def drawn(width: int, height: int, version: str = "2.6") -> tuple[SlicePlan, npt.NDArray[np.uint8]]:
    plan = plan_slices((width, height), slice_spec_from_version(version, queries=64))
    drawing = draw_plan(Image.new("RGB", (width, height), BLUE), plan)
    assert drawing.mode == "RGB"
    return plan, np.asarray(drawing, dtype=np.uint8)


def rules(red: npt.NDArray[np.bool_]) -> int:
    """Groups of neighbouring rows that are red along a whole panel."""
    full = np.concatenate([[False], red.sum(axis=1) >= PANEL_PIXELS - 2])
    return int((full[1:] & ~full[:-1]).sum())


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (640, 480), (1000, 333), (100, 60)])
def test_wide_images_have_panels_above_one_another(width: int, height: int) -> None:
    plan, pixels = drawn(width, height)
    rows = 0 if plan.grid is None else plan.grid.rows + 1
    assert rules((pixels == RULE).all(axis=2)) == 2 + rows


@pytest.mark.parametrize(("width", "height"), [(1080, 1920), (480, 640), (333, 1000), (896, 896)])
def test_tall_images_have_panels_side_by_side(width: int, height: int) -> None:
    plan, pixels = drawn(width, height)
    assert plan.grid is not None
    assert rules((pixels == RULE).all(axis=2).T) == 2 + plan.grid.columns + 1


def test_each_slice_is_numbered_on_the_image() -> None:
    """Slices of one size differ in their numbers alone: without those all cells were equal."""
    _, pixels = drawn(1344, 1344)
    red = (pixels == RULE).all(axis=2)
    left = np.flatnonzero(red.sum(axis=0) >= PANEL_PIXELS - 2)[2:]
    top = np.flatnonzero(red.sum(axis=1) >= PANEL_PIXELS - 2)
    columns, rows = (np.linspace(edges.min(), edges.max() + 1, 4).astype(int) for edges in (left, top))
    inner = {
        pixels[rows[r] + 4 : rows[r] + 204, columns[c] + 4 : columns[c] + 204].tobytes()
        for r in range(3)
        for c in range(3)
    }
    assert len(inner) == 9
    assert all(np.frombuffer(cell, np.uint8).reshape(-1, 3).tolist().count(list(RULE)) > 300 for cell in inner)


def test_the_image_itself_is_shown() -> None:
    image = Image.new("RGB", (640, 480), BLUE)
    image.paste((0, 200, 0), (320, 0, 640, 480))
    drawing = draw_plan(image, plan_slices(image.size, slice_spec_from_version("2.0", queries=64)))
    pixels = np.asarray(drawing)
    blue, green = ((pixels == colour).all(axis=2).nonzero()[1] for colour in (BLUE, (0, 200, 0)))
    assert blue.size > 100_000
    assert green.size > 100_000
    assert blue.max() < green.min()


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (4000, 200)])
@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_drawings_stay_small_and_legible(size: tuple[int, int], version: str) -> None:
    _, pixels = drawn(*size, version)
    height, width, _ = pixels.shape
    assert max(width, height) <= 2 * PANEL_PIXELS + 200
    assert (pixels == BLUE).all(axis=2).sum() > 5000
