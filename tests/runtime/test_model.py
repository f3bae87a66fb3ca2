"""One class for every bundle: its tasks, the one error for what it cannot do, and its use by workers and threads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm_export
from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError

IMAGE = Image.new("RGB", (30, 20), "red")
TEXTS = ["a cat", "a photo of a dog"]
CALLS: dict[str, Callable[[Model], object]] = {
    "encode_image": lambda model: model.encode_image(IMAGE),
    "encode_text": lambda model: model.encode_text("red"),
    "encode_ids": lambda model: model.encode_ids([[1, 2]]),
    "classify": lambda model: model.classify(IMAGE, ["red"]),
    "embed_dim": lambda model: model.embed_dim,
    "match": lambda model: model.match(IMAGE, "red"),
    "caption": lambda model: model.caption(IMAGE),
    "answer": lambda model: model.answer(IMAGE, "what"),
    "rank_answers": lambda model: model.rank_answers(IMAGE, "what", ["yes"]),
    "stream": lambda model: model.stream(IMAGE, "what"),
    "features": lambda model: model.features(IMAGE),
}
EMBEDDING = {"encode_image", "encode_text", "encode_ids", "classify", "embed_dim"}
TALKING = {"caption", "answer", "stream"}


def refused_by(model: Model) -> dict[str, InputError]:
    """The calls that the model's tasks do not allow, and their errors."""
    refused = {}
    for name, call in CALLS.items():
        try:
            call(model)
        except InputError as error:
            if str(error).startswith("this bundle cannot"):
                refused[name] = error
    return refused


@pytest.mark.parametrize(
    "call", [vlm_export.load, vlm_export.verify, lambda path: vlm_export.export("clip-demo", path)]
)
def test_what_is_no_path_is_refused(call: Callable[[Any], object]) -> None:
    with pytest.raises(UsageError, match="is named by its path"):
        call(None)


def test_package_exports_one_loader_and_one_class() -> None:
    verbs = {"export", "export_package", "ExportedPackage", "ExportResult", "verify", "VerificationResult"}
    verbs |= {"quantize", "QuantizeResult", "package", "page", "bench", "embed", "EmbedOptions", "EmbedResult"}
    verbs |= {"build_index", "open_index", "SearchIndex", "Match", "combined_vector"}
    verbs |= {"bisect", "check", "diff", "doctor", "ranges", "regress", "report"}
    assert set(vlm_export.__all__) == {"Model", "__version__", "load", *verbs}
    assert vlm_export.load is load
    assert vlm_export.Model is Model


def test_a_pair_of_encoders_embeds(tiny_model: Model) -> None:
    assert set(tiny_model.tasks) == {"embed"}
    assert tiny_model.embedding is tiny_model.tasks["embed"]
    assert repr(tiny_model) == "<vlm_export.Model 'tiny': embed>"
    assert set(refused_by(tiny_model)) == set(CALLS) - EMBEDDING


@pytest.mark.parametrize(
    ("ask", "kind", "what", "export"),
    [
        ("match", "match", "match texts with images", "retrieval"),
        ("caption", "caption", "caption images", "captions"),
        ("answer", "answer", "answer questions", "questions about images"),
        ("rank_answers", "answer", "answer questions", "questions about images"),
        ("stream", "chat", "answer in words of its own", "one decoder"),
        ("features", "features", "make features of an image's slices", "slices"),
    ],
)
def test_the_error_says_what_the_bundle_can_do_and_what_to_export(
    tiny_model: Model, ask: str, kind: str, what: str, export: str
) -> None:
    with pytest.raises(InputError, match=f"this bundle cannot {what}") as caught:
        CALLS[ask](tiny_model)
    assert caught.value.exit_status == 3
    assert caught.value.where == "tiny"
    assert repr(kind) in caught.value.expected
    assert caught.value.got == "it can embed images or texts"
    assert export in caught.value.fix


def test_a_bundle_without_tasks_can_do_nothing(tiny_bundle: Path, model_with: Callable[..., Model]) -> None:
    model = model_with(tiny_bundle, tasks=())
    assert not model.tasks
    assert repr(model) == "<vlm_export.Model 'tiny': no tasks>"
    refused = refused_by(model)
    assert set(refused) == set(CALLS)
    assert {error.got for error in refused.values()} == {"a bundle without tasks"}
    assert "one space for images and texts" in refused["encode_text"].fix


@pytest.mark.needs_torch
@pytest.mark.parametrize(
    ("variant", "tasks", "calls"),
    [
        ("caption", {"caption"}, {"caption"}),
        ("vqa", {"answer"}, {"answer", "rank_answers"}),
        ("retrieval", {"embed", "match"}, {*EMBEDDING, "match"}),
        ("feature_extractor", {"embed", "match", "caption"}, {*EMBEDDING, "match", "caption"}),
    ],
)
def test_tasks_of_blip(variant: str, tasks: set[str], calls: set[str], blip_bundle: Callable[[str], Path]) -> None:
    model = load(blip_bundle(variant), threads=1)
    assert set(model.tasks) == tasks
    assert set(CALLS) - set(refused_by(model)) == calls


@pytest.mark.needs_torch
def test_tasks_of_a_chat(nanovlm_bundle: Callable[[str], Path]) -> None:
    model = load(nanovlm_bundle("450m"), threads=1)
    assert set(model.tasks) == {"embed", "chat"}
    assert model.captioning is model.answering is model.chatting is model.tasks["chat"]
    assert set(refused_by(model)) == set(CALLS) - EMBEDDING - TALKING


@pytest.mark.needs_torch
def test_tasks_of_slices(slice_bundle: Callable[[str], Path]) -> None:
    model = load(slice_bundle("v2_6"), threads=1)
    assert set(model.tasks) == {"features"}
    refused = refused_by(model)
    assert set(refused) == set(CALLS) - {"features"}
    assert refused["encode_image"].got == "it can make features of an image's slices"


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_it_travels_to_workers(tiny_bundle: Path, used: bool) -> None:
    model = load(tiny_bundle, threads=1)
    if used:
        model.encode_image(IMAGE)
        model.encode_text(TEXTS)
    for again in (pickle.loads(pickle.dumps(model)), copy.copy(model), copy.deepcopy(model)):
        assert type(again) is Model
        assert again.identity == model.identity
        assert (again.encode_text(TEXTS) == model.encode_text(TEXTS)).all()
        assert (again.encode_image(IMAGE) == model.encode_image(IMAGE)).all()


@pytest.mark.needs_torch
def test_every_kind_travels_after_use(
    blip_bundle: Callable[[str], Path], nanovlm_bundle: Callable[[str], Path], slice_bundle: Callable[[str], Path]
) -> None:
    calls: list[tuple[Path, Callable[[Model], Any]]] = [
        (blip_bundle("caption"), lambda model: model.caption(IMAGE, beams=1)),
        (blip_bundle("vqa"), lambda model: model.answer(IMAGE, "what", beams=1)),
        (blip_bundle("retrieval"), lambda model: model.match(IMAGE, "red")),
        (nanovlm_bundle("222m"), lambda model: model.answer(IMAGE, "what", max_new_tokens=2)),
        (slice_bundle("v1_0"), lambda model: model.features(IMAGE)[0].image_features.tolist()),
    ]
    for path, call in calls:
        model = load(path, threads=1)
        expected = call(model)
        assert call(pickle.loads(pickle.dumps(model))) == expected
        for task in model.tasks.values():
            assert type(pickle.loads(pickle.dumps(task))) is type(task)


def test_threads_share_it(tiny_bundle: Path, tiny_model: Model) -> None:
    expected = tiny_model.encode_text(TEXTS), tiny_model.encode_image(IMAGE)
    model = load(tiny_bundle, threads=1)
    calls = [lambda: model.encode_text(TEXTS), lambda: model.encode_image(IMAGE)] * 8
    with ThreadPoolExecutor(8) as pool:
        found = [future.result() for future in [pool.submit(call) for call in calls]]
    for got, wanted in zip(found, expected * 8, strict=True):
        assert np.abs(got - wanted).max() <= 1e-6


def test_identity_is_the_manifests(tiny_model: Model) -> None:
    assert tiny_model.identity == tiny_model.session.identity == tiny_model.manifest.identity()
