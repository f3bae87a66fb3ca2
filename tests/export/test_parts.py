from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import UsageError
from vlm_export.export.parts import needed_bytes
from vlm_export.family import Model
from vlm_export.models.registry import recognise

DATA = Path(__file__).parents[1] / "data"


def test_the_disk_check_counts_what_is_read_and_every_graph() -> None:
    checkpoint = open_checkpoint(str(DATA / "clip" / "vit_p14" / "state_dict_fp32.pt"))
    family = recognise(checkpoint)
    counts = {part.name: part.parameter_count for part in family.describe(checkpoint).parts}
    read = sum(prod(info.shape) for info in checkpoint.tensors.values())
    assert needed_bytes(family, checkpoint, (), False) == 4 * (read + sum(counts.values()))
    assert needed_bytes(family, checkpoint, ("text",), False) == 4 * (read + counts["text"])
    assert needed_bytes(family, checkpoint, (), True) == 4 * (read + sum(counts.values()) + counts["vision"])


def test_the_language_model_is_not_counted() -> None:
    checkpoint = open_checkpoint(str(DATA / "minicpmv" / "v2_6"))
    family = recognise(checkpoint)
    aside = [info.shape for key, info in checkpoint.tensors.items() if not key.startswith(family.reads)]
    assert aside
    counts = sum(part.parameter_count for part in family.describe(checkpoint).parts)
    read = sum(prod(info.shape) for info in checkpoint.tensors.values()) - sum(map(prod, aside))
    assert needed_bytes(family, checkpoint, (), False) == 4 * (read + counts)


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
    assert needed_bytes(family, checkpoint, described, False) == needed_bytes(family, checkpoint, (), False)
    with pytest.raises(UsageError, match="no part 'texts'") as caught:
        needed_bytes(family, checkpoint, (described[0], "texts"), False)
    assert caught.value.expected == ", ".join(described)
