"""The Rust tokenizer in an untrusted tokenizer.json: loaded, bounded, and its failures named."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

from vlm_export.errors import InputError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.panic_text import panics_held
from vlm_export.specs import TextSpec

MAX_GROWTH = 40
"""How many times longer a tokenizer's own replacements may make a text. SentencePiece's character map alone makes 18
characters of one; CLIP's, BERT's and byte-level tokenizers stay below 4."""

MAX_TOKEN_CHARACTERS = 256
"""Of a WordPiece's longest word, which is 100 in BERT's, and of a token of SentencePiece's unigrams."""

_MAX_STEPS = 64
_MANY = 10**9
# One character or class of them, at least once, perhaps only in some places: no match of such a pattern is empty.
_ONE = r"(?:\[(?:\\.|[^\[\]\\&])+\]|[^\\\[\](){}.*+?|^$])"
_BEFORE, _AFTER = r"(?:\\A|\(\?<[=!][^()]*\)|[^()|]*\\K)?", r"(?:\\z|\(\?[=!][^()]*\))?"
_CONSUMES = re.compile(rf"{_BEFORE}{_ONE}(?:\+|\{{[1-9][0-9]{{0,3}},?\}})?{_AFTER}", re.DOTALL)
_RIGHT_TOKENIZER = "use the tokenizer that the checkpoint was trained with"


@contextmanager
def named_failures(what: str, where: str, expected: str = "") -> Iterator[None]:
    """Around calls into the Rust library, which raises bare Exception, or panics on what it did not foresee.

    Raises:
        InputError: either of the two, as `what`.
        EnvironmentFailure: the machine stands in the way.
    """
    try:
        with panics_held():
            yield
    except InputError:
        raise
    except BaseException as error:
        # pyo3's PanicException is none of Exception, and has no importable name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise machine_fault(error, where) or InputError(
            what, where=where, expected=expected, got=str(error), fix=_RIGHT_TOKENIZER
        ) from error


def tokenizer_from_json(text: str, spec: TextSpec, where: str) -> Any:
    """The `tokenizers.Tokenizer` in the content of a tokenizer.json, without truncation and padding of its own.

    Raises:
        InputError: malformed, a text may cost more than seconds, or its ids or its end token do not fit `spec`.
    """
    rust = bounded_tokenizer(text, where)
    _check_fit(rust, ids_around(rust, where), spec, where)
    return rust


def ids_around(rust: Any, where: str) -> list[int]:
    """What a tokenizer puts around every text; InputError when it fails on the empty one."""
    with named_failures("a tokenizer cannot encode an empty text", where):
        around: list[int] = rust.encode("").ids
    return around


def bounded_tokenizer(text: str, where: str) -> Any:
    """As `tokenizer_from_json`, for whatever model.

    Raises:
        InputError: malformed, or a text may cost more than seconds.
    """
    from tokenizers import Tokenizer as RustTokenizer

    with named_failures("the tokenizer cannot be loaded", where, "a tokenizer.json"):
        rust = RustTokenizer.from_str(text)
        rust.no_truncation()
        rust.no_padding()
    _check_search(rust, where)
    _check_growth("normalizer", rust.normalizer, where)
    _check_growth("decoder", rust.decoder, where)
    return rust


def _check_fit(rust: Any, empty: list[int], spec: TextSpec, where: str) -> None:
    known = rust.get_vocab(with_added_tokens=True).values()
    # The ids that are put around a text are stated apart from the vocabulary.
    highest = max([*known, *empty], default=-1)
    if not known or highest >= spec.vocab_size:
        raise InputError(
            "the tokenizer's ids do not fit the model's vocabulary",
            where=where,
            expected=f"ids below {spec.vocab_size}, the number of rows of the model's token embedding",
            got=f"ids up to {highest}",
            fix=_RIGHT_TOKENIZER,
        )
    if spec.adds_eos and (not empty or empty[-1] != spec.end_token_id or len(empty) > spec.context_length):
        raise InputError(
            "the tokenizer does not end texts as the model expects",
            where=where,
            expected=f"end-of-text id {spec.end_token_id} as the last of at most {spec.context_length} tokens",
            got=f"an empty text gives {len(empty)} tokens: {[*empty[:4], '…', *empty[-4:]] if empty[8:] else empty}",
            fix=_RIGHT_TOKENIZER,
        )


def _check_search(rust: Any, where: str) -> None:
    """InputError when the model looks for tokens so long that a long word takes minutes: the time grows with their
    square."""
    kind, longest = type(rust.model).__name__, 0
    if kind == "WordPiece":
        longest = rust.model.max_input_chars_per_word
    elif kind == "Unigram":
        longest = max(map(len, rust.get_vocab(with_added_tokens=False)), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise InputError(
            "the tokenizer looks for tokens that are too long",
            where=where,
            expected=f"at most {MAX_TOKEN_CHARACTERS} characters",
            got=f"{longest} in a {kind} model",
            fix=_RIGHT_TOKENIZER,
        )


def _check_growth(kind: str, stage: Any, where: str) -> None:
    """InputError when what a tokenizer does to every text before or after its model multiplies its length."""
    if stage is None:
        return
    steps = list(_steps(json.loads(stage.__getstate__())))
    growth = prod(map(_growth, steps))
    if len(steps) > _MAX_STEPS or growth > MAX_GROWTH:
        raise InputError(
            f"the tokenizer's {kind} makes texts too long",
            where=where,
            expected=f"at most {_MAX_STEPS} steps that make a text at most {MAX_GROWTH} times longer",
            got=f"{len(steps)} steps, {growth if growth < _MANY else 'more than 10^9'} times",
            fix=_RIGHT_TOKENIZER,
        )


def _steps(stage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    inner = stage.get("normalizers", stage.get("decoders"))
    if inner is None:
        yield stage
        return
    for step in inner:
        yield from _steps(step)


def _growth(step: Mapping[str, Any]) -> int:
    """Characters that one step may make of one. Unicode's normal forms and cases count as 1: they do not compound."""
    match step["type"]:
        case "Replace":
            (pattern,) = step["pattern"].items()
            kind, found, made = pattern[0], len(pattern[1]), len(step["content"])
            if kind == "Regex":
                # It may match the empty text before every character, unless it is of the simplest kind.
                return max(1, made) if _CONSUMES.fullmatch(pattern[1]) else made + 1
            return max(1, -(-made // found)) if found else made + 1
        case "Prepend":
            return 1 + len(step["prepend"])
        case "Precompiled":
            return _longest_entry(step["precompiled_charsmap"])
        case "ByteLevel":
            return 4  # bytes of a character
        case "BertNormalizer":
            return 3  # spaces around each Chinese character
    return 1


def _longest_entry(charsmap: str) -> int:
    """Characters in the longest replacement of SentencePiece's map: a size, a trie of so many bytes, and texts that end
    with zero bytes."""
    raw = base64.b64decode(charsmap)
    entries = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1, *(len(entry.decode("utf-8", "replace")) for entry in entries))
