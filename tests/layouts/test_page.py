"""`page`: refusals, and the page itself in Chromium, where it gives the runtime's ids, vectors and probabilities.

The tests in Chromium need npm, which fetches the two pinned packages once into the folder that `VLM_EXPORT_CONSUMERS`
names, or into a temporary one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import shutil
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bootstrap import installed_browser
from chromium import SOFTWARE_WEBGPU, Page, chromium, served
from PIL import Image

import vlm_export
from vlm_export.bundle.cache_directory import CACHE_VARIABLE
from vlm_export.cli.main import main
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.graph.core.files import Storage
from vlm_export.layouts import packing
from vlm_export.layouts.cleaning_tables import javascript_pattern
from vlm_export.layouts.npm_packages import NPM_PACKAGES, NpmPackage, package_files
from vlm_export.layouts.page import page
from vlm_export.proof.contract_inputs import TEXTS, contract_images
from vlm_export.runtime.inputs.texts import cleaned_text

ROOT = Path(__file__).parents[2]
DEMO_IMAGES = sorted((ROOT / "configs" / "demo" / "images").glob("*.png"))
COSINE, PROBABILITY = 0.9999, 1e-4
_SIZE = 64  # of the demo's images
_EXIF_ORIENTATION, _ROTATED = 0x0112, 6
# Texts whose letters are broken in each of these encodings, and pieces of what cleaning looks at.
_WORDS = ("schön – “quoted”", "naïve café à la mode", "привет мир", "日本語", "Ελληνικά", "łódź", "🎂 voilà le travail")
_ENCODINGS = ("latin-1", "sloppy-windows-1252", "sloppy-windows-1251", "sloppy-windows-1257", "macroman", "cp437")
_MARKUP = (
    "&eacute; &NTILDE; &notit; &#x2019; &#150; &#0;",
    "a&b &ampfoo &copy2 &lt;b&gt;",
    "｡ｱ ＡＢＣ ﬁ ŉ",
    "\x1b[36;44mx",
)


def in_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Needs npm and Chromium."""
    marked: Callable[..., None] = pytest.mark.browser(pytest.mark.slow(test))
    return marked


def test_a_bundle_that_lacks_the_graph_is_refused_with_the_command(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        page(demo, tmp_path / "site", threads=1)
    assert "vision_from_uint8" in caught.value.expected
    assert "--with-preprocessing" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_the_page_lacks_a_step_of_is_refused(
    demo: Path, tmp_path: Path, relist: Callable[[Path], None]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(demo, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"]["normalizers"].append({"type": "Nmt"})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    relist(copy)
    with pytest.raises(InputError) as caught:
        page(copy, tmp_path / "site", threads=1)
    assert caught.value.got == "Nmt"


def archive_of(folder: Path, package: NpmPackage, content: bytes) -> NpmPackage:
    """A package whose archive in the folder holds `content` in every file, pinned as that."""
    with tarfile.open(folder / package.archive, "w:gz") as archive:
        for name in package.files:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha512((folder / package.archive).read_bytes()).digest()
    return replace(package, integrity="sha512-" + base64.b64encode(digest).decode("ascii"))


def test_packages_are_the_pinned_ones(tmp_path: Path) -> None:
    package = NPM_PACKAGES[1]
    with pytest.raises(InputError, match="is missing") as missing:
        package_files(package, tmp_path)
    assert "npm pack @huggingface/tokenizers@0.2.0" in missing.value.fix
    fake = archive_of(tmp_path, package, b"content")
    assert package_files(fake, tmp_path) == dict.fromkeys(("package.json", "LICENSE", "tokenizers.min.mjs"), b"content")
    with pytest.raises(InputError, match="another one than the one that is pinned"):
        package_files(package, tmp_path)


def test_without_npm_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match="npm is needed") as caught:
        package_files(NPM_PACKAGES[0], None)
    assert "--packages" in caught.value.fix


def test_patterns_become_those_of_javascript() -> None:
    verbose = re.compile("[a-z] [é#]  # a comment\n | \\s[ \\s]", re.VERBOSE)
    space = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    assert javascript_pattern(verbose) == rf"[a-z][\u{{e9}}\u{{23}}]|[{space}][\u{{20}}{space}]"
    assert javascript_pattern(re.compile(b"\xc3 (?!x)")) == r"\u{c3}\u{20}(?!x)"


@pytest.fixture(scope="session")
def page_bundle(shared_bundle: Callable[..., Path]) -> Path:
    """The demo checkpoint with the graph that the page needs; tests must not change it."""
    options: dict[str, Any] = {"exporter": "torchscript", "opset": 18, "threads": 1, "with_preprocessing": True}
    return shared_bundle(
        "clip-demo-with-preprocessing", lambda target: vlm_export.export("clip-demo", target, **options)
    )


@pytest.fixture(scope="session")
def npm_cache(tmp_path_factory: pytest.TempPathFactory, consumers: Path) -> Iterator[None]:
    """npm's archives are kept where the consumers' environments are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(consumers / "cache"))
        yield


@pytest.fixture(scope="session")
def site(page_bundle: Path, npm_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page") / "site"
    written(page_bundle, target)
    return target


def written(bundle: Path, target: Path) -> None:
    try:
        page(bundle, target, threads=1)
    except EnvironmentFailure as error:
        pytest.skip(f"npm cannot be asked: {error}")


class Open:
    """A page that is open, with the bundle that it was made of."""

    def __init__(self, tab: Page, address: str, bundle: Path) -> None:
        self.tab, self.address, self.model = tab, address, vlm_export.load(bundle, threads=1)

    def load(self, query: str = "") -> None:
        self.tab.open(f"{self.address}/{query}")
        state = self.tab.wait("['ready', 'failed'].find((state) => state === document.body.dataset.state)")
        assert state == "ready", self.tab.evaluate("document.body.innerText")

    def ask(self, method: str, *arguments: str) -> Any:
        """What the page's worker answers; arguments are expressions of JavaScript. Vectors come as lists."""
        call = f"ask({', '.join([json.dumps(method), *arguments])})"
        return self.tab.evaluate(
            f"import('./app.js').then(({{ ask }}) => {call}).then((v) => ArrayBuffer.isView(v) ? [...v] : v)"
        )

    def image_vector(self, file: Path) -> npt.NDArray[Any]:
        return np.array(self.ask("imageVector", file_expression(file)))

    def add(self, files: list[Path], by: str = "choose") -> None:
        before = self.tab.evaluate("document.querySelectorAll('#results li').length")
        {"choose": self.tab.choose_files, "drop": self.tab.drop_files}[by](
            {"choose": "#files", "drop": "#drop"}[by], files
        )
        self.tab.wait(
            f"document.querySelectorAll('#results li').length === {before + len(files)}"
            " && document.body.dataset.state === 'ready'"
        )

    def search(self, text: str) -> list[str]:
        """The names of the images, the first first."""
        self.tab.evaluate(
            f"document.getElementById('query').value = {json.dumps(text)};"
            " document.getElementById('search').requestSubmit()"
        )
        self.tab.wait(f"document.getElementById('results').dataset.query === {json.dumps(text)}")
        names: list[str] = self.tab.evaluate("[...document.querySelectorAll('.name')].map((name) => name.textContent)")
        return names


def file_expression(file: Path) -> str:
    content = base64.b64encode(file.read_bytes()).decode("ascii")
    return f"new File([Uint8Array.from(atob('{content}'), (c) => c.charCodeAt(0))], {json.dumps(file.name)})"


def browser_here() -> str:
    executable = installed_browser()
    assert executable is not None, "there is no Chromium: leave these tests out with -m 'not browser'"
    return executable


@pytest.fixture(scope="module")
def opened(site: Path, page_bundle: Path) -> Iterator[Open]:
    """The demo's page, ready."""
    with chromium(browser_here()) as browser, served(site) as address:
        found = Open(browser.page(), address, page_bundle)
        found.load()
        yield found


@in_browser
def test_dropped_images_are_found_and_stay(opened: Open) -> None:
    opened.add(DEMO_IMAGES, by="drop")
    assert opened.search("a small green triangle")[0] == "green-triangle-small-two-left.png"
    assert opened.search("three large yellow stars")[0] == "yellow-star-large-three-bottom.png"
    opened.load()
    assert opened.tab.wait("document.querySelectorAll('#results li').length") == len(DEMO_IMAGES)
    names = opened.search("a large red circle")
    cosines = opened.model.encode_image(DEMO_IMAGES) @ opened.model.encode_text(["a large red circle"])[0]
    assert names == [DEMO_IMAGES[i].name for i in np.argsort(-cosines)]
    asked = opened.tab.requested()
    assert len(asked) > 20
    assert {urllib.parse.urlsplit(url.removeprefix("blob:")).netloc for url in asked} == {opened.address[7:]}
    assert not [line for line in opened.tab.logs() if "No available adapters" not in line]


@in_browser
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_the_screen(opened: Open, width: int) -> None:
    opened.tab.resize(width, 800)
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    box = opened.tab.evaluate(
        "(({ left, right }) => [left, right])(document.querySelector('#search').getBoundingClientRect())"
    )
    assert 0 < box[0] < box[1] < width


@in_browser
def test_probabilities_are_the_runtimes(opened: Open) -> None:
    labels = ["red circle", "green triangle", "blue square", "yellow star"]
    opened.search("a red circle")
    opened.tab.evaluate(
        "document.querySelector('#results button').click();"
        f"document.getElementById('label-list').value = {json.dumps(chr(10).join(labels))};"
        "document.getElementById('labels').requestSubmit()"
    )
    opened.tab.wait(f"document.querySelectorAll('#probabilities li').length === {len(labels)}")
    rows = opened.tab.evaluate(
        "[...document.querySelectorAll('#probabilities li')].map((row) =>"
        " [row.children[0].textContent, Number(row.children[1].dataset.probability)])"
    )
    name = opened.tab.evaluate("document.getElementById('details-name').textContent")
    (file,) = (file for file in DEMO_IMAGES if file.name == name)
    expected = opened.model.classify([file], labels)[0]
    found = dict(rows)
    np.testing.assert_allclose([found[label] for label in labels], expected, atol=PROBABILITY)
    assert [label for label, _ in rows] == [labels[i] for i in np.argsort(-expected)]
    opened.tab.evaluate("document.getElementById('details').close()")


def hard_images(folder: Path, size: int) -> Iterator[Path]:
    """Files that preparations part on: the contract's, one reduced to a fifth, and other formats with EXIF data."""
    for edge, only in ((size, ""), (5 * size, "portrait")):
        for image in contract_images(edge):
            name = Path(image.name).name
            if only in name:
                (folder / f"{edge}-{name}").write_bytes(image.content)
                yield folder / f"{edge}-{name}"
    scene = Image.open(folder / f"{size}-reduced.png")
    exif = scene.getexif()
    exif[_EXIF_ORIENTATION] = _ROTATED
    tall = scene.resize((70, 400))
    tall.save(folder / "tall.png")
    tall.putalpha(tall.convert("L"))
    tall.save(folder / "tall-rgba.png")
    yield from (folder / "tall.png", folder / "tall-rgba.png")
    formats: dict[str, dict[str, Any]] = {
        "turned.jpg": {"quality": 90, "exif": exif},
        "progressive.jpg": {"progressive": True, "subsampling": 2},
        "turned.webp": {"exif": exif},
        "bitmap.bmp": {},
        "few.gif": {},
    }
    for name, options in formats.items():
        scene.save(folder / name, **options)
        yield folder / name


@in_browser
def test_vectors_are_the_runtimes_also_where_a_canvas_is_wrong(opened: Open, tmp_path: Path) -> None:
    refused = {"64-cmyk.tiff": "cannot read", "64-sixteen-bit.png": "read differently"}
    found = {}
    for file in hard_images(tmp_path, _SIZE):
        if file.name in refused:
            with pytest.raises(RuntimeError, match=refused[file.name]):
                opened.image_vector(file)
            continue
        found[file.name] = float(opened.image_vector(file) @ opened.model.encode_image(file)[0])
    print(json.dumps(found, indent=1))
    assert {"320-portrait.png", "64-rgba.png", "64-palette.png", "turned.jpg"} <= found.keys()
    assert min(found.values()) >= COSINE


@in_browser
def test_texts_are_the_runtimes(opened: Open) -> None:
    rows = opened.ask("ids", "'a'"), opened.ask("textVector", "'a red circle'")
    assert rows[0] == opened.model.session.tokenizer.encode_rows(["a"])[0]
    assert np.dot(rows[1], opened.model.encode_text("a red circle")[0]) >= COSINE
    for text in TEXTS:
        expected = opened.model.session.tokenizer.encode_rows([text], truncate=True)[0]
        assert opened.ask("ids", json.dumps(text)) == expected, text
    with pytest.raises(RuntimeError, match=r"too long for the model: .* it takes 32"):
        opened.ask("textVector", json.dumps(TEXTS[-1]))


def broken_texts() -> list[str]:
    """Texts that were decoded wrongly, once and twice, alone and among others, and random ones of the same letters."""
    found = [*TEXTS, *_WORDS, *_MARKUP]
    for word in _WORDS:
        for encoding in _ENCODINGS:
            broken = word.encode().decode(encoding, "ignore")
            found += [
                broken,
                f"abc {broken} déf",
                broken.replace("\xa0", " "),
                broken.encode().decode(encoding, "ignore"),
            ]
    letters = sorted({letter for text in found for letter in text})
    draw = random.Random(0)
    return found + ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(3000)]


@in_browser
def test_cleaning_is_the_runtimes(opened: Open) -> None:
    texts = broken_texts()
    opened.tab.evaluate(f"globalThis.texts = {json.dumps(texts)}; 1")
    got = opened.tab.evaluate(
        "Promise.all([import('./cleaning.js'), fetch('./cleaning.json').then((answer) => answer.json())])"
        ".then(([{ Cleaner, collapsed }, tables]) => { const cleaner = new Cleaner(tables);"
        " return texts.map((text) => collapsed(cleaner.repaired(text))) })"
    )
    expected = [cleaned_text(text, "whitespace") for text in texts]
    assert sum(text != cleaned for text, cleaned in zip(texts, expected, strict=True)) > 1000
    assert got == expected


@in_browser
def test_webgpu_gives_the_same_vectors(site: Path, page_bundle: Path, tmp_path: Path) -> None:
    """On the processor, which the page would not choose by itself."""
    with chromium(browser_here(), SOFTWARE_WEBGPU) as browser, served(site) as address:
        opened = Open(browser.page(), address, page_bundle)
        opened.load("?engine=webgpu")
        assert "WebGPU" in opened.tab.evaluate("document.getElementById('about').textContent")
        files = [
            file for file in hard_images(tmp_path, _SIZE) if file.stem in ("64-reduced", "320-portrait", "64-rgba")
        ]
        cosines = [opened.image_vector(file) @ opened.model.encode_image(file)[0] for file in files]
        text = opened.ask("textVector", "'a red circle'") @ opened.model.encode_text("a red circle")[0]
    print(cosines, text)
    assert len(files) == 3
    assert min(*cosines, text) >= COSINE


@in_browser
@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_models_of_sigmoid_scores(
    siglip_tests: SimpleNamespace, npm_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SentencePiece's unigrams and its byte pairs, texts that are filled to their context, stretched images.

    Weights of one lie beside the graphs, as large ones do."""
    make = getattr(siglip_tests, {"siglip": "siglip_tokenizer", "siglip2": "gemma_tokenizer"}[name])
    # Bilinear as SigLIP 2's own, and smaller weights for pixels: random ones take single levels of 256, which the graph
    # and Pillow round otherwise, for more than trained ones do.
    saved = siglip_tests.save(tmp_path / "model", make(tmp_path / "pieces"), resample=Image.Resampling.BILINEAR)
    saved.vision_model.embeddings.patch_embedding.weight.data.mul_(0.2)
    saved.save_pretrained(tmp_path / "model")
    bundle, site = tmp_path / "bundle", tmp_path / "site"
    options: dict[str, Any] = {"exporter": "torchscript", "opset": 18, "threads": 1, "with_preprocessing": True}
    vlm_export.export(str(tmp_path / "model"), bundle, **options)
    monkeypatch.setattr(packing, "Storage", partial(Storage, external=name == "siglip2"))
    written(bundle, site)
    assert (site / "model" / "images.onnx_data").exists() == (name == "siglip2")
    with chromium(browser_here()) as browser, served(site) as address:
        opened = Open(browser.page(), address, bundle)
        opened.load()
        model, tokenizer = opened.model, opened.model.session.tokenizer
        for text in TEXTS:
            assert opened.ask("ids", json.dumps(text)) == tokenizer.encode_rows([text], truncate=True)[0], text
        (tmp_path / "images").mkdir()
        files = [file for file in hard_images(tmp_path / "images", 34) if not re.search("cmyk|sixteen", file.name)]
        vectors = np.stack([opened.image_vector(file) for file in files])
        cosines = (vectors * model.encode_image(files)).sum(axis=1)
        # The graph rounds none of an image that has the model's size.
        (exact,) = (file for file in files if file.name == "34-margin-0.png")
        opened.add([exact])
        labels = ["red circle", "two dogs"]
        key = opened.tab.evaluate("document.querySelector('#results li').dataset.key")
        rows = opened.ask("classify", json.dumps(key), json.dumps(labels), "'a photo of a {}'")
    print(dict(zip([file.name for file in files], cosines.tolist(), strict=True)))
    assert cosines.min() >= COSINE
    found = {row["label"]: row["probability"] for row in rows}
    expected = model.classify([exact], labels)[0]
    np.testing.assert_allclose([found[label] for label in labels], expected, atol=PROBABILITY)


@in_browser
def test_the_example_of_the_documentation(opened: Open, site: Path) -> None:
    """It is served beside the page's files, with an image of its own."""
    text = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```html\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 30
    folder = site.parent / "example"
    shutil.copytree(site, folder)
    (folder / "example.html").write_text(example, encoding="utf-8")
    file = DEMO_IMAGES[0]
    shutil.copy(file, folder / "photo.png")
    with served(folder) as address:
        opened.tab.open(f"{address}/example.html")
        shown = opened.tab.wait("document.querySelector('output').textContent")
    expected = (opened.model.encode_image(file) @ opened.model.encode_text("a blue circle").T)[0, 0]
    assert float(shown) == pytest.approx(expected, abs=1e-4)
    opened.load()


@in_browser
def test_the_page_verifies_and_is_not_replaced_unasked(site: Path, page_bundle: Path, npm_cache: None) -> None:
    result = vlm_export.verify(site, threads=1)
    assert result.passed
    assert {report.part for report in result.reports} == {"vision_from_uint8", "text"}
    before = (site / "vlm_export.json").read_bytes()
    with pytest.raises(UsageError):
        page(page_bundle, site, threads=1)
    assert main(["page", str(page_bundle), "-o", str(site), "--overwrite", "--threads", "1"]) == 0
    assert json.loads((site / "vlm_export.json").read_bytes())["files"] == json.loads(before)["files"]
