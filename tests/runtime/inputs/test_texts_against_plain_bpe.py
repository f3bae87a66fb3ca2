"""The Rust tokenizer against an independent one: byte-pair encoding in plain Python, as the paper describes it."""

from __future__ import annotations

import gzip
import html
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import regex

from vlm_export.runtime.inputs.texts import Tokenizer

WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
FRAGMENT_LINE = (
    "<|startoftext|> <|endoftext|> <|ENDOFTEXT|> !<|endoftext|> x<|endoftext|>y '<|startoftext|> <|endoftext|>! <| |> "
    "&amp; &amp;lt; &lt;b&gt; &eacute; &#101;&#769; &#x85; &#0; &nbsp; it's DON'T we'LL 'ſ 'S Σίσυφος ΟΔΟΣ İstanbul ẞ "
    "“quoted” ‘x’ … Ã©tÃ© â€œhiâ€\x9d ﬁne ｆｕｌｌ é e\u0301 H\u0331 ͅ ⅷ Ⅷ ² ½ ٣ 你好 한국어 ไทย नमस्ते 🏳️‍🌈 👩🏽‍🚀 "
    "\u200b \ufeff \u00ad \x00 \x1c \x85 \u2028 \u3000 \ud800 \U0010ffff __init__ 3.14 a1b2 #hash @you $5 100% \\n"
)
FRAGMENTS = FRAGMENT_LINE.split(" ")
RANGES = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1E00, 0x2000)]
RANGES += [(0x2000, 0x2C00), (0x3040, 0x3100), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F700)]


def plain_tokenizer(merges_path: Path) -> Callable[[str], list[int]]:
    """Text to ids without start and end, from the published merges alone."""
    visible = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    hidden = [b for b in range(256) if b not in visible]
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    lines = gzip.decompress(merges_path.read_bytes()).decode().split("\n")[1 : 1 + 49408 - 514]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    symbols = [letters[b] for b in visible + hidden]
    tokens = symbols + [s + "</w>" for s in symbols] + [line.replace(" ", "") for line in lines]
    ids = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}

    @cache
    def word_ids(word: str) -> tuple[int, ...]:
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (ids[word],)
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        return tuple(ids[part] for part in parts)

    def encode(text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [i for word in WORDS.findall(text) for i in word_ids(word)]

    return encode


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        pieces = []
        for _ in range(rng.randint(0, 8)):
            low, high = rng.choice(RANGES)
            letters = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6)))
            pieces.append(rng.choice([letters, rng.choice(FRAGMENTS), rng.choice(FRAGMENTS)]))
        texts.append(rng.choice(["", " ", "\t\n "]).join(pieces))
    return texts


def test_ids_equal_an_independent_implementation(clip_tokenizer: Tokenizer, clip_merges: Path) -> None:
    plain = plain_tokenizer(clip_merges)
    texts = [*FRAGMENTS, *random_texts(600)]
    wrong = []
    for text, row in zip(texts, clip_tokenizer.encode_rows(texts, truncate=True), strict=True):
        expected = [49406, *plain(text), 49407]
        expected = expected if len(expected) <= 77 else [*expected[:76], 49407]
        if row != expected:
            wrong.append((text, row, expected))
    assert not wrong, wrong[:3]
    assert np.mean([len(plain(text)) for text in texts]) > 5
