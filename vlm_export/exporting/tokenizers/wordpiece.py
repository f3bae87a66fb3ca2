"""BERT's WordPiece as `tokenizer.json`, torch-free, and the tokens that a checkpoint's own code appends to it.

Facts: `BasicTokenizer` and `WordpieceTokenizer` in google-research/bert tokenization.py (eedf571), uncased;
`init_tokenizer` in salesforce/BLIP models/blip.py (056a169) adds [DEC], then [ENC].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlm_export.errors import InputError
from vlm_export.specs import TextSpec

BERT_VOCAB_SIZE = 30_522
"""Of bert-base-uncased."""

DECODER_TOKEN = "[DEC]"
ENCODER_TOKEN = "[ENC]"
_ADDED = (DECODER_TOKEN, ENCODER_TOKEN)
_PAD, _UNKNOWN, _START, _END, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_REQUIRED = (_PAD, _UNKNOWN, _START, _END)
_CONTINUED = "##"
_LONGEST_WORD_CHARACTERS = 100
_FIX = "use the vocabulary that the checkpoint was trained with"


def is_wordpiece_vocab(raw: bytes) -> bool:
    """Whether the content is a BERT vocabulary: one token a line, with [CLS] and [SEP] among them."""
    return {_START.encode(), _END.encode()} <= {line.rstrip(b"\r") for line in raw.split(b"\n")}


def tokenizer_json_from_wordpiece_vocab(text: str, where: str) -> str:
    """`tokenizer.json` from an uncased `vocab.txt`, whose line numbers are the ids; texts become [CLS] … [SEP].

    Raises:
        InputError: a line is no token or repeats one, or a special token is missing.
    """
    vocab = _vocab_from_lines(text, where)
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab,
            unk_token=_UNKNOWN,
            max_input_chars_per_word=_LONGEST_WORD_CHARACTERS,
            continuing_subword_prefix=_CONTINUED,
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUED, cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START}:0 $A:0 {_END}:0",
        pair=f"{_START}:0 $A:0 {_END}:0 $B:1 {_END}:1",
        special_tokens=[(_START, vocab[_START]), (_END, vocab[_END])],
    )
    tokenizer.add_special_tokens([_special(token) for token in (*_REQUIRED, _MASK, *_ADDED) if token in vocab])
    result: str = tokenizer.to_str()
    return result


def has_room(tokenizer: Any, spec: TextSpec) -> bool:
    """Whether the model has rows for the tokens that its code appends, behind those of the tokenizer's vocabulary."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return max(vocab.values()) + 1 != spec.vocab_size or bool(set(spec.added_tokens) & set(vocab))


def wordpiece_fitted(tokenizer: Any, text: str, spec: TextSpec, where: str) -> str:
    """The content of a tokenizer.json with the tokens that the checkpoint's own code appends; without any, as it is.

    A vocabulary that holds them keeps them where they are, as special tokens.

    Args:
        tokenizer: what `text` holds; changed by this.

    Raises:
        InputError: they do not get the last ids of the model's vocabulary.
    """
    if not spec.added_tokens:
        return text
    before = _special_tokens(tokenizer)
    tokenizer.add_special_tokens([_special(token) for token in spec.added_tokens])
    _check_places(tokenizer, spec, where)
    if set(spec.added_tokens) <= before:
        return text
    fitted: str = tokenizer.to_str()
    return fitted


def _vocab_from_lines(text: str, where: str) -> dict[str, int]:
    # Only at line feeds: a token may be another of Unicode's line separators.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    vocab: dict[str, int] = {}
    for number, token in enumerate(lines, start=1):
        if not token or any(character.isspace() for character in token) or token in vocab:
            raise InputError(
                "vocab.txt is malformed",
                where=f"{where}: line {number}",
                expected="one token, without white space, that no other line holds",
                got=repr(token[:80]),
                fix=_FIX,
            )
        vocab[token] = number - 1
    missing = [token for token in _REQUIRED if token not in vocab]
    if missing:
        raise InputError(
            "vocab.txt is not BERT's",
            where=where,
            expected=f"lines {', '.join(_REQUIRED)}",
            got=f"no {', '.join(missing)} in {len(lines)} lines",
            fix=_FIX,
        )
    return vocab


def _check_places(tokenizer: Any, spec: TextSpec, where: str) -> None:
    added = spec.added_tokens
    wanted = {token: spec.vocab_size - len(added) + i for i, token in enumerate(added)}
    found: Mapping[str, int] = {token: tokenizer.token_to_id(token) for token in added}
    if found != wanted:
        size = spec.vocab_size - len(added)
        raise InputError(
            f"{' and '.join(added)} do not have the model's ids",
            where=where,
            expected=f"{', '.join(f'{token} {token_id}' for token, token_id in wanted.items())}, after {size} others",
            got=f"{', '.join(f'{token} {token_id}' for token, token_id in found.items())}",
            fix=_FIX,
        )


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
