"""The runtime of a bundle whose texts attend to pictures: captions, answers, matches, and the encoder pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError
from vlm_export.runtime.answering import ENCODER, Answering
from vlm_export.runtime.captioning import Captioning
from vlm_export.runtime.chat_inputs import is_chat
from vlm_export.runtime.decoding import DECODER
from vlm_export.runtime.engine_choice import ONNXRUNTIME, EngineName
from vlm_export.runtime.image import MAX_PIXELS
from vlm_export.runtime.matching import MULTIMODAL, Matching

LANGUAGE_PARTS = frozenset({DECODER, ENCODER, MULTIMODAL})


class VisionLanguage(Captioning, Answering, Matching):
    """All that a checkpoint of this kind may have been trained for; the rest is an InputError when it is asked."""


def load_vision_language(
    path: str | Path,
    *,
    precision: str | None = None,
    engine: EngineName = ONNXRUNTIME,
    providers: str | Sequence[str] | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> VisionLanguage:
    """Opens a bundle to caption, answer or match with; arguments and errors as in `vlm_export.load`.

    Raises:
        InputError: also for a decoder-only model, which `load_vision_chat` opens.
    """
    bundle = open_bundle(Path(path))
    if is_chat(bundle.manifest):
        raise InputError(
            "this bundle is a decoder-only model, which has other options",
            where=bundle.manifest.name,
            expected="a bundle whose texts attend to pictures, such as BLIP's",
            got=bundle.manifest.family,
            fix="open it with vlm_export.load_vision_chat(DIR)",
        )
    return VisionLanguage(
        bundle, precision=precision, engine=engine, providers=providers, threads=threads, max_pixels=max_pixels
    )
