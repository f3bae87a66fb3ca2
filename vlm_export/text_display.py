"""Foreign text on a terminal: names, paths, labels and messages that files and models made are shown, never obeyed.

A control character moves the cursor, renames the window or erases lines; a line end forges a message of ours; a
direction override turns a name around; a zero-width character hides in it. Each is written as its escape.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST_NAME = 200
LONGEST_FIELD = 4000
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SUSPECT = re.compile("[^\x20-\x7e]")
_LINE_END = "\n"


def shown(text: object, longest: int = LONGEST_NAME) -> str:
    """A foreign text as one line: hidden characters and line ends are escapes, and what is too long is cut."""
    visible = _SUSPECT.sub(_escape, str(text))
    return visible if len(visible) <= longest else f"{visible[:longest]}…"


def shown_lines(text: str) -> str:
    """A text of several lines, uncut: line ends stay, every other hidden character is an escape."""
    return _LINE_END.join(_SUSPECT.sub(_escape, line) for line in text.split(_LINE_END))


def escaped_json(document: str) -> str:
    """A JSON document whose strings hold hidden characters as JSON's own escapes, so that it reads the same.

    Lone surrogates stay: they have no escape that every reader takes, and the stream writes them as one.
    """
    return _SUSPECT.sub(_json_escape, document)


class Lines(str):
    """A text of several lines that this project wrote; each of its lines is already shown."""

    @classmethod
    def of(cls, lines: Iterable[object], indent: str = "    ") -> Lines:
        """Each on a line of its own, below the one that introduces them."""
        return cls("".join(f"\n{indent}{shown(line, LONGEST_FIELD)}" for line in lines))


def shown_field(text: str) -> str:
    """A field of an error: one line, unless this project wrote its line ends (`Lines`)."""
    return str(text) if isinstance(text, Lines) else shown(text, LONGEST_FIELD)


def size_text(size_bytes: int) -> str:
    """A size for people: 340.1 MiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN_CATEGORIES


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    return ascii(character)[1:-1] if _is_hidden(character) else character


def _json_escape(match: re.Match[str]) -> str:
    character = match.group()
    if character == _LINE_END or not _is_hidden(character) or 0xD800 <= ord(character) <= 0xDFFF:
        return character
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
