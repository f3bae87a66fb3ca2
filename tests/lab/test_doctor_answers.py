"""What doctor is asked and told: questions, collectors, recorded answers of real consumers, and bad answers."""

from __future__ import annotations

import base64
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.lab.consumer.questions import write_questions

DATA = Path(__file__).parents[1] / "data" / "consumers"
OWN = runpy.run_path(str(Path(__file__).with_name("record_consumer.py")))
RIGHT = ("transformers-js-own-pixels", "fastembed", "optimum")


def recorded(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a real consumer answered: without its pixels, and its pixels alone (`record_consumer.py`).

    transformers.js 4.3.2 (collect.mjs; "own-pixels": on the bundle's pixels, texts that need not be cut); fastembed
    0.9.1 (add_custom_model, and ImageEmbedding with specific_model_path); optimum 2.1 with optimum-onnx 0.1 and
    transformers 4.57.6 (ORTModelForCustomTasks, AutoTokenizer, CLIPImageProcessor).
    """
    with np.load(DATA / f"{name}.npz") as data:
        texts, images, kept = (json.loads(str(data[key])) for key in ("texts", "images", "kept"))
        ids = [[int(token) for token in row if token >= 0] for row in data["ids"]]
        vectors = {key: data[key] for key in ("text_vectors", "image_vectors")}
        mean, std = (np.reshape(OWN[key], (3, 1, 1)) for key in ("MEAN", "STD"))
        pixels = ((data["levels"] / 255 - mean) / std).astype(np.float32)
    return {"texts": texts, "images": images, "ids": ids, **vectors}, {"images": kept, "pixels": pixels}


@pytest.mark.parametrize("name", RIGHT)
def test_consumers_that_are_right_raise_no_alarm(demo: Path, name: str) -> None:
    for answers in recorded(name):
        found = vlm_export.doctor(demo, answers)
        assert found.passed, found
        assert {stage.verdict for stage in found.stages} == {"equal", "not given"}


def test_what_transformers_js_does_of_itself_is_named(demo: Path) -> None:
    """It cuts the end token off, resizes by sharp's affine without antialias, and turns images as EXIF says."""
    vectors, pixels = recorded("transformers-js")
    (ids, _, texts, images) = vlm_export.doctor(demo, vectors).stages
    assert [finding.mistake for finding in ids.findings] == ["cut without EOS"]
    assert texts.verdict == "follows"
    assert images.findings[0].mistake == "no antialias"
    stage = vlm_export.doctor(demo, pixels).stages[1]
    found = {finding.mistake: finding.items for finding in stage.findings}
    assert found == {"no antialias": ("portrait.png", "reduced.png"), "EXIF orientation applied": ("orientation.png",)}


@pytest.fixture(scope="module")
def questions(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked") / "questions"
    assert main(["doctor", str(demo), "--questions", str(folder)]) == 0
    return folder


def test_the_collector_asks_a_program(demo: Path, questions: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(questions, tmp_path / "questions"))
    (folder / "mine.py").write_text(
        "import vlm_export\n"
        f"model = vlm_export.load({str(demo)!r}, threads=1)\n"
        "def ids(text):\n"
        "    if 'crowded' in text: raise ValueError('too long')\n"
        "    return model.session.tokenizer.encode_rows([text], truncate=True)[0]\n"
        "def image_vector(path): return model.encode_image([path])[0]\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "collect.py", "mine"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left out: ValueError: too long" in done.stderr
    found = vlm_export.doctor(demo, folder / "answers")
    assert [(s.verdict, s.compared) for s in found.stages] == [
        ("equal", 15),
        ("not given", 0),
        ("not given", 0),
        ("equal", 15),
    ]


def test_the_collector_asks_an_endpoint(questions: Path) -> None:
    """In OpenAI's form for texts, in Jina's for images."""
    asked: list[Any] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"embedding": [0.6, 0.8]}]}).encode())

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = runpy.run_path(str(questions / "collect.py"))["Endpoint"](
            f"http://127.0.0.1:{server.server_port}/v1"
        )
        assert endpoint.text_vector("a cat") == endpoint.image_vector(questions / "images" / "tiny.png") == [0.6, 0.8]
        server.shutdown()
    assert asked[0] == {"model": "default", "input": ["a cat"]}
    content = (questions / "images" / "tiny.png").read_bytes()
    assert base64.b64decode(asked[1]["input"][0]["image"]) == content


def test_the_verb_tells_and_ends_with_the_verdict(
    demo: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, _ = recorded("transformers-js")
    given = tmp_path / "answers.json"
    given.write_text(json.dumps({key: np.asarray(value, object).tolist() for key, value in answers.items()}))
    assert main(["doctor", str(demo), str(given), "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "ids            16        differs    cut without EOS" in printed
    assert "fix: keep the end token as the last of 32 tokens" in printed
    assert main(["doctor", str(demo), str(given), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["passed"], data["first_wrong_stage"], data["mistakes"][0]) == (False, "ids", "cut without EOS")
    assert main(["doctor", str(demo), str(questions), "--json"]) == 3


BAD: Mapping[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "there are no answers"),
    "an unknown name": ({"pixel": []}, "did you mean 'pixels'"),
    "other rows": ({"ids": [[1, 2]]}, "expected: 16 rows, one for each of the texts\n  got: 1 rows"),
    "texts that are none": ({"texts": ["x"], "ids": [[1]]}, "no such question"),
    "no list": ({"text_vectors": 5}, "is no list of rows"),
    "words": ({"ids": [["a"]] * 16}, "expected: a list of token ids"),
    "flat": ({"image_vectors": [0.5] * 15}, "expected: (N, D)\n  got: (15,)"),
    "ragged": ({"text_vectors": [[1.0], [1.0, 2.0]] * 8}, "rows that make no array"),
    "flat images": ({"pixels": np.zeros((15, 64, 64))}, "expected: (3, height, width)\n  got: (64, 64)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers_are_refused(demo: Path, name: str) -> None:
    answers, said = BAD[name]
    with pytest.raises(InputError) as caught:
        vlm_export.doctor(demo, answers)
    assert said in str(caught.value)


def test_bad_files_are_refused(demo: Path, tmp_path: Path) -> None:
    cases = {"no.json": "no such file", "cut.json": "cannot be read", "list.json": "no JSON object", "text.txt": ".txt"}
    (tmp_path / "cut.json").write_text('{"ids": [')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.txt").write_text("1")
    for file, said in cases.items():
        with pytest.raises(InputError, match=said):
            vlm_export.doctor(demo, tmp_path / file)
    with pytest.raises(InputError, match="holds no answers"):
        vlm_export.doctor(demo, tmp_path)
    (tmp_path / "ids.json").write_text("[]")
    (tmp_path / "ids.npy").write_bytes(b"x")
    with pytest.raises(InputError, match="there twice"):
        vlm_export.doctor(demo, tmp_path)


def test_a_graph_is_changed_only_with_the_extra(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("vlm_export.lab.consumer.graphs", "onnx_ir"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    answers, _ = recorded("fastembed")
    vectors = np.random.default_rng(0).standard_normal((16, 128))
    (stage,) = vlm_export.doctor(demo, {"ids": answers["ids"], "text_vectors": vectors}).wrong
    assert stage.notes[-1].startswith("pooling, projection and activation were not tried: in your clone: pip install")


def test_a_program_of_a_bundle_without_embeddings(nanovlm_bundle: Callable[[str], Path]) -> None:
    bundle = nanovlm_bundle("450m")
    with pytest.raises(InputError, match="none of the answers can be compared"):
        vlm_export.doctor(bundle, {"image_vectors": np.ones((15, 8))})


def test_questions_need_a_new_folder_and_a_record(demo: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not empty"):
        write_questions(open_bundle(demo), questions)
    bare = Path(__file__).parents[1] / "data" / "runtime" / "tiny_bundle"
    with pytest.raises(InputError, match="holds no record"):
        write_questions(open_bundle(bare), tmp_path / "new")
    assert main(["doctor", str(demo)]) == 2
