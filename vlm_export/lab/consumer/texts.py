"""What consumers do to texts by mistake, as hypotheses: each makes the token ids that the mistake would make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.runtime.inputs.texts import Tokenizer, read_tokenizer_file
from vlm_export.specs import TextCleaning, TextSpec

Row: TypeAlias = tuple[int, ...]
Rows: TypeAlias = list[Row]
_LONG_CONTEXT = 4096
# Those that any tokenizer can follow; "none" is no mistake (`tokenizer_alone`).
_CLEANINGS: tuple[TextCleaning, ...] = ("whitespace", "lower", "canonicalize")
# What classifying puts around a label: CLIP's notebooks, and transformers' zero-shot pipeline.
_SENTENCES = ("a photo of a {}", "a photo of {}", "This is a photo of {}.")
# Lengths that programs have as limits.
_SHORT_LIMITS = (8, 16, 20, 24, 30, 32, 40, 48, 50, 52, 64, 77, 128, 256)


@dataclass(frozen=True)
class TextHypothesis:
    """A mistake with texts.

    Attributes:
        word: what it is called.
        fix: what to do.
        rows: what it makes of all texts.
        lengths: of a mistake about padding, whose rows are fed as they are: how many ids of each the mask counts. None
            where rows are filled up as the model wants.
    """

    word: str
    fix: str
    rows: Rows
    lengths: Sequence[int] | None = None


def tokenizer_alone(bundle: OpenBundle, texts: Sequence[str]) -> Rows | None:
    """What tokenizer.json makes of the texts without the cleaning before it, as libraries run it; None without one."""
    spec = bundle.manifest.text
    if spec is None or TOKENIZER_NAME not in bundle.manifest.files:
        return None
    return _encoded(bundle.file(TOKENIZER_NAME), replace(spec, cleaning="none"), texts)


def text_hypotheses(bundle: OpenBundle, texts: Sequence[str], expected: Rows, pad: int) -> Iterator[TextHypothesis]:
    """The mistakes, the most usual first; one word may come several times, with what other libraries make of it."""
    spec = bundle.manifest.text
    assert spec is not None
    alone = tokenizer_alone(bundle, texts)
    bases = [expected] if alone in (None, expected) else [expected, alone]
    yield from _tokenizers(bundle, spec, texts)
    yield from (found for base in bases for found in _special_tokens(spec, base))
    yield from (found for base in bases for found in _short_limits(spec, base))
    yield from (found for base in bases for found in _paddings(spec, base, pad))
    yield from (found for base in bases for found in _widths(base))


def _special_tokens(spec: TextSpec, rows: Rows) -> Iterator[TextHypothesis]:
    starts = len({row[:1] for row in rows}) == 1 and all(len(row) > 1 for row in rows)
    if starts:
        begin = rows[0][0]
        yield TextHypothesis("no BOS", f"put the start token {begin} before every text", [row[1:] for row in rows])
        yield TextHypothesis("BOS twice", "add the special tokens once", [(begin, *row) for row in rows])
    if spec.adds_eos and all(row[-1:] == (spec.end_token_id,) for row in rows):
        end = spec.end_token_id
        yield TextHypothesis("no EOS", f"put the end token {end} behind every text", [row[:-1] for row in rows])
        yield TextHypothesis("EOS twice", "add the special tokens once", [(*row, end) for row in rows])
        if starts:
            fix = f"put the tokens {rows[0][0]} and {end} around every text (add_special_tokens)"
            yield TextHypothesis("no BOS and no EOS", fix, [row[1:-1] for row in rows])


def _tokenizers(bundle: OpenBundle, spec: TextSpec, texts: Sequence[str]) -> Iterator[TextHypothesis]:
    if TOKENIZER_NAME not in bundle.manifest.files:
        return
    path = bundle.file(TOKENIZER_NAME)
    if spec.case == "lower":
        word, fix = "not lower case", "make texts lower case before they are tokenized"
    else:
        word, fix = "lower case", "keep the case of letters"
    for cleaning in ("whitespace", "none"):
        changed = _encoded(path, replace(spec, cleaning=cleaning), texts, _exchange_case)
        if changed is not None:
            yield TextHypothesis(word, fix, changed)
    for cleaning in dict.fromkeys((spec.cleaning, "none")):
        changed = _encoded(path, replace(spec, cleaning=cleaning), texts, _exchange_prefix_space)
        if changed is not None:
            fix = "load tokenizer.json as it is (add_prefix_space of tokenizer_config.json may change it)"
            yield TextHypothesis("space before the first word", fix, changed)
    limit, endless = spec.context_length, replace(spec, context_length=_LONG_CONTEXT)
    for cleaning in dict.fromkeys((spec.cleaning, "none")):
        longer = _encoded(path, replace(endless, cleaning=cleaning), texts)
        if longer is not None:
            yield TextHypothesis("not truncated", f"cut texts to {limit} tokens, the end token included", longer)
            fix = f"keep the end token as the last of {limit} tokens when a text is cut"
            yield TextHypothesis("cut without EOS", fix, [row[:limit] for row in longer])
    for cleaning in _CLEANINGS:
        changed = None if cleaning == spec.cleaning else _encoded(path, replace(spec, cleaning=cleaning), texts)
        if changed is not None:
            yield TextHypothesis("other cleaning", f"clean texts as {spec.cleaning!r}, not as {cleaning!r}", changed)
    fix = "embed the text itself; such a sentence is for labels that are classified"
    for sentence in _SENTENCES:
        for cleaning in dict.fromkeys((spec.cleaning, "none")):
            sentences = [sentence.replace("{}", text) for text in texts]
            changed = _encoded(path, replace(spec, cleaning=cleaning), sentences)
            if changed is not None:
                yield TextHypothesis(f"put into {sentence!r}", fix, changed)


def _short_limits(spec: TextSpec, rows: Rows) -> Iterator[TextHypothesis]:
    longest = max(map(len, rows), default=0)
    for limit in _SHORT_LIMITS:
        if limit < longest:
            end = (spec.end_token_id,) if spec.adds_eos else ()
            cut = [row if len(row) <= limit else (*row[: limit - len(end)], *end) for row in rows]
            fix = f"cut texts that are longer than {spec.context_length} tokens, and no others"
            yield TextHypothesis(f"cut to {limit} tokens", fix, cut)


def _paddings(spec: TextSpec, rows: Rows, pad: int) -> Iterator[TextHypothesis]:
    limit, own = spec.context_length, [len(row) for row in rows]

    def filled(other: int) -> Rows:
        return [row + (other,) * (limit - len(row)) for row in rows]

    left = [(pad,) * (limit - len(row)) + row for row in rows]
    yield TextHypothesis("padded on the left", "pad on the right", left, [limit] * len(rows))
    if spec.padding == "context":
        yield TextHypothesis("not padded", f"pad every text to {limit} tokens with id {pad}", rows, own)
    fix = "hand over the attention mask, with zeros where a text is padded"
    yield TextHypothesis("mask ignored", fix, filled(pad), [limit] * len(rows))
    for other in sorted({0, 1, spec.end_token_id} - {pad}):
        yield TextHypothesis("another padding id", f"pad with id {pad}, not {other}", filled(other), own)


def _widths(rows: Rows) -> Iterator[TextHypothesis]:
    for bits in (8, 16):
        half = 1 << (bits - 1)
        fix = "hold token ids in int64 (int32 where the graph says so)"
        yield TextHypothesis(f"int width: {bits} bits, unsigned", fix, [tuple(i % (2 * half) for i in r) for r in rows])
        signed = [tuple((i + half) % (2 * half) - half for i in row) for row in rows]
        yield TextHypothesis(f"int width: {bits} bits", fix, signed)
    halves = [tuple(half for i in row for half in (i & 0xFFFFFFFF, i >> 32))[: len(row)] for row in rows]
    yield TextHypothesis("int width: int64 read as int32", "hand over the dtype that the graph's input has", halves)
    pairs = [tuple(a | b << 32 for a, b in zip(row[::2], row[1::2], strict=False)) for row in rows]
    yield TextHypothesis("int width: int32 read as int64", "hand over the dtype that the graph's input has", pairs)


def _encoded(
    path: Path, spec: TextSpec, texts: Sequence[str], change: Callable[[dict[str, Any]], bool] | None = None
) -> Rows | None:
    """Rows of a tokenizer.json, or of a changed copy; None where the change changes nothing, or it fails."""
    try:
        if change is None:
            rows = Tokenizer(path, spec).encode_rows(texts, truncate=True)
        else:
            data = json.loads(read_tokenizer_file(path))
            if not change(data):
                return None
            with TemporaryDirectory() as folder:
                changed = Path(folder) / TOKENIZER_NAME
                changed.write_text(json.dumps(data), encoding="utf-8")
                rows = Tokenizer(changed, spec).encode_rows(texts, truncate=True)
    except InputError:
        return None
    return [tuple(row) for row in rows]


def _exchange_case(data: dict[str, Any]) -> bool:
    """A tokenizer.json that makes letters lower case makes none, and the other way."""
    normalizer = data.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kept = [step | {"lowercase": False} if step.get("lowercase") else step for step in steps]
    kept = [step for step in kept if step.get("type") != "Lowercase"]
    kept += [] if kept != steps else [{"type": "Lowercase"}]
    data["normalizer"] = {"type": "Sequence", "normalizers": kept}
    return True


def _exchange_prefix_space(data: dict[str, Any]) -> bool:
    """A tokenizer.json that puts a space before the first word puts none, and the other way."""
    splitter = data.get("pre_tokenizer") or {}
    if "add_prefix_space" not in splitter:
        return False
    splitter["add_prefix_space"] = not splitter["add_prefix_space"]
    return True


def follows(given: Row, row: Row) -> bool:
    """Whether ids are this row, filled up on the right with one id or not at all."""
    return given[: len(row)] == row and len(set(given[len(row) :])) <= 1


def made_by(given: Row, hypothesis: TextHypothesis, number: int) -> bool:
    """Whether ids are a mistake's: of one about padding, up to its length."""
    row = hypothesis.rows[number]
    if hypothesis.lengths is None:
        return follows(given, row)
    return len(given) > 0 and row[-len(given) :] == given
