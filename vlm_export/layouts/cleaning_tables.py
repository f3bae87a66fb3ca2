"""What the page's cleaning of texts needs of ftfy and of Python's html: tables, and patterns as JavaScript writes them.

They are taken from the libraries that are installed, so that a page cleans as the runtime beside it does.
"""

from __future__ import annotations

import html
import html.entities
import re
from collections.abc import Iterator, Mapping
from typing import Any

_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Python's classes, as members of a class of JavaScript's.
_CLASSES = {r"\s": _SPACE, r"\w": r"\p{L}\p{N}_"}
_TOKEN = re.compile(r"\\x[0-9a-fA-F]{2}|\\.|.", re.DOTALL)
_PLAIN = re.compile(r"[0-9A-Za-z]")
_PLANES, _BMP = 17, 0x10000


def cleaning_tables() -> dict[str, Any]:
    """The content of the page's cleaning.json."""
    from ftfy import badness, chardata, fixes

    controls = "".join(f"\\u{{{code:x}}}" for code in chardata.CONTROL_CHARS)
    return {
        "patterns": {
            "badness": javascript_pattern(badness.BADNESS_RE),
            "utf8": javascript_pattern(chardata.UTF8_DETECTOR_RE),
            "altered": javascript_pattern(chardata.ALTERED_UTF8_RE),
            "lossy": javascript_pattern(chardata.LOSSY_UTF8_RE),
            "a_grave": javascript_pattern(fixes.A_GRAVE_WORD_RE),
            "controls": f"[{controls}]",
        },
        "encodings": [
            {"name": name, "characters": bytes(range(256)).decode(name)} for name in chardata.CHARMAP_ENCODINGS
        ],
        "ligatures": _by_character(chardata.LIGATURES),
        "widths": _by_character(chardata.WIDTH_MAP),
        "entities": chardata.HTML_ENTITIES,
        "html": html.entities.html5,
        "references": _references(),
    }


def javascript_pattern(pattern: re.Pattern[Any]) -> str:
    """A pattern of Python's, of strings or of bytes as characters, for JavaScript's flag `u`.

    Comments and white space of verbose patterns go; what stands for itself is written as a code point.
    """
    source = pattern.pattern.decode("latin-1") if isinstance(pattern.pattern, bytes) else pattern.pattern
    if pattern.flags & re.VERBOSE:
        source = "".join(_terse(source))
    return "".join(_translated(source))


def _terse(source: str) -> Iterator[str]:
    """Tokens of a verbose pattern that count."""
    inside = comment = False
    for token in _TOKEN.findall(source):
        comment = (comment and token != "\n") or (token == "#" and not inside)
        if comment or (token.isspace() and not inside):
            continue
        inside = token == "[" or (inside and token != "]")
        yield token


def _translated(source: str) -> Iterator[str]:
    inside = False
    for token in _TOKEN.findall(source):
        if token in _CLASSES:
            yield _CLASSES[token] if inside else f"[{_CLASSES[token]}]"
        elif token.startswith(r"\x"):
            yield token
        elif token.startswith("\\"):
            yield f"\\u{{{ord(token[1]):x}}}"
        elif _PLAIN.match(token) or (token in "-]^" if inside else token in "[](){}|?:!<=+*^$.,"):
            yield token
        else:
            yield f"\\u{{{ord(token):x}}}"
        inside = token == "[" or (inside and token != "]")


def _by_character(table: Mapping[int, str]) -> dict[str, str]:
    return {chr(code): text for code, text in table.items()}


def _references() -> dict[int, str]:
    """What `html.unescape` makes of numbers that do not stand for their own character; surrogates have a rule."""
    last = [plane * _BMP + code for plane in range(_PLANES) for code in (0xFFFE, 0xFFFF)]
    codes = [code for code in (*range(_BMP), *last) if not 0xD800 <= code <= 0xDFFF]
    return {code: made for code in codes if (made := html.unescape(f"&#{code};")) != chr(code)}
