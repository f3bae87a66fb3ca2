"""The images and texts of the contract: small files, made by a seeded generator, on which preparations part.

Each image is there for one thing that libraries do differently: the crop's rounding, antialiasing, EXIF orientation,
transparency, palettes, CMYK, 16 bits, sizes far from square. Blocks of a few pixels keep the files small and their
edges hard.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

_BLOCK = 5
_EXIF_ORIENTATION, _ROTATED = 0x0112, 6
# Of crop sizes above, the images that need no resize would be large files that show nothing more.
_LARGEST_EDGE = 448
_TRANSPARENT_INDEX = 3
_COLOURS = 16

TEXTS: tuple[str, ...] = (
    "",
    "a photo of a cat",
    "A PHOTO OF A Cat in UPPER case",
    "Crème brûlée, naïve façade, ÅNGSTRÖM, Straße, İstanbul",
    "雨の中を歩く人々 한국어 漢字",
    "a cake 🎂, a family 👨‍👩‍👧 and a flag 🇯🇵",
    "tab\there, null\x00, bell\x07, escape\x1b[31m, soft\u00adhyphen, zero\u200bwidth",
    "  spaces   around\n\nand  newlines \u3000 wide ",
    "&lt;b&gt; &amp;amp; &eacute; entities",
    "don't it's we're I'll he'd 3.14 x 10^-5 (50%) #tag @user http://a.b/c?d=e_f",
    "schÃ¶n â€œmojibakeâ€\x9d",
    "e\u0301 combining, ﬁ ligature, ＦＵＬＬ width, ½ Ⅷ ²",
    "<|startoftext|> inside <|endoftext|> a text <end_of_text>",
    "[CLS] [SEP] [PAD] [UNK] [MASK] </s> <pad>",
    "مرحبا بالعالم שלום עולם привет, мир",
    "a crowded market street in the early evening " * 12,
)
"""What tokenizers part on: nothing at all, case, accents, scripts, control characters, entities, special tokens'
names, and more than any context of CLIP's holds."""


@dataclass(frozen=True)
class ContractImage:
    """A file of the contract: its name without folder, and its bytes."""

    name: str
    content: bytes


@cache
def contract_images(edge: int) -> tuple[ContractImage, ...]:
    """The images for an encoder that takes `edge` pixels; the same on every call.

    Four have a shorter edge of exactly `edge`, so that nothing but the crop acts on them, and margins of 0 to 3 mod 4.
    """
    edge = min(edge, _LARGEST_EDGE)
    return tuple(ContractImage(name, content) for name, content in _files(edge))


def contract_texts(added_tokens: Sequence[str] = (), limit: int | None = None) -> tuple[str, ...]:
    """The texts, and one with the tokens that a tokenizer has besides its vocabulary.

    Args:
        limit: the first so many of `TEXTS` only.
    """
    own = f"some {' and '.join(added_tokens[:8])} here, {added_tokens[0]}{added_tokens[-1]}" if added_tokens else ""
    return (*TEXTS[:limit], *([own] if own else []))


def _files(edge: int) -> Iterator[tuple[str, bytes]]:
    yield "reduced.png", _png(_scene(edge * 13 // 8 + 1, edge * 5 // 4, 0))
    for margin in range(4):
        size = (edge + margin, edge) if margin % 2 else (edge, edge + margin)
        yield f"margin-{margin}.png", _png(_scene(*size, 1 + margin))
    yield "portrait.png", _png(_scene(edge * 3 // 4, edge * 4 // 3 + 3, 5))
    rotated = _scene(edge + 9, edge, 6)
    exif = rotated.getexif()
    exif[_EXIF_ORIENTATION] = _ROTATED
    yield "orientation.png", _png(rotated, exif=exif)
    yield "rgba.png", _png(_with_alpha(_scene(70, 57, 7)))
    yield "grey-alpha.png", _png(_with_alpha(_scene(66, 51, 8)).convert("LA"))
    palette = _scene(61, 64, 9).quantize(_COLOURS, dither=Image.Dither.NONE)
    yield "palette.png", _png(palette, transparency=_TRANSPARENT_INDEX)
    yield "cmyk.tiff", _saved(_scene(53, 59, 10).convert("CMYK"), "TIFF", compression="tiff_deflate")
    yield "grey.png", _png(_scene(90, 71, 11).convert("L"))
    yield "sixteen-bit.png", _png(Image.fromarray(_levels(47, 52, 12)[:, :, 0].astype(np.uint16) * 5))
    yield "tiny.png", _png(_scene(7, 5, 13))
    yield "wide.png", _png(_scene(301, 12, 14))


def _levels(width: int, height: int, seed: int) -> npt.NDArray[np.uint8]:
    """uint8 (height, width, 3): a slope of blocks with random ones among them, and lines that are one pixel wide."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    slope = np.linspace(0, 150, rows)[:, None, None] + np.linspace(0, 60, columns)[None, :, None]
    noise = rng.integers(0, 8, (rows, columns, 3)) * 6
    bright = rng.random((rows, columns, 1)) < 0.12
    blocks = np.where(bright, rng.integers(0, 256, (rows, columns, 3)), slope + noise).clip(0, 255).astype(np.uint8)
    scene: npt.NDArray[np.uint8] = blocks.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)[:height, :width].copy()
    scene[height // 3 :: 7, : width // 2] = (250, 20, 90)
    scene[: height // 2, width // 3 :: 6] = (10, 240, 200)
    return scene


def _scene(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(_levels(width, height, seed))


def _with_alpha(image: Image.Image) -> Image.Image:
    """RGBA whose opacity falls from left to right, down to nothing: the hidden colours stay in the file."""
    alpha = np.linspace(255, 0, image.width).astype(np.uint8)
    image = image.convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    return image


def _png(image: Image.Image, **options: object) -> bytes:
    return _saved(image, "PNG", optimize=True, **options)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
