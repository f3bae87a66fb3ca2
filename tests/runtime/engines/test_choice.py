"""The engine of a bundle: chosen by name, with options that are checked when the bundle is opened."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from vlm_export import load
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.engines import openvino
from vlm_export.runtime.engines.onnxruntime import MAX_THREADS, OrtEngine, run_in_float32
from vlm_export.runtime.engines.openvino import OpenVinoEngine

OPENVINO = (
    pytest.mark.needs_torch
)  # Where torch is missing OpenVINO is too: the environment has what the runtime needs.


@pytest.fixture(scope="module")
def bundle(data: Path) -> Path:
    return data / "runtime" / "tiny_bundle"


@pytest.fixture(scope="module")
def image(data: Path) -> Path:
    return data / "runtime" / "images" / "large.png"


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, MAX_THREADS + 1, 99_999_999_999])
def test_threads_out_of_range_are_named(bundle: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match="threads"):
        load(bundle, threads=threads)
    with pytest.raises(UsageError, match="threads"):
        OrtEngine(bundle / "onnx" / "text_model.onnx", threads=threads)


def test_numbers_of_numpy_are_numbers(bundle: Path, image: Path) -> None:
    assert load(bundle, threads=np.int64(1)).encode_image(image).shape == (1, 12)


@pytest.mark.parametrize("precision", ["bogus", "fp33", "", 5])
def test_an_unknown_variant_is_named_at_once(bundle: Path, precision: Any) -> None:
    with pytest.raises(UsageError, match="no variant") as caught:
        load(bundle, precision=precision)
    assert "fp32" in caught.value.fix


def test_providers_may_be_one_name(bundle: Path, image: Path) -> None:
    pair = load(bundle, providers="cpu", threads=1)
    assert pair.session.providers == ("cpu",)
    assert pair.encode_image(image).shape == (1, 12)
    with pytest.raises(EnvironmentFailure, match="'tpu' is not available"):
        load(bundle, providers="tpu").encode_image(image)
    with pytest.raises(UsageError, match="providers are names"):
        load(bundle, providers=[None])  # type: ignore[list-item]


def test_an_unknown_engine_is_named(bundle: Path) -> None:
    with pytest.raises(UsageError, match="no engine 'openvno'") as caught:
        load(bundle, engine="openvno")  # type: ignore[arg-type]
    assert "openvino" in caught.value.fix
    with pytest.raises(UsageError, match="execution providers"):
        load(bundle, engine="openvino", providers=["cuda"])
    assert load(bundle, engine="openvino", providers=["cpu"]).session.threads is None


def test_a_path_with_a_zero_byte_is_no_bundle() -> None:
    with pytest.raises(InputError, match="no bundle here"):
        load("a\0b")


@OPENVINO
def test_openvino_computes_what_onnxruntime_does(bundle: Path, image: Path, assert_same: Callable[..., None]) -> None:
    first, second = load(bundle, threads=1), load(bundle, engine="openvino", threads=1)
    assert isinstance(second.session.engine("vision"), OpenVinoEngine)
    assert_same(second.encode_image([image] * 3), first.encode_image([image] * 3))
    texts = ["a cat", "a photo of two dogs on the left", ""]
    assert_same(second.encode_text(texts), first.encode_text(texts))


def test_bfloat16_is_refused_where_nothing_computes_in_it(bundle: Path) -> None:
    for precision in ("bf16", "fp32+bf16"):
        with pytest.raises(UsageError, match="ONNX Runtime does not compute") as caught:
            load(bundle, precision=precision)
        assert "--engine openvino" in caught.value.fix
    with pytest.raises(UsageError, match=r"no variant 'int9\+bf16'"):
        load(bundle, engine="openvino", precision="int9+bf16")


@OPENVINO
def test_a_processor_without_bfloat16_is_told(bundle: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "computes_in_bf16", lambda: False)
    model = load(bundle, engine="openvino", precision="bf16", threads=1)
    with pytest.raises(EnvironmentFailure, match="processor does not compute in bfloat16"):
        model.encode_image(image)


@OPENVINO
@pytest.mark.skipif(not openvino.computes_in_bf16(), reason="this processor does not compute in bfloat16")
def test_bfloat16_rounds_and_travels(bundle: Path, image: Path, assert_same: Callable[..., None]) -> None:
    exact, model = load(bundle, threads=1), load(bundle, engine="openvino", precision="bf16", threads=1)
    assert (model.precision, model.session.precision, model.identity) == ("bf16", "fp32", exact.identity)
    expected, got = exact.encode_image(image), model.encode_image(image)
    assert_same(got, expected, max_abs=0.02, cosine=0.999)
    assert np.abs(got - expected).max() > 1e-5, "nothing was rounded"
    again = pickle.loads(pickle.dumps(model))
    assert again.precision == "bf16"
    assert (again.encode_image(image) == got).all()


@OPENVINO
def test_threads_take_turns_in_openvino(bundle: Path) -> None:
    engine = OpenVinoEngine(bundle / "onnx" / "vision_model.onnx", threads=1)
    shape = [size if isinstance(size, int) else 4 for size in engine.inputs[0].shape]
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = run_in_float32(engine, {engine.inputs[0].name: pixels})
    failed: list[Exception] = []

    def repeat() -> None:
        try:
            for _ in range(20):
                got = run_in_float32(engine, {engine.inputs[0].name: pixels})
                assert all(np.allclose(got[name], expected[name], atol=1e-5) for name in expected)
        except Exception as error:  # A thread's own would be lost.
            failed.append(error)

    threads = [Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@OPENVINO
def test_openvino_runs_decoders(
    nanovlm_bundle: Callable[[str], Path], blip_bundle: Callable[[str], Path], data: Path
) -> None:
    chat, image = nanovlm_bundle("split"), data / "nanovlm" / "split" / "image.png"
    answers = [
        load(chat, engine=engine, threads=1).answer(image, ["What is this?", "Where?"])
        for engine in ("onnxruntime", "openvino")
    ]
    assert answers[0] == answers[1]
    captions = [
        load(blip_bundle("caption"), engine=engine, threads=1).caption(image) for engine in ("onnxruntime", "openvino")
    ]
    assert captions[0] == captions[1]


@OPENVINO
def test_openvino_encodes_slices(
    slice_bundle: Callable[[str], Path], data: Path, assert_same: Callable[..., None]
) -> None:
    path, image = slice_bundle("v2_0"), data / "runtime" / "images" / "large.png"
    ((first,), (second,)) = (
        load(path, engine=engine, threads=1).features(image) for engine in ("onnxruntime", "openvino")
    )
    assert_same(second.image_features.reshape(-1, 1), first.image_features.reshape(-1, 1), cosine=-1)
