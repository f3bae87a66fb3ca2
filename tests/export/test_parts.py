from __future__ import annotations

from math import prod
from pathlib import Path

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.export.parts import needed_bytes
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
