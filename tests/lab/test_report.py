"""`report`: one page without requests that says first what fails, in words and plots, whatever a manifest holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from vlm_export.bundle.manifest import manifest_from_bytes
from vlm_export.cli.main import main
from vlm_export.errors import UsageError
from vlm_export.lab.report.collect import ReportOptions, report
from vlm_export.lab.report.findings import Report
from vlm_export.lab.report.markdown import markdown_summary
from vlm_export.lab.report.page import html_page
from vlm_export.lab.report.recorded import recorded_proof

Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]
VISION = "onnx/vision_model.onnx"
REQUESTS = {"src", "href", "srcset", "poster", "data", "action", "xlink:href", "background"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, texts, and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(name == tag and wanted.items() <= given.items() for name, given in self.tags)


@pytest.fixture(scope="module")
def passing(demo: Path) -> Report:
    return report(demo, ReportOptions(threads=1, latency=True))


@pytest.fixture
def edit_manifest() -> Edit:
    def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
        manifest = bundle / "vlm_export.json"
        data = json.loads(manifest.read_text(encoding="utf-8"))
        change(data)
        manifest.write_text(json.dumps(data), encoding="utf-8")

    return edit


def negate_a_bias(bundle: Path) -> None:
    model = ir.load(bundle / VISION)
    value = model.graph.initializers["blocks.2.mlp.fc2.bias"]
    assert value.const_value is not None
    value.const_value = ir.tensor(-value.const_value.numpy())
    ir.save(model, bundle / VISION)


def shown_page(found: Report) -> Page:
    return Page(html_page(found))


def test_a_page_tells_all_of_a_bundle(passing: Report) -> None:
    page = shown_page(passing)
    assert page.text.index("✓ clip-demo passes") < page.text.index("Proof")
    headings = ("Proof", "What was exported from what", "Images of the contract", "Where the weights come from")
    for heading in (*headings, "Operators", "Sizes by layer", "Ranges", "Latency", "How to load it"):
        assert heading in page.text
    for fact in ("Apache-2.0", "image_embeds", "tokenizer", "LayerNormalization", "blocks.3", "ms (batch 1)"):
        assert fact in page.text
    # A plot of points for each graph and of sizes for each part, a dot for each recorded input, two images for each.
    assert page.count("svg") == 4 + 2
    assert page.count("circle", fill="#229954") == 2 * 3 + 2 * 5
    assert page.count("circle", fill="#c0392b") == 0
    assert page.count("img") == 2 * 15
    for code in (
        "vlm_export.load('clip-demo')",
        '"clip-demo/onnx/vision_model.onnx"',
        "[1, 3, 64, 64]",
        "Ort::Session",
    ):
        assert code in page.text


def test_sizes_add_up_to_the_weights(passing: Report) -> None:
    vision = next(graph for graph in passing.graphs if (graph.part, graph.variant) == ("vision", "fp32"))
    weights = ir.load(passing.bundle.root / VISION).graph.initializers.values()
    assert sum(vision.layer_bytes.values()) == sum(w.const_value.nbytes for w in weights if w.const_value is not None)
    assert {f"blocks.{number}" for number in range(4)} < set(vision.layer_bytes)
    assert sum(vision.operators.values()) > 100


def test_pictures_are_the_pixels_that_the_model_gets(passing: Report) -> None:
    picture = next(each for each in passing.pictures if each.name == "margin-1.png")
    assert picture.failure == ""
    assert picture.original is not None
    assert picture.prepared is not None
    with Image.open(BytesIO(picture.prepared)) as prepared:
        assert prepared.size == picture.size[::-1]


def test_a_replaced_weight_stands_first(copied: Path, relist: Callable[[Path], None], tmp_path: Path) -> None:
    negate_a_bias(copied)
    relist(copied)
    out, summary = tmp_path / "page.html", tmp_path / "summary.md"
    command = ["report", str(copied), "-o", str(out), "--markdown", str(summary), "--threads", "1", "--quiet"]
    assert main(command) == 1
    page = Page(out.read_text(encoding="utf-8"))
    text = page.text
    assert text.startswith("clip-demo: FAILS")
    first = text.index("What failed first: a graph is not the one that was exported")
    culprit = text.index(
        "blocks.2.mlp.fc2.bias (made of visual.transformer.resblocks.2.mlp.c_proj.bias) has other values"
    )
    effect = text.index("image_embeds of vision fp32 fails at 3 of 3 recorded inputs: its error is")
    assert first < culprit < effect < text.index("Each dot is one input")
    assert page.count("circle", fill="#c0392b") == 3
    assert page.count("header", class_="verdict failed") == 1
    markdown = summary.read_text(encoding="utf-8")
    assert markdown.startswith("## ❌ FAIL: `clip-demo`")
    assert markdown.index("blocks.2.mlp.fc2.bias") < markdown.index("| part |")


def test_a_replaced_weight_is_seen_without_running_a_graph(copied: Path, relist: Callable[[Path], None]) -> None:
    negate_a_bias(copied)
    relist(copied)
    found = report(copied, ReportOptions(run=False))
    assert [problem.what for problem in found.proof.problems] == ["a graph is not the one that was exported"]
    assert "Nothing was run for this report" in shown_page(found).text


def test_a_damaged_file_hides_nothing_else(copied: Path) -> None:
    raw = bytearray((copied / VISION).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copied / VISION).write_bytes(raw)
    found = report(copied, ReportOptions(precision="fp32", threads=1))
    (problem,) = found.proof.problems
    assert problem.what == "a file of the bundle is not the one that was exported"
    assert set(found.proof.not_run) == {
        "vision fp32: the graph could not be compared",
        "contract: it could not be compared",
        "ranges of vision: a file of the bundle is not the one that was exported",
    }
    assert {output.part for output in found.proof.outputs} == {"text"}
    assert next(graph for graph in found.graphs if graph.part == "vision").refusal
    assert "a file of the bundle is not the one" in shown_page(found).text


def test_wrong_pixels_are_shown_first(copied: Path, edit_manifest: Edit) -> None:
    edit_manifest(copied, lambda data: data["image"].update(resample="bilinear"))
    found = report(copied, ReportOptions(precision="fp32", threads=1))
    assert "preprocessor_config.json" in found.proof.problems[0].what
    page = shown_page(found)
    wrong = sum(bool(picture.failure) for picture in found.pictures)
    assert 0 < wrong == page.count("figure", class_="bad")
    figures = [attributes.get("class") for tag, attributes in page.tags if tag == "figure"]
    assert figures[:wrong] == ["bad"] * wrong
    assert not any(output.failed for output in found.proof.outputs)


def test_recorded_figures_are_those_of_the_export(demo: Path, passing: Report) -> None:
    found = report(demo, ReportOptions(run=False))
    assert found.proof.passed
    assert found.proof.outputs == passing.recorded.outputs
    # Of float16 the export also compared the nodes in float32.
    variants = {(output.part, output.variant) for output in found.proof.outputs}
    assert variants >= {("vision", "fp32"), ("text", "fp16 unrounded")}
    assert all(output.points >= 5 and 0 <= output.share <= 1 for output in found.proof.outputs)


def test_hostile_text_is_shown_and_not_obeyed(copied: Path, edit_manifest: Edit) -> None:
    script = '</title><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)>\u202e|`*'

    def change(data: dict[str, Any]) -> None:
        data["name"] = script
        data["source"].update(name=script, licence=script, files=[])
        data["export"].update(warnings=[script], notes=[script], reference=script, contract=None)
        variant = data["parts"][0]["variants"][0]
        variant["verification"] = {"worst": {script: {"max_abs": script}}, "passed": "yes", "failures": [script, 3]}
        data["parts"][1]["variants"][0]["verification"] = {"worst": script, "points": [script], "floor": 3}

    edit_manifest(copied, change)
    found = report(copied, ReportOptions(run=False))
    assert not found.proof.passed
    page = shown_page(found)
    assert page.count("script") == 0
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert requests_of(page) == []
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in html_page(found)
    markdown = markdown_summary(found)
    without_code = re.sub(r"`[^`\n]*`", "", markdown)
    assert "script" not in without_code
    assert "evil" not in without_code
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def requests_of(page: Page) -> list[tuple[str, str]]:
    """Attributes that would make a browser ask something of a server, and what of styles would."""
    asked = [
        (tag, value or "")
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in REQUESTS and not (value or "").startswith(("#", "data:image/png;base64,"))
    ]
    loading = {"link", "script", "iframe", "object", "embed", "base", "form", "video", "audio"}
    return asked + [(tag, "") for tag, _ in page.tags if tag in loading]


def test_a_page_requests_nothing(passing: Report) -> None:
    text = html_page(passing)
    page = Page(text)
    assert requests_of(page) == []
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (given["content"] for tag, given in page.tags if tag == "meta" and "http-equiv" in given)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_verb_writes_in_one_step_and_replaces_nothing_unasked(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    command = ["report", str(demo), "-o", str(out), "--no-run", "--json"]
    assert main(["report", str(demo), "-o", str(out.with_suffix(".pdf")), "--no-run"]) == UsageError.exit_status
    assert not out.with_suffix(".pdf").exists()
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is True
    assert data["output"] == str(out)
    before = out.read_bytes()
    assert main(command) == UsageError.exit_status
    assert out.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["page.html"]


def opened(page: str, folder: Path) -> tuple[np.ndarray, str]:
    """What Chromium draws of a page (H, W, 3), and what it logs."""
    assert CHROMIUM is not None, "there is no Chromium: leave this test out with -m 'not browser'"
    (folder / "page.html").write_text(page, encoding="utf-8")
    picture, profile = folder / "page.png", f"--user-data-dir={folder / 'profile'}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, *options, profile, f"--screenshot={picture}", "--window-size=1280,2600"]
    done = subprocess.run([*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")).astype(int), done.stderr


@pytest.mark.browser
def test_it_opens_in_a_browser_with_its_plots_and_requests_nothing(passing: Report, tmp_path: Path) -> None:
    pixels, log = opened(html_page(passing), tmp_path)
    assert "Content Security Policy" not in log
    colours = {"dots": (0x22, 0x99, 0x54), "gates": (0xC0, 0x39, 0x2B), "verdict": (0x1E, 0x84, 0x49)}
    for name, colour in colours.items():
        assert (np.abs(pixels - colour).max(axis=2) < 12).sum() > 50, name


@pytest.mark.browser
def test_the_browser_would_tell_of_a_request(passing: Report, tmp_path: Path) -> None:
    page = html_page(passing).replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>')
    assert "violates the following Content Security Policy" in opened(page, tmp_path)[1]


@pytest.mark.parametrize("count", ["nan", "inf", 1e300, None, [1]])
def test_counts_that_are_none_are_left_out(count: object, demo: Path) -> None:
    data = json.loads((demo / "vlm_export.json").read_text(encoding="utf-8"))
    data["parts"][0]["variants"][0]["verification"] |= {"passed": False, "failure_count": count}
    data["export"]["contract"]["checks"][0]["compared"] = count
    found = recorded_proof(manifest_from_bytes(json.dumps(data).encode()))
    assert not found.passed
    assert found.stages[0].compared == 0
