"""SentencePiece's unigrams as `tokenizer.json`, with the canonical form that transformers' SiglipTokenizer gives texts.

That class makes letters lower case, takes ASCII punctuation out and closes white space up, each between the strings of
special tokens, and encodes what is left after an underline (▁). The end token is not added to a text that ends with
it. The steps here are the same in this order, as one normaliser, so that any reader of tokenizer.json gets its ids.
Three differences remain. Where a combining mark follows a character that SentencePiece's character map replaces without
it, `tokenizers` drops the mark. Where the vocabulary has no ">", SiglipTokenizer, which encodes "<unk>" before each
stretch of text and takes its tokens off again, loses an unknown character right behind a special token. And a text that
is the end token alone ends here with another one; where that is the padding as well, as published, both are the same.

Sources: transformers 5.23, models/siglip/tokenization_siglip.py; SentencePiece 0.2, sentencepiece_model.proto and
normalizer.cc.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from vlm_export.errors import EnvironmentFailure, InputError, install_fix
from vlm_export.exporting.tokenizers.openai_bpe import read_bounded
from vlm_export.runtime.inputs.tokenizer import MAX_TOKEN_CHARACTERS, named_failures

UNDERLINE = "▁"
MAX_PIECES = 1 << 20
_UNIGRAM, _NORMAL, _UNUSED = 1, 1, 5  # of sentencepiece_model.proto
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
# What `str.isspace` and Python's \s call white space.
_SPACE = "[\\t-\\r\\x1c-\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}]"
# Python's `lower` writes a sigma at the end of a word as ς, tokenizers' Lowercase does not.
_FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}*)Σ(?!\p{Case_Ignorable}*\p{Cased})"
# Noncharacters of Unicode, one for each added token; the last is for those that stand in a text itself.
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_FIX = "get the file again from the checkpoint's publisher, or pass --tokenizer PATH"


def checked_pieces(path: Path) -> Any:
    """The SentencePiece model in a file, as its protobuf message.

    Raises:
        InputError: it is malformed, or holds another model than unigrams of a usable size.
        EnvironmentFailure: sentencepiece is not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise EnvironmentFailure(
            "reading a SentencePiece model needs sentencepiece", got=str(error), fix=install_fix("export")
        ) from error
    with named_failures("the SentencePiece model is malformed", str(path)):
        model = sentencepiece_model_pb2.ModelProto.FromString(read_bounded(path))
    normalizer, trainer, pieces = model.normalizer_spec, model.trainer_spec, model.pieces
    problems = {
        "unigrams": trainer.model_type != _UNIGRAM or trainer.byte_fallback,
        "white space as a prefix of words, collapsed and escaped": trainer.treat_whitespace_as_suffix
        or not normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces,
        f"1 to {MAX_PIECES} pieces of at most {MAX_TOKEN_CHARACTERS} characters, each once": not (
            0 < len(pieces) <= MAX_PIECES
            and len({piece.piece for piece in pieces}) == len(pieces)
            and all(0 < len(piece.piece) <= MAX_TOKEN_CHARACTERS for piece in pieces)
        ),
        "finite scores": not all(math.isfinite(piece.score) for piece in pieces),
        # The unigrams of `tokenizers` are all found in texts; without punctuation, none of these can be.
        "punctuation in each piece that is no text": any(
            piece.type not in (_NORMAL, _UNUSED) and all(c.isalnum() or c == UNDERLINE for c in piece.piece)
            for piece in pieces
        ),
        "no pieces that are out of use": any(piece.type == _UNUSED for piece in pieces),
    }
    for expected, is_wrong in problems.items():
        if is_wrong:
            raise _refusal(path, expected, f"another model, of {len(pieces)} pieces")
    return model


def canonical_tokenizer_json(path: Path, *, lowers: bool, end: str, added: Mapping[int, AddedToken]) -> str:
    """`tokenizer.json` with the ids that SiglipTokenizer gives; texts end with `end`.

    Args:
        path: the SentencePiece model.
        lowers: whether letters become lower case (`do_lower_case`).
        end: the end token, one of `added`.
        added: id → token that is found in texts before anything else, as the class has them.

    Raises:
        InputError: as `checked_pieces`, or the added tokens cannot be told apart or have other ids here.
    """
    model = checked_pieces(path)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokens = [added[token_id] for token_id in sorted(added)]
    if len(tokens) > len(_STAND_INS) - 1 or any(token.single_word or not token.content for token in tokens):
        raise _refusal(
            path, f"at most {len(_STAND_INS) - 1} added tokens, found inside of words too", f"{tokens!r:.200}"
        )
    with named_failures("the SentencePiece model cannot be read", str(path)):
        rust = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id))
        rust.normalizer = _normalizer(bytes(model.normalizer_spec.precompiled_charsmap), lowers, tokens, end)
    rust.decoder = decoders.Metaspace(replacement=UNDERLINE, prepend_scheme="always")
    for token in tokens:
        # Found in what the normaliser makes of the text, where a stand-in is in its place.
        own = AddedToken(token.content, normalized=True, special=token.special)
        (rust.add_special_tokens if token.special else rust.add_tokens)([own])
    found = {token_id: rust.token_to_id(token.content) for token_id, token in added.items()}
    if any(token_id != got for token_id, got in found.items()):
        raise _refusal(path, f"added tokens with the ids {list(found)}", str(list(found.values())))
    ending = [(end, rust.token_to_id(end))]
    rust.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", ending)
    text: str = rust.to_str()
    return text


def _normalizer(charsmap: bytes, lowers: bool, tokens: Sequence[AddedToken], end: str) -> normalizers.Sequence:
    """The steps between two added tokens, each of which a stand-in holds apart from its neighbours."""
    mapped = [normalizers.Precompiled(charsmap)] if charsmap else []
    lowered = [normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()] if lowers else []
    *stand_ins, other = _STAND_INS
    marks = f"[{stand_ins[0]}-{stand_ins[-1]}]"
    # The longest first, as the library's trie finds them. White space around them goes with that around all texts.
    by_length = sorted(zip(tokens, stand_ins, strict=False), key=lambda pair: -len(pair[0].content))
    held = [normalizers.Replace(token.content, stand_in) for token, stand_in in by_length]
    ends = [stand_in for token, stand_in in by_length if token.content == end]
    return normalizers.Sequence(
        [
            normalizers.Replace(UNDERLINE, " "),
            normalizers.Replace(Regex(marks), other),
            *held,
            normalizers.Prepend(UNDERLINE),
            *lowered,
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            normalizers.Replace(Regex(f"{_SPACE}+"), " "),
            normalizers.Replace(Regex(f"(?<={marks}) | (?={marks}|\\z)"), ""),
            *mapped,
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(" ", UNDERLINE),
            normalizers.Replace(Regex(f"{UNDERLINE}+(?={marks}|\\z)"), ""),
            # Not where it is all of the text, which is how `tokenizers` looks for the token itself.
            *(normalizers.Replace(Regex(f"(?<=[\\s\\S]){stand_in}\\z"), "") for stand_in in ends),
        ]
    )


def _refusal(path: Path, expected: str, got: str) -> InputError:
    return InputError(
        "the SentencePiece model is not of the published kind", where=str(path), expected=expected, got=got, fix=_FIX
    )
