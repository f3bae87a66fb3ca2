"""Writes the pictures in docs/images, with Chromium: `report` of a failing bundle, narrow too, and of a passing one;
`page` with a search on a laptop, and with the labels of an image on a phone."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir
from bootstrap import installed_browser
from chromium import Page, chromium, served
from faults.graph import change_weight
from faults.plant import VISION, rehash
from PIL import Image

import vlm_export
from vlm_export.lab.report.collect import ReportOptions, report
from vlm_export.lab.report.page import html_page

IMAGES = Path(__file__).parent.parent / "docs" / "images"
_LAPTOP, _PHONE, _NARROWEST_WINDOW = 1280, 390, 500
_MARGIN = 120
_SHOWN_WIDTH = 900
# Name → width of the screen, height that is shown.
PICTURES = {
    "report-failing": (_LAPTOP, 1420),
    "report-failing-phone": (_PHONE, 1400),
    "report-passing": (_LAPTOP, 1500),
}


def main() -> int:
    """Writes all pictures; returns 1 where there is no browser."""
    browser = installed_browser()
    if browser is None:
        print("error: there is no Chromium on PATH", file=sys.stderr)
        return 1
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        passing, failing = folder / "passing" / "clip-demo", folder / "failing" / "clip-demo"
        passing.parent.mkdir()
        vlm_export.export("clip-demo", passing, precisions=("fp32", "fp16"), threads=1)
        shutil.copytree(passing, failing)
        _plant(failing)
        for picture, size in PICTURES.items():
            bundle = failing if "failing" in picture else passing
            _write_picture(browser, bundle, folder, IMAGES / f"{picture}.png", size)
        _write_page_pictures(browser, folder)
    return 0


def _write_page_pictures(browser: str, folder: Path) -> None:
    """A page of the demo's images, which npm's packages are fetched for."""
    bundle, site = folder / "with-preprocessing", folder / "site"
    vlm_export.export("clip-demo", bundle, with_preprocessing=True, threads=1)
    vlm_export.page(bundle, site, threads=1)
    images = sorted((IMAGES.parents[1] / "configs" / "demo" / "images").iterdir())
    with chromium(browser) as opened, served(site) as address:
        page = opened.page(_LAPTOP, 760)
        page.open(address)
        page.wait("document.body.dataset.state === 'ready'")
        page.drop_files("#drop", images)
        page.wait(f"document.querySelectorAll('#results li').length === {len(images)}")
        page.wait("document.body.dataset.state === 'ready'")
        page.evaluate("document.getElementById('query').value = 'two green triangles'")
        page.evaluate("document.getElementById('search').requestSubmit()")
        page.wait("document.querySelectorAll('.cosine').length > 0")
        _keep_picture(page, "page")
        page.resize(_PHONE, 780)
        page.evaluate("document.querySelector('#results button').click()")
        page.evaluate("document.getElementById('label-list').value = 'red circle\\ngreen triangle\\nblue square'")
        page.evaluate("document.getElementById('labels').requestSubmit()")
        page.wait("document.querySelectorAll('#probabilities li').length > 0")
        _keep_picture(page, "page-phone")


def _keep_picture(page: Page, name: str) -> None:
    # The pointer has left the place where the images were dropped.
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    page.wait("new Promise((done) => setTimeout(done, 500, true))")
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        # Photographs need more colours than a palette has.
        _shown(shot.convert("RGB")).save(IMAGES / f"{name}.png", optimize=True)


def _plant(bundle: Path) -> None:
    """One bias of the other sign, and the files' digests made anew."""
    model = ir.load(bundle / VISION)
    change_weight(model, "blocks.2.mlp.fc2.bias", lambda values: -values)
    ir.save(model, bundle / VISION)
    rehash(bundle, VISION)


def _write_picture(browser: str, bundle: Path, folder: Path, target: Path, size: tuple[int, int]) -> None:
    width, height = size
    (folder / "page.html").write_text(html_page(report(bundle, ReportOptions(threads=1))), encoding="utf-8")
    # A window has a least width; a frame has none.
    frame = (
        f'<body style="margin:0"><iframe src="page.html" style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    shot = folder / "shot.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    window = f"--window-size={max(width, _NARROWEST_WINDOW)},{height}"
    page = (folder / "frame.html").as_uri()
    subprocess.run([browser, *options, f"--screenshot={shot}", window, page], check=True, capture_output=True)
    with Image.open(shot) as opened:
        margin = _MARGIN if width == _LAPTOP else 0
        image = opened.convert("RGB").crop((margin, 0, width - margin, height))
    _shown(image).quantize(256, method=Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


def _shown(image: Image.Image) -> Image.Image:
    """At most as wide as documentation shows it."""
    if image.width <= _SHOWN_WIDTH:
        return image
    return image.resize((_SHOWN_WIDTH, round(image.height * _SHOWN_WIDTH / image.width)), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
