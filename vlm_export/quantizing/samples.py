"""Images and texts that a loss is measured on, and others that ranges are calibrated on: none is in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError
from vlm_export.proof.contract_record import image_content, read_record
from vlm_export.proof.samples import SENTENCES, synthetic_photographs
from vlm_export.runtime.inputs.images import ImageSource, open_image
from vlm_export.runtime.inputs.sources import image_files

Sample = TypeVar("Sample")
_MOST_IMAGES, _MOST_TEXTS = 2000, 10000
_FEW = 32
_MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class SampleSet:
    """Images and texts.

    Attributes:
        own_images, own_texts: how many of them the user named, which come first.
        left_out: what the user named beyond what is measured on, a sentence each.
    """

    images: tuple[ImageSource, ...]
    texts: tuple[str, ...]
    own_images: int = 0
    own_texts: int = 0
    left_out: tuple[str, ...] = ()

    def part(self, start: int, step: int) -> SampleSet:
        """Every `step`-th of each, from `start` on."""
        own_images = len(range(start, self.own_images, step))
        own_texts = len(range(start, self.own_texts, step))
        return SampleSet(self.images[start::step], self.texts[start::step], own_images, own_texts, self.left_out)

    def notes(self, purpose: str) -> tuple[str, ...]:
        """What stands on few samples, in a sentence each."""
        found = list(self.left_out)
        for kind, count, own, option in (
            ("images", len(self.images), self.own_images, "--images"),
            ("texts", len(self.texts), self.own_texts, "--texts"),
        ):
            if count and count < _FEW:
                whose = "none of them yours" if not own else f"{own} of them yours"
                found.append(f"{purpose} {count} {kind}, {whose}: name more with {option} for figures that say more")
        return tuple(found)


def sample_set(bundle: OpenBundle, images: Sequence[Path], texts: Path | None) -> SampleSet:
    """The user's images and texts, then the contract's and the project's own; those that the bundle takes.

    Args:
        images: files, and folders of them.
        texts: a file of UTF-8 with one text a line.

    Raises:
        UsageError: the bundle takes no images or no texts and some are named, or a folder holds none.
        InputError: a file cannot be read.
    """
    manifest, record = bundle.manifest, read_record(bundle)
    left_out: list[str] = []
    own_images = _first(_MOST_IMAGES, [path for entry in images for path in image_files(entry)], "images", left_out)
    own_texts = _first(_MOST_TEXTS, () if texts is None else _lines(texts), "texts", left_out)
    for named, takes, kind in ((images, manifest.image, "images"), (own_texts, manifest.text, "texts")):
        if named and takes is None:
            raise UsageError(f"this bundle takes no {kind}", where=manifest.name, fix=f"leave out --{kind}")
    found = SampleSet(
        own_images, tuple(dict.fromkeys(own_texts)), len(own_images), len(set(own_texts)), tuple(left_out)
    )
    if manifest.image is not None:
        recorded = () if record is None else record.images
        contract: list[Image.Image] = [open_image(image_content(bundle, image), name=image.file) for image in recorded]
        found = replace(found, images=(*own_images, *contract, *synthetic_photographs()))
    if manifest.text is not None:
        recorded_texts = () if record is None else tuple(text.text for text in record.texts)
        every = dict.fromkeys([*found.texts, *SENTENCES, *recorded_texts])
        found = replace(found, texts=tuple(text for text in every if text.strip()))
    return found


def _first(most: int, items: Sequence[Sample], kind: str, left_out: list[str]) -> tuple[Sample, ...]:
    """So many of the items; a sentence is added where there are more."""
    if len(items) > most:
        left_out.append(f"of your {len(items)} {kind} the first {most} were taken")
    return tuple(items[:most])


def _lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TEXT_BYTES + 1)
        lines = [line.strip() for line in raw.decode("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        got = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"[:200]
        raise InputError(
            "a file of texts cannot be read", where=str(path), expected="UTF-8, one text a line", got=got
        ) from error
    if len(raw) > _MAX_TEXT_BYTES or not lines:
        got = "no text" if not lines else f"more than {_MAX_TEXT_BYTES} bytes"
        raise InputError("a file of texts cannot be used", where=str(path), expected="UTF-8, one text a line", got=got)
    return tuple(lines)
