"""Images and texts that a loss is measured on, and others that ranges are calibrated on: none is in both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from vlm_export.bundle.manifest import SourceRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError
from vlm_export.proof.contract_record import image_content, read_record
from vlm_export.proof.samples import SENTENCES, synthetic_photographs
from vlm_export.runtime.inputs.images import ImageSource, open_image
from vlm_export.runtime.inputs.sources import image_files

Sample = TypeVar("Sample")
_MOST_IMAGES, _MOST_TEXTS = 2000, 10000
_FEW = 32
TEMPLATE = "a photo of a {}"
"""Around a label, as OpenAI's CLIP was shown."""
_NUMBERED = re.compile(r"#[0-9]+$")
_MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class NamedSamples:
    """What the user names to measure on.

    Attributes:
        images: files, and folders of them.
        texts: a file of UTF-8 with one text a line; before it there may be the name of an image and a tab.
        labels: a folder with a folder of images for each label; one may be empty.
        template: the sentence around a label.
    """

    images: tuple[Path, ...] = ()
    texts: Path | None = None
    labels: Path | None = None
    template: str = TEMPLATE


@dataclass(frozen=True)
class SampleSet:
    """Images and texts.

    Attributes:
        own_images, own_texts: how many of them the user named, which come first.
        left_out: what the user named beyond what is measured on, a sentence each.
        pairs: number of an image, and a text that belongs to it; these texts are not among `texts`.
        labelled: number of an image, and of its label.
        labels: sentences, one for each label.
    """

    images: tuple[ImageSource, ...]
    texts: tuple[str, ...]
    own_images: int = 0
    own_texts: int = 0
    left_out: tuple[str, ...] = ()
    pairs: tuple[tuple[int, str], ...] = ()
    labelled: tuple[tuple[int, int], ...] = ()
    labels: tuple[str, ...] = ()

    def part(self, start: int, step: int) -> SampleSet:
        """Every `step`-th of each, from `start` on; texts and labels of an image go with it."""
        kept = {number: place for place, number in enumerate(range(start, len(self.images), step))}
        return replace(
            self,
            images=self.images[start::step],
            texts=self.texts[start::step],
            own_images=len(range(start, self.own_images, step)),
            own_texts=len(range(start, self.own_texts, step)),
            pairs=tuple((kept[image], text) for image, text in self.pairs if image in kept),
            labelled=tuple((kept[image], label) for image, label in self.labelled if image in kept),
        )

    def notes(self, purpose: str) -> tuple[str, ...]:
        """What stands on few samples, in a sentence each."""
        found = list(self.left_out)
        for kind, count, own, option in (
            ("images", len(self.images), self.own_images, "--images"),
            ("texts", len(self.texts) + len(self.pairs), self.own_texts + len(self.pairs), "--texts"),
        ):
            if count and count < _FEW:
                whose = "none of them yours" if not own else f"{own} of them yours"
                found.append(f"{purpose} {count} {kind}, {whose}: name more with {option} for figures that say more")
        return tuple(found)

    def accuracy_notes(self, named: NamedSamples, source: SourceRecord) -> tuple[str, ...]:
        """On which data and weights accuracies were measured, in a sentence each."""
        found = []
        weights = f"the weights of {source.name!r}" if source.random_weights_seed is None else "random weights"
        if self.labelled and named.labels is not None:
            found.append(
                f"zero-shot: {len(self.labelled)} images of {len(self.labels)} labels in the folder "
                f"{named.labels.name!r}, as {named.template!r}, with {weights}"
            )
        if self.pairs and named.texts is not None:
            found.append(
                f"pairs: {len(self.pairs)} of the file {named.texts.name!r}, {len({image for image, _ in self.pairs})} "
                f"images, with {weights}"
            )
        return tuple(found)


def sample_set(bundle: OpenBundle, named: NamedSamples) -> SampleSet:
    """The user's images and texts, then the contract's and the project's own; those that the bundle takes.

    Raises:
        UsageError: the bundle takes no images or no texts and some are named, or a folder holds none.
        InputError: a file cannot be read, or a text belongs to an image that is not there.
    """
    manifest, record = bundle.manifest, read_record(bundle)
    left_out: list[str] = []
    folders = [] if named.labels is None else _label_folders(named.labels)
    # A label without images is one more that the others' images may be taken for.
    of_label = [
        (path, label)
        for label, folder in enumerate(folders)
        for path in (image_files(folder) if any(folder.iterdir()) else ())
    ]
    alone = [path for entry in named.images for path in image_files(entry)]
    own_images = _first(_MOST_IMAGES, [*alone, *(path for path, _ in of_label)], "images", left_out)
    lines = [] if named.texts is None else _lines(named.texts)
    own_texts = _first(_MOST_TEXTS, lines, "texts", left_out)
    for given, takes, kind in (
        (named.images or folders, manifest.image, "images"),
        (own_texts or folders, manifest.text, "texts"),
    ):
        if given and takes is None:
            raise UsageError(f"this bundle takes no {kind}", where=manifest.name, fix="leave them out")
    pairs, texts = _pairs(own_texts, own_images, named.texts)
    found = SampleSet(
        own_images,
        texts,
        len(own_images),
        len(texts),
        tuple(left_out),
        pairs,
        tuple((len(alone) + i, label) for i, (_, label) in enumerate(of_label) if len(alone) + i < len(own_images)),
        tuple(named.template.replace("{}", folder.name) for folder in folders),
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


def _label_folders(folder: Path) -> list[Path]:
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if len(found) < 2:
        raise UsageError(
            "labels are folders of images",
            where=str(folder),
            expected="a folder for each label, named as the label, two or more",
            got=f"{len(found)} folders" if folder.is_dir() else "no folder",
        )
    return found


def _pairs(
    lines: Sequence[str], images: Sequence[Path], file: Path | None
) -> tuple[tuple[tuple[int, str], ...], tuple[str, ...]]:
    """Texts that belong to an image, in the order of images, and the others, each once."""
    numbers: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        numbers.setdefault(image.name, []).append(number)
    pairs, texts = [], []
    for line in lines:
        name, tab, text = line.partition("\t")
        if not tab:
            texts.append(line)
            continue
        # Flickr8k's and Flickr30k's files number an image's texts: `photo.jpg#2`.
        places = numbers.get(name, numbers.get(_NUMBERED.sub("", name), []))
        if len(places) != 1:
            got = f"{len(places)} images of that name" if places else "no image of that name"
            raise InputError(
                "a text belongs to no one image",
                where=f"{file}: {name:.80}",
                expected="NAME<tab>TEXT, with the name of one of the images",
                got=got,
                fix="name the images' folder with --images",
            )
        pairs.append((places[0], text.strip()))
    return tuple(sorted(pairs)), tuple(dict.fromkeys(texts))


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
