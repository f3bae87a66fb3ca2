"""Where an image is cut, as MiniCPM-V and OmniLMM decide it: sizes alone, no pixels.

The arithmetic is that of `slice_image` in MiniCPM-V 2.0's modeling file and of the image processors of 2.5 and 2.6,
including Python's rounding of halves to even and its truncation. Very thin images: the originals let a slice grow
without bound (1 x 10000 becomes 14 x 44800, 3200 patches), and an image more than size_pixels² times as wide as high
collapses to one patch. Both are kept; slices beyond MAX_STRETCH are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlm_export.errors import InputError
from vlm_export.specs.slices import SliceSpec

Size: TypeAlias = tuple[int, int]

MAX_STRETCH = 4
"""Patches of a slice, over those of a square one: attention's memory grows with the square. Thin images reach 4 when
one side is about 16,384 times the other."""


@dataclass(frozen=True)
class SliceGrid:
    """Equal slices of the resized image.

    Attributes:
        columns, rows: at least two slices together.
        slice_size: (width, height) in pixels.
    """

    columns: int
    rows: int
    slice_size: Size


@dataclass(frozen=True)
class SlicePlan:
    """How one image is sliced; sizes are (width, height) in pixels.

    Attributes:
        image_size: of the image itself.
        source_size: what the whole image, slice 0, is resized to.
        grid: the slices after it, row by row; None when the image is not cut.
        patch_size: edge of a patch.
    """

    image_size: Size
    source_size: Size
    grid: SliceGrid | None
    patch_size: int

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of each slice, the source first."""
        cut = () if self.grid is None else (self.grid.slice_size,) * (self.grid.columns * self.grid.rows)
        return (self.source_size, *cut)

    @property
    def refined_size(self) -> Size | None:
        """What the image is resized to before it is cut."""
        if self.grid is None:
            return None
        width, height = self.grid.slice_size
        return (width * self.grid.columns, height * self.grid.rows)

    @property
    def boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(left, top, right, bottom) of the slices in the image of `refined_size`, row by row."""
        return tuple(self._grid_boxes())

    @property
    def patch_grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of patches of each slice: the `tgt_sizes` of the originals."""
        edge = self.patch_size
        return tuple((math.ceil(height / edge), math.ceil(width / edge)) for width, height in self.sizes)

    def to_json(self) -> dict[str, Any]:
        """What `inspect` prints: sizes as [width, height], patches as [rows, columns]."""
        grid = self.grid
        return {
            "size": list(self.image_size),
            "grid": None if grid is None else {"columns": grid.columns, "rows": grid.rows},
            "slices": [
                {"size": list(size), "patches": list(patches)}
                for size, patches in zip(self.sizes, self.patch_grids, strict=True)
            ],
        }

    def _grid_boxes(self) -> Iterator[tuple[int, int, int, int]]:
        if self.grid is None:
            return
        width, height = self.grid.slice_size
        for top in range(0, height * self.grid.rows, height):
            for left in range(0, width * self.grid.columns, width):
                yield (left, top, left + width, top + height)


def plan_slices(size: Size, spec: SliceSpec, *, max_patches: int | None = None, name: str = "image") -> SlicePlan:
    """Decide how an image of `size` (width, height) is sliced.

    Args:
        max_patches: most patches of a slice; MAX_STRETCH times those of a square slice by default.

    Raises:
        InputError: the image has no pixels, or is so long and thin that a slice exceeds `max_patches`.
    """
    if min(size) < 1:
        raise InputError("an image has no pixels", where=name, got=f"{size[0]} x {size[1]}")
    edge = spec.size_pixels
    if spec.mode == "square":
        return SlicePlan(size, (edge, edge), None, spec.patch_size)
    wanted = min(math.ceil(size[0] * size[1] / (edge * edge)), spec.max_slices)
    grid = None if wanted <= 1 else _refine(size, _choose_grid(size, wanted, spec.max_slices), spec)
    plan = SlicePlan(size, _fit(size, spec), grid, spec.patch_size)
    square = math.ceil(edge / spec.patch_size) ** 2
    _check_patches(plan, MAX_STRETCH * square if max_patches is None else max_patches, name)
    return plan


def _fit(size: tuple[float, float], spec: SliceSpec) -> Size:
    """(width, height) of the same aspect with a slice's area, each side a multiple of the patch."""
    aspect = size[0] / size[1]
    height = int(spec.size_pixels / math.sqrt(aspect))
    width = int(height * aspect)
    return (_nearest_multiple(width, spec.patch_size), _nearest_multiple(height, spec.patch_size))


def _nearest_multiple(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


def _choose_grid(size: Size, wanted: int, max_slices: int) -> Size:
    """(columns, rows) of about `wanted` slices whose aspect is nearest to the image's; the first of equals."""
    aspect = math.log(size[0] / size[1])
    counts = (n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= max_slices)
    grids = ((columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))


def _refine(size: Size, grid: Size, spec: SliceSpec) -> SliceGrid:
    cell = [_nearest_multiple(extent, parts) / parts for extent, parts in zip(size, grid, strict=True)]
    return SliceGrid(*grid, _fit((cell[0], cell[1]), spec))


def _check_patches(plan: SlicePlan, max_patches: int, name: str) -> None:
    patches, size = max(
        (rows * columns, size) for (rows, columns), size in zip(plan.patch_grids, plan.sizes, strict=True)
    )
    if patches > max_patches:
        width, height = plan.image_size
        raise InputError(
            "an image is too long and thin to slice",
            where=name,
            expected=f"at most {max_patches:,} patches in a slice",
            got=f"{width} x {height} would have a slice of {size[0]} x {size[1]}: {patches:,} patches",
            fix="crop it nearer to a square",
        )
