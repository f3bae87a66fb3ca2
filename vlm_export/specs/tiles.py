"""How an image is cut into square tiles, as nanoVLM's later generation does.

Source: `DynamicResize` and `GlobalAndSplitImages` of huggingface/nanoVLM (data/custom_transforms.py, 4e0c096).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from vlm_export.specs.codec import Spec, between

MAX_SIDE_PIXELS = 8192
MAX_TILES = 1024
"""Of one image, the global one not counted."""
Side: TypeAlias = Annotated[int, between(1, MAX_SIDE_PIXELS)]


@dataclass(frozen=True)
class TileSpec(Spec):
    """From an image to square tiles: always RGB first, Pillow's bicubic, values in [0, 1] without normalisation.

    Attributes:
        tile_size_pixels: edge S of a tile, the vision part's input.
        max_side_pixels: longest side of the resized image, a multiple of S: the original fails on other numbers as
            soon as an image reaches them.
        resize_to_max_side: whether the longer side always becomes that long; otherwise it is only rounded up to
            whole tiles where it is shorter.
        global_tile: whether the whole image at a tile's size goes first where there is more than one tile.

    Raises:
        InputError: a value is of another type or out of range.
    """

    tile_size_pixels: Side
    max_side_pixels: Side
    resize_to_max_side: bool
    global_tile: bool

    def check(self) -> None:
        whole, rest = divmod(self.max_side_pixels, self.tile_size_pixels)
        if rest or not 1 <= whole * whole <= MAX_TILES:
            square = f"a multiple of tile_size_pixels, {self.tile_size_pixels}, of at most {MAX_TILES} tiles in all"
            raise self.refusal("max_side_pixels", square)
