"""A drawing of how an image is sliced: the whole image as the model sees it, and the grid with numbers and sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from vlm_export.runtime.inputs.slice_plan import Size, SlicePlan
from vlm_export.runtime.inputs.slices import rgb_image

PANEL_PIXELS = 640
"""Longer side of each panel; small images are enlarged, so that numbers fit."""

_MIN_SIDE = 28
_MARGIN = 16
_LINE = 22
_HEADING, _BODY = 16, 14
_PAPER, _INK, _RULE, _LABEL = (255, 255, 255), (20, 20, 20), (230, 30, 60), (255, 255, 255)


@dataclass(frozen=True)
class _Panel:
    title: str
    image: Image.Image
    columns: int
    rows: int
    first: int
    size: Size


def draw_plan(image: Image.Image, plan: SlicePlan) -> Image.Image:
    """Draw the source beside the grid (above it for wide images), each panel at most PANEL_PIXELS long.

    Numbers are those of `SlicePlan.sizes`: 0 is the whole image. Very thin images are drawn wider than they are.

    Args:
        image: the image of the plan.

    Returns:
        An RGB image; its size depends on the plan alone.

    Raises:
        InputError: Pillow cannot convert the image to RGB.
    """
    blocks = [_draw_panel(panel) for panel in _panels(rgb_image(image), plan)]
    count = len(plan.sizes)
    heading = f"{plan.image_size[0]} x {plan.image_size[1]} pixels: {count} slice{'s' if count > 1 else ''}"
    stacked = plan.image_size[0] > plan.image_size[1]
    corners, left, top = [], _MARGIN, _MARGIN + _LINE
    for block in blocks:
        corners.append((left, top))
        left, top = (left, top + block.height + _MARGIN) if stacked else (left + block.width + _MARGIN, top)
    right = max(left + block.width for block, (left, _) in zip(blocks, corners, strict=True))
    bottom = max(top + block.height for block, (_, top) in zip(blocks, corners, strict=True))
    width = max(right, _MARGIN + _text_width(heading, _HEADING))
    canvas = Image.new("RGB", (width + _MARGIN, bottom + _MARGIN), _PAPER)
    ImageDraw.Draw(canvas).text((_MARGIN, _MARGIN), heading, fill=_INK, font=_font(_HEADING))
    for block, corner in zip(blocks, corners, strict=True):
        canvas.paste(block, corner)
    return canvas


def _panels(image: Image.Image, plan: SlicePlan) -> list[_Panel]:
    patches = plan.patch_grids
    title = _title("0: the whole image,", plan.source_size, patches[0])
    panels = [_Panel(title, _shown(image, plan.source_size), 1, 1, 0, plan.source_size)]
    if plan.grid is not None and plan.refined_size is not None:
        columns, rows, size = plan.grid.columns, plan.grid.rows, plan.grid.slice_size
        title = _title(f"1 to {columns * rows}: {columns} x {rows} slices, each", size, patches[1])
        panels.append(_Panel(title, _shown(image, plan.refined_size), columns, rows, 1, size))
    return panels


def _title(name: str, size: Size, patches: tuple[int, int]) -> str:
    return f"{name} {size[0]} x {size[1]} pixels = {patches[1]} x {patches[0]} patches"


def _shown(image: Image.Image, size: Size) -> Image.Image:
    scale = PANEL_PIXELS / max(size)
    width, height = (max(round(extent * scale), _MIN_SIDE) for extent in size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _draw_panel(panel: _Panel) -> Image.Image:
    width, height = panel.image.size
    block = Image.new("RGB", (max(width, _text_width(panel.title, _BODY)), height + _LINE), _PAPER)
    block.paste(panel.image, (0, _LINE))
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), panel.title, fill=_INK, font=_font(_BODY))
    for row in range(panel.rows):
        for column in range(panel.columns):
            box = (
                column * width // panel.columns,
                _LINE + row * height // panel.rows,
                (column + 1) * width // panel.columns - 1,
                _LINE + (row + 1) * height // panel.rows - 1,
            )
            draw.rectangle(box, outline=_RULE, width=2)
            _draw_label(draw, box, panel.first + row * panel.columns + column, panel.size)
    return block


def _draw_label(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], number: int, size: Size) -> None:
    """The slice's number in the middle of its box, its size too where there is room."""
    text = f"{number}\n{size[0]} x {size[1]}"
    inside = (box[2] - box[0] - 8, box[3] - box[1] - 8)
    extent = draw.multiline_textbbox((0, 0), text, font=_font(_BODY))
    if extent[2] > inside[0] or extent[3] > inside[1]:
        text = str(number)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    left, top, right, bottom = draw.multiline_textbbox(centre, text, font=_font(_BODY), anchor="mm", align="center")
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill=_RULE)
    draw.multiline_text(centre, text, fill=_LABEL, font=_font(_BODY), anchor="mm", align="center")


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
