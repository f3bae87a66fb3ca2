from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import UsageError
from vlm_export.exporting.parts import check_images, needed_bytes, planned_parts
from vlm_export.family import Checkpoint, Model
from vlm_export.models.registry import recognise

DATA = Path(__file__).parents[1] / "data"


def disk_bytes(checkpoint: Checkpoint, names: tuple[str, ...], with_preprocessing: bool = False) -> int:
    family = recognise(checkpoint)
    return needed_bytes(family, checkpoint, planned_parts(family, checkpoint, names, with_preprocessing))


def test_the_disk_check_counts_what_is_read_and_every_graph() -> None:
    checkpoint = open_checkpoint(str(DATA / "clip" / "vit_p14" / "state_dict_fp32.pt"))
    family = recognise(checkpoint)
    counts = {part.name: part.parameter_count for part in family.describe(checkpoint).parts}
    read = sum(prod(info.shape) for info in checkpoint.tensors.values())
    assert disk_bytes(checkpoint, ()) == 4 * (read + sum(counts.values()))
    assert disk_bytes(checkpoint, ("text",)) == 4 * (read + counts["text"])
    assert disk_bytes(checkpoint, (), True) == 4 * (read + sum(counts.values()) + counts["vision"])


def test_the_image_encoder_is_found_by_what_it_takes() -> None:
    checkpoint = open_checkpoint(str(DATA / "nanovlm" / "222m"))
    family = recognise(checkpoint)
    (vision,) = (part for part in family.describe(checkpoint).parts if part.name == "vision_encoder")
    (planned,) = planned_parts(family, checkpoint, ("vision_from_uint8",), True)
    assert (planned.name, planned.parameter_count) == ("vision_from_uint8", vision.parameter_count)
    assert disk_bytes(checkpoint, (), True) == disk_bytes(checkpoint, ()) + 4 * vision.parameter_count


@pytest.mark.parametrize(
    ("name", "names", "with_preprocessing", "message"),
    [
        ("clip/vit_p14/state_dict_fp32.pt", ("vision",), True, "adds the part vision_from_uint8"),
        ("nanovlm/222m", ("vision_encoder",), True, "adds the part vision_from_uint8"),
        ("nanovlm/222m", ("vision_from_uint8",), False, "--with-preprocessing"),
        ("minicpmv/v2_6", (), True, "no vision part that takes images alone"),
    ],
)
def test_preprocessing_that_nobody_would_get_is_refused(
    name: str, names: tuple[str, ...], with_preprocessing: bool, message: str
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_path(name)))
    with pytest.raises(UsageError) as caught:
        planned_parts(recognise(checkpoint), checkpoint, names, with_preprocessing)
    assert message in str(caught.value)


def test_images_need_a_part_that_takes_them() -> None:
    checkpoint = open_checkpoint(str(DATA / "minicpmv" / "v2_6"))
    family, image = recognise(checkpoint), [Path("a.png")]
    for names in ((), ("vision",), ("vision_tokens", "resampler")):
        check_images(planned_parts(family, checkpoint, names, False), image)
    resampler = planned_parts(family, checkpoint, ("resampler",), False)
    check_images(resampler, [])
    with pytest.raises(UsageError, match="no part of this export takes an image"):
        check_images(resampler, image)


def test_the_language_model_is_not_counted() -> None:
    checkpoint = open_checkpoint(str(DATA / "minicpmv" / "v2_6"))
    family = recognise(checkpoint)
    aside = [info.shape for key, info in checkpoint.tensors.items() if not key.startswith(family.reads)]
    assert aside
    counts = sum(part.parameter_count for part in family.describe(checkpoint).parts)
    read = sum(prod(info.shape) for info in checkpoint.tensors.values()) - sum(map(prod, aside))
    assert disk_bytes(checkpoint, ()) == 4 * (read + counts)


CHECKPOINTS = (
    "clip/rn_tiny/jit_archive.pt",
    "clip/vit_p14/state_dict_fp32.pt",
    *(f"blip/{name}" for name in ("caption", "feature_extractor", "retrieval", "vqa")),
    *(f"minicpmv/{name}" for name in ("omnilmm", "v1_0", "v2_0", "v2_5", "v2_6", "v4_5")),
    *(f"nanovlm/{name}" for name in ("222m", "450m", "split")),
)


def checkpoint_path(name: str) -> Path:
    path = DATA / name
    return next(path.glob("*.pth"), path) if path.is_dir() else path


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_unknown_names_are_refused_before_weights_are_read(name: str, build_model: Callable[..., Model]) -> None:
    """By the names that the description gives, which are those that the model has."""
    checkpoint = open_checkpoint(str(checkpoint_path(name)))
    family = recognise(checkpoint)
    described = [part.name for part in family.describe(checkpoint).parts]
    assert described == [part.name for part in build_model(checkpoint_path(name)).parts]
    assert disk_bytes(checkpoint, tuple(described)) == disk_bytes(checkpoint, ())
    with pytest.raises(UsageError, match="no part 'texts'") as caught:
        planned_parts(family, checkpoint, (described[0], "texts"), False)
    assert caught.value.expected == ", ".join(described)
