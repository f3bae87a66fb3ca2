"""How the versions of MiniCPM-V, and OmniLMM, cut images into slices, and the text around their features.

Sources: the published image processors and `chat` functions of MiniCPM-V 1.0, 2.0, Llama3-V 2.5, 2.6 (with 4.0 and 4.5,
which share 2.6's), and OpenBMB/OmniLMM 08ae772.
"""

from __future__ import annotations

from typing import Literal, get_args

from vlm_export.errors import InputError, suggestion
from vlm_export.specs.slices import PlaceholderSpec, SliceSpec

SliceVersion = Literal["1.0", "2.0", "2.5", "2.6", "4.0", "4.5", "omnilmm"]
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def slice_spec_from_version(
    version: str, *, queries: int, size_pixels: int = 448, patch_size: int = 14, max_slices: int = 9
) -> SliceSpec:
    """The published preprocessing of one version.

    Args:
        version: one of SliceVersion.
        queries: the resampler's queries (`query_num`; 96 for 2.5, otherwise 64).
        size_pixels: `image_size` of 1.0 and OmniLMM, `scale_resolution` of the others.
        max_slices: `max_slice_nums`; 1.0 and OmniLMM never cut.

    Raises:
        InputError: the version is unknown, or a value is out of range.
    """
    if version not in get_args(SliceVersion):
        raise InputError(f"no preprocessing is known for version {version!r}", fix=_known_versions(version))
    square = version in ("1.0", "omnilmm")
    mean, std = (_CLIP_MEAN, _CLIP_STD) if version == "omnilmm" else (_HALF, _HALF)
    return SliceSpec(
        mode="square" if square else "adaptive",
        size_pixels=size_pixels,
        patch_size=patch_size,
        max_slices=1 if square else max_slices,
        pixel_layout="image" if square or version == "2.0" else "patches",
        mean=mean,
        std=std,
        placeholder=_placeholder(version, queries),
    )


def _placeholder(version: str, queries: int) -> PlaceholderSpec:
    image, cut, nothing = ("<image>", "</image>"), ("<slice>", "</slice>"), ("", "")
    if version == "omnilmm":
        marks = ("<im_start>", "<im_end>")
        return PlaceholderSpec(queries, "<im_patch>", marks, marks, nothing, "\n", None, "\n")
    if version in ("1.0", "2.0", "2.5"):
        # The line break of the older versions belongs to `chat`, which puts it between the image and the question.
        return PlaceholderSpec(queries, "<unk>", image, image, cut, "\n", None, "" if version == "2.5" else "\n")
    return PlaceholderSpec(queries, "<unk>", image, cut, nothing, "\n", ("<image_id>", "</image_id>"), "")


def _known_versions(version: str) -> str:
    return suggestion(version, get_args(SliceVersion))
