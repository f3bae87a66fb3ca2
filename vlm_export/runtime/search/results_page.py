"""Results of a search as one HTML page that requests nothing: thumbnails are data in it, all text is escaped.

Names of items are foreign texts. They become text of the page and never an address, so that nothing in them is run or
fetched; the page's own policy forbids both once more.
"""

from __future__ import annotations

import io
import os
import tarfile
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image, ImageOps

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.images import MAX_STREAM_BYTES, open_image
from vlm_export.text_display import LONGEST_FIELD, shown

_EDGE = 320
"""Pixels of a thumbnail's longer side."""
_QUALITY = 82
_IN_ARCHIVE = ".tar/"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; --line: #d5d8dc; --grey: #566573; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2833; background: #fff; max-width: 74rem; margin: 0 auto;
  padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; } p { margin: .4rem 0; } small, dt { color: var(--grey); }
.query { display: flex; gap: 1rem; align-items: center; margin: 0 0 1.2rem; }
.query img { max-width: 10rem; max-height: 10rem; border-radius: 6px; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
li { border: 1px solid var(--line); border-radius: 8px; padding: .6rem; font-size: .85rem; }
.picture { display: flex; height: 12rem; align-items: center; justify-content: center; background: #f4f6f7;
  border-radius: 4px; margin: 0 0 .5rem; color: var(--grey); text-align: center; padding: .3rem; }
.picture img { max-width: 100%; max-height: 100%; }
.missing { border: 1px dashed #c0392b; color: #c0392b; }
.score { font-weight: 600; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: .3rem 0 0; } dd { margin: 0; }
"""


@dataclass(frozen=True)
class PageResult:
    """A result as the page shows it.

    Attributes:
        score: in words, as "cosine 0.6250".
        columns: what else is known of the item.
    """

    item: str
    score: str
    columns: Mapping[str, str] = field(default_factory=dict)


def results_page(
    results: Sequence[PageResult],
    *,
    of_images: bool,
    text: str = "",
    image: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as one document in UTF-8.

    Args:
        results: best first.
        of_images: items are images, which are shown; one that cannot be read is shown as missing, with the reason.
        text, image: what was looked for: a text, the path of an image, or both.
        notes: sentences about the search, such as its conditions.
    """
    title = f"Search: {text or image or ''}"
    asked = f"<div><h1>{_text(text)}</h1>" if text else "<div><h1>Images like this one</h1>"
    asked += "".join(f"<p><small>{_text(note)}</small></p>" for note in notes) + "</div>"
    query = f'<header class="query">{_picture(image) if image else ""}{asked}</header>'
    rows = "\n".join(_result(number, result, of_images) for number, result in enumerate(results, 1))
    found = f"<ol>\n{rows}\n</ol>" if results else "<p>Nothing meets the conditions.</p>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{query}\n{found}\n</body></html>\n"
    )


def _result(number: int, result: PageResult, of_images: bool) -> str:
    parts = [f'<div class="score">{number}. {_text(result.score)}</div>', f"<div>{_text(result.item)}</div>"]
    if of_images:
        parts.insert(0, _picture(result.item))
    if result.columns:
        pairs = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in result.columns.items())
        parts.append(f"<dl>{pairs}</dl>")
    return f"<li>{''.join(parts)}</li>"


def _picture(item: str) -> str:
    try:
        content = thumbnail(item)
    except InputError as error:
        # Not what it got, which may be the first bytes of a file that is no image: a page may be handed on.
        return f'<div class="picture missing">image missing: {_text(error.what)}</div>'
    encoded = b64encode(content).decode("ascii")
    return f'<div class="picture"><img alt="{_text(item)}" src="data:image/jpeg;base64,{encoded}"></div>'


def thumbnail(item: str) -> bytes:
    """A JPEG of an item, turned as its camera says, at most `_EDGE` pixels a side.

    Args:
        item: an image's path, or `ARCHIVE.tar/MEMBER`.

    Raises:
        InputError: the image cannot be read.
    """
    # os.path: a name that no file can have is no error. A pipe would be waited for.
    content = item if os.path.isfile(item) else _member(item)
    if content is None:
        raise InputError("there is no such file", where=item)
    opened = ImageOps.exif_transpose(open_image(content, name=item))
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        with_alpha = opened.convert("RGBA")
        opened = Image.new("RGB", opened.size, "white")
        opened.paste(with_alpha, mask=with_alpha.getchannel("A"))
    small = opened.convert("RGB")
    small.thumbnail((_EDGE, _EDGE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=_QUALITY)
    return written.getvalue()


def _member(item: str) -> bytes | None:
    """The content of an archive's member, as `embed` names it; None where an item is no such name."""
    before, divider, member = item.partition(_IN_ARCHIVE)
    if not divider:
        return None
    archive = before + _IN_ARCHIVE.rstrip("/")
    try:
        with tarfile.open(archive, "r:") as opened:
            found = opened.extractfile(member)
            return None if found is None else found.read(MAX_STREAM_BYTES)
    except (tarfile.TarError, OSError, KeyError, ValueError, EOFError) as error:
        raise InputError("an archive cannot be read", where=archive, got=str(error)) from error


def _text(text: object) -> str:
    """Foreign text: hidden characters as escapes, and nothing that HTML reads."""
    return escape(shown(text, LONGEST_FIELD))
