"""How nanoVLM's later generation cuts a picture into tiles; torch-free facts, stated by a Family, kept in a manifest.

Source: `DynamicResize` and `GlobalAndSplitImages` of huggingface/nanoVLM (data/custom_transforms.py, 4e0c096).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlm_export.errors import InputError
from vlm_export.specs import record_from_json

MAX_SIDE_PIXELS = 8192
MAX_TILES = 1024
"""Of one picture, the global one not counted."""


@dataclass(frozen=True)
class TileSpec:
    """From a picture to square tiles: always RGB first, Pillow's bicubic, values in [0, 1] without normalisation.

    Attributes:
        tile_size_pixels: edge S of a tile, the vision part's input.
        max_side_pixels: longest side of the resized picture, a multiple of S: the original fails on other numbers as
            soon as a picture reaches them.
        resize_to_max_side: whether the longer side always becomes that long; otherwise it is only rounded up to
            whole tiles where it is shorter.

    Raises:
        InputError: a value is of another type or out of range.
    """

    tile_size_pixels: int
    max_side_pixels: int
    resize_to_max_side: bool

    def __post_init__(self) -> None:
        _check_side("tile_size_pixels", self.tile_size_pixels, 1)
        _check_side("max_side_pixels", self.max_side_pixels, self.tile_size_pixels)
        whole, rest = divmod(self.max_side_pixels, self.tile_size_pixels)
        expected = (
            f"a multiple of tile_size_pixels, {self.tile_size_pixels}, of at most {MAX_TILES} tiles in its square"
        )
        _check("max_side_pixels", rest == 0 and whole * whole <= MAX_TILES, expected, self.max_side_pixels)
        _check(
            "resize_to_max_side", isinstance(self.resize_to_max_side, bool), "true or false", self.resize_to_max_side
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tile_spec_from_json(data: Mapping[str, Any]) -> TileSpec:
    """The spec that `TileSpec.to_json` wrote; InputError on unknown, missing or odd values."""
    return record_from_json(TileSpec, data)


def _check_side(name: str, value: object, minimum: int) -> None:
    fine = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MAX_SIDE_PIXELS
    _check(name, fine, f"an integer from {minimum} to {MAX_SIDE_PIXELS}", value)


def _check(name: str, fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise InputError(
            "the cutting of pictures into tiles is not usable", where=name, expected=expected, got=repr(got)
        )
