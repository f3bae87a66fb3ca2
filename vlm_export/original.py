"""Whose code prepares images and texts for an original: stated by a Family, run by the proof of the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Encode: TypeAlias = "Callable[[Mapping[str, npt.NDArray[np.generic]]], dict[str, npt.NDArray[Any]]]"
OPENAI_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class TransformersOriginal:
    """transformers' classes on the checkpoint's own files.

    Attributes:
        model_type: of the config, by which the Auto classes choose where the files name no class.
        image_class: the processor whose defaults apply where the checkpoint has no processor file.
        added_tokens: special tokens that the original's own code adds to its tokenizer, in order.
    """

    model_type: str
    image_class: str
    added_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenClipOriginal:
    """open_clip's `image_transform_v2`, for originals that prepare images with it or with a copy of it.

    Attributes:
        preprocess: the checkpoint's `preprocess_cfg`.
        rgb_first: the original converts images to RGB before it, which converts them after the crop.
    """

    preprocess: Mapping[str, Any]
    rgb_first: bool = False


@dataclass(frozen=True)
class TorchvisionPipeline:
    """Resize, [CenterCrop,] ToTensor and [Normalize] of torchvision on a Pillow image, as authors publish it.

    Attributes:
        name: of the function and its source.
        crop: resize the shorter edge and cut a square; False resizes both edges.
        rgb_first: convert to RGB before the resize, or after the crop.
        mean, std: None without normalisation.
    """

    name: str
    interpolation: Literal["bicubic", "bilinear"]
    crop: bool
    rgb_first: bool
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


@dataclass(frozen=True)
class SimpleTokenizerOriginal:
    """OpenAI's SimpleTokenizer, with the names that its publisher gives the start and end tokens.

    Attributes:
        special_tokens: these names. None for open_clip's own, with its own vocabulary, whatever tokenizer.json says.
    """

    special_tokens: tuple[str, str] | None = OPENAI_SPECIAL_TOKENS


@dataclass(frozen=True)
class Asked:
    """An image and a text, prepared by the original's own processor and tokenizer.

    Attributes:
        pixels: float32 (1, 3, H, W).
        ids: of the text, start and end included.
        max_length: of what is decoded, in tokens, the start and a prompt included.
    """

    pixels: npt.NDArray[np.float32]
    ids: Sequence[int]
    max_length: int


@dataclass(frozen=True)
class Written:
    """What the original makes of it.

    Attributes:
        ids: of what was decoded, start and end included; nothing for a match.
        prompt_length: how many of these are the start and the prompt.
        probability: of a match, None for what is decoded.
        margin: smallest distance, over all tokens, between the logit of the chosen one and the next: below what
            rounding moves, another right implementation may choose otherwise.
    """

    ids: tuple[int, ...] = ()
    prompt_length: int = 0
    probability: float | None = None
    margin: float = float("inf")


@dataclass(frozen=True)
class OriginalTask:
    """What the original does with an image and a text, beyond vectors.

    Attributes:
        kind: of the task in the manifest.
        name: the class, for people.
        load: gives the original, which decodes by greedy search.
    """

    kind: Literal["match", "caption", "answer"]
    name: str
    load: Callable[[], Callable[[Asked], Written]]


@dataclass(frozen=True)
class OpenClipTokenizer:
    """open_clip's `HFTokenizer`: the checkpoint's tokenizer of transformers, behind `get_clean_fn(clean)`."""

    clean: Literal["lower", "whitespace", "canonicalize"]


@dataclass(frozen=True)
class Original:
    """Whose code prepares images and texts for the original; None where that is remote code, which is never run.

    Attributes:
        encoders: part name → loads what the original's own model class computes, where that is not the Reference.
        encoders_name: who that is.
        score: name of a number of the manifest's score (`logit_scale`) → the original's own.
        task: what it answers in words or scores; None where it gives vectors alone, or cannot be run.
    """

    images: TransformersOriginal | OpenClipOriginal | TorchvisionPipeline | None = None
    texts: TransformersOriginal | SimpleTokenizerOriginal | OpenClipTokenizer | None = None
    encoders: Mapping[str, Callable[[], Encode]] = field(default_factory=dict)
    encoders_name: str = ""
    score: Mapping[str, float] = field(default_factory=dict)
    task: OriginalTask | None = None
