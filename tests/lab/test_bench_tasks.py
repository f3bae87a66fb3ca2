"""`bench` from files of images on: embeddings beside other software, and words token by token. Times are not judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm_export
from vlm_export.bundle.layout import json_bytes, preprocessor_config
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import UsageError
from vlm_export.lab import bench_plan
from vlm_export.lab.bench_plan import BenchOptions, Load, Side, sides_of
from vlm_export.lab.bench_result import BenchResult, Cost, Measured
from vlm_export.lab.bench_runs import token_stream

IMAGES = Path("configs/demo/images").resolve()
FEW: dict[str, Any] = {"batches": [3], "threads": [1], "rounds": 2, "engines": ["onnxruntime"]}
# fastembed's interface to an image model, as `image/onnx_embedding.py` of 0.9.1 uses the folder that it is given.
FASTEMBED = """
import json, pathlib
import numpy, onnxruntime
import vlm_export
class ImageEmbedding:
    @staticmethod
    def list_supported_models():
        return [{"model": "another", "model_file": "other.onnx"}, {"model": "any", "model_file": "model.onnx"}]
    def __init__(self, model_name, specific_model_path, threads):
        assert model_name == "any"
        folder = pathlib.Path(specific_model_path)
        self.edge = json.loads((folder / "preprocessor_config.json").read_text())["crop_size"]["height"]
        self.session = onnxruntime.InferenceSession(folder / "model.onnx")
    def embed(self, images, batch_size):
        for image in images:
            pixels = numpy.full((1, 3, self.edge, self.edge), len(image) / 1000, numpy.float32)
            (rows, *_) = self.session.run(None, {self.session.get_inputs()[0].name: pixels})
            yield rows[0]
"""


def sides_that_ran(found: BenchResult) -> list[str]:
    return [side.name for side in found.sides]


def test_a_folder_of_images_is_embedded_from_its_files_on(demo: Path) -> None:
    found = vlm_export.bench(demo, BenchOptions(**FEW, images=[IMAGES]))
    count = len(list(IMAGES.glob("*.png")))
    (load,) = found.loads
    assert load == Load("embed", 3, None, files=count)
    assert (load.rows, load.unit) == (count, "images")
    assert sides_that_ran(found) == ["onnxruntime fp32", "onnxruntime fp16"]
    fp32, fp16 = found.costs
    assert fp32.cosine == pytest.approx(1.0, abs=1e-12)
    assert 1e-10 < 1 - (fp16.cosine or 0) < 1e-3
    parts = open_bundle(demo).manifest
    assert fp32.size_bytes == parts.files[parts.part("vision").variant("fp32").file].size_bytes
    assert found.not_run == ()


def test_fastembed_reads_the_float32_graph(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of it; the real one ran by hand, since it brings packages that this environment lacks."""
    (tmp_path / "fastembed.py").write_text(FASTEMBED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    found = vlm_export.bench(demo, BenchOptions(**FEW, images=[IMAGES], precisions=["fp32"]))
    assert sides_that_ran(found) == ["fastembed fp32", "onnxruntime fp32"], found.not_run
    theirs, ours = found.costs
    assert theirs.size_bytes is None
    # It was given grey images, so that the vectors are others: what is compared is what it returned.
    assert theirs.cosine is not None
    assert theirs.cosine < 0.99
    best = found.recommendation()
    assert best is not None
    assert best.side == ours.side


@pytest.fixture
def clip_of_transformers(make_huggingface_clip: Callable[..., Any], demo: Path, tmp_path: Path) -> Path:
    """A directory that transformers saved, with a processor for its images of 24 pixels."""
    from dataclasses import replace

    folder = tmp_path / "saved"
    make_huggingface_clip(folder)
    spec = open_bundle(demo).manifest.image
    processor = json_bytes(preprocessor_config(replace(spec, size_pixels=24)))  # type: ignore[type-var, arg-type]
    (folder / "preprocessor_config.json").write_bytes(processor)
    return folder


def test_transformers_embeds_the_same_files(
    clip_of_transformers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, which imports torch: that takes its seconds."""
    bundle = tmp_path / "bundle"
    vlm_export.export(clip_of_transformers, bundle, threads=1, parts=("vision",), with_tokenizer=False)
    monkeypatch.setattr(bench_plan, "TORCH_FORMS", ())
    options = BenchOptions(**FEW, images=[IMAGES], precisions=["fp32"], against=str(clip_of_transformers))
    found = vlm_export.bench(bundle, options)
    assert sides_that_ran(found) == ["transformers eager", "onnxruntime fp32"], found.not_run
    # Its default processor resizes in torchvision, whose levels are now and then one apart.
    assert 0 < 1 - (found.costs[0].cosine or 0) < 1e-4


def test_what_transformers_does_not_read_is_told(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plan, "TORCH_FORMS", ())
    options = BenchOptions(**FEW, images=[IMAGES], precisions=["fp32"], against="clip-demo")
    found = vlm_export.bench(demo, options)
    assert sides_that_ran(found) == ["onnxruntime fp32"]
    assert [text.partition(":")[0] for text in found.not_run] == ["embed, transformers eager, 1 thread"]


def test_captions_are_timed_to_the_first_token_and_from_there(
    blip_bundle: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(blip_bundle("caption")), "--task", "caption", "--engine", "onnxruntime", "--threads", "1"]
    assert main([*words, "--batch", "2", "--new-tokens", "4", "--rounds", "1", "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(one["part"], one["step"], one["length"], one["unit"]) for one in data["measured"]] == [
        ("caption", "first token", None, "tokens"),
        ("caption", "next tokens", 3, "tokens"),
    ]
    first, rest = data["measured"]
    assert first["rows_per_second"] == pytest.approx(2 / first["seconds"]["median"])
    assert rest["rows_per_second"] == pytest.approx(2 * 3 / rest["seconds"]["median"])
    (cost,) = data["costs"]
    assert (cost["cosine"], cost["same_tokens"]) == (None, 1.0)
    assert "vlm-export caption" in data["recommended"]["command"]


def test_tokens_are_those_that_the_tasks_write(
    blip_bundle: Callable[[str], Path], nanovlm_bundle: Callable[[str], Path]
) -> None:
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "navy")]
    for bundle, task in ((blip_bundle("caption"), "caption"), (blip_bundle("vqa"), "answer")):
        model = vlm_export.load(bundle, threads=1)
        rows = np.array([token.token_id for token in token_stream(model, task, images, "what", 3)]).reshape(3, 2).T
        longest = {"max_length": 1 + 3, "min_length": 4, "beams": 1}
        written = (
            model.caption(images, prompt="", **longest)
            if task == "caption"
            else model.answer(images, "what", **longest)
        )
        told = np.array([token.token_id for token in token_stream(model, task, images, "", 3)]).reshape(3, 2).T
        rows = told if task == "caption" else rows
        assert [model.session.tokenizer.decode(row.tolist()).strip() for row in rows] == written
    chat = vlm_export.load(nanovlm_bundle("222m"), threads=1)
    rows = np.array([token.token_id for token in token_stream(chat, "chat", images, "what", 3)]).reshape(3, 2).T
    written = chat.answer(images, ["what"] * 2, max_new_tokens=3, stop_at_end=False)
    assert [chat.session.tokenizer.decode(row.tolist()).strip() for row in rows] == written


def test_a_decoder_without_room_is_told(nanovlm_bundle: Callable[[str], Path]) -> None:
    model = vlm_export.load(nanovlm_bundle("222m"), threads=1)
    with pytest.raises(UsageError, match="no position for so many tokens"):
        token_stream(model, "chat", [Image.new("RGB", (8, 8))], "what", 10_000)


def test_other_words_are_not_recommended() -> None:
    load = Load("chat", 1, 31, "next tokens")
    exact, fast = Side("onnxruntime", "fp32", 2), Side("onnxruntime", "int4", 2)
    measured = (Measured(exact, load, (2.0, 2.0)), Measured(fast, load, (1.0, 1.0)))

    def recommended(same: float) -> Side:
        costs = tuple(Cost(side, "chat", 1.0, 1, 1, 1, None, share) for side, share in ((exact, 1.0), (fast, same)))
        best = BenchResult("a bundle", ("chat", "embed"), BenchOptions(), measured, costs).recommendation()
        assert best is not None
        assert best.command.startswith("vlm-export ask 'a bundle'")
        return best.side

    assert (recommended(1.0), recommended(0.97)) == (fast, exact)


def test_what_there_is_not_is_named(demo: Path) -> None:
    with pytest.raises(UsageError, match="no task 'caption' that is measured"):
        vlm_export.bench(demo, BenchOptions(**FEW, tasks=["caption"]))
    with pytest.raises(UsageError, match="no images"):
        vlm_export.bench(demo, BenchOptions(**FEW, images=[demo / "onnx"]))
    with pytest.raises(UsageError, match="graphs stand for one part"):
        BenchOptions(parts=["text"], graphs=["a.onnx"], tasks=["embed"])
    with pytest.raises(UsageError, match="a first token and next ones"):
        BenchOptions(new_tokens=1)
    manifest = open_bundle(demo).manifest
    writing = sides_of(manifest, BenchOptions(**FEW, against="clip-demo"), "chat")
    assert [side.name for side in writing[:2]] == ["torch eager", "onnxruntime fp32"]
