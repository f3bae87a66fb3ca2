"""Texts that nobody writes: ids or an InputError, never a traceback; and what Rust prints when it panics."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm_export.errors import InputError
from vlm_export.exporting.tokenizers.files import find_open_clip_merges, tokenizer_json_from_bpe_merges
from vlm_export.runtime.inputs.panic_text import own_process
from vlm_export.runtime.inputs.texts import Tokenizer, clean_text
from vlm_export.specs import TextSpec

OPEN_CLIP = TextSpec(77, 49_408, 49_407, 0, "open_clip")
ODD = (
    "",
    "UPPER CASE and Title",
    "crème brûlée e\u0301",
    "雨の中を歩く人々",
    "a cake 🎂 👩‍👩‍👧‍👦",
    "bell\x07 null\x00 escape\x1b[31m",
    "<start_of_text> a dog <end_of_text> and more",
    "run!<end_of_text> <END_OF_TEXT>",
    "<|startoftext|> a cat <|endoftext|> [SEP]",
    "cafÃ© â€œquotedâ€\x9d",
    "fish &amp;amp; chips &lt;b&gt; &#65; &#0000000000065; &#99999999999;",
    "tabs\tand\nnew\r\nlines \u2028 \u00a0 x",
    "3.14 × 22:45 ½",
    "w" * 300,
    "שלום مرحبا",
    "word " * 200,
)


@pytest.fixture(scope="module")
def open_clip_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    merges = find_open_clip_merges()
    assert merges is not None, "the tests need open_clip_torch for CLIP's vocabulary"
    path = tmp_path_factory.mktemp("open_clip") / "tokenizer.json"
    path.write_text(tokenizer_json_from_bpe_merges(merges), encoding="utf-8")
    return path


@pytest.mark.needs_torch
def test_ids_are_those_of_open_clip(open_clip_json: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    ours = Tokenizer(open_clip_json, OPEN_CLIP).encode(ODD, truncate=True, pad_to=77)
    np.testing.assert_array_equal(ours, SimpleTokenizer()(list(ODD)).numpy())


@pytest.mark.parametrize("digits", [4_300, 4_301, 9_000])
@pytest.mark.parametrize("zeros", [0, 4_000])
def test_numbers_of_html_may_have_any_number_of_digits(digits: int, zeros: int) -> None:
    assert clean_text(f"a &#{'0' * zeros}{'9' * digits}; b") == "a \ufffd b"
    assert clean_text(f"a &amp;#{'1' * digits} b") == "a \ufffd b"
    assert clean_text(f"a &#{'0' * digits}65; b") == "a a b"


@pytest.mark.parametrize("cleaning", ["openai", "open_clip", "none"])
def test_any_text_gives_ids_or_an_input_error(cleaning: str, open_clip_json: Path) -> None:
    spec = TextSpec(77, 49_408, 49_407, 0, cleaning)  # type: ignore[arg-type]
    tokenizer = Tokenizer(open_clip_json, spec)
    draw = random.Random(13)
    pieces = ["&#", "&#x", "9" * 50, ";", "&amp;", "\ud800", "\udc00", "\x00", "\x1b[2J", "\u200d", "\u0345", "\u202e"]
    pieces += ["👩‍👩‍👧", "e\u0301" * 9, "<|endoftext|>", "<end_of_text>", "Ã©", " ", "\n", "'s", "ſ", "\U0010ffff"]
    for _ in range(120):
        text = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 40)))
        try:
            ids = tokenizer.encode([text], truncate=True)
        except InputError:
            # Only half a surrogate pair, which repair takes out.
            assert cleaning == "none"
            assert "\ud800" in text or "\udc00" in text
            continue
        assert ids[0, -1] == 49_407
        assert 0 <= ids.min() <= ids.max() < 49_408


def test_ten_thousand_characters_are_cut(open_clip_json: Path) -> None:
    tokenizer = Tokenizer(open_clip_json, OPEN_CLIP)
    assert tokenizer.encode(["é" * 10_000], truncate=True).shape == (1, 77)
    assert tokenizer.encode(["&#" + "9" * 9_990], truncate=True).shape == (1, 3)


def test_cutting_on_the_left_keeps_the_end(open_clip_json: Path) -> None:
    spec = TextSpec(5, 49_408, 49_407, 0, "openai", truncation_side="left")
    (row,) = Tokenizer(open_clip_json, spec).encode_rows(["one two three four five six"], truncate=True)
    whole = Tokenizer(open_clip_json, OPEN_CLIP).encode_rows(["four five six"])[0]
    assert row == whole


_HOSTILE = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}


def test_a_panic_writes_nothing_on_the_terminal(open_clip_json: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    data = json.loads(open_clip_json.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "normalizer": _HOSTILE}), encoding="utf-8")
    code = (
        "import os, sys\n"
        "from vlm_export.runtime.inputs.texts import Tokenizer\n"
        "from vlm_export.runtime.inputs.panic_text import own_process, panics_held\n"
        "from vlm_export.specs import TextSpec\n"
        "with panics_held(): os.write(2, b'before\\n')\n"
        "try:\n"
        f"    Tokenizer({str(path)!r}, TextSpec(77, 49408, 49407, 0, 'none'))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "print('after', file=sys.stderr)\n"
    )
    environment = {**os.environ, "RUST_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("InputError\n", "before\nafter\n")


def test_what_others_write_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    from vlm_export.runtime.inputs.panic_text import panics_held

    class PanicException(BaseException):
        pass

    def panic() -> None:
        with panics_held():
            os.write(2, b"a line of another thread\n\nthread '<unnamed>' panicked at src/lib.rs:1\nnote: run with\n")
            raise PanicException

    with own_process(), pytest.raises(PanicException):
        panic()
    assert capfd.readouterr().err.strip() == "a line of another thread"
