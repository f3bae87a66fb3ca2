"""What no bundle could state is refused before any graph is made, and a good bundle stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm_export.errors import InputError, UsageError
from vlm_export.exporting import source
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import ExportResult, export_bundle
from vlm_export.exporting.stages import Stages
from vlm_export.family import BuildOptions

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize(
    ("name", "values", "stage"),
    [
        ("preprocessor_config.json", {"image_std": [-1, -1, -1], "size": 24, "crop_size": 24}, "read"),
        ("config.json", {"transformers.js_config": 5}, "load weights"),
        ("config.json", {"transformers.js_config": ["dtype"]}, "load weights"),
    ],
)
def test_odd_values_end_an_export_early(
    make_huggingface_clip: Callable[..., Any], tmp_path: Path, name: str, values: dict[str, Any], stage: str
) -> None:
    make_huggingface_clip(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    stages = Stages()
    with pytest.raises(InputError, match=r"is malformed|could not be opened again") as caught:
        export_bundle(
            str(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions(opset=17, with_tokenizer=False), stages
        )
    assert f"(stage: {stage})" in caught.value.where
    assert not (tmp_path / "bundle").exists()
    assert [record.name for record in stages.records] == ([] if stage == "read" else ["read"])


def test_a_family_that_states_what_json_cannot_hold(
    checkpoint: Path,
    tmp_path: Path,
    export_fast: Callable[..., ExportResult],
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export_fast(checkpoint, tmp_path / "bundle", parts=("text",))
    before = snapshot(tmp_path)
    build = source.build_model
    odd = {"eps": float("inf")}
    monkeypatch.setattr(
        "vlm_export.exporting.pipeline.build_model", lambda *given: replace(build(*given), architecture=odd)
    )
    with pytest.raises(InputError, match="could not be opened again") as caught:
        export_fast(checkpoint, tmp_path / "bundle", parts=("text",), overwrite=True)
    assert "JSON" in caught.value.got
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seeds_that_no_bundle_could_state(seed: int) -> None:
    with pytest.raises(UsageError, match="seed") as caught:
        ExportOptions(random_weights_seed=seed)
    assert caught.value.got == str(seed)


@pytest.mark.parametrize("size", [0, -8, 8193, 8_000_000])
def test_image_sizes_that_no_bundle_could_state(size: int) -> None:
    with pytest.raises(UsageError, match="--image-size is out of range"):
        ExportOptions(build=BuildOptions(image_size=size))


def test_the_ends_of_the_ranges() -> None:
    for seed in (0, 2**63 - 1):
        assert ExportOptions(random_weights_seed=seed, build=BuildOptions(image_size=8192)).random_weights_seed == seed
