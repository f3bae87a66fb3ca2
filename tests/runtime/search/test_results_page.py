"""Results as a page: thumbnails in it, what is missing shown as that, and no name that a browser would obey."""

from __future__ import annotations

import base64
import io
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.search.results_page import PageResult, results_page, thumbnail

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[2J'


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def test_images_are_in_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "wide.png")
    Image.new("RGBA", (20, 40), (0, 0, 255, 0)).save(tmp_path / "clear.png")
    results = [
        PageResult(str(tmp_path / "wide.png"), "cosine 0.9000", {"colour": "red"}),
        PageResult(str(tmp_path / "clear.png"), "cosine 0.8000"),
        PageResult(str(tmp_path / "gone.png"), "cosine 0.7000"),
    ]
    page = results_page(results, of_images=True, text="a red thing", image=str(tmp_path / "wide.png"), notes=["Of 3."])
    asked, wide, clear = pictures(page)
    assert asked.size == wide.size == (320, 160)
    assert clear.size == (20, 40)
    # What is transparent is white.
    assert np.asarray(clear).min() > 250
    text = Tags(page).text
    for words in ("a red thing", "Of 3.", "1. cosine 0.9000", "colour", "image missing", "no such file", "gone.png"):
        assert words in text
    assert page.count("image missing") == 1


def test_names_and_texts_are_text(tmp_path: Path) -> None:
    results = [PageResult(HOSTILE, HOSTILE, {HOSTILE: HOSTILE})]
    for of_images in (True, False):
        page = results_page(results, of_images=of_images, text=HOSTILE, image=HOSTILE, notes=[HOSTILE])
        tags = Tags(page)
        assert {tag for tag, _ in tags.tags} <= {
            *("html", "head", "meta", "title", "style", "body", "header", "div", "h1", "p", "small", "ol", "li", "dl"),
            *("dt", "dd"),
        }
        assert not [
            name for _, attributes in tags.tags for name in attributes if name.startswith(("on", "src", "href"))
        ]
        assert "alert(1)" in tags.text
        assert "\x1b" not in page
        assert "\u202e" not in page


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    page = results_page([PageResult(str(tmp_path / "a.png"), "1")], of_images=True, text="http://example.org/a")
    policies = [a["content"] for tag, a in Tags(page).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not re.findall(r'(?:src|href|url|action)\s*[=(](?!"data:)', page.partition("</style>")[2])
    assert "<script" not in page


def test_nothing_found_is_said() -> None:
    assert "Nothing meets the conditions" in results_page([], of_images=True, text="x")


def test_thumbnails_of_turned_images_and_of_archives(tmp_path: Path) -> None:
    turned = Image.new("RGB", (30, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert Image.open(io.BytesIO(thumbnail(str(tmp_path / "turned.jpg")))).size == (10, 30)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "turned.jpg", "below/turned.jpg")
    assert Image.open(io.BytesIO(thumbnail(f"{tmp_path}/shard.tar/below/turned.jpg"))).size == (10, 30)
    (tmp_path / "notes.txt").write_text("secret")
    names = ["shard.tar/absent.jpg", "absent.tar/a.jpg", "notes.txt", "\0", "x" * 5000, "gone.png"]
    for name in names:
        with pytest.raises(InputError):
            thumbnail(f"{tmp_path}/{name}")
    assert "secret" not in results_page([PageResult(f"{tmp_path}/notes.txt", "1")], of_images=True)
