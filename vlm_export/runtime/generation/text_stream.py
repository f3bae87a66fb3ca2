"""Tokens to text as they come: pieces that are complete, and that together are the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns one row's tokens into pieces of text.

    A character may take several tokens: nothing is given out while the text ends inside one. White space at the start
    is left out, and at the end of what is known it waits for what follows, so that the pieces add up to the stripped
    text of all tokens.

    Args:
        decode: the text of token ids, of which byte-level tokens may be decoded from any token boundary on.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._pending: list[int] = []
        self._space = ""
        self._started = False

    def push(self, token_id: int, *, is_last: bool = False) -> str:
        """The text that is complete with this token; "" while there is none. After the last token nothing waits."""
        self._pending.append(token_id)
        text = self._decode(self._pending)
        if text.endswith(_INCOMPLETE) and not is_last:
            return ""
        self._pending.clear()
        text = self._space + text
        if not self._started:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._started = self._started or bool(kept)
        return kept
