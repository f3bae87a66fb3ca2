from __future__ import annotations

from pathlib import Path

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.exporting.bundle_manifest import fp32_operators
from vlm_export.models.registry import recognise

DATA = Path(__file__).parents[1] / "data"


def test_blips_text_norms_stay_in_float32_and_no_others(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(DATA / "blip" / "caption" / "model_caption.pth"))
    with ScratchStore(tmp_path / "weights.bin") as store:
        parts = {part.name: part for part in recognise(checkpoint).build(checkpoint, store).parts}
        assert fp32_operators(parts["vision"]) == ()
        names = fp32_operators(parts["text_decoder"])
        assert set(names) == {"embeddings.norm", "layers.0.norm1", "layers.0.norm2", "cross.0.norm", "head.norm"}
        weights = parts["text_decoder"].module.state_dict()
        assert all(f"{name}.weight" in weights for name in names)
