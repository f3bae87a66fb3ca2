"""The demo's world: scenes of drawn shapes, their images and their sentences. Deterministic by seed, torch-free.

A composition is one choice of shape, colour, size, position and count: 1,920 in all. About an eighth of them are held
out by a hash of their names: no training image shows one and no training sentence is written for one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")
SIZES = ("small", "large")
POSITIONS = ("left", "right", "top", "bottom", "middle")
COUNTS = ("one", "two", "three", "four")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "position": POSITIONS,
    "count": COUNTS,
}
IMAGE_PIXELS = 64
HELD_OUT_SHARE = 0.125

# Lengths are in units of the image's edge.
_RADIUS = {"small": 0.08, "large": 0.12}
_ANCHOR = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "middle": (0.5, 0.5)}
_RGB = {
    "red": (220, 30, 35),
    "green": (30, 160, 60),
    "blue": (35, 70, 220),
    "yellow": (245, 225, 40),
    "orange": (245, 135, 25),
    "purple": (125, 45, 175),
    "pink": (250, 130, 190),
    "cyan": (40, 205, 220),
}
_SUPERSAMPLING = 4


@dataclass(frozen=True, order=True)
class Composition:
    """One value of each attribute."""

    shape: str
    colour: str
    size: str
    position: str
    count: str

    def value(self, attribute: str) -> str:
        """The value of that attribute."""
        return str(getattr(self, attribute))

    def with_value(self, attribute: str, value: str) -> Composition:
        """The composition with another value of that attribute."""
        return replace(self, **{attribute: value})

    @property
    def held_out(self) -> bool:
        """Whether training must never see it: decided by a hash of its names, the same on every machine."""
        name = " ".join(self.value(attribute) for attribute in ATTRIBUTES)
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        return fraction < HELD_OUT_SHARE


COMPOSITIONS = tuple(Composition(*values) for values in itertools.product(*ATTRIBUTES.values()))
TRAINED = tuple(composition for composition in COMPOSITIONS if not composition.held_out)
HELD_OUT = tuple(composition for composition in COMPOSITIONS if composition.held_out)


@dataclass(frozen=True)
class Drawing:
    """An image of a composition and where its objects are: centres in [0, 1], x to the right, y down."""

    composition: Composition
    image: Image.Image
    centres: tuple[tuple[float, float], ...]


def draw(composition: Composition, seed: Sequence[int] | int, size_pixels: int = IMAGE_PIXELS) -> Drawing:
    """Same seed, same RGB image; the seed moves, turns and tints everything."""
    rng = np.random.default_rng(seed)
    radius = _RADIUS[composition.size] * rng.uniform(0.94, 1.06)
    centres = _place_objects(composition, radius, rng)
    mask = _draw_mask(composition.shape, centres, radius, size_pixels, rng)
    colour = np.array(_RGB[composition.colour]) + rng.normal(0, 7, 3)
    background = _paint_background(size_pixels, rng)
    cover = np.asarray(mask, dtype=np.float32)[..., None] / 255
    painted = background * (1 - cover) + colour * cover
    noisy = painted + rng.standard_normal(painted.shape, dtype=np.float32) * rng.uniform(0, 6)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return Drawing(composition, Image.fromarray(pixels), tuple(centres))


def _place_objects(composition: Composition, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres of the objects: a pair, a triangle or a square around the position's anchor, turned at random."""
    count = COUNTS.index(composition.count) + 1
    gap = radius * rng.uniform(2.25, 2.5)
    spread = 0.0 if count == 1 else gap / (2 * math.sin(math.pi / count))
    turn = rng.uniform(0, 2 * math.pi)
    # The anchor moves little along the axis that tells the positions apart and freely along the other one.
    x, y = _ANCHOR[composition.position]
    free_x = composition.position in ("top", "bottom")
    free_y = composition.position in ("left", "right")
    x += rng.uniform(-1, 1) * (0.10 if free_x else 0.035)
    y += rng.uniform(-1, 1) * (0.10 if free_y else 0.035)
    margin = spread + radius + 0.01
    x, y = (min(max(value, margin), 1 - margin) for value in (x, y))
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [(x + spread * math.cos(angle), y + spread * math.sin(angle)) for angle in angles]


def _draw_mask(
    shape: str, centres: Sequence[tuple[float, float]], radius: float, size_pixels: int, rng: np.random.Generator
) -> Image.Image:
    """Cover of the objects, mode L: drawn larger and averaged, so that edges are smooth."""
    edge = size_pixels * _SUPERSAMPLING
    mask = Image.new("L", (edge, edge), 0)
    draw = ImageDraw.Draw(mask)
    for x, y in centres:
        if shape in ("circle", "ring"):
            _draw_disc(draw, x * edge, y * edge, radius * edge, 255)
        if shape == "ring":
            _draw_disc(draw, x * edge, y * edge, radius * edge * 0.55, 0)
        if shape not in ("circle", "ring"):
            tilt = math.radians(rng.uniform(-10, 10))
            draw.polygon([_turned(x, y, tilt, dx * radius, dy * radius, edge) for dx, dy in _OUTLINES[shape]], fill=255)
    return mask.reduce(_SUPERSAMPLING)


def _draw_disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)


def _turned(x: float, y: float, tilt: float, dx: float, dy: float, edge: int) -> tuple[float, float]:
    cos, sin = math.cos(tilt), math.sin(tilt)
    return ((x + dx * cos - dy * sin) * edge, (y + dx * sin + dy * cos) * edge)


def _corners(radii: Sequence[float], count: int, first_degrees: float) -> tuple[tuple[float, float], ...]:
    angles = [math.radians(first_degrees) + 2 * math.pi * i / count for i in range(count)]
    return tuple(
        (radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    )


_ARM = 0.32
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": _corners([1.12], 4, 45),
    "triangle": _corners([1.15], 3, -90),
    "star": _corners([1.15, 0.46], 10, -90),
    "cross": (
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ),
}


def _paint_background(size_pixels: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """float32 (S, S, 3): a slope between two greys with a slight tint, so that no background has an object's colour."""
    grey = rng.uniform(20, 235)
    slope = rng.uniform(-45, 45)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.5, 0.5, size_pixels, dtype=np.float32)
    along = ramp[None, :] * math.cos(angle) + ramp[:, None] * math.sin(angle)
    tint = rng.uniform(-12, 12, 3)
    painted: npt.NDArray[Any] = np.clip(grey + slope * along[..., None] + tint, 0, 255)
    return painted.astype(np.float32)
