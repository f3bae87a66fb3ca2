"""Zero-shot and retrieval on the demo's held-out images: measured in both precisions, and bounded by a budget."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlm_export
from vlm_export.bundle.loss import Accuracy
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.quantizing import pipeline
from vlm_export.quantizing.budget import budget_for, points_text
from vlm_export.quantizing.losses import agreement
from vlm_export.quantizing.samples import NamedSamples, SampleSet, sample_set
from vlm_export.quantizing.task_runs import Answers, run_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from demo.accuracy import held_out_images
from demo.sentences import caption

COUNT = 48


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`labels/CAPTION/N.png` and `images/N.png` with `pairs.tsv`, of images that the demo was not trained on."""
    root = tmp_path_factory.mktemp("held-out")
    (root / "images").mkdir()
    lines = []
    for number, drawing in enumerate(held_out_images(COUNT)):
        text = caption(drawing.composition)
        folder = root / "labels" / text.removeprefix("a picture of ")
        folder.mkdir(parents=True, exist_ok=True)
        drawing.image.save(folder / f"l{number}.png")
        drawing.image.save(root / "images" / f"{number}.png")
        lines.append(f"{number}.png#0\t{text}")
    (root / "pairs.tsv").write_text("\n".join([*lines, "a text of no image"]), encoding="utf-8")
    return root


def named(held_out: Path) -> NamedSamples:
    return NamedSamples((held_out / "images",), held_out / "pairs.tsv", held_out / "labels", template="a picture of {}")


def test_accuracies_are_those_of_the_embeddings(demo: Path, held_out: Path) -> None:
    bundle, model = open_bundle(demo), vlm_export.load(demo, threads=1)
    images = [held_out / "images" / f"{number}.png" for number in range(COUNT)]
    texts = [caption(drawing.composition) for drawing in held_out_images(COUNT)]
    assert len(set(texts)) == COUNT
    scores = model.encode_image(images) @ model.encode_text(texts).T
    expected = [float((scores.argmax(axis) == range(COUNT)).mean()) for axis in (1, 0)]
    found = run_tasks(bundle, sample_set(bundle, named(held_out)), {}, 1).accuracies
    assert found == pytest.approx((expected[0], *expected))
    assert expected[0] > 0.9


def data(held_out: Path) -> dict[str, Any]:
    files = {"images": (held_out / "images",), "texts": held_out / "pairs.tsv", "labels": held_out / "labels"}
    return {**files, "template": "a picture of {}", "threads": 1}


def test_a_variant_that_keeps_its_accuracies_is_published_with_them(demo: Path, held_out: Path, tmp_path: Path) -> None:
    """8 bits lose none of them on the demo; its text encoder has a word that loses more of the cosine than allowed."""
    stated = "zero-shot=1pp,retrieval@1=0.5pp,cosine=0.9,mean-cosine=0.99"
    result = vlm_export.quantize(demo, "int8", output=tmp_path / "int8", budget=stated, **data(held_out))
    record = result.losses[0].record
    assert record.measured.zero_shot is not None
    assert record.measured.retrieval_images is not None
    assert record.naive is not None
    assert record.naive.zero_shot is not None
    assert (record.samples.labelled, record.samples.labels, record.samples.pairs) == (COUNT, COUNT, COUNT)
    assert any("of 48 labels in the folder 'labels'" in note and "'clip-demo'" in note for note in record.notes)
    assert record == open_bundle(tmp_path / "int8").manifest.part("vision").variant("int8").loss


@pytest.fixture
def worse_when_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies of quantised graphs that the demo's weights are too good to have."""

    def asked(bundle: OpenBundle, samples: SampleSet, start: Mapping[str, Any], threads: int | None) -> Answers:
        found = run_tasks(bundle, samples, start, threads)
        return replace(found, accuracies=(0.75, None, None)) if start else found

    monkeypatch.setattr(pipeline, "run_tasks", asked)


def test_accuracies_over_budget_are_refused(
    demo: Path,
    held_out: Path,
    tmp_path: Path,
    worse_when_quantised: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["quantize", str(demo), "--precision", "w8a16", "-o", str(tmp_path / "out"), "--quiet", "--threads", "1"]
    words += ["--labels", str(held_out / "labels"), "--template", "a picture of {}"]
    assert main([*words, "--budget", "cosine=0.9,zero-shot=10pp"]) == 1
    printed = capsys.readouterr()
    assert "% in float32, 75.00% in w8a16" in printed.out
    assert "expected: at most 10pp lost" in printed.err
    assert not (tmp_path / "out").exists()


def test_calibration_and_measurement_share_no_labelled_image(demo: Path, held_out: Path) -> None:
    every = sample_set(open_bundle(demo), named(held_out))
    calibration, measured = every.part(0, 2), every.part(1, 2)
    for field in ("pairs", "labelled"):
        sides = [{str(part.images[number]) for number, _ in getattr(part, field)} for part in (calibration, measured)]
        assert not sides[0] & sides[1]
        assert len(sides[0]) + len(sides[1]) == COUNT
    assert {label for _, label in measured.labelled} < set(range(len(measured.labels)))
    assert "a text of no image" in every.texts
    assert every.own_texts == 1


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("zero-shot=0.9", "percentage points that may be lost, such as 1pp"),
        ("retrieval@1=101pp", "percentage points"),
        ("zero-shot=-1pp", "percentage points"),
        ("cosine=1pp", "a number from 0 to 1"),
        ("zeroshot=1pp", "zero-shot"),
    ],
)
def test_a_budget_that_says_something_else_is_refused(budget: str, told: str) -> None:
    with pytest.raises(UsageError, match="budget") as caught:
        budget_for("int8", budget)
    assert told in str(caught.value)


def test_points_are_what_may_be_lost() -> None:
    found = budget_for("int8", "zero-shot=1pp,retrieval@1=0.5pp,exact-match=1pp,top10=5pp")
    assert found["zero-shot"] == pytest.approx(0.99)
    assert found["retrieval@1"] == pytest.approx(0.995)
    assert found["exact-match"] == pytest.approx(0.99)
    assert found["top10"] == pytest.approx(0.95)
    assert Accuracy(0.95, 0.94).kept == pytest.approx(0.99)
    assert Accuracy(0.9, 0.95).kept == 1
    assert points_text(0.995) == "0.5pp"


def test_data_that_does_not_fit_is_told(demo: Path, held_out: Path, tmp_path: Path) -> None:
    bundle, file = open_bundle(demo), tmp_path / "texts.tsv"
    file.write_text("missing.png\ta red circle\n", encoding="utf-8")
    with pytest.raises(InputError, match="belongs to no one image"):
        sample_set(bundle, NamedSamples((held_out / "images",), file))
    with pytest.raises(UsageError, match="labels are folders of images"):
        sample_set(bundle, NamedSamples(labels=held_out / "images"))


def test_texts_alone_are_ranked_among_themselves() -> None:
    """Each without itself, which would always be its own nearest."""
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0].astype(np.float32)
    near = np.repeat(rows, 6, axis=0) + 0.01 * np.random.default_rng(1).standard_normal((72, 12)).astype(np.float32)
    other = near[np.random.default_rng(2).permutation(72)]
    assert agreement(Answers(text_vectors=near), Answers(text_vectors=near)).top10_texts == 1
    mixed = agreement(Answers(text_vectors=near), Answers(text_vectors=other))
    assert mixed.top10_texts is not None
    # Ten of 71 others by chance.
    assert mixed.top10_texts < 0.4
    assert mixed.top10_images is None
    assert agreement(Answers(text_vectors=near[:11]), Answers(text_vectors=near[:11])).top10_texts is None
