"""Texts to `input_ids`: cleaning, the Rust tokenizer, truncation and padding to the batch's longest row.

`TextSpec.cleaning` "openai" reproduces `tokenize` and `SimpleTokenizer` of openai/CLIP (d05afc4): ftfy repairs the
text (control characters vanish, lone surrogates become U+FFFD), HTML entities are unescaped twice, white space
collapses, letters become lower case. "open_clip" is the same with the strings that open_clip 3.3 (tokenizer.py) reads
as special tokens. "whitespace", "lower" and "canonicalize" are open_clip 3.3's functions of these names, and
`tokenizer.json` does the rest, as its `HFTokenizer` has it. "none" leaves all of it to `tokenizer.json`.
Token ids that callers hand over are checked before a graph sees them.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.tokenizer import named_failures, tokenizer_from_json
from vlm_export.specs import TextCleaning, TextSpec

Ids: TypeAlias = npt.NDArray[np.int64]

MAX_CHARACTERS = 10_000
"""Longest text that is tokenized: far above any context, and the cost of one text stays in milliseconds, or below
seconds with the worst tokenizer that `tokenizer` lets pass."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PREVIEW_CHARACTERS = 60
_DIGITS = re.compile(r"&#([0-9]{8,})")
_LONGEST_CODE_POINT_DIGITS = 7
_IDS, _MASK = "token ids do not fit the model", "the attention mask does not fit the token ids"


class Tokenizer:
    """`tokenizer.json` and a TextSpec; `encode` gives what the text part takes.

    Raises:
        InputError: the file is no tokenizer, makes texts too long, or does not fit the spec (ids beyond the vocabulary,
            another end token).
    """

    def __init__(self, tokenizer_json: str | Path, spec: TextSpec, *, max_characters: int = MAX_CHARACTERS) -> None:
        self.spec = spec
        self.max_characters = max_characters
        self._where = str(tokenizer_json)
        self._rust = tokenizer_from_json(read_tokenizer_file(Path(tokenizer_json)), spec, self._where)
        self._start_ids: list[int] = self._rust.encode("").ids[:-1]
        self._specials = _special_ids(self._rust)
        if spec.cleaning == "open_clip":
            self._specials = {"<start_of_text>": self._start_ids[0], "<end_of_text>": spec.end_token_id}
        self._splits = spec.cleaning in ("openai", "open_clip")
        if self._splits:
            # `clean_text` has normalised; composing characters again (NFC) would depart from the original.
            self._rust.normalizer = None
            # `_split_at_specials` decides where a special token counts; elsewhere its letters are plain text.
            self._rust.encode_special_tokens = True

    def encode(self, texts: Sequence[str], *, truncate: bool = False, pad_to: int | None = None) -> Ids:
        """Token ids of a batch.

        Args:
            texts: any Unicode; an empty text is the start and end tokens.
            truncate: cut texts that are too long, with end-of-text as the last token; of a text above
                `max_characters` only its beginning is read (its end, where the spec cuts on the left). Otherwise both
                are errors.
            pad_to: width to fill at least, up to the context length; None for what the spec's padding says.

        Returns:
            int64 (B, T), rows filled with `pad_token_id` after end-of-text.

        Raises:
            InputError: a text is too long, is no Unicode, or the tokenizer fails on it.
            UsageError: `texts` is a single string, or `pad_to` exceeds the context length.
        """
        return self.encode_masked(texts, truncate=truncate, pad_to=pad_to)[0]

    def encode_masked(
        self, texts: Sequence[str], *, truncate: bool = False, pad_to: int | None = None
    ) -> tuple[Ids, Ids]:
        """`input_ids` and `attention_mask` of a batch, as in `pad_masked`; arguments and errors as in `encode`."""
        return self.pad_masked(self.encode_rows(texts, truncate=truncate), pad_to=pad_to)

    def encode_rows(self, texts: Sequence[str], *, truncate: bool = False) -> list[list[int]]:
        """Token ids of each text, unpadded; arguments and errors as in `encode`."""
        if isinstance(texts, str):
            raise UsageError("texts is a single string", expected="a list of strings", fix="pass [text]")
        bounded = [self._bounded(i, text, truncate) for i, text in enumerate(texts)]
        rows = self._tokenize_openai(bounded) if self._splits else self._tokenize_plain(bounded)
        return [self._fitted(i, texts[i], row, truncate) for i, row in enumerate(rows)]

    def pad(self, rows: Sequence[Sequence[int]], *, pad_to: int | None = None) -> Ids:
        """int64 (B, T) from unpadded rows."""
        return self.pad_masked(rows, pad_to=pad_to)[0]

    def pad_masked(self, rows: Sequence[Sequence[int]], *, pad_to: int | None = None) -> tuple[Ids, Ids]:
        """int64 (B, T) token ids from unpadded rows, and their mask: 1 for a row's own tokens, 0 after them.

        The mask follows from the rows' lengths: a text may hold the padding token itself.
        """
        if pad_to is not None and not 1 <= pad_to <= self.spec.context_length:
            raise UsageError(
                "pad_to is out of range", expected=f"1 to {self.spec.context_length} tokens", got=str(pad_to)
            )
        width = max([pad_to or self.spec.least_tokens, *map(len, rows)])
        ids = np.full((len(rows), width), self.spec.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids without special tokens."""
        with self._failures("a tokenizer cannot decode its tokens"):
            text: str = self._rust.decode([int(token_id) for token_id in ids], skip_special_tokens=True)
        return text

    def token_id(self, text: str) -> int | None:
        """The id of a text that is one token of the vocabulary or an added one."""
        found: int | None = self._rust.token_to_id(text)
        return found

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a text of any length; InputError when it is no Unicode, or the tokenizer fails on it."""
        return self._tokenize_plain([text])[0]

    def word_ends(self, text: str) -> list[int]:
        """For each token of a text, how many of its characters are behind with it."""
        with self._failures("a tokenizer cannot encode a question"):
            return [end for _, end in self._rust.encode(text, add_special_tokens=False).offsets]

    def _bounded(self, index: int, text: str, truncate: bool) -> str:
        if not isinstance(text, str):
            raise InputError("a text is not a string", where=f"text {index}", got=type(text).__name__)
        if len(text) <= self.max_characters:
            return text
        if truncate:
            left = self.spec.truncation_side == "left"
            return text[-self.max_characters :] if left else text[: self.max_characters]
        raise InputError(
            "a text has too many characters to tokenize",
            where=_place(f"text {index}", text),
            expected=f"at most {self.max_characters:,} characters",
            got=f"{len(text):,}",
            fix="shorten it, or allow truncation",
        )

    def _fitted(self, index: int, text: str, row: list[int], truncate: bool) -> list[int]:
        limit = self.spec.context_length
        if len(row) <= limit:
            return row
        if truncate:
            return self._cut(row)
        raise InputError(
            "a text is too long for the model",
            where=_place(f"text {index}", text),
            expected=f"at most {limit} tokens, start and end included",
            got=f"{len(row)} tokens",
            fix="shorten it, or allow truncation",
        )

    def _cut(self, row: list[int]) -> list[int]:
        """A row of the context's length; the tokens around an encoder's text stay."""
        limit, left = self.spec.context_length, self.spec.truncation_side == "left"
        if not self.spec.adds_eos:
            return row[-limit:] if left else row[:limit]
        words, room = row[len(self._start_ids) : -1], limit - len(self._start_ids) - 1
        return [*self._start_ids, *(words[len(words) - room :] if left else words[:room]), self.spec.end_token_id]

    def _tokenize_plain(self, texts: list[str]) -> list[list[int]]:
        cleaned = [cleaned_text(text, self.spec.cleaning) for text in texts]
        for i, text in enumerate(cleaned):
            check_unicode(text, f"text {i}")
        return self._encoded(cleaned, add_special_tokens=self.spec.adds_eos)

    def _tokenize_openai(self, texts: list[str]) -> list[list[int]]:
        pieces = [_split_at_specials(clean_text(text), self._specials) for text in texts]
        plain = [piece for row in pieces for piece in row if isinstance(piece, str)]
        encoded = iter(self._encoded(plain, add_special_tokens=False))
        rows = []
        for row in pieces:
            ids = [[piece] if isinstance(piece, int) else next(encoded) for piece in row]
            rows.append([*self._start_ids, *(i for part in ids for i in part), self.spec.end_token_id])
        return rows

    def _encoded(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        with self._failures("a tokenizer cannot encode a text"):
            return [row.ids for row in self._rust.encode_batch(texts, add_special_tokens=add_special_tokens)]

    def _failures(self, what: str) -> AbstractContextManager[None]:
        return named_failures(what, self._where)


def clean_text(text: str) -> str:
    """The text as the original's BPE sees it: repaired, unescaped twice, one space between words, lower case."""
    return _collapsed(_repaired(text)).lower()


def cleaned_text(text: str, cleaning: TextCleaning) -> str:
    """The text as a tokenizer of transformers sees it."""
    if cleaning == "none":
        return text
    text = _repaired(text)
    if cleaning == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    # In the original's order: letters that become lower case may be several, but never white space.
    return _collapsed(text) if cleaning == "whitespace" else _collapsed(text.lower())


def _repaired(text: str) -> str:
    import ftfy  # A tenth of a second, which image-only work need not spend.

    return _unescaped(_unescaped(ftfy.fix_text(text)))


def _collapsed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _unescaped(text: str) -> str:
    """`html.unescape`, of numbers with any number of digits: Python converts no more than 4,300 of them."""
    return html.unescape(_DIGITS.sub(_bounded_number, text))


def _bounded_number(match: re.Match[str]) -> str:
    digits = match[1].lstrip("0") or "0"
    # Beyond Unicode all numbers are alike: U+FFFD.
    return "&#" + (digits if len(digits) <= _LONGEST_CODE_POINT_DIGITS else "9" * 8)


def _split_at_specials(text: str, specials: dict[str, int]) -> list[str | int]:
    """Plain pieces and ids of special tokens, in order.

    The original finds tokens from left to right, so a run of symbols swallows the "<|" of a special token that
    follows it without a space.
    """
    if not specials:
        return [text]
    pieces: list[str | int] = []
    done = 0
    for match in re.finditer("|".join(map(re.escape, specials)), text):
        before = text[done : match.start()]
        if before and _is_symbol(before[-1]):
            continue
        pieces += [before, specials[match[0]]]
        done = match.end()
    return [*pieces, text[done:]]


def _is_symbol(character: str) -> bool:
    # U+0345 counts as nothing at all: see WORD_PATTERN in vlm_export.exporting.tokenizers.openai_bpe.
    return not character.isspace() and character != "\u0345" and unicodedata.category(character)[0] not in "LN"


def check_unicode(text: str, name: str) -> None:
    """InputError when a text holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "a text holds half a surrogate pair",
            where=_place(name, text),
            expected="Unicode text",
            got=f"{text[error.start]!r} as character {error.start}",
            fix="take it out; a file is read as UTF-8 with errors='replace'",
        ) from error


def _place(name: str, text: str) -> str:
    shown = text if len(text) <= _PREVIEW_CHARACTERS else text[:_PREVIEW_CHARACTERS] + "…"
    return f"{name}: {shown!r}"


def read_tokenizer_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise machine_fault(error, str(path)) or InputError(
            "the tokenizer cannot be read", where=str(path), got=str(error)
        ) from error


def _special_ids(rust: Any) -> dict[str, int]:
    added: Iterable[tuple[int, Any]] = rust.get_added_tokens_decoder().items()
    return {token.content: token_id for token_id, token in added if token.special}


def checked_ids(given: npt.ArrayLike, spec: TextSpec) -> npt.NDArray[np.int64]:
    """Ids as int64 (N, T), 1 ≤ T ≤ the context length; InputError when they are none of the model's."""
    expected = f"integers (N, T), T from 1 to {spec.context_length}, each in [0, {spec.vocab_size})"
    ids = _array(given, _IDS, expected)
    fits = ids.ndim == 2 and ids.dtype.kind in "iu" and 1 <= ids.shape[1] <= spec.context_length
    if not fits or (ids.size and not 0 <= ids.min() <= ids.max() < spec.vocab_size):
        got = f"{ids.dtype} {ids.shape}" + (f", {ids.min()} to {ids.max()}" if fits else "")
        raise InputError(_IDS, expected=expected, got=got)
    return ids.astype(np.int64)


def checked_mask(given: npt.ArrayLike, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A mask as int64 like `ids`; InputError unless it is zeros and ones with a one in every row."""
    expected = f"zeros and ones {ids.shape}, a one in every row"
    mask = _array(given, _MASK, expected)
    fits = mask.shape == ids.shape and mask.dtype.kind in "biu" and bool(np.isin(mask, (0, 1)).all())
    if not fits or not mask.any(axis=1).all():
        got = f"{mask.dtype} {mask.shape}" + (", a row of zeros" if fits else "")
        raise InputError(_MASK, expected=expected, got=got)
    return mask.astype(np.int64)


def _array(given: npt.ArrayLike, refusal: str, expected: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(given)
    except (OverflowError, ValueError) as error:
        raise InputError(refusal, expected=expected, got=f"rows that make no array: {error}") from error
