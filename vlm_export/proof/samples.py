"""Images and sentences that go through the runtime's own preprocessing, so that the deployed path is compared.

The images are synthetic photographs: generated, with the 1/f spectrum of natural scenes, shading, hard edges and
fine text. The user may name real ones instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_export.proof.image_samples import RAW, prepared_twice, takes_images
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import AnyImageSpec, ImageSpec, TextSpec
from vlm_export.specs.signature import Signature

_SENTENCES_PER_BATCH = 5
_TEXT_INPUTS = (("input_ids",), ("input_ids", "attention_mask"))
_SEEN_OF_EACH = 4
_PHOTOGRAPH_SIZES = ((640, 426), (351, 527), (300, 300))

SENTENCES: tuple[str, ...] = (
    "a dog",
    "rain",
    "a photo of a red bicycle leaning against a brick wall",
    "two cups of coffee on a wooden table, seen from above",
    "An old fisherman mends his net while gulls circle over the harbour.",
    "three green apples, one of them bitten",
    "the night train to the coast leaves at 22:45 from platform 9",
    "a child draws a house with four windows and a very large sun",
    "snow-covered roofs under a pale winter sky",
    "no parking — except on Sundays & holidays!",
    "A close-up of a bee's wing; every vein is visible.",
    "une petite boulangerie au coin de la rue, tôt le matin",
    "ein Straßenmusiker spielt Geige vor der Brücke",
    "una playa vacía al atardecer, con huellas en la arena",
    "雨の中を歩く人々",
    "кот спит на подоконнике",
    "a cake 🎂 with seven candles and a cat 🐈 that stares at it",
    "invoice no. 4711: 3 × 19.99 € = 59.97 €",
    "   spaces   around,  and\ttabs   between   the words   ",
    "a crowded market street in the early evening, lanterns above the stalls, steam rising from pots of soup, a man "
    "carrying baskets of oranges past two women who argue about the price of a blue scarf",
)


@cache
def synthetic_photographs() -> tuple[Image.Image, ...]:
    """Three RGB images, landscape, portrait and square; drawn once, not to be changed."""
    return tuple(_synthetic_photograph(width, height, seed) for seed, (width, height) in enumerate(_PHOTOGRAPH_SIZES))


@dataclass(frozen=True)
class Sample:
    """One image or batch of sentences, prepared for both sides.

    Attributes:
        inputs: for the engine, by the runtime's preprocessing.
        reference_inputs: for the Reference; images by the original's preprocessing, so that a fault of the
            runtime's shows, token ids as for the engine.
    """

    inputs: Arrays
    reference_inputs: Arrays

    @property
    def same_for_both(self) -> bool:
        """Both preparations give the same numbers, so that what differs behind them is the graph's."""
        return all(np.array_equal(self.inputs[name], array) for name, array in self.reference_inputs.items())


def sample_inputs(
    signature: Signature,
    image_spec: AnyImageSpec | None,
    text_spec: TextSpec | None,
    tokenizer_path: Path | None,
    *,
    images: Sequence[Image.Image] | None = None,
) -> list[Sample]:
    """Samples for a part that takes sources, or token ids alone or with their mask.

    There are none for any other part.

    Args:
        image_spec: from `image_spec`.
        tokenizer_path: the bundle's `tokenizer.json`; without it there are no text samples.
        images: take the place of the synthetic photographs, and of the odd margins for a graph that crops. Of
            photographs, a few slices or tiles are seen.
    """
    if takes_images(signature):
        # One at a time: the grid has the batches.
        limit = _SEEN_OF_EACH if images is None else None
        sources = (*_odd_margins(signature, image_spec), *synthetic_photographs()) if images is None else images
        return [Sample(*both) for image in sources for both in prepared_twice(image, signature, image_spec, limit)]
    if signature.input_names in _TEXT_INPUTS and text_spec is not None and tokenizer_path is not None:
        tokenizer = Tokenizer(tokenizer_path, text_spec)
        starts = range(0, len(SENTENCES), _SENTENCES_PER_BATCH)
        # Truncated, since a short context (a demo's) must not refuse a long sentence.
        batches = [tokenizer.encode_masked(SENTENCES[i : i + _SENTENCES_PER_BATCH], truncate=True) for i in starts]
        inputs = [dict(zip(signature.input_names, batch, strict=False)) for batch in batches]
        return [Sample(each, each) for each in inputs]
    return []


def _odd_margins(signature: Signature, spec: AnyImageSpec | None) -> tuple[Image.Image, ...]:
    """Images of which nothing but the crop is left to do, for a graph that crops; none for any other part.

    A margin of 3 is cut in two as 1 and 2 where half of it is rounded down, and as 2 and 1 where it is rounded to the
    nearest even number; one of 1 shows a half that is rounded up. The grid's sizes have margins that are multiples of 4
    for most encoders.
    """
    if RAW not in signature.input_names or not isinstance(spec, ImageSpec) or spec.resize != "shortest_edge":
        return ()
    edge, photograph = spec.resize_pixels[0], synthetic_photographs()[0]
    cut = {edge + extra: (edge + extra - spec.size_pixels) % 4 for extra in range(4)}
    longer = sorted((length for length, margin in cut.items() if margin % 2), key=lambda length: -cut[length])
    sizes = [size for length in longer for size in ((edge, length), (length, edge))]
    return tuple(photograph.resize(size) for size in dict.fromkeys(sizes))


def _synthetic_photograph(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    luminance = _pink_noise(rng, height, width)
    colour = np.stack([_pink_noise(rng, height, width) for _ in range(3)], axis=-1)
    shade = np.linspace(-0.5, 0.5, height)[:, None, None] + np.linspace(0.2, -0.2, width)[None, :, None]
    scene = 0.5 + 0.16 * luminance[:, :, None] + 0.06 * colour + 0.3 * shade
    image = Image.fromarray((scene.clip(0, 1) * 255).round().astype(np.uint8))
    _draw_details(ImageDraw.Draw(image), rng, width, height)
    return image


def _pink_noise(rng: np.random.Generator, height: int, width: int) -> Array:
    """float64 (height, width), mean 0, deviation 1: amplitude falls with 1/frequency, as in natural scenes.

    Source: D. J. Field, Relations between the statistics of natural images and the response properties of cortical
    cells, J. Opt. Soc. Am. A 4 (1987).
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    noise = np.fft.irfft2(spectrum, s=(height, width))
    return np.asarray((noise - noise.mean()) / noise.std())


def _draw_details(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    """Hard edges and detail near the pixel: that is where a resize without antialiasing differs."""
    for _ in range(4):
        x, y = int(rng.integers(0, width * 3 // 4)), int(rng.integers(0, height * 3 // 4))
        edge = int(rng.integers(20, width // 4))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + edge, y + edge), fill=colour)
    left, top = width // 8, height // 3
    for i in range(0, width // 3, 3):
        draw.line((left + i, top, left + i, top + height // 4), fill=(20, 20, 20))
    font = ImageFont.load_default_imagefont()  # the bitmap font: the same pixels on every platform
    for line in range(6):
        draw.text((width // 2, height // 2 + 12 * line), SENTENCES[2 + line], fill=(250, 250, 245), font=font)
