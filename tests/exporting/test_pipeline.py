"""Whole exports: what is published, what its manifest says, and that nothing unverified is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import load_tensor, numpy_helper
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

from vlm_export import load
from vlm_export.bundle.opened import open_bundle
from vlm_export.checkpoint.sources.known import KnownCheckpoint, KnownSource, Tolerance
from vlm_export.errors import InputError, UsageError, VerificationError
from vlm_export.exporting import pipeline, source
from vlm_export.exporting.finishing import simplify_graph
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.stages import Stages
from vlm_export.family import DEFAULT_BUILD, Array, Arrays, BuildOptions, Checkpoint, Model, Reference, WeightStore
from vlm_export.models.clip.family import ClipFamily
from vlm_export.specs import ImageSpec
from vlm_export.specs.tasks import EmbedSpec, ScoreSpec

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
TOKENIZER = DATA / "runtime" / "tiny_bundle" / "tokenizer.json"
Export = Callable[..., pipeline.ExportResult]
Snapshot = Callable[[Path], dict[str, bytes]]


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def test_manifest_tells_source_tools_and_proof(default_bundle: Path, checkpoint: Path) -> None:
    manifest = open_bundle(default_bundle).manifest
    (file,) = manifest.source.files
    assert (file.name, file.size_bytes) == (checkpoint.name, checkpoint.stat().st_size)
    assert file.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (manifest.source.name, manifest.source.format) == (checkpoint.name, "state_dict")
    assert manifest.source.random_weights_seed is None
    assert {"vlm-export", "torch", "onnx", "onnx-ir", "onnxruntime", "onnxsim"} <= set(manifest.tools)
    assert manifest.architecture["activation"] == "quick_gelu"
    assert manifest.export.reference == "unpatched eager module"
    task = manifest.task(EmbedSpec)
    assert task is not None
    assert task.parts == ("vision", "text")
    assert isinstance(task.score, ScoreSpec)
    for part in manifest.parts:
        (variant,) = part.variants
        assert (variant.opset, variant.exporter, variant.simplified) == (18, "dynamo", True)
        assert variant.warnings == ()
        assert variant.verification is not None
        assert variant.verification["passed"] is True
        assert variant.verification["axes"]["batch"] == [1, 2, 3, 4, 5, 8, 16, 32, 64]
        assert variant.verification["points"]["grid"] >= 4


def test_manifest_lists_every_file(default_bundle: Path, snapshot: Snapshot) -> None:
    files = open_bundle(default_bundle).manifest.files
    found = snapshot(default_bundle)
    assert set(found) == {*files, "vlm_export.json"}
    for name, record in files.items():
        assert (len(found[name]), hashlib.sha256(found[name]).hexdigest()) == (record.size_bytes, record.sha256)
    assert sorted(path.name for path in default_bundle.parent.iterdir()) == [default_bundle.name]


def test_bundle_tells_nothing_of_this_machine(default_bundle: Path, snapshot: Snapshot) -> None:
    for name, content in snapshot(default_bundle).items():
        for path in (ROOT, Path(pipeline.__file__).parents[1], default_bundle.parent, Path(np.__file__).parent):
            assert str(path).encode() not in content, name


def test_side_files_follow_the_conventions(default_bundle: Path) -> None:
    config = read_json(default_bundle / "config.json")
    assert (config["model_type"], config["architectures"], config["projection_dim"]) == ("clip", ["CLIPModel"], 32)
    assert config["text_config"]["vocab_size"] == 200
    assert config["vision_config"]["patch_size"] == 14
    assert "transformers.js_config" not in config
    preprocessor = read_json(default_bundle / "preprocessor_config.json")
    assert preprocessor["size"] == {"shortest_edge": 42}
    assert preprocessor["crop_size"] == {"height": 42, "width": 42}


def test_transformers_reads_a_bundle(
    tmp_path: Path, make_huggingface_clip: Callable[..., Any], export_fast: Export
) -> None:
    original = make_huggingface_clip(tmp_path / "model")
    bundle = tmp_path / "bundle"
    export_fast(tmp_path / "model", bundle, tokenizer=str(TOKENIZER), with_tokenizer=True)
    config = AutoConfig.from_pretrained(bundle)
    assert config.vision_config.num_attention_heads == original.config.vision_config.num_attention_heads
    assert config.text_config.eos_token_id == original.config.text_config.eos_token_id
    assert config.text_config.layer_norm_eps == original.config.text_config.layer_norm_eps
    pair = load(bundle)
    source = Image.effect_noise((31, 47), 80).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(bundle)(images=source, return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(bundle)(["a red cat"], return_tensors="pt")
    image = original.get_image_features(**pixels).pooler_output.detach().numpy()
    text = original.get_text_features(input_ids=ids["input_ids"]).pooler_output.detach().numpy()
    # transformers resizes with torchvision, which rounds pixels differently from Pillow.
    assert np.abs(pair.encode_image([source]) - image / np.linalg.norm(image)).max() < 0.02
    assert np.abs(pair.encode_text(["a red cat"]) - text / np.linalg.norm(text)).max() < 1e-5


def test_huggingface_checkpoints_are_compared_with_transformers(
    tmp_path: Path, make_huggingface_clip: Callable[..., Any], export_fast: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_huggingface_clip(tmp_path / "model")
    calls = _count_calls(monkeypatch)
    result = export_fast(tmp_path / "model", tmp_path / "bundle")
    assert calls, "the reference was not computed by transformers"
    assert result.manifest.export.reference == "transformers CLIPModel"
    assert {report.reference for report in result.reports} == {"transformers CLIPModel"}
    names = {file.name for file in result.manifest.source.files}
    assert {"config.json", "model.safetensors"} <= names
    assert isinstance(result.manifest.image, ImageSpec)
    assert result.manifest.image.rgb_stage == "before_resize"


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    method = CLIPModel.get_text_features

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs)

    monkeypatch.setattr(CLIPModel, "get_text_features", counted)
    return calls


@pytest.mark.parametrize("options", [{}, {"opset": 18}, {"simplify": False}], ids=["torchscript", "dynamo", "raw"])
def test_external_data(tmp_path: Path, checkpoint: Path, export_fast: Export, options: dict[str, Any]) -> None:
    target = tmp_path / "bundle"
    export_fast(checkpoint, target, external_data_threshold_bytes=0, **options)
    for stem in ("vision_model", "text_model"):
        assert (target / "onnx" / f"{stem}.onnx_data").stat().st_size > 100_000
        assert (target / "onnx" / f"{stem}.onnx").stat().st_size < 100_000
    config = read_json(target / "config.json")
    external = {"text_model.onnx": 1, "vision_model.onnx": 1}
    assert config["transformers.js_config"] == {"use_external_data_format": external}
    variant = open_bundle(target).manifest.part("vision").variant("fp32")
    assert variant.external_data == ("onnx/vision_model.onnx_data",)
    # Moved elsewhere, it still finds its data.
    moved = target.rename(tmp_path / "elsewhere")
    assert load(moved).encode_ids([[1, 199]]).shape == (1, 32)


def test_small_models_are_one_file(default_bundle: Path) -> None:
    assert sorted(path.name for path in (default_bundle / "onnx").iterdir()) == ["text_model.onnx", "vision_model.onnx"]


def test_golden_records_are_the_references_outputs(
    default_bundle: Path, oracle_model: Callable[[str], Model], assert_same: Callable[..., None]
) -> None:
    for part in oracle_model("vit_p14/state_dict_fp16.pt").parts:
        reference = part.module
        sets = sorted((default_bundle / "golden" / part.name).iterdir())
        assert len(sets) >= 3
        for folder in sets:
            given = numpy_helper.to_array(load_tensor(folder / "input_0.pb"))
            expected = numpy_helper.to_array(load_tensor(folder / "output_0.pb"))
            assert_same(reference(torch.from_numpy(given.copy())).numpy(), expected, 1e-6)


def _perturbed(model: ir.Model) -> ir.Model:
    """The simplified graph with its largest weight slightly wrong."""
    result = simplify_graph(model)
    value = max(result.graph.initializers.values(), key=lambda v: v.const_value.nbytes if v.const_value else 0)
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)
    return result


def test_simplified_graph_that_differs_is_taken_back(
    tmp_path: Path, checkpoint: Path, export_fast: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "simplify_graph", _perturbed)
    result = export_fast(checkpoint, tmp_path / "changed", external_data_threshold_bytes=0)
    assert all(report.passed for report in result.reports)
    for part in result.manifest.parts:
        (variant,) = part.variants
        assert not variant.simplified
        (warning,) = variant.warnings
        assert "the simplified graph differs" in warning
        assert "max-abs" in warning or "cosine" in warning or "norm" in warning
    monkeypatch.undo()
    export_fast(checkpoint, tmp_path / "plain", simplify=False, external_data_threshold_bytes=0)
    for name in ("vision_model.onnx", "vision_model.onnx_data", "text_model.onnx", "text_model.onnx_data"):
        assert (tmp_path / "changed/onnx" / name).read_bytes() == (tmp_path / "plain/onnx" / name).read_bytes()


@pytest.mark.parametrize("error", [RuntimeError("no such operator"), ValueError("bad graph")])
def test_simplifier_that_fails_is_left_out(
    tmp_path: Path, checkpoint: Path, export_fast: Export, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: ir.Model) -> ir.Model:
        raise error

    monkeypatch.setattr(pipeline, "simplify_graph", fail)
    result = export_fast(checkpoint, tmp_path / "bundle")
    for part in result.manifest.parts:
        (variant,) = part.variants
        assert not variant.simplified
        assert variant.warnings == (f"simplification failed, so the graph is not simplified: {error}",)


class _WrongReference(ClipFamily):
    """CLIP whose text Reference is another model's."""

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        model = super().build(checkpoint, store, options)
        wrong = model.references["text"]

        def load_wrong() -> Reference:
            run = wrong()

            def shifted(inputs: Arrays) -> dict[str, Array]:
                return {name: array[:, ::-1].copy() for name, array in run(inputs).items()}

            return shifted

        return replace(model, references={**model.references, "text": load_wrong})


def test_part_that_differs_is_not_published(
    tmp_path: Path, checkpoint: Path, export_fast: Export, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_fast(checkpoint, tmp_path / "bundle")
    before = snapshot(tmp_path)
    monkeypatch.setattr(source, "identify", lambda checkpoint: (_WrongReference(), checkpoint))
    with pytest.raises(VerificationError, match="text"):
        export_fast(checkpoint, tmp_path / "bundle", overwrite=True)
    with pytest.raises(VerificationError):
        export_fast(checkpoint, tmp_path / "new", simplify=False)
    assert snapshot(tmp_path) == before


@pytest.fixture
def tiny_known(monkeypatch: pytest.MonkeyPatch, oracle_model: Callable[[str], Model]) -> KnownCheckpoint:
    """A config named `tiny`, of the oracle's vit_p14."""
    model = oracle_model("vit_p14/state_dict_fp16.pt")
    known = KnownCheckpoint(
        name="tiny",
        family="clip",
        title="tiny",
        source=KnownSource(hub="owner/tiny"),
        architecture=model.architecture,
        tolerances={"fp32": Tolerance(cosine=0.9999, max_abs=0.0002)},
    )
    monkeypatch.setattr(source, "known_names", lambda: ("tiny",))
    monkeypatch.setattr(source, "load_known", lambda _: known)
    return known


def test_random_weights_are_recorded(tmp_path: Path, tiny_known: KnownCheckpoint, export_fast: Export) -> None:
    first = export_fast("tiny", tmp_path / "first", random_weights_seed=5).manifest
    assert (first.source.format, first.source.random_weights_seed, first.source.name) == ("random", 5, "tiny")
    assert first.architecture == json.loads(json.dumps(tiny_known.architecture))
    again = export_fast("tiny", tmp_path / "again", random_weights_seed=5).manifest
    other = export_fast("tiny", tmp_path / "other", random_weights_seed=6).manifest
    graph = "onnx/vision_model.onnx"
    assert first.files[graph] == again.files[graph] != other.files[graph]
    assert not list(tmp_path.rglob("random.safetensors"))
    verification = first.part("vision").variant("fp32").verification
    assert verification is not None
    assert (verification["gate"]["max_abs_relative"], verification["gate"]["cosine"]) == (0.0002, 0.9999)


def test_random_weights_need_a_known_name(tmp_path: Path, checkpoint: Path, export_fast: Export) -> None:
    with pytest.raises(UsageError, match="known architecture"):
        export_fast(checkpoint, tmp_path / "bundle", random_weights_seed=0)
    assert not list(tmp_path.iterdir())


def test_another_sha256_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoint: Path, export_fast: Export
) -> None:
    with pytest.raises(InputError, match="sha256") as caught:
        export_fast(checkpoint, tmp_path / "bundle", sha256="0" * 64)
    assert caught.value.exit_status == 3
    assert "stage: read" in caught.value.where
    assert not list(tmp_path.iterdir())


def test_the_right_sha256_is_accepted(tmp_path: Path, checkpoint: Path, export_fast: Export) -> None:
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert export_fast(checkpoint, tmp_path / "bundle", sha256=sha256).manifest.source.files[0].sha256 == sha256


def test_same_export_gives_the_same_graphs(tmp_path: Path, checkpoint: Path, export_fast: Export) -> None:
    files = [export_fast(checkpoint, tmp_path / name).manifest.files for name in ("a", "b")]
    assert files[0] == files[1]


def test_exported_bundle_equals_the_record(
    default_bundle: Path, oracle_record: Callable[[str], dict[str, Array]], assert_same: Callable[..., None]
) -> None:
    record = oracle_record("vit_p14/state_dict_fp16.pt")
    pair = load(default_bundle)
    assert_same(pair.encode_ids(record["input.text"]), record["output.text_features_norm"])
    source = Image.open(DATA / "clip" / "vit_p14" / "image.png")
    features = record["preprocess.image_features"]
    assert_same(pair.encode_image([source]), features / np.linalg.norm(features, axis=1, keepdims=True))
    score = pair.embedding.spec.score
    assert score is not None
    image, text = record["output.image_features_norm"], pair.encode_ids(record["input.text"])
    assert_same(score.scale * image @ text.T, record["output.logits_per_image"], 1e-3)


def test_stages_are_timed(tmp_path: Path, checkpoint: Path) -> None:
    stages = Stages()
    options = ExportOptions(opset=17, with_tokenizer=False, threads=1)
    pipeline.export_bundle(str(checkpoint), tmp_path / "bundle", options, stages)
    steps = ["export", "simplify", "load reference of", "write", "verify", "record golden of"]
    expected = [f"{step} {part}" for part in ("vision", "text") for step in steps]
    names = [record.name for record in stages.records]
    assert sorted(names) == sorted(["read", "load weights", *expected, "prove contract", "publish"])
    assert (names[:3], names[-1]) == (["read", "load weights", "export vision"], "publish")
    assert all(record.seconds >= 0 for record in stages.records)
