"""A model that is built again states the same, in every family: as the manifest holds it after it was read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_export.bundle.manifest import manifest_from_bytes
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.publish import manifest_content
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.exporting.bundle_manifest import planned_manifest
from vlm_export.exporting.options import ExportOptions
from vlm_export.models.registry import recognise
from vlm_export.proof.declared import check_declared

DATA = Path(__file__).parents[1] / "data"
SOURCES = ["clip/rn_tiny/jit_archive.pt", "blip/retrieval", "blip/vqa", "minicpmv/v1_0", "minicpmv/v2_5"]
SOURCES += ["minicpmv/omnilmm", "nanovlm/222m", "nanovlm/450m", "nanovlm/split"]


@pytest.mark.parametrize("name", SOURCES)
def test_every_family_states_the_same_again(name: str, tmp_path: Path) -> None:
    source = next((DATA / name).glob("*.pth"), DATA / name)
    contents = []
    for turn in range(2):
        checkpoint = open_checkpoint(str(source))
        with ScratchStore(tmp_path / f"{turn}.bin") as store:
            model = recognise(checkpoint).build(checkpoint, store)
            contents.append(manifest_content(planned_manifest("again", checkpoint, model, None, ExportOptions())))
            planned = planned_manifest("again", checkpoint, model, None, ExportOptions(target="web"))
    bundle = OpenBundle(tmp_path, manifest_from_bytes(contents[0]), contents[0])
    check_declared(bundle, planned)
    assert contents[0] == contents[1]
